"""Text of a command's product: tables, amounts, one JSON document (cli.md 1.3).

Rule:  what is not known is `-` in a table and null in JSON; nothing depends on the terminal.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


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
