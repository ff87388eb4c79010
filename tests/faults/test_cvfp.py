"""Sweeps over files killed at every change of the file system: equal weights and rows after.

A9 and rule 2.6 of reliability.md: rows are overwritten in turn, so a checkpoint must be committed
before the first overwrite of what the one before reads.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.core import files
from lib.core.run_settings import Train
from lib.models import cvfp
from lib.models.base import build
from lib.train.trainer import train
from tests.faults.crash import enumerate_crashes
from tests.faults.tally import tally
from tests.models.streams import Stream
from tests.train.test_trainer import CLOCKED
from tests.train.tiny import RUNTIME, make_job

pytestmark = pytest.mark.faults
EVERY = int(os.environ.get("KUMIKI_FAULTS_EVERY", "53"))
THIN = 5  # each kind of buffers is struck at every fifth change, and each at another
TOKENS, CHUNK, WIDTH, VOCAB = 40, 10, 4, 9


class Rows:
    """The chunks of a stream, as lib.data.loader gives them."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids.numpy()

    def row_numbers(self, step, rank=0, world=1):
        return np.array([step % (TOKENS // CHUNK)])

    def prefetch(self, start, stop, rank=0, world=1):
        for step in range(start, stop):
            at = step % (TOKENS // CHUNK) * CHUNK
            ids = self.ids[at : at + CHUNK]
            yield np.append(ids, ids[-1])[None]


def sweep(folder: Path, commit_every: int = 500, **config) -> None:
    """A run of three sweeps over four chunks; its files lie below `folder`."""
    os.environ["KUMIKI_SCRATCH"] = str(folder / "scratch")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (TOKENS,), generator=draw)
    stream = Stream(ids, torch.randn(VOCAB, WIDTH, generator=draw))
    whole: dict[str, Any] = {
        "phase": "fixed_point", "width": WIDTH, "depth": 2, "solver": "jacobi",
        "reset": "never", "sweeps": 3, "chunk_tokens": CHUNK, "keep_contexts": True,
    }  # fmt: skip
    model = build(cvfp, cvfp.Config(**{**whole, **config}), VOCAB, seed=1)
    model.read_from(stream)
    job = make_job(
        folder / "work", Train(lr=0.01, eval_every=0),
        replace(RUNTIME, log_every=1, checkpoint_every_steps=commit_every),
        model=model, rows=lambda plan: Rows(ids), context=CHUNK, validate=lambda model: None,
    )  # fmt: skip
    outcome = train(job)
    files.write_json(folder / "stats.json", model.statistics())
    model.solver.state.open().close()
    log = (folder / "work/training_log.jsonl").read_text().splitlines()
    kept = [{k: v for k, v in json.loads(x).items() if k not in CLOCKED} for x in log]
    files.write_json(folder / "log_without_clock.json", kept)
    total = sum(t.double().sum().item() for t in outcome.weights.values())
    files.write_json(folder / "weights.json", total)


@pytest.fixture(autouse=True)
def _one_thread_and_a_scratch(monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", "unused")
    torch.set_num_threads(1)


def maker(fast_folder: Path):
    def make(point: int) -> Path:
        path = fast_folder / f"point_{point}"
        path.mkdir()
        return path

    return make


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({}, 1),
        ({"buffers": "slots"}, 2),
        ({"buffers": "slots", "spare_chunks": 2}, 3),
    ],
    ids=["double", "slots-1", "slots-2"],
)
def test_a09_sweeps_killed_at_any_file_operation_end_with_the_same_bytes(
    fast_folder, config, first
):
    every, warm = THIN * EVERY, fast_folder / "warm"
    warm.mkdir()
    sweep(warm, **config)
    killed = enumerate_crashes(
        lambda path: sweep(path, **config), maker(fast_folder),
        skip=lambda name: name.endswith("training_log.jsonl"), every=every, first=first,
    )  # fmt: skip
    assert killed >= 400 // every, f"only {killed} points: the injector has lost sight of the store"
    kind = config.get("buffers", "double buffers") + " 2" * ("spare_chunks" in config)
    told = f"SIGKILL in sweeps, {kind}" + (f", one in {every}" if every > 1 else "")
    tally("A9", told, killed, "equal weights and rows")


def test_control_without_a_commit_at_every_chunk_the_run_does_not_come_back(
    fast_folder, monkeypatch
):
    """A checkpoint five chunks behind its files: the generation is noticed, never trained on."""
    monkeypatch.setattr(cvfp.Model, "sweep_end", lambda self: False)
    with pytest.raises(AssertionError, match="the rerun fails"):
        enumerate_crashes(
            lambda path: sweep(path, commit_every=5), maker(fast_folder),
            skip=lambda name: name.endswith("training_log.jsonl"), every=10,
        )  # fmt: skip
