"""Families through the real loop: killed in the midst, on the same bits in the end."""

from __future__ import annotations

import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.core.errors import UserError
from lib.models import load_family
from lib.models.base import Family, build
from lib.train.trainer import train
from tests.faults.crash import in_child
from tests.train.tiny import BASE, CONTEXT, VOCAB, Rows, make_job

SIZES: dict[str, dict[str, Any]] = {
    "phase7": {
        "width": 16, "depth": 2, "heads": 2, "d_ff": 24, "context": CONTEXT, "window": 3,
        "ssm_rank": 6, "tt_rank": 4, "curvature": {"warmup": 7},
    },
    "phase8": {
        "width": 16, "depth": 2, "heads": 2, "key_width": 4, "d_ff": 24, "context": CONTEXT,
        "tt_rank": 4,
    },
    "gpt": {"width": 16, "depth": 1, "heads": 2, "context": CONTEXT},
    "ramgpt": {"width": 16, "depth": 2, "heads": 2, "context": CONTEXT},
    "trm": {"width": 16, "depth": 1, "heads": 2, "context": CONTEXT, "dropout": 0.1, "halt": "q"},
}  # fmt: skip


def made(name: str, **changes: Any) -> Family:
    family = load_family(name)
    return build(family, family.Config(**SIZES[name] | changes), VOCAB, seed=1)


def run(folder: Path, name: str, rows: Any = None, settings=BASE, **changes: Any):
    job = make_job(folder, settings, model=made(name, **changes))
    return train(replace(job, rows=lambda plan: rows or Rows()))


class Killing(Rows):
    """Ends the process when the batch of step `at` is asked for."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def prefetch(self, start, stop, rank=0, world=1):
        for i, batch in enumerate(super().prefetch(start, stop, rank, world), start):
            if i == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *[("phase7", {}), ("phase7", {"rank": {"target": None}}), ("phase8", {})],
        *[("trm", {}), ("trm", {"schedule": "every", "grad": "last"})],
    ],
)
@pytest.mark.parametrize("kills", [[4], [2, 5, 8]], ids=str)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, name, changes, kills):
    """Curvature, scores of channels and their rate are in the checkpoint or follow the step."""
    whole = run(tmp_path / "whole", name, **changes).weights
    for at in kills:
        status = in_child(lambda at=at: run(tmp_path / "killed", name, Killing(at), **changes))
        assert os.WIFSIGNALED(status), status
    again = run(tmp_path / "killed", name, **changes).weights
    for key, tensor in whole.items():
        assert torch.equal(again[key], tensor), key


class KillAtOperation(TorchDispatchMode):
    """Counts what torch is asked for, in backward and the update too; the n-th ends the process."""

    def __init__(self, n: float = math.inf) -> None:
        super().__init__()
        self.n, self.seen = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        self.seen += 1
        if self.seen >= self.n:
            os.kill(os.getpid(), signal.SIGKILL)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("changes", [{}, {"rank": {"target": None}}], ids=["rank", "fixed"])
def test_phase7_killed_at_twenty_random_points_ends_with_the_same_bits(tmp_path, changes):
    """phase7.md 12.16: within steps, the curvature on its way for most of them; killed in a row."""
    with KillAtOperation() as counter:
        whole = run(tmp_path / "whole", "phase7", **changes).weights
    draw, kills, runs = random.Random(16), 0, 0

    def attempt(folder: Path, n: int) -> None:
        with KillAtOperation(n):
            run(folder, "phase7", **changes)

    def status_of(folder: Path) -> int:
        n = draw.randint(1, counter.seen)
        return in_child(lambda: attempt(folder, n))

    while kills < 20:
        folder, runs = tmp_path / str(runs), runs + 1
        while status := status_of(folder):
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            kills += 1
        again = run(folder, "phase7", **changes).weights
        assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())


def test_scores_keep_their_rate_while_the_others_fall(tmp_path):
    """Over a whole run their travel is 3, whatever the base rate and the schedule are."""
    settings = replace(BASE, lr=1e-6, eval_every=0, ema_decay=0.0)
    first: Any = made("phase7")
    moved = run(tmp_path, "phase7", settings=settings).weights["alpha"] - first.alpha
    assert 0.5 < moved.abs().max() <= 3.3


def test_the_8_bit_rule_without_its_library_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(UserError, match="optim8bit") as caught:
        run(tmp_path, "phase7", settings=replace(BASE, optimizer="adamw8bit"))
    assert caught.value.code == 2


@pytest.mark.slow  # torch compiles the update with a C++ compiler
def test_8_bit_moments_survive_a_kill_bit_by_bit(tmp_path):
    pytest.importorskip("torchao", reason="the extra optim8bit is not installed")
    settings = replace(BASE, optimizer="adamw8bit", steps=4, eval_every=0, warmup=1)
    wide = {"width": 64, "d_ff": 64}  # matrices of 4,096 elements have coded moments
    whole = run(tmp_path / "whole", "phase7", settings=settings, **wide).weights
    status = in_child(
        lambda: run(tmp_path / "killed", "phase7", Killing(3), settings=settings, **wide)
    )
    assert os.WIFSIGNALED(status), status
    again = run(tmp_path / "killed", "phase7", settings=settings, **wide).weights
    assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())
