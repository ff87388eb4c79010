"""A recipe as a table: what is asked of each source, and what came of it where it has been made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.core import artifact, files, params
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.settings import Settings
from lib.export import amounts

HEADER = ("source", "kind", "weight", "share", "split", "field", "cap", "documents",
          "bytes", "disk", "realised", "licence")  # fmt: skip


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
             r["field"], r["cap"], r["documents"], amounts.size(r["bytes"]),
             amounts.size(r["disk_bytes"]),
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
    from lib.cli.commands.push import licence

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
