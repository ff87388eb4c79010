"""Learning rates of a run, compared on training rows that no run of the profile has read.

In:  a run of params.yaml whose inputs are there.   Out: a line a rate on stdout, the mean loss of
     the held rows in nats a token. Nothing is published.
Law: held are the batches of steps [first, first + batches) in the seeded order that training walks
     from step 0, so validation text stays unseen by the choice.

    python -m benchmarks.rates cvfp --lr 7e-3 1e-2 1.5e-2 2e-2 --first 100 --with \\
        embeddings=data/embeddings.manifest.json contexts=checkpoints/phase1_cvfp/final
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._work import work_folder
from lib.core import params
from lib.core.settings import Settings
from lib.core.stage import Run
from lib.data.loader import Loader
from lib.models.base import Family
from lib.train.inputs import Data
from lib.train.precision import autocast
from lib.train.session import open_job
from lib.train.trainer import train
from stages import pretrain


def main() -> None:
    """Train the run at every rate, then score each on the same held rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates")
    parser.add_argument("run")
    parser.add_argument("--lr", nargs="+", type=float, required=True)
    parser.add_argument("--first", type=int, required=True, help="step that no run has reached")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens/bpe.manifest.json"))
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tokenizers/bpe"))
    parser.add_argument("--with", nargs="*", default=[], dest="extras", metavar="INPUT=PATH")
    arguments = parser.parse_args()
    settings = params.load()
    batch_tokens = settings.train[arguments.run].batch_tokens
    assert isinstance(batch_tokens, int), "a run with a batch of its own"
    data = Data.open(arguments.tokens, arguments.tokenizer, settings.seed, full=False)
    loader = Loader(data.store, batch_tokens, settings.seed)
    steps = range(arguments.first, arguments.first + arguments.batches)
    assert loader.rows_per_step * steps.stop <= data.store.rows, "these rows are a second epoch's"
    held = [torch.from_numpy(loader.batch(step)) for step in steps]
    for lr in arguments.lr:
        print(f"lr {lr:g}: {loss_at(lr, held, settings, arguments):.4f}", flush=True)


def loss_at(lr: float, held: list[Tensor], settings: Settings, arguments: Namespace) -> float:
    """Nats a token of the held rows (rows, T + 1) after the run's own steps at `lr`."""
    extras = dict.fromkeys(pretrain.STAGE.extras) | dict(x.split("=") for x in arguments.extras)
    with work_folder() as folder:
        words = {**vars(arguments), **extras, "out": f"{folder}/final", "curves": folder}
        run = Run(pretrain.STAGE, settings, Namespace(**words))
        run.work = Path(folder)
        with open_job(run, pretrain.family_of(run), pretrain.identity(run)) as job:

            def score(model: Family) -> float:
                with autocast(job.device, job.dtype):
                    found = [model.token_losses(x[:, :-1], x[:, 1:]).double() for x in held]
                return float(torch.cat(found).mean())

            own = replace(job.settings, lr=lr, eval_every=0, controls=None)
            assert own.steps is not None and own.steps <= arguments.first, "it reads held rows"
            outcome = train(replace(job, settings=own, validate=score, log=lambda line: None))
    assert outcome.position.best is not None
    return outcome.position.best["bpb"]


if __name__ == "__main__":
    main()
