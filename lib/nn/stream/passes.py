"""One pass over a group of micro-batches: what each operation of its plan does, and autograd.

In:   tokens and targets of G micro-batches, an engine.   Out: their mean loss, whose backward fills
      `.grad` of every parameter.
Law:  a gradient is summed over micro-batches and applications in a buffer of its own parameter, in
      fp32 and in the order of autograd, so a pass with G = 1 has the resident model's bits.
Note: the head computes its gradients in forward, unscaled; backward multiplies them by what comes
      in, a power of two in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib.nn.stream.plan import Op

if TYPE_CHECKING:
    from lib.nn.stream.unit import Engine

Moment = tuple[int, int]  # (optimizer step, number of the first row in it): where masks come from


class Pass:
    """Forward and backward of one group of micro-batches: what each operation of the plan does."""

    def __init__(
        self, engine: Engine, tokens: Sequence[Tensor], targets: Sequence[Tensor], moment: Moment
    ) -> None:
        self.engine, self.model = engine, engine.model
        self.tokens, self.targets = tokens, targets
        step, row = moment
        self.moments = [(step, row + j * len(tokens[0])) for j in range(len(tokens))]
        self.losses: list[Tensor] = []
        self.scale = torch.ones(())

    def forward(self) -> Tensor:
        """The mean loss; gradients by the last boundary and of the head are there already."""
        engine = self.engine
        with engine.guarded():
            engine.epoch += 1
            self.epoch = engine.epoch
            self.plan = engine._plan("pass", len(self.tokens))
            ends = engine.units[-1].gradient_size
            engine.memory.need_gradients(self.plan.gradients, engine.stage_size, ends)
            engine.executor.start(self.plan.ops, self.act)
            engine.executor.advance(self.plan.border)
        return torch.stack(self.losses).sum() / len(self.losses)

    def backward(self, upstream: Tensor) -> None:
        """The rest of the plan; returns when all gradients are on the host."""
        engine = self.engine
        if self.epoch != engine.epoch:
            raise RuntimeError("backward of a pass that a later one has replaced")
        self.scale = upstream / len(self.tokens)
        with engine.guarded(), torch.no_grad():
            engine.executor.advance(len(self.plan.ops))
            engine.executor.finish()
            engine.epoch += 1  # a second backward is refused

    def act(self, op: Op) -> None:
        """Do one operation."""
        if op.kind in ("EVICT", "LOAD"):
            self.engine.act(op)
        else:
            getattr(self, f"_{op.kind.lower()}")(op)

    def _x(self, buffer: int, micro: int) -> Tensor:
        return self.engine.memory.boundaries[buffer][micro]

    def _embed(self, op: Op) -> None:
        engine = self.engine
        weights = engine.views(op.place, op.unit)
        with torch.no_grad(), engine.installed(op.unit, weights), engine.autocast():
            x = self.model.embed(self.tokens[op.micro], self.moments[op.micro])
        if op.micro == 0:
            shape, n = engine.shape, len(engine.shape.applications)
            saved = max(0, n - 2) if shape.host else 0
            pinned = engine.slab.pinned_bytes > 0
            size = (len(self.tokens), *x.shape)
            engine.memory.need_boundaries(shape.buffers, saved, size, x.dtype, pinned)
        self._x(op.target, op.micro).copy_(x)

    def _fwd(self, op: Op) -> None:
        engine, x = self.engine, self._x(op.source, op.micro)
        weights = engine.views(op.place, op.unit)
        with torch.no_grad(), engine.installed(op.unit, weights), engine.autocast():
            y = self.model.apply_unit(op.application, x, self.moments[op.micro])
        assert y.dtype == x.dtype, f"a unit turns {x.dtype} into {y.dtype}"
        self._x(op.target, op.micro).copy_(y)

    def _head(self, op: Op) -> None:
        x = self._x(op.source, op.micro).detach().requires_grad_()
        weights = self._leaves(op)
        with torch.enable_grad(), self.engine.installed(op.unit, weights), self.engine.autocast():
            loss = self.model.head_loss(x, self.targets[op.micro])
        dx, *grads = self._grad(loss, x, weights, None)
        assert dx is not None, "the head's loss does not follow from x"
        self._x(op.target, op.micro).copy_(dx)
        self._add(op.unit, self.engine.memory.ends_gradient, grads, first=op.micro == 0)
        self.losses.append(loss.detach())

    def _scale(self, op: Op) -> None:
        engine = self.engine
        engine.memory.boundaries[op.target].mul_(self.scale)
        engine.memory.ends_gradient[: engine.units[-1].gradient_size].mul_(self.scale)

    def _bwd(self, op: Op) -> None:
        x = self._x(op.source, op.micro).detach().requires_grad_()
        weights = self._leaves(op)
        with torch.enable_grad(), self.engine.installed(op.unit, weights), self.engine.autocast():
            y = self.model.apply_unit(op.application, x, self.moments[op.micro])
        back = self._x(op.target, op.micro)
        dx, *grads = self._grad(y, x, weights, back)
        assert dx is not None, "a unit's output does not follow from its input"
        back.copy_(dx)
        if op.gradient >= 0:
            self._add(op.unit, self.engine.memory.gradients[op.gradient], grads, first=op.first)

    def _ends_bwd(self, op: Op) -> None:
        weights = self._leaves(op)
        if not any(w.requires_grad for w in weights):
            return
        with torch.enable_grad(), self.engine.installed(op.unit, weights), self.engine.autocast():
            x = self.model.embed(self.tokens[op.micro], self.moments[op.micro])
        grads = self._grad(x, None, weights, self._x(op.target, op.micro))
        self._add(op.unit, self.engine.memory.ends_gradient, grads, first=False)

    def _leaves(self, op: Op) -> list[Tensor]:
        """Weights of a place as leaves of a graph of their own."""
        unit = self.engine.units[op.unit]
        trains = [unit.parameters[piece.name].requires_grad for piece in unit.wires]
        views = self.engine.views(op.place, op.unit)
        return [v.detach().requires_grad_(t) for v, t in zip(views, trains, strict=True)]

    @staticmethod
    def _grad(
        out: Tensor, x: Tensor | None, weights: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | None]:
        wanted = [*([x] if x is not None else []), *(w for w in weights if w.requires_grad)]
        if not out.requires_grad:  # the embedding's tables are frozen, the rest of the ends is not
            return [None] * len(wanted)
        return list(torch.autograd.grad(out, wanted, upstream, allow_unused=True))

    @torch.no_grad()
    def _add(
        self, unit: int, buffer: Tensor, grads: Sequence[Tensor | None], *, first: bool
    ) -> None:
        """Into the pass-local sum, by parameter; converted to fp32 by the addition."""
        flat = buffer.view(torch.uint8)
        for piece, grad in zip(self.engine.units[unit].gradients, grads, strict=True):
            target = piece.of(flat)
            if grad is not None:
                target.copy_(grad) if first else target.add_(grad)
            elif first:
                target.zero_()

    def _save(self, op: Op) -> None:
        saved = self.engine.memory.saved[op.application][op.micro]
        saved.copy_(self._x(op.source, op.micro), non_blocking=True)

    def _fetch(self, op: Op) -> None:
        saved = self.engine.memory.saved[op.application][op.micro]
        self._x(op.target, op.micro).copy_(saved, non_blocking=True)

    def _part(self, op: Op) -> tuple[int, int]:
        size = self.engine.stage_size
        start = op.piece * size
        return start, min(start + size, self.engine.units[op.unit].gradient_size)

    def _grad_out(self, op: Op) -> None:
        engine, (start, stop) = self.engine, self._part(op)
        memory = engine.memory
        buffer = memory.gradients[op.gradient] if op.gradient >= 0 else memory.ends_gradient
        stage = engine.stages[op.stage][: stop - start]
        part = buffer[start:stop]
        if part.dtype != stage.dtype:  # a conversion and a copy in one would block the host
            part = part.to(stage.dtype)
        stage.copy_(part, non_blocking=True)
        engine.bytes_out += stage.nbytes

    def _acc(self, op: Op) -> None:
        engine, (start, stop) = self.engine, self._part(op)
        unit = engine.units[op.unit]
        engine._await_update(op.unit)  # the optimizer reads the same gradient
        part = engine.stages[op.stage][: stop - start]
        unit.add_gradient(start, part, is_last=stop == unit.gradient_size)


class Bind(torch.autograd.Function):
    """Ties a pass into autograd; the anchor asks for a gradient, so that backward is called."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, made: Pass) -> Tensor:
        """The mean loss of the group."""
        ctx.made = made
        return made.forward()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        """Every gradient to the host; nothing flows on."""
        ctx.made.backward(upstream[0])
        return None, None
