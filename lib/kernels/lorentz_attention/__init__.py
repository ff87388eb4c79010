"""Causal windowed attention by squared distance in the Lorentz model (kernels.md 5.4).

In:  points q, k of one hyperbolic space per head (space parts), values, curvature, temperature.
Out: o, the mean of the visible values under softmax of minus beta times the squared distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels.lorentz_attention.reference import backward, forward


def lorentz_attention(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, beta: Tensor, window: int
) -> Tensor:
    """q (B, H, n, D), k (B, H, m, D), v (B, H, m, E) -> (B, H, n, E) in v's dtype.

    Queries are the last n of m positions; key j is visible where 0 <= i - j < window. c, beta (H,)
    fp32 and positive; c None: the Euclidean limit. Gradients are first order only.
    """
    _check(q, k, v, c, beta, window)
    with torch.autocast(q.device.type, enabled=False):
        return _Attention.apply(q, k, v, c, beta, window)  # type: ignore[return-value]  # untyped


def _check(q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, beta: Tensor, window: int) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"q, k, v must be (B, H, positions, width): {shapes}")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[2] > k.shape[2]:
        raise ValueError(f"q, k, v do not fit: {shapes}")
    for name, x in (("c", c), ("beta", beta)):
        if x is not None and x.shape != (q.shape[1],):
            raise ValueError(f"{name} {tuple(x.shape)} must be one number a head: {shapes}")
    if window < 1:
        raise ValueError(f"window {window} must be 1 or more")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, c, beta, window):
        out, lse = forward(q, k, v, c, beta, window)
        ctx.save_for_backward(q, k, v, c, beta, out, lse)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, c, beta, out, lse = ctx.saved_tensors
        return *backward(q, k, v, c, beta, ctx.window, out, lse, dout), None
