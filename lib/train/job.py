"""What one training run is given and what it returns: the seam between a stage and the loop.

A `Job` holds everything; the loop looks nothing up elsewhere. Rows come by step, so that the state
of the data is one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lib.core import ranks
from lib.core.artifact import plain
from lib.core.run_settings import Runtime, Train
from lib.models.base import Family
from lib.train.observe import Observer
from lib.train.plan import Plan
from lib.train.state import Position


class Rows(Protocol):
    """Where batches come from: rows of T + 1 ids by step, the same for every number of ranks."""

    def row_numbers(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray: ...  # noqa: D102
    def prefetch(  # noqa: D102
        self, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[np.ndarray]: ...


class Asked(Protocol):
    """Whether somebody wants the run to stop (lib.core.process.StopRequest)."""

    asked: bool


@dataclass(kw_only=True)
class Batch:
    """What `losses` is given. tokens, targets: (rows, T) int64; step: updates made before it.

    rows: their numbers among the packed rows, where the family reads more than ids.
    """

    tokens: Tensor
    targets: Tensor
    step: int
    first_row: int = 0  # number of its first row in the step, over all ranks
    rows: np.ndarray | None = None
    of: int = 1  # micro-batches that the step has, over all ranks


def cut(
    ids: np.ndarray,
    step: int,
    micro_rows: int,
    device: torch.device,
    numbered: Rows | None,
    pieces: int = 1,
    answers: Callable[[Tensor], Tensor] | None = None,
) -> list[Batch]:
    """The micro-batches of a rank's rows (rows, T + 1); numbered: knows which packed rows.

    pieces: shorter rows that each row is read as. answers: which ids of rows are targets, all.
    """
    own = None
    if numbered is not None:
        own = numbered.row_numbers(step, ranks.rank(), ranks.world_size())
    parts = torch.from_numpy(ids).to(device, non_blocking=True).split(micro_rows)
    ends = list(range(micro_rows, len(ids), micro_rows))
    of = [None] * len(parts) if own is None else np.split(own, ends)
    first_rows = range(ranks.rank() * len(ids), (ranks.rank() + 1) * len(ids), micro_rows)
    length = (ids.shape[1] - 1) // pieces
    shorter = (lambda x: x.reshape(-1, length)) if pieces > 1 else (lambda x: x)

    def targets(part: Tensor) -> Tensor:
        kept = part if answers is None else part.masked_fill(~answers(part), -1)
        return shorter(kept[:, 1:])

    return [
        Batch(
            tokens=shorter(part[:, :-1]), targets=targets(part), step=step,
            first_row=first * pieces, rows=numbers, of=len(parts) * ranks.world_size(),
        )
        for part, first, numbers in zip(parts, first_rows, of, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that one run needs; nothing is looked up elsewhere."""

    run: str
    settings: Train
    runtime: Runtime
    seed: int
    model: Family  # on its device, with its first weights
    rows: Callable[[Plan], Rows]
    context: int  # T
    device: torch.device
    dtype: torch.dtype  # of matmuls
    work: Path  # checkpoints and logs
    identity: Mapping[str, Any]  # what a checkpoint must agree in
    extra: Mapping[str, Any] = field(default_factory=dict)  # kept in checkpoints: code, parents
    answers: Callable[[Tensor], Tensor] | None = None  # which ids are targets; None: all
    bytes_per_token: float = 0.0  # of the training text
    validate: Callable[[Family], float | None] = lambda model: None  # bits per byte
    sample: Callable[[Family], list[str]] = lambda model: []
    push: Callable[[int, dict[str, Tensor], bool], None] = lambda step, weights, last: None
    # for what stands beside a run: another model of its family (config, seed, whether it begins
    # with the weights that the run began with), the first packed rows, validation text a token
    build: Callable[[Any, int, bool], Family] = lambda config, seed, started: Family()
    diagnostic_rows: Callable[[int], np.ndarray] = lambda count: np.empty((0, 0), np.int64)
    val_bytes_per_token: float = 0.0
    stop: Asked
    log: Callable[[str], None]
    warn: Callable[[str], None]

    def described(self) -> dict[str, Any]:
        """What trackers show beside the curves."""
        return {**self.identity, "seed": self.seed, "train": plain(self.settings)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run; `weights` is a whole state dict on the CPU, averaged if the run averages."""

    plan: Plan
    position: Position
    weights: dict[str, Tensor]
    observer: Observer
