"""Every stage and family struck at every change of the file system: A1 to A8, A10, B1, B3.

After a kill the same command ends with the bytes of an undisturbed run; a full or failing disk ends
with code 4, a signal with 75, and the same command then ends with those bytes too. With
KUMIKI_FAULTS_EVERY=1, as in `make faults`, kills come at every change (`toy.THIN`: where at every
eighth); else a sample is taken, at least one point of every way in every stage and family.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.tally import tally
from tests.faults.toy import CHAINS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
FULL = os.environ.get("KUMIKI_FAULTS_EVERY") == "1"
ROWS = {
    "download": "A1", "extract": "A2", "bpe": "A3", "spm": "A3", "encode": "A4", "embed": "A5",
    "train": "A8", "evaluate": "A6", "export": "A7",
}  # fmt: skip
SEEN = {
    "kill": "equal bytes after the same command",
    "twice": "the recovery killed too; equal bytes after the third run",
    "ENOSPC": "exit 4, or done without; then equal bytes",
    "EIO": "exit 4, or done without; then equal bytes",
    "SIGTERM": "75, or done; then equal bytes",
    "SIGINT": "75, or done; then equal bytes",
}


def run_toy(folder: Path, *words: str) -> dict[str, dict[str, list[int]]]:
    """What tests.faults.toy prints, in a process of its own."""
    command = [sys.executable, "-m", "tests.faults.toy", str(folder), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def ways_of(chain: str) -> dict[str, int]:
    """How a chain is struck, and at every how many-th change."""
    if not FULL:
        return {"kill": 37, "twice": 150, "ENOSPC": 60, "EIO": 60, "SIGTERM": 150, "SIGINT": 150}
    errors = 2 if chain == "data" else 6
    return {"kill": 1, "twice": 29, "ENOSPC": errors, "EIO": errors, "SIGTERM": 20, "SIGINT": 20}


@pytest.mark.parametrize("chain", CHAINS)
def test_a01_to_b03_struck_anywhere_the_same_command_ends_with_the_same_bytes(fast_folder, chain):
    ways = [f"{way}:{every}" for way, every in ways_of(chain).items()]
    for step, struck in run_toy(fast_folder, chain, *ways).items():
        for way, (points, every) in struck.items():
            assert points > 0 and (way != "kill" or points * every > 20), f"{step}: {struck}"
            row = {"ENOSPC": "B1", "EIO": "B3", "SIGTERM": "A10", "SIGINT": "A10"}.get(way)
            name = "SIGKILL" if way in ("kill", "twice") else way
            told = f"{name} in {step}" + (f", one in {every}" if every > 1 else "")
            tally(row or ROWS[step.split("_")[0]], told, points, SEEN[way])


@pytest.mark.parametrize("step", ["extract", "encode"])
def test_workers_change_no_byte(fast_folder, step):
    """data.md 1.2: same inputs + same parameters = same bytes."""
    ((files, _),) = run_toy(fast_folder, step, "--workers")[step].values()
    assert files > 5
