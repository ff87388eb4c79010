"""Linear recurrence over time, h_t = exp(log_a_t) h_{t-1} + b_t (kernels.md 5.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.scan.reference import backward, forward


def scan(log_a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """log_a, b (B, T, r), h0 (B, r), all fp32 (or fp64) -> h (B, T, r) and h_T (B, r).

    Gradients are first order only.
    """
    if b.ndim != 3 or log_a.shape != b.shape or h0.shape != (b.shape[0], b.shape[2]):
        shapes = f"log_a {tuple(log_a.shape)}, b {tuple(b.shape)}, h0 {tuple(h0.shape)}"
        raise ValueError(f"need (B, T, r) twice and (B, r): {shapes}")
    if b.shape[1] < 1:
        raise ValueError(f"b {tuple(b.shape)} has no step")
    limit = "" if log_a.dtype == b.dtype == h0.dtype else "mixed dtypes"
    if decide("scan", b.device, b.dtype, limit):
        h = torch.ops.kumiki.scan(log_a, b, h0)
        return h, h[:, -1]
    h = _Scan.apply(log_a, b, h0)
    return h, h[:, -1]  # type: ignore[index,return-value]  # apply is untyped


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_a, b, h0):
        h = forward(log_a, b, h0)
        ctx.save_for_backward(log_a, h, h0)
        return h

    @staticmethod
    def backward(ctx, dh):
        log_a, h, h0 = ctx.saved_tensors
        return backward(log_a, h, h0, dh)
