"""`kumiki status`: what is done, stale, running or interrupted; from files alone (cli.md 3.8)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from lib.cli import machines, pipeline, tables
from lib.core import artifact, files, params
from lib.core.errors import InputError, UserError
from lib.export import amounts

LONGEST_PAUSE = 86400.0  # seconds; what is far above it overflows the system's clock


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Print the table, once or again and again."""
    pause = arguments.watch
    if pause is not None and not 0 < pause <= LONGEST_PAUSE:  # nan compares with nothing
        raise UserError(
            "not a time to wait", value=f"--watch {pause:g}",
            remedy="give seconds, a number above 0 and up to a day",
        )  # fmt: skip
    while True:
        found = collect(arguments.verify)
        if arguments.json:
            tables.put_json(found)
        else:
            if pause is not None and sys.stdout.isatty():
                sys.stdout.write("\x1b[2J\x1b[H")
            tables.put(shown(found))
        if pause is None:
            break
        time.sleep(pause)
    if arguments.verify and found["scratch"]["problems"]:
        raise InputError(
            "scratch differs from its manifests",
            value=found["scratch"]["problems"][0],
            remedy="run the same `dvc repro` again: it makes what is missing",
        )


def collect(verify: bool = False) -> dict[str, Any]:
    """The JSON document: stages, changed weights to begin from, memory, scratch."""
    raw = params.read_yaml(Path(params.PARAMS))
    scratch = artifact.scratch_root()
    return {
        "profile": raw.get("profile"),
        "stages": [state.plain() for state in pipeline.states(raw)],
        "init_from_changed": changed_starts(),
        "memory": machines.memory(),
        "scratch": {
            "folder": str(scratch),
            "bytes": pipeline.in_use(scratch),
            "free_bytes": files.free_bytes(scratch),
            "problems": pipeline.scratch_problems(verify),
        },
    }


def changed_starts() -> list[str]:
    """Runs whose `init_from` weights are no longer those that they began with: DVC cannot see."""
    found = []
    for name, settings in params.load().train.items():
        path = Path("checkpoints") / name / "final/provenance.json"
        if not settings.init_from or not path.is_file():
            continue
        source = Path(settings.init_from) / files.MANIFEST
        began = files.read_json(path).get("parents", {}).get("init_from")
        if not source.is_file() or files.sha256_file(source) != began:
            found.append(name)
    return found


def shown(found: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows = []
    for state in found["stages"]:
        told = state["reason"]
        if state["state"] == "running":
            told = _running(state)
        rows.append((state["stage"], state["state"], told))
    lines = [f"profile {found['profile']}", "", *tables.lines(rows, ("stage", "state", ""))]
    ram, scratch = found["memory"], found["scratch"]
    total = ram["ram_bytes"]
    used = total - (ram["ram_available_bytes"] or 0) if total is not None else None
    lines += ["", f"RAM {amounts.size(used)} of {amounts.size(total)} used"]
    if ram["vram_bytes"] is not None:
        used_vram = amounts.size(ram["vram_used_bytes"])
        lines.append(f"VRAM {used_vram} of {amounts.size(ram['vram_bytes'])} used")
    size, free = amounts.size(scratch["bytes"]), amounts.size(scratch["free_bytes"])
    place = os.environ.get("KUMIKI_SCRATCH", "./scratch")
    lines.append(f"scratch {size} in {place}, {free} free")
    lines += [f"missing in scratch: {problem}" for problem in scratch["problems"]]
    for name in found["init_from_changed"]:
        lines.append(f"{name}: the weights it began with have changed; dvc repro -f train@{name}")
    return lines


def _running(state: dict[str, Any]) -> str:
    parts = [f"pid {state['pid']}"]
    if state["step"] is not None:
        parts.append(
            f"step {state['step']:,}" + (f" of {state['steps']:,}" if state["steps"] else "")
        )
    if state["tokens_per_s"]:
        parts.append(f"{state['tokens_per_s']:,.0f} tokens/s")
    if state["eta_s"] is not None:
        parts.append(f"{amounts.duration(state['eta_s'])} left")
    if state["loss"] is not None:
        parts.append(f"loss {state['loss']:.4f}")
    return ", ".join(parts)
