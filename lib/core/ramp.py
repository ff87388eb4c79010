"""A whole number that changes between equal parts of a run: a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """values[k] in part k of `steps` steps; one value holds throughout."""

    values: tuple[int, ...]
    steps: int  # N

    def at(self, step: int) -> int:
        """The value of `step`; the last one holds from step N on."""
        return self.values[min(len(self.values) * step // self.steps, len(self.values) - 1)]

    def before(self, step: int) -> int:
        """Sum of the values of all steps before `step`."""
        parts = len(self.values)
        starts = [-(-k * self.steps // parts) for k in range(parts)]
        ends = [*starts[1:], max(step, self.steps)]
        spans = (max(0, min(step, end) - start) for start, end in zip(starts, ends, strict=True))
        return sum(value * span for value, span in zip(self.values, spans, strict=True))
