"""A folder for what a benchmark writes while it runs; outside of the project, gone at its end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def work_folder() -> tempfile.TemporaryDirectory[str]:
    """Below $KUMIKI_SCRATCH, else where the system keeps such files."""
    base = os.environ.get("KUMIKI_SCRATCH")
    if base:
        Path(base).mkdir(parents=True, exist_ok=True)
    place = Path(base).absolute() if base else None
    return tempfile.TemporaryDirectory(prefix="kumiki_bench_", dir=place)
