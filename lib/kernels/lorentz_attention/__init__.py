"""Causal windowed attention by squared distance in the Lorentz model (kernels.md 5.4).

In:  points q, k of one hyperbolic space per head (space parts), values, curvature, temperature.
Out: o, the mean of the visible values under softmax of minus beta times the squared distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.lorentz_attention.reference import backward, forward

WIDTHS = (16, 32, 64, 128)  # of heads, that the kernel has tiles for


def lorentz_attention(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, beta: Tensor, window: int
) -> Tensor:
    """q (B, H, n, D), k (B, H, m, D), v (B, H, m, E) -> (B, H, n, E) in v's dtype.

    Queries are the last n of m positions; key j is visible where 0 <= i - j < window. c, beta (H,)
    fp32 and positive; c None: the Euclidean limit. Gradients are first order only.
    """
    _check(q, k, v, c, beta, window)
    with torch.autocast(q.device.type, enabled=False):
        if decide("lorentz_attention", q.device, q.dtype, _limit(q, k, v, c), q.shape[3]):
            return torch.ops.kumiki.lorentz_attention(q, k, v, c, beta, window)[0]
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


def _limit(q: Tensor, k: Tensor, v: Tensor, c: Tensor | None) -> str:
    """Why the kernel cannot take these shapes."""
    if c is None:
        return "no curvature"
    if q.shape[3] not in WIDTHS or v.shape[3] != q.shape[3]:
        return f"head width {q.shape[3]}"
    return "" if q.shape == k.shape else "continues a row"


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
