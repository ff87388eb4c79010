"""What every rank of test_parallel runs: one tiny run after another, each in its own folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from lib.core import ranks
from lib.core.errors import InputError, Interrupted
from lib.train import parallel
from tests.train.tiny import BASE, RUNTIME, Stop, make_job, make_model, train


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
    poison_rank_1(folder / "poisoned")


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
