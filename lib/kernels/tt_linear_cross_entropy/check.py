"""What checks and benchmarks know about the tensor-train cross-entropy."""

from __future__ import annotations

from math import isqrt

import torch

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.tt_linear_cross_entropy import tt_linear_cross_entropy


def make(
    draw: Draw, n: int, d: int, R: int, V: int, block: int = 0, softcap: float = 0.0,
    shuffled: int = 0, reduction: str = "mean", ignored: int = 1,
) -> Case:  # fmt: skip
    """n rows, a table of V rows, width d, rank R; logits O(1); block: first indices at once."""
    v1, d1 = isqrt(V - 1) + 1, isqrt(d - 1) + 1
    v2, d2 = -(-V // v1), -(-d // d1)
    std = (R * d) ** -0.25
    cores = {"C1": draw.wide(v1, R, d1, std=std), "C2": draw.wide(v2, R, d2, std=std)}
    targets = draw.ids(n, below=V)
    targets[n - ignored :] = -1
    targets[:1] = V - 1
    cells = None
    if shuffled:
        order = torch.randperm(v1 * v2, generator=torch.Generator().manual_seed(1))[:V]
        cells = order.to(targets.device)
    tensors = {"h": draw.half(n, d), **cores, "targets": targets, "cells": cells}
    options = {"vocab_size": V, "softcap": softcap, "reduction": reduction}
    return Case(tensors, {**options, "block": block or "auto"})


OPERATOR = Operator(
    name="tt_linear_cross_entropy",
    function=tt_linear_cross_entropy,
    make=make,
    small=(
        {"n": 17, "d": 24, "R": 5, "V": 31, "block": 2, "softcap": 15.0, "shuffled": 1},
        {"n": 5, "d": 20, "R": 16, "V": 200, "block": 3, "reduction": "none"},
    ),
    production={"n": 8_192, "d": 2_048, "R": 32, "V": 50_257},
    compiled={"n": 8, "d": 64, "R": 32, "V": 4_096, "block": 40, "softcap": 15.0},
    bounds={"": (1e-5, 1.2e-2), "out0": (1e-6, 2e-3)},
)
