"""Training killed at every change of the file system: nothing wrong committed, equal bytes after.

A8, A9: model, optimizer, average, random states, curves, log (but for its clock).
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lib.core import files
from lib.core.errors import KumikiError
from lib.train.checkpoint import verify
from lib.train.final import Final, write_final
from tests.faults.crash import Injector, enumerate_crashes, in_child, tree
from tests.faults.tally import tally
from tests.train.test_trainer import CLOCKED
from tests.train.tiny import BASE, RUNTIME, VOCAB, make_job, make_model, train

pytestmark = pytest.mark.faults
EVERY = int(os.environ.get("KUMIKI_FAULTS_EVERY", "29"))  # 1 in `make faults`: every point
SETTINGS = replace(BASE, steps=5, eval_every=2)
RUNTIME_HERE = replace(RUNTIME, checkpoint_every_steps=2)


def train_and_publish(folder: Path) -> None:
    """A whole stage in small: train, write the final model and the curves."""
    outcome = train(make_job(folder, SETTINGS, RUNTIME_HERE))
    card = {"family": "gpt", "config": {}, "vocab_size": VOCAB, "context": 6, "tokenizer": "t"}
    write_final(folder / "final", outcome.weights, card, {"fingerprint": "f"})
    outcome.observer.write_curves(folder / "curves")
    log = folder / "training_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]
    files.write_json(folder / "log_without_clock.json", kept)


def nothing_committed_is_wrong(folder: Path) -> None:
    """Whatever bears a final name verifies; only the newest may be half removed, manifest first."""
    for path in [*folder.glob("step_*"), *folder.glob("best")]:
        if path.suffix == ".part" or not (path / files.MANIFEST).is_file():
            continue
        verify(path)
    if (folder / "final/manifest.json").is_file():
        Final.open(folder / "final")


def maker(fast_folder: Path):
    def make(point: int) -> Path:
        path = fast_folder / f"point_{point}"
        path.mkdir()
        return path

    return make


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory):
    """Lazy imports happen in the parent, once, so that points are cheap and count the same."""
    train_and_publish(tmp_path_factory.mktemp("warm"))


def test_a08_training_killed_at_any_file_operation_ends_with_the_same_bytes(fast_folder):
    killed = enumerate_crashes(
        train_and_publish, maker(fast_folder), nothing_committed_is_wrong,
        skip=lambda name: name.endswith("training_log.jsonl"), every=EVERY,
    )  # fmt: skip
    assert killed >= 300 // EVERY, (
        f"only {killed} points: the injector has lost sight of the writer"
    )
    tally("A8", "SIGKILL in the trainer with dropout", killed, "equal bytes after the same command")


def test_a08_killed_again_during_the_recovery(fast_folder):
    """Second order: each of three kills falls into the rerun of the one before."""
    whole, folder = fast_folder / "whole", fast_folder / "killed"
    for path in (whole, folder):
        path.mkdir()
    assert in_child(lambda: train_and_publish(whole)) == 0
    for point in (211, 97, 41, 13, 60):
        in_child(lambda: train_and_publish(folder), Injector(point))
        nothing_committed_is_wrong(folder)
    assert in_child(lambda: train_and_publish(folder)) == 0
    skip = "training_log.jsonl".__eq__
    assert tree(folder, skip) == tree(whole, skip)


def test_e10_two_good_checkpoints_remain_wherever_retention_is_killed(fast_folder):
    """After the second commit at least two verify at every point."""
    make = maker(fast_folder)
    point = 1
    while True:
        folder = make(point)
        job = make_job(folder, SETTINGS, RUNTIME_HERE)
        status = in_child(lambda job=job: train(job), Injector(point))
        good = 0
        for path in folder.glob("step_*"):
            try:
                verify(path)
                good += 1
            except KumikiError:
                continue
        reached = max((int(p.name[5:]) for p in folder.glob("step_*") if p.suffix == ""), default=0)
        finished = (folder / "step_5/manifest.json").is_file()
        if reached >= 4 and not finished:
            assert good >= 2, f"point {point}: {good} good after step {reached}"
        assert good >= 1 or reached <= 2, f"point {point}"
        if status == 0:
            return
        point += max(EVERY, 3)


# ---------------------------------------------------------------- negative controls


def test_control_without_the_random_states_the_bytes_differ(fast_folder, monkeypatch):
    """Dropout draws on: a rerun that begins its generators anew must be caught."""
    monkeypatch.setattr("lib.train.safety.restore_random_states", lambda states, device: None)
    with pytest.raises(AssertionError, match="point"):
        enumerate_crashes(
            train_and_publish, maker(fast_folder), skip="training_log.jsonl".__eq__, every=60
        )


def test_control_with_the_step_off_by_one_the_bytes_differ(fast_folder, monkeypatch):
    from lib.train import state

    real = state.Position

    def late(**note):
        return real(**{**note, "step": note["step"] + (0 < note["step"] < 5)}) if note else real()

    monkeypatch.setattr(state, "Position", late)
    with pytest.raises(AssertionError, match="point"):
        enumerate_crashes(
            train_and_publish, maker(fast_folder), skip="training_log.jsonl".__eq__, every=60
        )


def test_control_without_the_hash_a_flipped_bit_is_trained_on(fast_folder, monkeypatch):
    """The same flip that E3 names goes through when only the format is looked at."""
    from lib.core import artifact

    monkeypatch.setattr(artifact, "verify", lambda folder, manifest: None)
    train(make_job(fast_folder, replace(SETTINGS, steps=2), RUNTIME_HERE))
    path = fast_folder / "step_2/model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.unlink()
    path.write_bytes(damaged)
    outcome = train(make_job(fast_folder, replace(SETTINGS, steps=2), RUNTIME_HERE))
    assert outcome.position.step == 2  # taken without a word: the hash is what stands in the way


def test_the_model_of_these_tests_draws_random_numbers():
    """Without dropout the first control could not fail."""
    assert make_model().dropout.p > 0
