"""The kernels of `scatter`: sums of a segment's rows, and split rows put together in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels.configs import tile
from lib.kernels.launch import acc, launch, unit, wide
from lib.kernels.scatter import Segments, segments, slot_count

COLUMNS = tile(4, BC=512)


@triton.jit
def add_segment_kernel(
    x, order, index, begin, end, slot, out, slots, width, x_row,
    BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[index] or slots[slot] = sum of x[order[begin:end]]; grid (segments, ceil(width / BC))."""
    s = tl.program_id(0)
    col = tl.program_id(1) * BC + tl.arange(0, BC)
    first, last = tl.load(begin + s), tl.load(end + s)
    total = tl.zeros((BC,), ACC)
    for entry in range(first, last):
        row = tl.load(order + entry)
        total += tl.load(x + row * x_row + col, mask=col < width, other=0.0).to(ACC)
    at, seen = tl.load(slot + s), (col < width) & (last > first)
    straight = out + tl.load(index + s) * width + col
    tl.store(straight, total.to(out.dtype.element_ty), mask=seen & (at < 0))
    tl.store(slots + tl.maximum(at, 0) * width + col, total, mask=seen & (at >= 0))


@triton.jit
def add_slots_kernel(
    slots, split, first, last, out, width, BC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """out[split] (rows, width) = sum of its slots in order; grid (splits, ceil(width / BC))."""
    run = tl.program_id(0)
    row = tl.load(split + run)
    col = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), ACC)
    for slot in range(tl.load(first + run), tl.load(last + run)):
        total += tl.load(slots + slot * width + col, mask=col < width, other=0.0)
    seen = (col < width) & (row >= 0)
    tl.store(out + tl.maximum(row, 0) * width + col, total.to(out.dtype.element_ty), mask=seen)


def add_rows(x: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, width) in dtype: at i the sum of x (n, width) where index (n,) is i, in fp32."""
    x, (n, width), found = unit(x), x.shape, segments(index, rows)
    out = torch.zeros(rows, width, dtype=dtype, device=x.device)
    slots = torch.empty(slot_count(n), width, dtype=wide(x), device=x.device)
    launch(
        add_segment_kernel, (len(found.index), triton.cdiv(width, COLUMNS["BC"])), COLUMNS,
        x=x, order=found.order, index=found.index, begin=found.begin, end=found.end,
        slot=found.slot, out=out, slots=slots, width=width, x_row=x.stride(0), ACC=acc(x),
    )  # fmt: skip
    add_slots(found, slots, out)
    return out


def add_slots(found: Segments, slots: Tensor, out: Tensor) -> None:
    """Sums of split rows: slots (S, width) fp32 into out (rows, width), both contiguous."""
    width = slots.shape[1]
    launch(
        add_slots_kernel, (len(found.split), triton.cdiv(width, COLUMNS["BC"])), COLUMNS,
        slots=slots, split=found.split, first=found.first, last=found.last, out=out, width=width,
        ACC=acc(slots),
    )  # fmt: skip
