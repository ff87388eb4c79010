"""`kumiki report`: the leaderboard as text, and report.html with what was measured here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.cli.console import note
from lib.core import files, params
from lib.core.errors import UserError, relative
from lib.export import amounts
from lib.export.report.gather import DECIDED, Found, FoundRun, against, gather
from lib.export.report.page import render

HEADER = ("run", "bpb", "cloze", "CORE", "parameters", "tokens", "FLOPs", "tokens/s", "")


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Print the leaderboard, write the page, say what is older than its model."""
    found = gather(Path(), params.load(), measured=True)
    out = arguments.out or Path("report.html")
    if out.exists() and not out.is_file():  # a device would be replaced by the page
        raise UserError("not a file", value=out, remedy="name the file that the page shall be")
    files.write_bytes(out, render(found).encode())
    stale = [one.name for one in found.runs if is_older(one)]
    if arguments.json:
        rows = [_document(one) for one in found.runs]
        shown = {"profile": found.profile, "page": relative(out), "stale": stale, "runs": rows}
        tables.put_json(shown)
    else:
        tables.put(leaderboard(found))
        if any(one.twin for one in found.runs):
            rule = f"a twin within {DECIDED:.3f} of its family is not decided"
            tables.put(["", f"one seed a run: {rule}"])
        tables.put(["", f"page: {relative(out)}"])
    for name in stale:
        note(f"warning: the numbers of {name} are older than its model; dvc repro evaluate@{name}")


def leaderboard(found: Found) -> list[str]:
    """A table per validation text, best first; what is missing is said."""
    lines: list[str] = []
    for text, runs in found.groups():
        lines += [""] if lines else []
        if text is None:
            names = " ".join(f"evaluate@{one.name}" for one in runs)
            lines.append(f"missing: {', '.join(one.name for one in runs)}; dvc repro {names}")
            continue
        total = (runs[0].metrics or {}).get("val_bytes")
        recipe = found.recipes.get(runs[0].tokens, "")
        lines.append(f"validation text {recipe}, {total:,} bytes, {text[:12]}")
        lines += tables.lines([_row(one, runs) for one in runs], HEADER)
        beside = (runs[0].record.get("baselines") or {}).get("bpb") or {}
        told = ", ".join(f"{name} {bpb:.4f}" for name, bpb in beside.items() if bpb is not None)
        lines += [f"beside it: {told}"] if told else []
    return lines


def _row(one: FoundRun, runs: Sequence[FoundRun]) -> tuple[Any, ...]:
    m = one.metrics or {}
    core = m.get("core") if m.get("core") is not None else m.get("core_partial")
    partial = "partial" if m.get("core") is None and core is not None else ""
    flops, rate = m.get("train_flops"), one.speed.get("tokens_per_s")
    return (
        one.name,
        amounts.number(m.get("bpb")),
        amounts.number(m.get("cloze"), 3),
        f"{amounts.number(core)} {partial}".strip(),
        f"{m['params']:,}" if m.get("params") is not None else None,
        amounts.count(m.get("train_tokens")),
        f"{flops:.3g}" if flops is not None else None,
        f"{rate:,.0f}" if rate else None,
        f"twin of {one.family}{_told(against(one, runs))}" if one.twin else "",
    )


def _told(difference: tuple[float, bool] | None) -> str:
    if difference is None:
        return ""
    return f", {difference[0]:+.4f}" + ("" if difference[1] else " not decided")


def _document(one: FoundRun) -> dict[str, Any]:
    return {
        "run": one.name,
        "family": one.family,
        "twin": one.twin,
        "val_sha256": one.val_sha256,
        "metrics": one.metrics,
        "tokens_per_s": one.speed.get("tokens_per_s"),
        "peak_memory_bytes": one.speed.get("peak_memory_bytes"),
    }


def is_older(one: FoundRun) -> bool:
    """Whether the record speaks of another model than the one that lies there now."""
    manifest = Path("checkpoints") / one.name / "final" / files.MANIFEST
    if not one.record.get("model") or not manifest.is_file():
        return False
    return one.record["model"] != files.sha256_file(manifest)
