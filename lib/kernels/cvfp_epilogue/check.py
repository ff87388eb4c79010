"""What checks and benchmarks know about the epilogue of a context block."""

from __future__ import annotations

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.cvfp_epilogue import cvfp_epilogue


def make(draw: Draw, n: int, d: int, V: int, stats: int = 0) -> Case:
    """n rows of width d, V ids; `stats` 1: z_old, of which half lies far from z'."""
    P, z, table = draw.half(n, d), draw.half(n, d), draw.half(V, d)
    gamma, beta = draw.wide(d, mean=1.0, std=0.3), draw.wide(d, std=0.3)
    old = draw.half(n, d, grad=False) if stats else None
    tensors = {"P": P, "z": z, "table": table, "ids": draw.ids(n, below=V)}
    return Case({**tensors, "gamma": gamma, "beta": beta, "z_old": old}, {"tau": 2.0})


OPERATOR = Operator(
    name="cvfp_epilogue",
    function=cvfp_epilogue,
    make=make,
    small=(
        {"n": 17, "d": 47, "V": 5},
        {"n": 19, "d": 130, "V": 40, "stats": 1},
    ),
    production={"n": 32_768, "d": 768, "V": 50_257},
    compiled={"n": 32, "d": 768, "V": 64, "stats": 1},
    bounds={"": (1e-5, 8e-3)},
)
