"""Every kind of file that some stage reads, damaged: refused, or mended (E3, D4, D5, B6).

`make faults` plants about 70 damages a kind, more than 1,000 in all; the sample 10 damages by lot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.damage import KINDS
from tests.faults.tally import tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
FULL = os.environ.get("KUMIKI_FAULTS_EVERY") == "1"
ROWS = {
    "shard": "D4", "shard manifest": "B6", "document part": "D5", "checkpoint": "E3",
    "training state": "E3",
}  # fmt: skip


@pytest.mark.parametrize("reader", sorted({kind.reader for kind in KINDS.values()}))
def test_b06_damage_is_refused_or_mended_and_never_read(fast_folder, reader):
    how = "--flips=40" if FULL else "--most=10"
    command = [sys.executable, "-m", "tests.faults.damage", str(fast_folder), reader, how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    for kind, seen in json.loads(run.stdout.splitlines()[-1]).items():
        assert sum(seen.values()) >= 8, kind
        told = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
        tally(ROWS.get(kind, "B6"), f"damaged {kind}", sum(seen.values()), told)
