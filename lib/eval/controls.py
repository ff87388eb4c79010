"""The controls of a finished model as a table: final/controls.json -> controls.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.core import files

SOURCE, TABLE = "controls.json", "controls.csv"


def write_controls(model: Path, folder: Path) -> str | None:
    """Write the table into `folder` and return its verdict; only a head where none were trained.

    An output of every evaluation, so that DVC knows it.
    """
    held = (model / SOURCE).is_file()
    found: dict[str, Any] = files.read_json(model / SOURCE) if held else {"rows": []}
    columns = list(found["rows"][0]) if found["rows"] else ["arm"]
    lines = [",".join(columns)]
    lines += [",".join(_cell(row[name]) for name in columns) for row in found["rows"]]
    files.write_bytes(folder / TABLE, ("\n".join(lines) + "\n").encode())
    return found.get("verdict")


def _cell(value: object) -> str:
    """Ten significant digits; empty for what was not measured."""
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
