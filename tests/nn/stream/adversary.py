"""A device that keeps no promise but those of the plan.

Operations are only queued when they are issued. A copy lands when something waits for it, lanes
advance in an order drawn from a seed, and whatever has no right to be read is NaN: places that are
not loaded or were evicted, buffers before their first write and after their last reader.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lib.nn.stream.execute import InOrder
from lib.nn.stream.plan import LANES, Lane, Op

Prefer = Callable[[list[int]], int]  # numbers of operations that may run -> the one that does


class Adversary(InOrder):
    """Lanes that run ahead of each other as far as waits allow."""

    def __init__(self, seed: int = 0, prefer: Prefer | None = None) -> None:
        super().__init__()
        self.engine: Any = None
        self._draw = random.Random(seed)
        self._prefer = prefer or self._draw.choice
        self._queues: dict[Lane, list[int]] = {lane: [] for lane in LANES}
        self._done: set[int] = set()

    def start(self, ops: Sequence[Op], act: Callable[[Op], None]) -> None:
        super().start(ops, act)
        self._queues, self._done = {lane: [] for lane in LANES}, set()
        memory = self.engine.memory
        for place, held in enumerate(self.engine._loaded):
            if held is None:
                poison(memory.places[place])
        for buffer in (*memory.gradients, memory.ends_gradient, *memory.boundaries, *memory.saved,
                       *self.engine.stages):  # fmt: skip
            poison(buffer)

    def advance(self, to: int) -> None:
        for number in range(self._at, min(to, len(self._ops))):
            self._queues[self._ops[number].lane].append(number)
        self._at = max(self._at, to)
        self._run(until=lambda: not self._queues["compute"])

    def finish(self) -> None:
        self._run(until=lambda: not any(self._queues.values()))

    def abort(self) -> None:
        self._queues = {lane: [] for lane in LANES}

    def _run(self, until: Callable[[], bool]) -> None:
        while not until():
            heads = [queue[0] for queue in self._queues.values() if queue]
            ready = [n for n in heads if set(self._ops[n].waits) <= self._done]
            assert ready, "the plan waits for itself"
            number = self._prefer(ready)
            op = self._ops[number]
            self._queues[op.lane].pop(0)
            self._do(op)
            self._done.add(number)

    def _do(self, op: Op) -> None:
        memory = self.engine.memory
        fresh = len(memory.boundaries)
        self._act(op)
        if len(memory.boundaries) != fresh:  # made by the first EMBED, which has written one part
            for index, buffer in enumerate(memory.boundaries):
                for micro in range(len(buffer)):
                    if (index, micro) != (op.target, op.micro):
                        poison(buffer[micro])
        if op.kind == "EVICT":
            poison(memory.places[op.place])
        elif op.kind == "ACC":
            poison(self.engine.stages[op.stage])
        elif op.kind == "GRAD_OUT" and op.piece == self.engine.shape.piece_count(op.unit) - 1:
            poison(memory.gradients[op.gradient] if op.gradient >= 0 else memory.ends_gradient)
        elif op.kind == "BWD" and op.source >= 0:
            poison(memory.boundaries[op.source][op.micro])  # its input is not needed again


def poison(buffer: torch.Tensor) -> None:
    """All bits set: NaN in every floating dtype."""
    if buffer.numel():
        buffer.view(torch.uint8).fill_(0xFF)
