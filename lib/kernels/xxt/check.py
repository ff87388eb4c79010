"""What checks and benchmarks know about symmetric products."""

from __future__ import annotations

import torch

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.xxt import xxt


def make(draw: Draw, b: int, n: int, m: int, affine: int = 0) -> Case:
    """Y = X X^T with entries O(1); `affine` 1: 0.5 X X^T - 2 A."""
    X = draw.half(b, n, m, std=m**-0.25, grad=False)
    if not affine:
        return Case({"X": X})
    half = draw.half(b, n, n, grad=False)
    with torch.no_grad():
        A = torch.triu(half) + torch.triu(half, 1).mT
    return Case({"X": X, "A": A}, {"alpha": 0.5, "beta": -2.0})


OPERATOR = Operator(
    name="xxt",
    function=xxt,
    make=make,
    small=({"b": 2, "n": 17, "m": 47}, {"b": 1, "n": 65, "m": 65, "affine": 1}),
    production={"b": 1, "n": 2_048, "m": 7_168},
    compiled={"b": 1, "n": 256, "m": 512, "affine": 1},
    bounds={"": (1e-6, 4e-3)},
)
