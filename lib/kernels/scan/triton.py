"""The recurrence by tiles of time with a carry; formulas in reference.py (phase7.md 3.4.4).

A program owns BR channels of one row of the batch and goes through all of T: inside a tile an
associative scan of (a, b), the tile's last state carried to the next. Padded steps have a = 1,
b = 0. Forward 12 B T r bytes, backward 20. Backward is the same scan from the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, launch, name_of, unit
from lib.kernels.scan.configs import CANDIDATES, TUNED


@triton.jit
def combine(a1, b1, a2, b2):
    """Two steps as one: (a1, b1) first."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def row_of(x, index, SIZE: tl.constexpr):
    """Row `index` of x (SIZE, columns); the others add zero."""
    return tl.sum(tl.where((tl.arange(0, SIZE) == index)[:, None], x, 0.0), axis=0)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    log_a, b, h0, h, T, r, a_b, a_t, b_b, b_t, h0_b,
    BT: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h (B, T, r) contiguous; grid (B, ceil(r / BR))."""
    batch = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BR + tl.arange(0, BR)
    carry = tl.load(h0 + batch * h0_b + col, mask=col < r, other=0.0).to(ACC)
    for first in range(0, T, BT):
        t = tl.cast(first, tl.int64) + tl.arange(0, BT)
        seen = (t < T)[:, None] & (col < r)[None, :]
        la = tl.load(log_a + batch * a_b + t[:, None] * a_t + col[None, :], mask=seen, other=0.0)
        bs = tl.load(b + batch * b_b + t[:, None] * b_t + col[None, :], mask=seen, other=0.0)
        decay, added = tl.associative_scan((tl.exp(la.to(ACC)), bs.to(ACC)), 0, combine)
        state = decay * carry[None, :] + added
        tl.store(h + (batch * T + t[:, None]) * r + col[None, :], state, mask=seen)
        carry = row_of(state, BT - 1, BT)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    log_a, h, h0, dh, dlog_a, db, dh0, T, r, a_b, a_t, h0_b, dh_b, dh_t,
    BT: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta_t = dh_t + a_{t+1} delta_{t+1}: db = delta, dlog_a = a delta h_{t-1}.

    dh0 = a_1 delta_1. Outputs and h contiguous; grid (B, ceil(r / BR)).
    """
    batch = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BR + tl.arange(0, BR)
    start = tl.load(h0 + batch * h0_b + col, mask=col < r, other=0.0).to(ACC)
    carry = tl.zeros((BR,), ACC)
    tiles = tl.cdiv(T, BT)
    for step in range(0, tiles):
        t = tl.cast((tiles - 1 - step) * BT, tl.int64) + tl.arange(0, BT)
        seen = (t < T)[:, None] & (col < r)[None, :]
        a_place = log_a + batch * a_b + t[:, None] * a_t + col[None, :]
        later = tl.load(a_place + a_t, mask=seen & (t + 1 < T)[:, None], other=0.0).to(ACC)
        up_place = dh + batch * dh_b + t[:, None] * dh_t + col[None, :]
        up = tl.load(up_place, mask=seen, other=0.0).to(ACC)
        decay, added = tl.associative_scan((tl.exp(later), up), 0, combine, reverse=True)
        delta = decay * carry[None, :] + added
        carry = row_of(delta, 0, BT)
        place = (batch * T + t[:, None]) * r + col[None, :]
        before = tl.load(h + place - r, mask=seen & (t > 0)[:, None], other=0.0).to(ACC)
        before = tl.where((t == 0)[:, None], start[None, :], before)
        pulled = tl.exp(tl.load(a_place, mask=seen, other=0.0).to(ACC)) * delta
        tl.store(db + place, delta, mask=seen)
        tl.store(dlog_a + place, pulled * before, mask=seen)
        start_place = dh0 + batch * r + col[None, :] + 0 * t[:, None]
        tl.store(start_place, pulled, mask=seen & (t == 0)[:, None])


def _config(x: Tensor) -> configs.Config:
    return configs.pick(CANDIDATES, TUNED, "scan", x.shape[-1], x.device, name_of(x.dtype))


@torch.library.custom_op("kumiki::scan", mutates_args=())
def forward(log_a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """log_a, b (B, T, r), h0 (B, r) -> h (B, T, r), contiguous; fp32 or fp64."""
    (B, T, r), config = b.shape, _config(b)
    log_a, b, h0 = unit(log_a), unit(b), unit(h0)
    h = torch.empty(B, T, r, dtype=b.dtype, device=b.device)
    launch(
        forward_kernel, (B, triton.cdiv(r, config["BR"])), config,
        log_a=log_a, b=b, h0=h0, h=h, T=T, r=r, a_b=log_a.stride(0), a_t=log_a.stride(1),
        b_b=b.stride(0), b_t=b.stride(1), h0_b=h0.stride(0), ACC=acc(b),
    )  # fmt: skip
    return h


@torch.library.custom_op("kumiki::scan_backward", mutates_args=())
def backward(dh: Tensor, log_a: Tensor, h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_a, b, h0."""
    (B, T, r), config = h.shape, _config(h)
    dh, log_a, h0 = unit(dh), unit(log_a), unit(h0)
    dlog_a, db = (torch.empty(B, T, r, dtype=h.dtype, device=h.device) for _ in range(2))
    dh0 = torch.empty(B, r, dtype=h.dtype, device=h.device)
    launch(
        backward_kernel, (B, triton.cdiv(r, config["BR"])), config,
        log_a=log_a, h=h, h0=h0, dh=dh, dlog_a=dlog_a, db=db, dh0=dh0, T=T, r=r,
        a_b=log_a.stride(0), a_t=log_a.stride(1), h0_b=h0.stride(0), dh_b=dh.stride(0),
        dh_t=dh.stride(1), ACC=acc(h),
    )  # fmt: skip
    return dlog_a, db, dh0


@forward.register_fake
def _(log_a, b, h0):
    return b.new_empty(b.shape)


@backward.register_fake
def _(dh, log_a, h, h0):
    return h.new_empty(h.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


def _save(ctx, inputs, output) -> None:
    log_a, _, h0 = inputs
    ctx.save_for_backward(log_a, output, h0)


def _backward(ctx, dh):
    return backward(dh, *ctx.saved_tensors)


forward.register_autograd(_backward, setup_context=_save)
