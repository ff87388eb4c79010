"""What checks and benchmarks know about the tensor-train gather."""

from __future__ import annotations

from math import isqrt

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.tt_gather import tt_gather


def _sides(total: int) -> tuple[int, int]:
    """ceil(sqrt total), and what it takes of them."""
    one = isqrt(total - 1) + 1
    return one, -(-total // one)


def make(draw: Draw, n: int, d: int, R: int, V: int) -> Case:
    """n cells of a table of V rows and width d, rank R; rows O(1)."""
    (v1, v2), (d1, d2) = _sides(V), _sides(d)
    cores = {"C1": draw.half(v1, R, d1, std=R**-0.25), "C2": draw.half(v2, R, d2, std=R**-0.25)}
    return Case({"cell": draw.ids(n, below=V), **cores}, {"width": d})


OPERATOR = Operator(
    name="tt_gather",
    function=tt_gather,
    make=make,
    small=({"n": 17, "d": 47, "R": 5, "V": 31}, {"n": 270, "d": 20, "R": 16, "V": 2}),
    production={"n": 16_384, "d": 2_048, "R": 32, "V": 50_257},
    compiled={"n": 32, "d": 2_048, "R": 32, "V": 64},
    bounds={"": (1e-5, 1e-2), "out0": (1e-6, 4e-3)},
)
