"""Causal linear attention with a scalar decay per head and step, by chunks (kernels.md 5.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.gla.reference import backward, forward

WIDTHS = (16, 32, 64, 128)  # of keys and values, that the kernels have tiles for


def gla(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, H, T, Dv) in v's dtype and the last state (B, H, Dk, Dv) fp32.

    q, k (B, H, T, Dk), k already times its step size; v (B, H, T, Dv); log_a (B, H, T) fp32, 0 or
    less; s0 (B, H, Dk, Dv) fp32. Gradients are first order only.
    """
    B, H, T, Dk = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    fits = v.ndim == 4 and k.shape == q.shape and v.shape[:3] == q.shape[:3]
    if T < 1 or not fits or log_a.shape != (B, H, T) or s0.shape != (B, H, Dk, v.shape[3]):
        named = (("q", q), ("k", k), ("v", v), ("log_a", log_a), ("s0", s0))
        raise ValueError("do not fit: " + ", ".join(f"{n} {tuple(x.shape)}" for n, x in named))
    with torch.autocast(q.device.type, enabled=False):
        widths = {Dk, v.shape[3]}
        limit = "" if widths <= set(WIDTHS) else f"widths {Dk} and {v.shape[3]}"
        if decide("gla", q.device, q.dtype, limit, Dk):
            return torch.ops.kumiki.gla(q, k, v, log_a, s0)[:2]
        return _Gla.apply(q, k, v, log_a, s0)  # type: ignore[return-value]  # apply is untyped


class _Gla(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_a, s0):
        out, s_end, before = forward(q, k, v, log_a, s0)
        ctx.save_for_backward(q, k, v, log_a, before, s_end)
        return out, s_end

    @staticmethod
    def backward(ctx, dout, ds_end):
        q, k, v, log_a, before, s_end = ctx.saved_tensors
        return backward(q, k, v, log_a, before, s_end, dout, ds_end)
