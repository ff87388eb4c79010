"""What checks and benchmarks know about the epilogue of a context block."""

from __future__ import annotations

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.cvfp_epilogue import cvfp_epilogue


def make(draw: Draw, n: int, d: int) -> Case:
    """n rows of width d: a product in the compute type, a state that is wide, as in training."""
    gamma, beta = draw.wide(d, mean=1.0, std=0.3), draw.wide(d, std=0.3)
    return Case({"P": draw.half(n, d), "z": draw.wide(n, d), "gamma": gamma, "beta": beta}, {})


OPERATOR = Operator(
    name="cvfp_epilogue",
    function=cvfp_epilogue,
    make=make,
    small=({"n": 17, "d": 47}, {"n": 19, "d": 130}),
    production={"n": 32_768, "d": 768},
    compiled={"n": 32, "d": 768},
    bounds={"": (1e-5, 8e-3)},
)
