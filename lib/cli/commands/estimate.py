"""`kumiki estimate`: download, disk, memory, time of every stage, before anything runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lib.cli import machines, tables
from lib.cli.commands.config import load_profile
from lib.cli.cost import Cost, problems, refuse, totals
from lib.cli.estimate import costs, fitting
from lib.cli.machines import Machine
from lib.core.errors import UserError
from lib.export import amounts

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LONGEST = 1e12  # seconds, 30,000 years; FLOPs of far more overflow
HEADER = ("stage", "download", "scratch", "RAM", "VRAM", "time", "binds")


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Estimate, print, and exit 4 where it does not fit."""
    settings, machine = load_profile(arguments.profile), machines.named(arguments.device)
    if arguments.run and arguments.run not in settings.train:
        names = ", ".join(n for n in settings.train if n != "defaults")
        raise UserError("unknown run", value=arguments.run, remedy=f"choose one of {names}")
    seconds = None if arguments.fit is None else parse_time(arguments.fit)
    found = costs(settings, machine, arguments.run)
    fits = {
        cost.stage: fitting(cost, seconds)
        for cost in found
        if seconds and "steps" in dict(cost.facts)
    }
    lacking = problems(found, machine)
    if arguments.json:
        tables.put_json(
            {
                "profile": settings.profile,
                "machine": vars(machine),
                "stages": [cost.plain() for cost in found],
                "totals": totals(found),
                "fit": fits or None,
                "problems": lacking,
            }
        )
    else:
        tables.put(shown(settings.profile, machine, found))
        for stage, fit in fits.items():
            steps, tokens = f"{fit['steps']:,} steps", amounts.count(fit["tokens"])
            best = amounts.count(fit["model_parameters"])
            tables.put([f"{stage} in {arguments.fit}: {steps}, {tokens} tokens; "
                        f"the best size for that time is about {best} parameters"])  # fmt: skip
    refuse(lacking)


def parse_time(text: str) -> float:
    """30m, 12h, 7d in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds < LONGEST:
        raise UserError("not a time above 0", value=text, remedy="write 30m, 12h or 7d")
    return seconds


def shown(profile: str, machine: Machine, found: list[Cost]) -> list[str]:
    """The table for people, then each model's numbers."""
    rows: list[tuple[Any, ...]] = [
        (
            c.stage, amounts.size(c.download_bytes), amounts.size(c.scratch_bytes),
            amounts.size(c.ram_bytes), amounts.size(c.vram_bytes), amounts.duration(c.seconds),
            c.binds,
        )
        for c in found
    ]  # fmt: skip
    sums = totals(found)
    rows.append(
        ("all known", amounts.size(sums["download_bytes"]), amounts.size(sums["scratch_bytes"]),
         amounts.size(sums["ram_bytes"]), amounts.size(sums["vram_bytes"] or None),
         amounts.duration(sums["seconds"]), "")
    )  # fmt: skip
    lines = [f"profile {profile} on {machine.name}; rates {machine.source}", ""]
    lines += [*tables.lines(rows, HEADER), ""]
    for cost in found:
        facts = dict(cost.facts)
        if "parameters" in facts:
            lines.append(
                f"{cost.stage}: {facts['parameters']:,} parameters ({facts['embedding']:,} "
                f"embedding, {facts['non_embedding']:,} other), {facts['steps']:,} steps, "
                f"{amounts.count(facts['tokens'])} tokens, {facts['flops']:.3g} FLOPs, "
                f"{amounts.size(facts['checkpoint_bytes'])} a checkpoint, "
                f"{facts['tokens_per_s']:,.0f} tokens/s"
            )
        elif "contexts_bytes" in facts:
            parts = [f"{amounts.size(facts[f'{n}_bytes'])} {n}" for n in ("embeddings", "contexts")]
            lines.append(f"{cost.stage}: {' + '.join(parts)}")
    return lines
