"""Schedules and horizon: pure functions of the step and of a few integers.

In:  a name and the run's length.   Out: multipliers of every group's peak rate, at any step.
Invariant: never negative, never above 1; rising, then falling; resuming at a step continues the
           curve.
Note:  toy clamps shorten ramps of short runs where a `Schedule` is derived (`make_schedule`), not
       inside the formulas, so the formulas are those of the published runs. None acts from 1,600
       steps on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lib.core.errors import UserError

REFERENCE_BATCH = 2**19  # tokens; the batch at which the power law below was anchored
BATCH_EXPONENT = 0.383  # arXiv 2505.13738
MIN_STEPS = 256  # an automatic batch leaves at least as many steps


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What one step applies: lr times every group's peak, Muon's momentum, Muon's decay factor.

    adamw: False where AdamW only gathers this step's gradients.
    """

    lr: float = 1.0
    momentum: float = 0.95
    weight_decay: float = 1.0
    adamw: bool = True


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, plateau, decay. Steps count from 0 to steps - 1."""

    steps: int  # N
    warmup: int = 0  # lr (it + 1) / warmup before it
    decay: int = 0  # steps of the falling part, at the end
    shape: Literal["linear", "cosine"] = "linear"  # of the falling part
    final: float = 0.0  # multiplier at step N, which is never taken
    momentum: tuple[float, float, float] = (0.85, 0.95, 0.95)  # first, plateau, at step N
    momentum_ramp: int = 0  # steps from first to plateau
    cosine_decay: bool = False  # Muon's weight decay falls by half a cosine, else stays

    def lr(self, step: int) -> float:
        """Multiplier of the learning rate."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = self._left(step)
        falling = left if self.shape == "linear" else (1 - math.cos(math.pi * left)) / 2
        return falling + self.final * (1 - falling)

    def momentum_at(self, step: int) -> float:
        """Muon's momentum; the ramp has priority over the fall."""
        first, plateau, last = self.momentum
        if step < self.momentum_ramp:
            return first + (plateau - first) * step / self.momentum_ramp
        return plateau + (last - plateau) * (1 - self._left(step))

    def weight_decay(self, step: int) -> float:
        """Multiplier of Muon's weight decay."""
        return (1 + math.cos(math.pi * step / self.steps)) / 2 if self.cosine_decay else 1.0

    def at(self, step: int) -> Multipliers:
        """All three."""
        return Multipliers(
            lr=self.lr(step), momentum=self.momentum_at(step), weight_decay=self.weight_decay(step)
        )

    def _left(self, step: int) -> float:
        """Share of the falling part that is still to come: 1 before it, 0 at step N."""
        return min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0


SCHEDULES = ("constant", "linear", "triangle", "cosine", "warmdown", "base", "modern")


def make_schedule(
    name: str,
    steps: int,
    *,
    warmup: int = 0,
    warmdown_ratio: float = 0.2,
    final: float = 0.0,
) -> Schedule:
    """The schedule of a run of `steps`.

    constant | linear | cosine (fall from the end of warm-up) | warmdown (the last share falls
    linearly): warmup and final as given; triangle is linear with one step at the peak and the last
    one at `final`, as in TRM's published recipe. base, modern: the two eras' own values; warmup,
    ratio and final play no part. UserError: an unknown name, steps < 1, warm-up beyond the end.
    """
    if name not in SCHEDULES:
        raise UserError("unknown schedule", value=name, remedy=f"choose {', '.join(SCHEDULES)}")
    if steps < 1:
        raise UserError("a run needs steps", value=steps, remedy="use 1 or more")
    if name == "base":
        return Schedule(steps=steps, decay=round(0.2 * steps), momentum_ramp=min(300, steps // 4))
    if name == "modern":
        return Schedule(
            steps=steps, warmup=min(40, steps // 10), decay=round(0.65 * steps), final=0.05,
            momentum=(0.85, 0.97, 0.90), momentum_ramp=min(400, steps // 4), cosine_decay=True,
        )  # fmt: skip
    if warmup > steps:
        raise UserError("warm-up is longer than the run", value=warmup, remedy=f"at most {steps}")
    falls = {"constant": 0} | dict.fromkeys(("linear", "triangle", "cosine"), steps - warmup)
    decay = falls.get(name, round(warmdown_ratio * steps))
    shape = "cosine" if name == "cosine" else "linear"
    end = steps - 1 if name == "triangle" else steps
    return Schedule(steps=end, warmup=warmup, decay=decay, shape=shape, final=final)


def horizon(
    *,
    batch_tokens: int,
    params: int,
    flops_per_token: int,
    num_iterations: int | None = None,
    target_flops: float | None = None,
    param_data_ratio: float | None = None,
) -> int:
    """Steps of a run: the count given, else FLOPs / (FLOPs of a step), else ratio params / batch.

    UserError where none is above 0, or where the result is no step at all.
    """
    if num_iterations and num_iterations > 0:
        return num_iterations
    if target_flops and target_flops > 0:
        tokens = target_flops / flops_per_token
        steps = round(tokens / batch_tokens)
    elif param_data_ratio and param_data_ratio > 0:
        tokens = param_data_ratio * params
        steps = math.floor(tokens / batch_tokens)
    else:
        raise UserError(
            "the run has no length",
            remedy="give steps, target_flops or param_data_ratio above 0",
        )
    if steps < 1:
        raise UserError(
            "the run is shorter than one step",
            value=f"{tokens:,.0f} tokens in batches of {batch_tokens:,}",
            remedy=f"use batch_tokens of {math.floor(tokens):,} or less",
        )
    return steps


def auto_batch(tokens: float, reference_tokens: float, context: int) -> int:
    """Tokens of a step: 2^round(log2(2^19 (D / D_ref)^0.383)), then at least 256 steps and one row.

    tokens D of the run, reference_tokens D_ref of the size the law is anchored at. The cap D / 256
    is rounded down to a power of two; the result is a multiple of the context.
    """
    law = REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT
    cap = max(1, math.floor(tokens / MIN_STEPS))
    batch = min(2 ** round(math.log2(law)), 1 << (cap.bit_length() - 1))
    return max(context, batch // context * context)
