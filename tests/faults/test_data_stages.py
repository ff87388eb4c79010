"""Kill every data stage at every change of the file system: rows A1 to A4 of the fault catalogue.

The same command must then end with the bytes of an undisturbed run. KUMIKI_FAULTS_EVERY=1 takes
every point, as `make faults` does; `make test` takes every seventh.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
EVERY = int(os.environ.get("KUMIKI_FAULTS_EVERY", "7"))


def enumerate_in_fresh_process(folder: Path, every: int, *stage: str) -> int:
    command = [sys.executable, "-m", "tests.faults.toy", str(folder), str(every), *stage]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return int(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "stage",
    [
        ("download_shards",),
        ("extract_texts",),
        ("train_tokenizer", "--name", "bpe"),
        ("train_tokenizer", "--name", "spm"),
        ("encode_tokens", "--name", "bpe"),
    ],
    ids=["a01_download", "a02_extract", "a03_bpe", "a03_spm", "a04_encode"],
)
def test_kill_anywhere_then_the_same_command_gives_the_same_bytes(tmp_path, stage):
    points = enumerate_in_fresh_process(tmp_path, EVERY, *stage)
    assert points * EVERY > 20, f"only {points} points"


@pytest.mark.parametrize("stage", ["extract_texts", "encode_tokens"])
def test_workers_change_no_byte(tmp_path, stage):
    """data.md 1.2: same inputs + same parameters = same bytes."""
    assert enumerate_in_fresh_process(tmp_path, 0, stage) > 5
