"""Rows of a tensor train, and the gradients of its cores; formulas in reference.py.

Forward: a program per cell, (d1 x R)(R x d2), 2 n R d1 d2 FLOP, writes n d e bytes. Backward: cells
sorted by i1 for dC1 (then by i2 for dC2); a program adds one segment of cells with one index,
dE_t C2[i2]^T each, in fp32 and in order (lib.kernels.scatter). Sides are padded to powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, dot, launch, name_of, power_of_two, unit, wide
from lib.kernels.scatter import segments, slot_count
from lib.kernels.scatter_triton import add_slots
from lib.kernels.tt_gather.configs import CANDIDATES, TUNED


@triton.jit
def core(C, i, R, d, RP: tl.constexpr, DP: tl.constexpr):
    """C[i] (R, d) as an (RP, DP) tile, zero beyond."""
    k, a = tl.arange(0, RP), tl.arange(0, DP)
    seen = (k < R)[:, None] & (a < d)[None, :]
    return tl.load(C + i * R * d + k[:, None] * d + a[None, :], mask=seen, other=0.0)


@triton.jit
def gather_kernel(
    cell, C1, C2, out, v2, R, d1, d2, width,
    RP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out (n, width) contiguous; C1 (v1, R, d1), C2 (v2, R, d2) contiguous; grid (n,)."""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(cell + t)
    one = tl.trans(core(C1, p // v2, R, d1, RP, D1)).to(DOT)
    two = core(C2, p % v2, R, d2, RP, D2).to(DOT)
    row = tl.dot(one, two, input_precision="ieee", out_dtype=ACC)
    a, b = tl.arange(0, D1), tl.arange(0, D2)
    column = a[:, None] * d2 + b[None, :]
    seen = (a < d1)[:, None] & (b < d2)[None, :] & (column < width)
    tl.store(out + t * width + column, row.to(out.dtype.element_ty), mask=seen)


@triton.jit
def scatter_kernel(
    cell, other, dout, order, index, begin, end, slot, grad, slots,
    v2, R, d_own, d_other, d2, width, up_row,
    FIRST: tl.constexpr, RP: tl.constexpr, DOWN: tl.constexpr, DOTHER: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One segment's share of dC1 (FIRST) or dC2: sum over its cells of other[i] dE, (R, d_own).

    FIRST: own columns a, dE[a, b] at a d2 + b, other = C2; else own columns b, other = C1.
    Straight into grad (v, R, d_own), or into its slot. Grid (segments,).
    """
    s = tl.program_id(0)
    k, own, far = tl.arange(0, RP), tl.arange(0, DOWN), tl.arange(0, DOTHER)
    total = tl.zeros((RP, DOWN), ACC)
    near, beyond = own[None, :], far[:, None]  # (DOTHER, DOWN): FIRST takes dE transposed
    column = near * d2 + beyond if FIRST else beyond * d2 + near
    seen = (far < d_other)[:, None] & (own < d_own)[None, :] & (column < width)
    for entry in range(tl.load(begin + s), tl.load(end + s)):
        t = tl.load(order + entry)
        p = tl.load(cell + t)
        i = p % v2 if FIRST else p // v2
        up = tl.load(dout + t * up_row + column, mask=seen, other=0.0).to(DOT)
        rows = core(other, i, R, d_other, RP, DOTHER).to(DOT)
        total += tl.dot(rows, up, input_precision="ieee", out_dtype=ACC)
    place = k[:, None] * d_own + own[None, :]
    inside = (k < R)[:, None] & (own < d_own)[None, :] & (tl.load(end + s) > tl.load(begin + s))
    at = tl.load(slot + s)
    straight = grad + tl.load(index + s) * R * d_own + place
    tl.store(straight, total.to(grad.dtype.element_ty), mask=inside & (at < 0))
    tl.store(slots + tl.maximum(at, 0) * R * d_own + place, total, mask=inside & (at >= 0))


def _config(kernel: str, C1: Tensor, C2: Tensor) -> configs.Config:
    widest = max(C1.shape[2], C2.shape[2])
    return configs.pick(CANDIDATES, TUNED, kernel, widest, C1.device, name_of(C1.dtype))


@torch.library.custom_op("kumiki::tt_gather", mutates_args=())
def forward(cell: Tensor, C1: Tensor, C2: Tensor, width: int) -> Tensor:
    """cell (n,) -> (n, width) in the cores' dtype."""
    (_, R, d1), (v2, _, d2) = C1.shape, C2.shape
    out = torch.empty(len(cell), width, dtype=C1.dtype, device=C1.device)
    launch(
        gather_kernel, (len(cell),), _config("gather", C1, C2),
        cell=cell.contiguous(), C1=C1.contiguous(), C2=C2.contiguous(), out=out,
        v2=v2, R=R, d1=d1, d2=d2, width=width,
        RP=power_of_two(R), D1=power_of_two(d1), D2=power_of_two(d2), ACC=acc(C1), DOT=dot(C1),
    )  # fmt: skip
    return out


@torch.library.custom_op("kumiki::tt_gather_backward", mutates_args=())
def backward(dout: Tensor, cell: Tensor, C1: Tensor, C2: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both cores."""
    dout, cell, C1, C2 = unit(dout), cell.contiguous(), C1.contiguous(), C2.contiguous()
    return _core_gradient(dout, cell, C1, C2, 0), _core_gradient(dout, cell, C1, C2, 1)


def _core_gradient(dout: Tensor, cell: Tensor, C1: Tensor, C2: Tensor, which: int) -> Tensor:
    own, other = (C1, C2) if which == 0 else (C2, C1)
    (v, R, d_own), d_other, v2 = own.shape, other.shape[2], C2.shape[0]
    found = segments(cell // v2 if which == 0 else cell % v2, v)
    grad = torch.zeros(own.shape, dtype=own.dtype, device=own.device)
    slots = torch.empty(slot_count(len(cell)), R * d_own, dtype=wide(own), device=own.device)
    launch(
        scatter_kernel, (len(found.index),), _config("scatter", C1, C2),
        cell=cell, other=other, dout=dout, order=found.order, index=found.index,
        begin=found.begin, end=found.end, slot=found.slot, grad=grad, slots=slots,
        v2=v2, R=R, d_own=d_own, d_other=d_other, d2=C2.shape[2], width=dout.shape[1],
        up_row=dout.stride(0), FIRST=which == 0, RP=power_of_two(R), DOWN=power_of_two(d_own),
        DOTHER=power_of_two(d_other), ACC=acc(own), DOT=dot(own),
    )  # fmt: skip
    add_slots(found, slots, grad)
    return grad


@forward.register_fake
def _(cell, C1, C2, width):
    return C1.new_empty(cell.shape[0], width)


@backward.register_fake
def _(dout, cell, C1, C2):
    return C1.new_empty(C1.shape), C2.new_empty(C2.shape)


def _save(ctx, inputs, output) -> None:
    cell, C1, C2, _ = inputs
    ctx.save_for_backward(cell, C1, C2)


def _backward(ctx, dout):
    return None, *backward(dout, *ctx.saved_tensors), None


forward.register_autograd(_backward, setup_context=_save)
