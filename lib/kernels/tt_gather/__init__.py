"""Embedding rows out of a tensor train of two cores (kernels.md 5.7)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.tt_gather.reference import backward, forward

MAX_SIDE = 128  # of rank, d1 and d2: tiles hold them whole


def tt_gather(cell: Tensor, C1: Tensor, C2: Tensor, width: int) -> Tensor:
    """cell (...) int64 in [0, v1 v2) -> (..., width) in the cores' dtype, autocast or not.

    C1 (v1, R, d1), C2 (v2, R, d2), width <= d1 d2. Gradients are first order only.
    """
    if C1.ndim != 3 or C2.ndim != 3 or C1.shape[1] != C2.shape[1]:
        raise ValueError(f"cores do not fit: {tuple(C1.shape)}, {tuple(C2.shape)}")
    if not 1 <= width <= C1.shape[2] * C2.shape[2]:
        raise ValueError(f"width {width} does not fit {tuple(C1.shape)}, {tuple(C2.shape)}")
    with torch.autocast(C1.device.type, enabled=False):
        if decide("tt_gather", C1.device, C1.dtype, _limit(C1, C2)):
            out = torch.ops.kumiki.tt_gather(cell.reshape(-1), C1, C2, width)
        else:
            out = _Gather.apply(cell.reshape(-1), C1, C2, width)
    return out.view(*cell.shape, width)  # type: ignore[union-attr]  # apply is untyped


def _limit(C1: Tensor, C2: Tensor) -> str:
    """Why the kernel cannot take these cores."""
    sides = (*C1.shape[1:], C2.shape[2])
    return "" if max(sides) <= MAX_SIDE and C1.dtype == C2.dtype else f"cores {sides}"


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, C1, C2, width):
        ctx.save_for_backward(cell, C1, C2)
        return forward(cell, C1, C2, width)

    @staticmethod
    def backward(ctx, dout):
        cell, C1, C2 = ctx.saved_tensors
        return None, *backward(cell, C1, C2, dout), None
