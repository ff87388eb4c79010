"""Cells, tables and links of the page; texts are escaped by whoever makes a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

Cell = str  # HTML
MISSING = '<span class="missing">missing</span>'


def table(header: Sequence[str], rows: Iterable[Iterable[Cell]], kinds: Sequence[str] = ()) -> str:
    """A table that scrolls sideways inside its frame; kinds: a class for each row, or none."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for n, row in enumerate(rows):
        kind = f' class="{kinds[n]}"' if n < len(kinds) and kinds[n] else ""
        body += f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def anchor(name: str) -> str:
    """The id of an artefact on the page."""
    return "a-" + re.sub(r"[^A-Za-z0-9_]+", "-", name)


def linked(name: str, text: str | None = None) -> Cell:
    """A link to the artefact `name` on the same page."""
    return f'<a href="#{anchor(name)}">{escape(text or name)}</a>'
