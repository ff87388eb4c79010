"""Twin runs: a training process killed at random wall-clock moments against an undisturbed one.

Compared item by item: weights, curves, the log but for its clock. Moments are exponential with a
mean of a third of the run; the run crosses an epoch border (reliability.md 6.6).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_S
from tests.faults.crash import tree
from tests.faults.tally import tally
from tests.faults.toy import log_without_clock, skip
from tests.train.project import command, make_project

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
SEEDS = range(3) if os.environ.get("KUMIKI_FAULTS_EVERY") == "1" else range(1)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("twins") / "start")


@pytest.fixture(scope="module")
def undisturbed(start) -> tuple[Path, float]:
    project = start.parent / "whole"
    shutil.copytree(start, project)
    began = time.monotonic()
    assert finished(project) == 0
    return project, time.monotonic() - began


def finished(project: Path, kill_after_s: float | None = None) -> int:
    """Train; the exit code, or the negative signal."""
    process = command(project, "--run", "gpt", "--set", "train.gpt.steps=60")
    try:
        process.communicate(timeout=kill_after_s or HANG_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode


@pytest.mark.parametrize("seed", SEEDS)
def test_a08_twins_killed_at_random_moments_end_equal(start, undisturbed, seed):
    whole, seconds = undisturbed
    project = start.parent / f"twin_{seed}"
    shutil.copytree(start, project)
    draw, kills, part = random.Random(seed), 0, 1.0
    while kills < 6:  # at least startup plus a little, or it would never get anywhere
        moment = part * (0.5 * seconds + draw.expovariate(3 / seconds))
        code = finished(project, moment)
        assert code in (0, -signal.SIGKILL), code
        if code:
            kills += 1
        elif kills:
            break
        else:  # done before its moment came, which shows nothing: again, with less time
            part /= 2
            shutil.rmtree(project)
            shutil.copytree(start, project)
    assert finished(project) == 0
    kept = lambda p: {n: h for n, h in tree(p, skip).items() if n.startswith(("check", "metr"))}  # noqa: E731
    assert kept(project) == kept(whole)
    assert log_without_clock(project) == log_without_clock(whole)
    tally("A8", f"SIGKILL at random moments, seed {seed}", kills, "weights, curves, log equal")
    shutil.rmtree(project)


def test_e11_the_log_after_kills_has_every_step_once(start, undisturbed):
    whole, _ = undisturbed
    steps = [line for line in log_without_clock(whole).splitlines() if '"loss"' in line]
    assert len(steps) == len(set(steps)) > 0
