"""What checks and benchmarks know about the squared-ReLU MLP."""

from __future__ import annotations

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.relu2_mlp import relu2_mlp


def make(draw: Draw, n: int, d: int, F: int) -> Case:
    """n rows, width d in and out, hidden width F; everything O(1)."""
    weights = {"W1": draw.half(F, d, std=d**-0.5), "W2": draw.half(d, F, std=F**-0.5)}
    return Case({"x": draw.half(n, d), **weights})


OPERATOR = Operator(
    name="relu2_mlp",
    function=relu2_mlp,
    make=make,
    small=({"n": 17, "d": 24, "F": 40}, {"n": 65, "d": 40, "F": 72}),
    production={"n": 16_384, "d": 1_280, "F": 5_120},
    compiled={"n": 64, "d": 1_280, "F": 256},
    bounds={"": (1e-5, 8e-3)},
)
