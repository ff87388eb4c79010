"""Every family's training stage on two processes (gloo), through the launcher: one rank's curve."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from tests.faults import toy
from tests.project import run_module

pytestmark = pytest.mark.slow
RUNS = [name for name in toy.STEPS if name.startswith("train_")]
TWO = {"KUMIKI_LAUNCHER": "torchrun", "KUMIKI_NPROC": "2"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The data, and what the runs need of each other."""
    return toy.prepare(tmp_path_factory.mktemp("ranks"), *RUNS)


def trained(start: Path, project: Path, step: str, **environment: str) -> dict[str, list[float]]:
    """Losses and validations of the run, made anew."""
    shutil.copytree(start, project, symlinks=True)
    words = toy.STEPS[step].words
    for place in (project / "checkpoints" / words[2], project / "metrics" / words[2]):
        shutil.rmtree(place, ignore_errors=True)
    module, *rest = words
    done = run_module(
        project, "lib.core.launch", f"stages.{module}", *rest, environment=environment
    )
    told = done.stderr.decode()
    assert done.returncode == 0, told[-9000:]
    assert f"cpu x {environment.get('KUMIKI_NPROC', '1')}" in told, (
        "as many ranks as were asked for"
    )
    found = {}
    for name, column in (("loss", "loss"), ("curve", "bpb")):
        text = (project / f"metrics/{words[2]}/{name}.csv").read_text().splitlines()
        found[name] = [float(row[column]) for row in csv.DictReader(text)]
    return found


@pytest.mark.parametrize("step", RUNS)
def test_two_ranks_train_like_one(start, tmp_path, step):
    """Seen equal to all ten digits: both add the same micro-batches. Bound: fp32 rounding."""
    one = trained(start, tmp_path / "one", step)
    two = trained(start, tmp_path / "two", step, **TWO)
    assert len(one["loss"]) == toy.TRAIN["steps"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["curve"] == pytest.approx(one["curve"], rel=1e-6)
