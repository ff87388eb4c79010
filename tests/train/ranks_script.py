"""What every rank of test_parallel runs: one tiny run after another, each in its own folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lib.core import ranks
from lib.core.errors import InputError, Interrupted
from lib.core.run_settings import Train
from lib.models import gpt
from lib.models.base import build
from lib.train import parallel
from lib.train.job import Job
from tests.train.tiny import (
    BASE,
    CONTEXT,
    RUNTIME,
    VOCAB,
    Rows,
    Stop,
    make_job,
    make_model,
    train,
)  # fmt: skip


def runs(folder: Path) -> None:
    """Every mode once; rank 0 writes the curves."""
    plain = {"ddp": RUNTIME, "fsdp": replace(RUNTIME, shard="fsdp")}
    for name, runtime in plain.items():
        outcome = train(make_job(folder / name, runtime=runtime, model=make_model(dropout=0.0)))
        if ranks.rank() == 0:
            outcome.observer.write_curves(folder / name / "curves")
    muon = replace(BASE, optimizer="muon", lr=0.01)
    for name in ("none", "optimizer"):
        runtime = replace(RUNTIME, shard=name)
        job = make_job(folder / f"muon_{name}", muon, runtime, model=make_model(dropout=0.0))
        train(job)
    for name, stop in (("two_then_one", Stop(at=2)), ("with_dropout", Stop())):
        # Only rank 1 is asked to stop: all must agree on the step.
        stop = stop if ranks.rank() == 1 else Stop()
        model = make_model(dropout=0.0 if name == "two_then_one" else 0.1)
        try:
            train(make_job(folder / name, model=model, stop=stop))
        except Interrupted as error:
            (folder / f"said_{ranks.rank()}").write_text(str(error))
    for name in ("base", "modern"):
        train(gpt_job(folder / f"gpt_{name}", name))
    train(gpt_job(folder / "gpt_ramped", "base", RAMPED))
    poison_rank_1(folder / "poisoned")


RAMPED = {"batch_ramp": (0.5, 1.0), "context_ramp": (0.5, 1.0), "adamw_every": 2}


def gpt_job(folder: Path, variant: str, switches: dict[str, Any] | None = None) -> Job:
    """20 steps of a GPT under its own optimizer and schedule."""
    sizes = {"depth": 2, "width": 16, "heads": 2, "context": CONTEXT}
    model = build(gpt, gpt.Config(variant=variant, **sizes), VOCAB, seed=3)
    settings = Train(steps=20, batch_tokens=4 * CONTEXT, eval_every=0, **(switches or {}))
    rows = lambda plan: Rows(ramp=plan.rows_by_step)  # noqa: E731
    runtime = replace(RUNTIME, log_every=1)
    return make_job(folder, settings, runtime, model=model, rows=rows, validate=lambda model: None)


def poison_rank_1(folder: Path) -> None:
    """A NaN on rank 1 alone stops both, and both name it."""
    model = make_model(dropout=0.0)
    real = model.losses

    def losses(batch):
        for loss in real(batch):
            bad = ranks.rank() == 1 and batch.step == 3
            yield loss * float("nan") if bad else loss

    model.losses = losses
    try:
        train(make_job(folder, model=model))
    except InputError as error:
        folder.mkdir(exist_ok=True)
        (folder / f"error_{ranks.rank()}").write_text(f"{error.what}: {error.value}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    runs(Path(sys.argv[1]))
    parallel.stop()
