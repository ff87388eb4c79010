"""K/V of a model that applies the same blocks again and again: kept by application, not by block.

A `Tape` is one pass over n positions; what it has kept at the end is the `State` that continues the
rows. Where a position has stopped thinking, its K/V of the last step stand in for the later ones.
Letters: B batch, n positions of this call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lib.nn.blocks import Past
from lib.nn.rope import Tables


class State(NamedTuple):
    """Rows so far: their length, the depth they were computed at, k and v of each application."""

    position: int
    depth: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Tape:
    """One pass over n positions: K/V by block application, in order, those of `state` before it."""

    def __init__(self, rope: Tables | None, state: State | None = None, keep: bool = False) -> None:
        self.rope, self.state, self.keep = rope, state, keep
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.halted: Tensor | None = None  # (B, n), positions that have stopped thinking

    def past(self, blocks: int, step: int) -> list[Past]:
        """What the next `blocks` applications meet; step: applications of one supervision step."""
        found, first = [], len(self.kept)
        for i in range(first, first + blocks):
            before = (self.state.keys[i], self.state.values[i]) if self.state else (None, None)
            own = None
            if self.halted is not None:
                n = self.halted.shape[1]
                k, v = self.kept[i - step]
                own = k[:, :, -n:], v[:, :, -n:]
            found.append(Past(*before, self.halted, own))
        return found

    def add(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        """K/V of applications that were just made."""
        if self.keep:
            self.kept += kept

    def halt(self, done: Tensor) -> int:
        """These positions (B, n) stop too, nobody begins again; returns how many go on."""
        self.halted = done if self.halted is None else self.halted | done
        return int((~self.halted).sum())

    @property
    def all_halted(self) -> bool:
        """Whether nobody thinks any more."""
        return self.halted is not None and bool(self.halted.all())

    def held(self, old: Tensor, new: Tensor) -> Tensor:
        """`new` (B, n, d), but `old` where a position has stopped."""
        return new if self.halted is None else torch.where(self.halted[..., None], old, new)

    def repeat_last(self, step: int) -> None:
        """Every position has stopped: K/V of the last supervision step stand in for the next."""
        for i in range(len(self.kept) - step, len(self.kept)):
            k, v = self.kept[i]
            if self.state:  # the past of the later applications is their own
                new = slice(self.state.position, None)
                k = torch.cat((self.state.keys[i + step], k[:, :, new]), dim=2)
                v = torch.cat((self.state.values[i + step], v[:, :, new]), dim=2)
            self.kept.append((k, v))

    def ended(self, position: int, depth: int) -> State:
        """The state that continues the rows."""
        keys, values = zip(*self.kept, strict=True)
        return State(position, depth, keys, values)
