"""`kumiki recipe`: show a mixture of sources, or make one, asked or not (cli.md 3.4).

Out:   a table of what is mixed and what came of it; or a block for params.yaml, printed or written.
Rule:  the same answers give the same bytes, from a terminal, a file or options. No source is ever
       put in another's place: an unknown name is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.core import artifact, files, params
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.settings import Settings
from lib.export import tables
from lib.export.commands.config import load_profile
from lib.export.console import note
from lib.export.recipe_block import block_lines, local_sources, write_block

GROUPS = {  # share of Japanese, code, everything else (phase7.md 8.2)
    "balanced": {"japanese": 0.33, "code": 0.33, "general": 0.34},
    "japanese": {"japanese": 0.70, "code": 0.15, "general": 0.15},
    "code": {"japanese": 0.15, "code": 0.70, "general": 0.15},
}
HEADER = ("source", "kind", "weight", "share", "split", "field", "cap", "documents",
          "bytes", "disk", "realised", "licence")  # fmt: skip


@dataclass
class Mixture:
    """What the questions come to."""

    name: str
    weights: dict[str, float]
    tokens: int | None = None  # size asked for
    local: dict[str, dict[str, Any]] = field(default_factory=dict)  # new sources of data/local


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Show, or make a block and print or write it."""
    settings = load_profile(arguments.profile)
    answers = _answers(arguments)
    if not (answers or arguments.init or arguments.set):
        show(settings, arguments.name, arguments.json)
        return
    found = local_sources(settings)
    known = dict(settings.download_shards.sources) | found
    if answers is not None:
        mixture = asked(answers, known, arguments.name or "mine")
    else:
        name = arguments.name or next(iter(settings.extract_texts.recipes), "mine")
        mixture = Mixture(name, start_of(settings, name, known, arguments.init))
    for text in arguments.set:
        source, _, weight = text.partition("=")
        mixture.weights[_known(source, known)] = _number(weight, text)
    weights = {name: w for name, w in mixture.weights.items() if w > 0}
    if not weights:
        raise UserError(
            "empty mixture", value=mixture.name, remedy="give a source a weight above 0"
        )
    mixture.weights = weights
    mixture.local = {name: source for name, source in found.items() if name in weights}
    lines = block_lines(mixture.name, mixture.weights, mixture.local, mixture.tokens)
    if arguments.write:
        for line in write_block(Path(params.PARAMS), arguments.profile, mixture):
            note(line)
    if arguments.json:
        tables.put_json({"name": mixture.name, "sources": weights, "tokens": mixture.tokens})
    elif not arguments.write:
        tables.put(lines)


# ---------------------------------------------------------------- answers


Answer = Callable[[str, str], str]


def _answers(arguments: argparse.Namespace) -> Answer | None:
    """Where answers come from: the terminal, a file with one a line, or nowhere."""
    if arguments.source is not None:
        try:
            lines = iter(arguments.source.read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise UserError("cannot read", file=arguments.source, value=error.strerror,
                            remedy="name a file of answers") from None  # fmt: skip
        return lambda question, default: next(lines, "").strip() or default
    if not arguments.ask:
        return None
    if not sys.stdin.isatty():
        raise UserError("nobody to ask", value="--ask", remedy="use --from FILE, --init or --set")

    def ask(question: str, default: str) -> str:
        sys.stderr.write(f"{question} [{default}] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip() or default

    return ask


def asked(answer: Answer, known: Mapping[str, Any], name: str) -> Mixture:
    """Name, language, sources, a weight each, size."""
    name = answer("name of the recipe?", name)
    language = answer(f"language or emphasis: {', '.join(GROUPS)}, own?", "balanced")
    if language not in (*GROUPS, "own"):
        raise UserError("unknown emphasis", value=language, remedy=f"{', '.join(GROUPS)} or own")
    text = answer(f"sources, by commas: {', '.join(known)}?", ",".join(known))
    sources = [_known(part.strip(), known) for part in text.split(",") if part.strip()]
    start = (
        by_groups(sources, known, language) if language in GROUPS else dict.fromkeys(sources, 1.0)
    )
    weights = {}
    for source in sources:
        said = answer(f"weight of {source}?", f"{start[source]:g}")
        weights[source] = _number(said, said)
    size = answer("size in tokens, 0 for all?", "0")
    return Mixture(name, weights, int(_number(size, size)) or None)


def start_of(
    settings: Settings, name: str, known: Mapping[str, Any], emphasis: str | None
) -> dict[str, float]:
    """The weights to begin with: those of the recipe, or shared out by groups."""
    recipe = settings.extract_texts.recipes.get(name)
    if emphasis is None:
        return dict(recipe.sources) if recipe else {}
    text = {n: s for n, s in known.items() if _kind(s) not in ("files", "archive")}
    names = list(recipe.sources) if recipe else list(text)
    return by_groups(names, known, emphasis)


def by_groups(names: list[str], known: Mapping[str, Any], emphasis: str) -> dict[str, float]:
    """A group's share, in equal parts; the share of a group without sources goes to the others."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(group_of(name, known[name]), []).append(name)
    shares = GROUPS[emphasis]
    total = sum(shares[group] for group in members)
    return {
        name: round(shares[group] / total / len(found), 4)
        for group, found in members.items()
        for name in found
    }


def group_of(name: str, source: Any) -> str:
    """japanese, code or general, by the words of a source's name and repository."""
    plain = artifact.plain(source)
    words = f"{name} {plain.get('repo') or ''}".lower().replace("/", " ").replace("-", " ")
    parts = words.replace("_", " ").split()
    if "ja" in parts or "japanese" in parts:
        return "japanese"
    return "code" if "code" in parts else "general"


def _known(name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        names = ", ".join(known) or "none is declared"
        raise UserError("unknown source", value=name, remedy=f"choose one of {names}")
    return name


def _number(text: str, shown: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError("not a weight", value=shown, remedy="give a number, 0 leaves it out")
    return value


def _kind(source: Any) -> str:
    return source["kind"] if isinstance(source, Mapping) else source.kind


# ---------------------------------------------------------------- show


def show(settings: Settings, name: str | None, as_json: bool) -> None:
    """Every recipe, or one: what is asked, and what came of it where it has been made."""
    recipes = settings.extract_texts.recipes
    if name is not None and name not in recipes:
        raise UserError("unknown recipe", value=name, remedy=f"choose one of {', '.join(recipes)}")
    documents = {n: list(_rows(settings, n)) for n in ([name] if name else recipes)}
    if as_json:
        tables.put_json({"profile": settings.profile, "recipes": documents})
        return
    for recipe, rows in documents.items():
        cells = [
            (r["source"], r["kind"], f"{r['weight']:g}", f"{100 * r['share']:.1f} %", r["split"],
             r["field"], r["cap"], r["documents"], tables.size(r["bytes"]),
             tables.size(r["disk_bytes"]),
             None if r["realised"] is None else f"{100 * r['realised']:.1f} %",
             (r["licence"] or "")[:40] or None)
            for r in rows
        ]  # fmt: skip
        tables.put([f"recipe {recipe}", *tables.lines(cells, HEADER), ""])


def _rows(settings: Settings, name: str) -> Iterator[dict[str, Any]]:
    recipe = settings.extract_texts.recipes[name]
    active = params.load().profile == settings.profile
    total = sum(recipe.sources.values())
    made = _made(name) if active else {}
    disk, licences = _shards() if active else ({}, {})
    realised = _realised(settings, name) if active else {}
    for source, weight in recipe.sources.items():
        plain = artifact.plain(settings.download_shards.sources[source])
        counts = made.get(source, {})
        yield {
            "source": source,
            "kind": plain["kind"],
            "weight": weight,
            "share": weight / total,
            "split": plain.get("train_split") or "train",
            "field": plain.get("text_field") or plain.get("messages_field")
            or plain.get("text_column") or "text",
            "cap": plain.get("max_train_samples") or plain.get("shards"),
            "licence": licences.get(source),
            "documents": counts.get("documents"),
            "bytes": counts.get("bytes"),
            "disk_bytes": disk.get(source),
            "realised": realised.get(source),
        }  # fmt: skip


def _made(name: str) -> dict[str, Any]:
    path = Path("data/documents") / name / files.MANIFEST
    return Manifest.read(path).counts["splits"].get("train", {}) if path.is_file() else {}


def _shards() -> tuple[dict[str, int], dict[str, str]]:
    """(bytes of shards, licence) of every source, from the shard manifest."""
    from lib.export.commands.push import licence

    path = Path("data/shards.manifest.json")
    if not path.is_file():
        return {}, {}
    manifest = Manifest.read(path)
    sizes: dict[str, int] = {}
    for entry in manifest.files:
        source = entry.path.partition("/")[0]
        sizes[source] = sizes.get(source, 0) + entry.bytes
    return sizes, {n: licence(s) for n, s in manifest.recipe["sources"].items()}


def _realised(settings: Settings, name: str) -> dict[str, float]:
    """Shares of training tokens, from an encoding of the recipe."""
    for encoding, section in settings.encode_tokens.items():
        path = Path(f"data/tokens/{encoding}.manifest.json")
        if section.documents == name and path.is_file():
            counts = Manifest.read(path).counts.get("sources", {})
            return {source: one["realised_share"] for source, one in counts.items()}
    return {}
