"""What checks and benchmarks know about Lorentz attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.lorentz_attention import lorentz_attention


def make(draw: Draw, B: int, H: int, T: int, D: int, window: int) -> Case:
    """Points of radius O(1) and scores O(1): beta 1 / (2 sqrt D), curvatures around 1."""
    q, k, v = (draw.half(B, H, T, D) for _ in range(3))
    return Case({"q": q, "k": k, "v": v, **_heads(draw, H, D)}, {"window": window})


def _heads(draw: Draw, H: int, D: int) -> dict[str, Tensor]:
    kind = {"dtype": draw.wide_dtype, "device": draw.device}
    c = torch.linspace(0.5, 1.5, H, **kind)
    beta = torch.linspace(0.5, 0.7, H, **kind) * D**-0.5
    return {"c": c.requires_grad_(), "beta": beta.requires_grad_()}


OPERATOR = Operator(
    name="lorentz_attention",
    function=lorentz_attention,
    make=make,
    small=(
        {"B": 1, "H": 2, "T": 65, "D": 32, "window": 20},
        {"B": 2, "H": 1, "T": 17, "D": 32, "window": 1_000},
    ),
    production={"B": 8, "H": 16, "T": 1_024, "D": 128, "window": 256},
    compiled={"B": 1, "H": 2, "T": 128, "D": 128, "window": 64},
    bounds={"": (1e-5, 1e-2), "c": (1e-4, 3e-2), "beta": (1e-4, 3e-2)},
    width="D",
)
