"""A model, rows and a job so small that a whole run takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.core.ramp import Ramp
from lib.core.rng import numpy_generator
from lib.core.run_settings import Runtime, Train
from lib.models.base import Family
from lib.train.job import Job
from lib.train.trainer import train

VOCAB, CONTEXT, ROWS_PER_STEP = 11, 6, 4


class Bigram(Family):
    """Next id from this id, through dropout, so that random states matter."""

    def __init__(self, dropout: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens, state=None):
        x = self.table(tokens)
        for block in self.blocks:
            x = x + self.run_block(block, x)
        return self.head(self.dropout(x)), state


class Rows:
    """Seeded rows with a permutation an epoch, like the loader's; 10 rows, 4 a step or a ramp."""

    def __init__(
        self,
        total: int = 10,
        per_step: int = ROWS_PER_STEP,
        seed: int = 3,
        ramp: Ramp | None = None,
    ) -> None:
        draw = numpy_generator(seed, "rows of a test")
        self.data = draw.integers(0, VOCAB, (total, CONTEXT + 1))
        self.ramp, self.seed = ramp or Ramp(values=(per_step,), steps=1), seed

    def row_numbers(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        share = self.ramp.at(step) // world
        slots = np.arange(share) + self.ramp.before(step) + rank * share
        epochs, places = np.divmod(slots, len(self.data))
        orders = {e: self._order(e) for e in set(epochs.tolist())}
        return np.array([orders[e][p] for e, p in zip(epochs.tolist(), places, strict=True)])

    def _order(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, "order", epoch).permutation(len(self.data))

    def prefetch(
        self, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[np.ndarray]:
        for step in range(start, stop):
            yield self.data[self.row_numbers(step, rank, world)]


@dataclass
class Stop:
    """Asks for a stop once `at` steps have been taken (None: never)."""

    at: int | None = None
    looks: int = 0

    @property
    def asked(self) -> bool:
        self.looks += 1
        return self.at is not None and self.looks >= 2 * self.at  # the loop looks twice a step


def make_model(seed: int = 0, **options: Any) -> Bigram:
    model = Bigram(**options)
    model.init_weights(seed)
    return model


BASE = Train(
    steps=9, batch_tokens=ROWS_PER_STEP * CONTEXT, lr=0.05, ema_decay=0.9, warmup=2,
    schedule="cosine", eval_every=4,
)  # fmt: skip
RUNTIME = Runtime(
    threads=1, device="cpu", device_batch_size=2, log_every=2, checkpoint_every_steps=3
)


def make_job(work: Path, settings: Train = BASE, runtime: Runtime = RUNTIME, **changes: Any) -> Job:
    model = changes.pop("model", None) or make_model()
    said = changes.pop("said", [])
    job = Job(
        run="tiny",
        settings=settings,
        runtime=runtime,
        seed=5,
        model=model,
        rows=lambda plan: Rows(),
        context=CONTEXT,
        device=torch.device("cpu"),
        dtype=torch.float32,
        work=work,
        identity={"fingerprint": "f" * 16, "vocab_size": VOCAB},
        bytes_per_token=2.5,
        validate=score,
        stop=Stop(),
        log=said.append,
        warn=said.append,
    )
    return replace(job, **changes)


def score(model: Family) -> float:
    """Bits a token on fixed rows: a validation that does not need text."""
    ids = torch.from_numpy(Rows(seed=99).data)
    return model.token_losses(ids[:, :-1], ids[:, 1:]).mean().item() / np.log(2)


__all__ = ["BASE", "RUNTIME", "Rows", "Stop", "make_job", "make_model", "train"]
