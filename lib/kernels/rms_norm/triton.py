"""RMSNorm forward and backward; formulas in reference.py.

Forward: a program takes ROWS rows whole, reads x once and writes y and r = 1/rms: 2 n d e + 4 n
bytes. Backward: a program goes over every P-th group of rows, writes dx (3 n d e bytes) and one
partial of dw, d numbers; the P partials are added in order. Source: arXiv 1910.07467.
Letters: n rows, d width, BD the power of two that holds d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, launch, name_of, processors, rows_of, wide
from lib.kernels.rms_norm.configs import CANDIDATES, TUNED

PROGRAMS_PER_PROCESSOR = 4  # of the backward pass: enough to hide latency, few partials


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    x, w, y, r, x_row, n, d, eps,
    HAS_W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x (n, d) with row stride x_row -> y (n, d) contiguous, r (n,); grid ceil(n / ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BD)
    seen = (row < n)[:, None] & (col < d)[None, :]
    value = tl.load(x + row[:, None] * x_row + col[None, :], mask=seen, other=0.0).to(ACC)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / d + eps)
    out = value * rstd[:, None]
    if HAS_W:
        out = out * tl.load(w + col, mask=col < d, other=0.0).to(ACC)[None, :]
    tl.store(y + row[:, None] * d + col[None, :], out.to(y.dtype.element_ty), mask=seen)
    tl.store(r + row, rstd, mask=row < n)


@triton.jit(do_not_specialize=["n"])
def backward_kernel(
    dy, x, w, r, dx, parts, dy_row, x_row, n, d,
    HAS_W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx (n, d) contiguous; parts (programs, d): each program's share of dw; grid (programs,)."""
    col = tl.arange(0, BD)
    total = tl.zeros((BD,), ACC)
    weight = tl.full((BD,), 1.0, ACC)
    if HAS_W:
        weight = tl.load(w + col, mask=col < d, other=0.0).to(ACC)
    for group in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        seen = (row < n)[:, None] & (col < d)[None, :]
        value = tl.load(x + row[:, None] * x_row + col[None, :], mask=seen, other=0.0).to(ACC)
        up = tl.load(dy + row[:, None] * dy_row + col[None, :], mask=seen, other=0.0).to(ACC)
        rstd = tl.load(r + row, mask=row < n, other=0.0)[:, None]
        unit = value * rstd
        pulled = up * weight[None, :]
        mean = tl.sum(pulled * unit, axis=1) / d
        out = rstd * (pulled - unit * mean[:, None])
        tl.store(dx + row[:, None] * d + col[None, :], out.to(dx.dtype.element_ty), mask=seen)
        total += tl.sum(up * unit, axis=0)
    if HAS_W:
        place = parts + tl.program_id(0).to(tl.int64) * d + col
        tl.store(place, total, mask=col < d)


def _config(x: Tensor) -> configs.Config:
    return configs.pick(CANDIDATES, TUNED, "rms_norm", x.shape[-1], x.device, name_of(x.dtype))


@torch.library.custom_op("kumiki::rms_norm", mutates_args=())
def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, contiguous, and r (rows,) fp32."""
    rows, config = rows_of(x), _config(x)
    (n, d), y = rows.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(n, dtype=wide(x), device=x.device)
    launch(
        forward_kernel, (triton.cdiv(n, config["ROWS"]),), config,
        x=rows, w=rows if weight is None else weight.contiguous(), y=y, r=r,
        x_row=rows.stride(0), n=n, d=d, eps=eps,
        HAS_W=weight is not None, BD=triton.next_power_of_2(d), ACC=acc(x),
    )  # fmt: skip
    return y, r


@torch.library.custom_op("kumiki::rms_norm_backward", mutates_args=())
def backward(dy: Tensor, x: Tensor, weight: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    """dx like x, contiguous, and dw (d,) in the weight's dtype; empty without one."""
    rows, ups, config = rows_of(x), rows_of(dy), _config(x)
    (n, d), dx = rows.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups = triton.cdiv(n, config["ROWS"])
    programs = min(groups, PROGRAMS_PER_PROCESSOR * processors(x))
    parts = torch.empty(programs if weight is not None else 0, d, dtype=wide(x), device=x.device)
    launch(
        backward_kernel, (programs,), config,
        dy=ups, x=rows, w=rows if weight is None else weight.contiguous(), r=r, dx=dx, parts=parts,
        dy_row=ups.stride(0), x_row=rows.stride(0), n=n, d=d,
        HAS_W=weight is not None, BD=triton.next_power_of_2(d), ACC=acc(x),
    )  # fmt: skip
    if weight is None:
        return dx, x.new_empty(0)
    return dx, parts.sum(0).to(weight.dtype)


@forward.register_fake
def _(x, weight, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(
        x.numel() // max(1, x.shape[-1]), dtype=wide(x)
    )


@backward.register_fake
def _(dy, x, weight, r):
    dw = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dw


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, dy, _dr):
    x, weight, r = ctx.saved_tensors
    dx, dw = backward(dy, x, weight, r)
    return dx, None if weight is None else dw, None


forward.register_autograd(_backward, setup_context=_save)
