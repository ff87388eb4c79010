"""A14: after a loss of power the newest durable checkpoint loads, and no manifest lies."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lib.core import files
from lib.core.errors import KumikiError
from lib.train.checkpoint import Checkpoints, verify
from lib.train.final import Final, write_final
from tests.faults.power import Folder, Recorder, crash_states, write_out
from tests.faults.tally import tally
from tests.train.tiny import BASE, RUNTIME, VOCAB, make_job, train

pytestmark = pytest.mark.faults
SEVERAL = 4 if os.environ.get("KUMIKI_FAULTS_EVERY") == "1" else 1
SETTINGS = replace(BASE, steps=4, eval_every=2)


def recorded(folder: Path) -> list[Folder]:
    """The states of a whole training run with retention, and of the model that it publishes."""
    folder.mkdir()
    with Recorder(folder).installed() as recorder:
        outcome = train(make_job(folder, SETTINGS, replace(RUNTIME, checkpoint_every_steps=1)))
        card = {"family": "gpt", "config": {}, "vocab_size": VOCAB, "context": 6, "tokenizer": "t"}
        write_final(folder / "final", outcome.weights, card, {"fingerprint": "f"})
    return recorder.states


def lost(states: list[Folder], place: Path, every: int) -> int:
    """Open every crash state; raises where something committed is wrong. Returns how many."""
    draw, count, durable = random.Random(4), 0, 0
    for state in states[::every]:
        durable = max([durable, *(_step(n) for n in state.sure)])
        for left in crash_states(state, draw, SEVERAL):
            shutil.rmtree(place, ignore_errors=True)
            write_out(left, place)
            found = Checkpoints(place, {"fingerprint": "f" * 16, "vocab_size": VOCAB}).newest_good()
            reached = found.step if found else 0
            assert reached >= durable, f"step {durable} was durable, {reached} is left"
            for path in place.glob("step_*"):
                if _step(path.name) >= durable and (path / files.MANIFEST).exists():
                    verify(path)
            if (place / "final" / files.MANIFEST).exists():
                Final.open(place / "final")
            count += 1
    return count


def _step(name: str) -> int:
    number = name.removeprefix("step_")
    return int(number) if number.isdigit() else 0


def test_a14_the_newest_durable_checkpoint_survives_a_loss_of_power(fast_folder):
    states = recorded(fast_folder / "run")
    assert len(states) > 100
    every = 1 if SEVERAL > 1 else 5
    count = lost(states, fast_folder / "left", every)
    tally("A14", "power loss in training", count, "the newest durable checkpoint loads")


def test_control_without_the_fsync_of_folders_a_checkpoint_is_lost(fast_folder, monkeypatch):
    monkeypatch.setattr(files, "fsync_folder", lambda folder: None)
    states = recorded(fast_folder / "run")
    with pytest.raises((AssertionError, KumikiError)):
        _nothing_is_lost(states, fast_folder / "left")


def test_control_without_the_fsync_of_files_a_manifest_lies(fast_folder, monkeypatch):
    real = files._fsync
    monkeypatch.setattr(files, "_fsync", lambda path: real(path) if path.is_dir() else None)
    monkeypatch.setattr(files.os, "fsync", os.fsync)
    states = recorded(fast_folder / "run")
    with pytest.raises((AssertionError, KumikiError)):
        lost(states, fast_folder / "left", 1)


def _nothing_is_lost(states: list[Folder], place: Path) -> None:
    """As `lost`, where durable is what the run itself took for committed."""
    draw = random.Random(4)
    seen = 0
    for state in states:
        complete = [n for n, node in state.now().items() if _step(n) and isinstance(node, Folder)]
        committed = max([0, *(_step(n) for n in complete)])
        if committed >= 2 and committed > seen + 1:
            seen = committed - 1
        for left in crash_states(state, draw, 1):
            shutil.rmtree(place, ignore_errors=True)
            write_out(left, place)
            found = Checkpoints(place, {"fingerprint": "f" * 16, "vocab_size": VOCAB}).newest_good()
            assert (found.step if found else 0) >= seen
