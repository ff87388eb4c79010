"""What the fault tests counted: a JSON line per count, merged into docs/reliability.md.

Written only where KUMIKI_FAULTS_REPORT names a file, as `make faults` does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def tally(row: str, injected: str, count: int, seen: str) -> None:
    """Note that `count` faults of catalogue row `row` ("A8") were injected, and what was seen."""
    if name := os.environ.get("KUMIKI_FAULTS_REPORT"):
        line = {"row": row, "injected": injected, "count": count, "seen": seen}
        with Path(name).open("a") as out:  # one short line is one write
            out.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict]:
    """All lines of a report."""
    return [json.loads(line) for line in path.read_text().splitlines()]
