"""Text of a command's product: tables, amounts, one JSON document (cli.md 1.3).

Rule:  what is not known is `-` in a table and null in JSON; nothing depends on the terminal.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
TIMES = (("years", 31_557_600.0), ("days", 86400.0), ("hours", 3600.0), ("min", 60.0))
COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def size(total_bytes: float | None) -> str:
    """Bytes for people, decimal units: 39.3 GB."""
    return _scaled(total_bytes, SIZES, "B")


def count(number: float | None) -> str:
    """A count for people: 1.10 B, 524 k."""
    return _scaled(number, COUNTS, "")


def duration(seconds: float | None) -> str:
    """Seconds for people; days up to ten years, then years."""
    years = seconds is not None and seconds >= 10 * TIMES[0][1]
    return _scaled(seconds, TIMES if years else TIMES[1:], "s")


def _scaled(value: float | None, units: Sequence[tuple[str, float]], one: str) -> str:
    if value is None:
        return "-"
    for name, unit in units:
        if value >= unit:
            scaled = value / unit
            digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:,.{digits}f} {name}"
    return f"{value:.3g} {one}".strip()


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with fixed digits."""
    return "-" if value is None else f"{value:.{digits}f}"


def lines(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> list[str]:
    """A table; columns as wide as their widest cell, no rule, no trailing space."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    padded = (
        "  ".join(c + " " * (w - width(c)) for c, w in zip(r, widths, strict=True)) for r in cells
    )
    return [line.rstrip() for line in padded]


def _cell(value: Any) -> str:
    return "-" if value is None else " ".join(str(value).split())


def width(text: str) -> int:
    """Columns on a terminal: Chinese and Japanese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def put(text_lines: Iterable[str]) -> None:
    """Lines on stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in text_lines))
    sys.stdout.flush()


def put_json(document: Any) -> None:
    """One JSON document on stdout, keys as they are given."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def ask(question: str, yes: bool) -> bool:
    """A yes or no on the terminal; `yes` answers for it. UserError where nobody can be asked."""
    from lib.core.errors import UserError

    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody to ask", value=question, remedy="add --yes to agree")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
