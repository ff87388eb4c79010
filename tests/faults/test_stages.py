"""Every stage and family struck at every change of the file system: A1 to A8, B1, B3.

After a kill the same command ends with the bytes of an undisturbed run; a full or failing disk ends
with code 4, and the same command then does too. KUMIKI_FAULTS_EVERY=1 takes every point, as `make
faults` does (`toy.THIN` says where it takes a third); else every `SAMPLE`-th, at least one of every
stage and family.
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
SAMPLE = {"kill": 37, "fail": 60}  # every how many-th change is struck outside `make faults`
ROWS = {
    "download": "A1", "extract": "A2", "bpe": "A3", "spm": "A3", "encode": "A4",
    "evaluate": "A6", "export": "A7", "train": "A8",
}  # fmt: skip


def strike(folder: Path, chain: str, *options: str) -> dict[str, int]:
    """Points struck by step, in a process of its own."""
    command = [sys.executable, "-m", "tests.faults.toy", str(folder), chain, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def row_of(step: str) -> str:
    return ROWS.get(step) or ROWS.get(step.split("_")[0], "A5")


@pytest.mark.parametrize("chain", CHAINS)
def test_a01_to_a08_kill_anywhere_then_the_same_command_gives_the_same_bytes(fast_folder, chain):
    every = 1 if FULL else SAMPLE["kill"]
    for step, points in strike(fast_folder, chain, "--every", str(every)).items():
        assert points * every > 20, f"{step}: only {points} points"
        tally(row_of(step), f"SIGKILL in {step}", points, "equal bytes after the same command")


@pytest.mark.parametrize("chain", CHAINS if FULL else ["export_gpt"])
def test_a01_to_a08_killed_again_in_the_recovery_it_ends_with_the_same_bytes(fast_folder, chain):
    for step, points in strike(fast_folder, chain, "--every", "29", "--twice").items():
        tally(row_of(step), f"SIGKILL twice in {step}", points, "equal bytes after the third run")


@pytest.mark.parametrize("chain", CHAINS if FULL else ["extract", "train_gpt"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_b01_b03_a_failing_disk_is_exit_4_and_the_same_command_ends_well(fast_folder, chain, error):
    """`make faults`: every operation of the data stages, every fourth of training and after."""
    every = (1 if chain == "data" else 4) if FULL else SAMPLE["fail"]
    found = strike(fast_folder, chain, "--every", str(every), "--errno", error)
    row = "B1" if error == "ENOSPC" else "B3"
    for step, points in found.items():
        assert points > 0, step
        tally(row, f"{error} in {step}", points, "exit 4, or done without; then equal bytes")


@pytest.mark.parametrize("step", ["extract", "encode"])
def test_workers_change_no_byte(fast_folder, step):
    """data.md 1.2: same inputs + same parameters = same bytes."""
    assert strike(fast_folder, step, "--every", "0")[step] > 5
