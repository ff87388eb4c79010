"""A recipe as a block of params.yaml: its lines, and putting them there without touching others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lib.core import artifact, files, params
from lib.core.errors import UserError
from lib.core.settings import Settings

LOCAL = Path("data/local")


class Asked(Protocol):
    """A recipe to be written."""

    name: str
    weights: dict[str, float]
    tokens: int | None
    local: dict[str, dict[str, Any]]


def local_sources(settings: Settings) -> dict[str, dict[str, Any]]:
    """Sources that the files of data/local could be, by stem; declared ones are left out.

    Plain text gives every twentieth document to validation; other kinds need a file of their own
    with `val` in its name, since validation is never guessed.
    """
    named = {
        n for s in settings.download_shards.sources.values() for n in _names(artifact.plain(s))
    }
    free = [p for p in sorted(LOCAL.glob("*")) if p.is_file() and p.name not in named]
    val = [p.name for p in free if "val" in p.name]
    found: dict[str, dict[str, Any]] = {}
    for path in free:
        stem = re.sub(r"[^A-Za-z0-9_]", "_", path.name.split(".")[0])
        if path.name in val:
            continue
        if path.suffix == ".txt":
            found[stem] = {"kind": "txt", "paths": [str(path)], "val_fraction": 0.05}
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            own = [n for n in val if ".jsonl" in n]
            if own:
                found[stem] = {"kind": "jsonl_gz", "train": [path.name], "val": own}
        elif path.suffix == ".parquet":
            own = [n for n in val if n.endswith(".parquet")]
            if own:
                found[stem] = {"kind": "parquet", "train": [path.name], "val": own}
    return found


def _names(plain: Mapping[str, Any]) -> list[str]:
    every = [*(plain.get("train") or []), *(plain.get("val") or []), *(plain.get("paths") or [])]
    return [Path(name).name for name in every]


def block_lines(
    name: str,
    weights: Mapping[str, float],
    local: Mapping[str, Mapping[str, Any]] | None = None,
    tokens: int | None = None,
) -> list[str]:
    """The block, ready to be pasted."""
    lines = []
    if local:
        lines += ["download_shards:", "  sources:", *_source_lines(local, 4)]
    lines += ["extract_texts:", "  recipes:", *_recipe_lines(name, weights, 4)]
    if tokens:
        lines.append(f"# of its encoding: encode_tokens.<name>.max_tokens: {tokens}")
    return lines


def _recipe_lines(name: str, weights: Mapping[str, float], indent: int) -> list[str]:
    pad = " " * indent
    shares = [f"{pad}    {source}: {weight:g}" for source, weight in weights.items()]
    return [f"{pad}{name}:", f"{pad}  sources:", *shares]


def _source_lines(sources: Mapping[str, Mapping[str, Any]], indent: int) -> list[str]:
    pad, lines = " " * indent, []
    for name, source in sources.items():
        lines.append(f"{pad}{name}:")
        for key, value in source.items():
            if isinstance(value, list):
                lines += [f"{pad}  {key}:", *(f"{pad}    - {one}" for one in value)]
            else:
                lines.append(f"{pad}  {key}: {value}")
    return lines


# ---------------------------------------------------------------- writing


def write_block(path: Path, profile: str | None, asked: Asked) -> list[str]:
    """Put the recipe into params.yaml; every other line stays. Returns old -> new, for people.

    profile: write into its overlay instead of the base values. UserError where the file would not
    load any more, with nothing written.
    """
    before = path.read_text(encoding="utf-8")
    base = ["profiles", profile] if profile and profile != "small" else []
    old = _at(params.read_yaml(path), [*base, "extract_texts", "recipes", asked.name, "sources"])
    lines = before.splitlines()
    for source, settings in asked.local.items():
        block = _source_lines({source: settings}, 4 + 2 * len(base))
        lines = _put(lines, [*base, "download_shards", "sources"], source, block)
    block = _recipe_lines(asked.name, asked.weights, 4 + 2 * len(base))
    lines = _put(
        lines, [*base, "extract_texts", "recipes"], asked.name, block, keep=old is not None
    )
    files.write_bytes(path, ("\n".join(lines) + "\n").encode())
    try:
        params.load()
    except UserError:
        files.write_bytes(path, before.encode())
        raise
    return [f"{path}: recipe {asked.name}: {old} -> {asked.weights}"]


def _at(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return None if tree is None else dict(tree)


def _put(
    lines: list[str], keys: list[str], name: str, block: list[str], keep: bool = False
) -> list[str]:
    """`block` under `keys`; where `name` is there already, its weights alone are replaced."""
    start, end = 0, len(lines)
    for depth, key in enumerate([*keys, name] if keep else keys):
        start, end = _section(lines, key, 2 * depth, start, end)
    if keep:
        start, end = _section(lines, "sources", 2 * len(keys) + 2, start, end)
        return [*lines[: start + 1], *block[2:], *lines[end:]]
    return [*lines[:end], *block, *lines[end:]]


def _section(lines: list[str], key: str, indent: int, start: int, end: int) -> tuple[int, int]:
    """(its line, one past its last) of `key` at `indent` between two lines."""
    pattern = re.compile(rf"^ {{{indent}}}{re.escape(key)}:")
    found = next((n for n in range(start, end) if pattern.match(lines[n])), None)
    if found is None or lines[found].split("#")[0].rstrip().endswith("}"):
        raise UserError(
            "no place for it", file=params.PARAMS, value=key, remedy="paste the printed block"
        )
    last = found + 1
    for n in range(found + 1, end):
        text = lines[n]
        if text.strip() and not text.lstrip().startswith("#"):
            if len(text) - len(text.lstrip()) <= indent:
                break
            last = n + 1
    return found, last
