"""`kumiki recipe`: show a mixture of sources, or make one, asked or not (cli.md 3.4).

Out:   a table of what is mixed and what came of it; or a block for params.yaml, printed or written.
Rule:  the same answers give the same bytes, from a terminal, a file or options. No source is ever
       put in another's place: an unknown name is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.cli.commands.config import load_profile
from lib.cli.console import note
from lib.cli.recipe_block import block_lines, local_sources, write_block
from lib.cli.recipe_table import show
from lib.core import artifact, params
from lib.core.errors import UserError
from lib.core.settings import Settings

GROUPS = {  # share of Japanese, code, everything else (phase7.md 8.2)
    "balanced": {"japanese": 0.33, "code": 0.33, "general": 0.34},
    "japanese": {"japanese": 0.70, "code": 0.15, "general": 0.15},
    "code": {"japanese": 0.15, "code": 0.70, "general": 0.15},
}


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
        if arguments.write:
            raise UserError("nothing written: no mixture given", value="--write",
                            remedy="add --init, --ask, --from FILE or --set")  # fmt: skip
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
