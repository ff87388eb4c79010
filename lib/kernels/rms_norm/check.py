"""What checks and benchmarks know about RMSNorm."""

from __future__ import annotations

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.rms_norm import rms_norm


def make(draw: Draw, n: int, d: int, weighted: int = 1) -> Case:
    """n rows of width d; `weighted` 0: no weight."""
    w = draw.wide(d, mean=1.0, std=0.3) if weighted else None
    return Case({"x": draw.half(n, d), "weight": w}, {"eps": 2.0**-23})


OPERATOR = Operator(
    name="rms_norm",
    function=rms_norm,
    make=make,
    small=({"n": 17, "d": 47}, {"n": 3, "d": 130, "weighted": 0}),
    production={"n": 16_384, "d": 2_048},
    compiled={"n": 8, "d": 2_048},
    bounds={"": (1e-5, 4e-3)},
)
