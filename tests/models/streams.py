"""A corpus of a few tokens in memory, and a driver of the fixed-point phase without a trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.models import cvfp
from lib.models.base import build


class Stream:
    """Ids with a table of vectors; `rows` given: the vectors are read by position instead."""

    def __init__(
        self, ids: Tensor, table: Tensor, reset_id: int | None = None, reads: bool = False
    ):
        self._ids, self._table, self.key, self.context = ids, table, "stream", 10
        self.hidden = None
        self.tokens, self.reset_id, self.has_rows = len(ids), reset_id, reads

    def table(self) -> Tensor:
        return self._table

    def ids(self, start: int, stop: int) -> Tensor:
        return self._ids[start:stop]

    def starts(self, start: int, stop: int) -> Tensor:
        return self._ids[start:stop] == (-1 if self.reset_id is None else self.reset_id)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._table[self._ids[start:stop]]

    def stream(self, start: int, stop: int, rows: int) -> Iterator[Tensor]:
        return iter(self.rows(start, stop).split(rows))

    def positions(self, numbers: Any) -> np.ndarray:
        """Row n is tokens [10 n, 10 n + 10)."""
        return np.asarray(numbers)[:, None] * self.context + np.arange(self.context)

    def packed(self, numbers: Any) -> Tensor:
        return self._table[self._ids[torch.from_numpy(self.positions(numbers))]]


def make(stream: Stream, folder: Path, seed: int = 1, dtype=torch.float64, **config: Any) -> Any:
    """A model of the fixed-point phase over `stream`, working in `folder`."""
    table = stream.table()
    whole = {"phase": "fixed_point", "width": table.shape[1], **config}
    model: Any = build(cvfp, cvfp.Config(**whole), len(table), seed=seed)
    model = model.to(dtype)
    model.read_from(stream)
    model.attach(folder / "work")
    return model


def run_steps(model: Any, steps: range, optimizer: Any = None, clip: float = 1.0) -> list[float]:
    """The trainer's loop: backward, clip, update; the loss of every step that has one."""
    optimizer = optimizer or torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.002
    )
    totals = []
    for step in steps:
        seen = []
        for loss in model.losses(SimpleNamespace(tokens=None, targets=None, step=step, rows=None)):
            with torch.autocast("cpu", enabled=False):  # as the trainer does
                loss.backward()
            seen.append(loss.item())
        if seen:
            totals.append(sum(seen))
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        optimizer.zero_grad()
        model.flush()
        model.sweep_end()
    return totals


def stored_rows(model: Any, sweep: int) -> Tensor:
    """All context vectors of a sweep that is still on disk."""
    disk = model.solver.state.open()
    return torch.cat([r for j in range(disk.chunks) for r in disk.read(sweep, j, 16)])
