"""What checks and benchmarks know about the linear recurrence."""

from __future__ import annotations

import torch

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.scan import scan


def make(draw: Draw, B: int, T: int, r: int, decay: float = 0.1) -> Case:
    """Decays exp(-decay |normal|), so that h stays O(1)."""
    with torch.no_grad():
        log_a = -decay * draw.wide(B, T, r).abs()
    b, h0 = draw.wide(B, T, r, std=0.5), draw.wide(B, r)
    return Case({"log_a": log_a.requires_grad_(), "b": b, "h0": h0})


OPERATOR = Operator(
    name="scan",
    function=scan,
    make=make,
    small=({"B": 1, "T": 65, "r": 33}, {"B": 2, "T": 5, "r": 7}),
    production={"B": 16, "T": 1_024, "r": 64},
    compiled={"B": 2, "T": 128, "r": 64},
    bounds={"": (1e-5, 1e-5)},
    dtypes=(torch.float32,),
)
