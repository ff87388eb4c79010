"""`kumiki doctor`: machine, packages, kernels, disk against what a profile needs (cli.md 3.1)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from lib.cli import checkup, machines, tables
from lib.cli.checkup import Row
from lib.cli.commands.config import load_profile
from lib.core import files
from lib.core.errors import EnvError, UserError
from lib.core.heads import family_names
from lib.core.progress import progress

SIGNS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skip": "skip"}


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Make the rows, print them with the failed ones last, exit 4 where one failed."""
    settings = load_profile(arguments.profile)
    family = arguments.family
    if family is not None and family not in family_names():
        names = ", ".join(family_names())
        raise UserError("unknown family", value=family, remedy=f"choose one of {names}")
    rows: list[Row] = []
    if not arguments.kernels:
        rows += checkup.all_rows(settings, family)
    rows += checkup.kernel_rows(settings)
    if arguments.online:
        rows.append(checkup.online_row())
    if arguments.full:
        rates = checkup.measure_rates()
        files.write_json(machines.cache_file(), rates)
        rows += rate_rows(rates)
        names = [family] if family else [n for n in family_names() if n in settings.train]
        with progress(len(names), "families", "deep checks") as advance:
            for name in names:
                rows += checkup.family_rows(settings, name)
                advance(1)
    rows.sort(key=lambda row: row.state == "fail")
    failed = [row for row in rows if row.state == "fail"]
    what = family or settings.profile
    if arguments.json:
        good = not failed
        tables.put_json({"for": what, "ok": good, "rows": [row.plain() for row in rows]})
    else:
        tables.put(shown(rows))
        if not failed:
            tables.put(["", f"{what}: everything needed is here"])
    if failed:
        first = failed[0]
        needed = f" (needed: {first.needed})" if first.needed else ""
        raise EnvError(
            f"{what} needs what is not here",
            value=f"{first.name}: {first.found}{needed}",
            remedy=first.remedy or "see the rows above",
        )


def rate_rows(rates: dict[str, float]) -> Iterable[Row]:
    """What was measured, for people."""
    units = {
        "flops": ("FLOP/s", 1.0),
        "bytes_per_s": ("MB/s", 1e6),
        "parameters_per_s": ("M/s", 1e6),
    }
    for name, value in rates.items():
        unit = next(u for u in units if name.endswith(u))
        word, scale = units[unit]
        told = f"{value / scale:.3g} {word}"
        yield Row(name.removesuffix(f"_{unit}").replace("_", " "), "ok", told)


def shown(rows: list[Row]) -> list[str]:
    """The table; a remedy only where there is something to mend."""
    cells = [
        (row.name, SIGNS[row.state], row.found, row.needed,
         row.remedy if row.state in ("warn", "fail") else "")
        for row in rows
    ]  # fmt: skip
    return tables.lines(cells, ("what", "", "found", "needed", "remedy"))
