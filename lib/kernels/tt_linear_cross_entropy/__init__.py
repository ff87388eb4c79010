"""Cross-entropy of a head held as a tensor train, its table never expanded (kernels.md 5.2).

In:  hidden rows, two cores, targets (-1 = ignored).   Out: the loss; gradients for rows and cores.
Note: gradients are first order only.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lib.kernels import decide, load
from lib.kernels.tt_linear_cross_entropy.reference import (
    Head,
    first_indices,
    gradients,
    losses,
    whole,
)

NAME = "tt_linear_cross_entropy"
Reduction = Literal["mean", "sum", "none"]


def tt_linear_cross_entropy(
    h: Tensor,
    C1: Tensor,
    C2: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    cells: Tensor | None = None,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    block: int | Literal["auto"] = "auto",
) -> Tensor:
    """Loss in nats, fp32: mean over valid targets (none valid: 0), sum, or one per row (...).

    h (..., d); C1 (v1, R, d1), C2 (v2, R, d2), v1 v2 >= vocab_size; cells (V,) int64: the cell of
    each id, None: its own number; targets (...) int64; block: first indices at once. Under autocast
    h is taken in its dtype, the cores are not.
    """
    _check(h, C1, C2, targets, vocab_size, cells)
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h = h.to(torch.get_autocast_dtype(device))
    rows, flat = h.reshape(-1, h.shape[-1]).contiguous(), targets.reshape(-1)
    size = first_indices(len(rows), rows.shape[1], len(C1), len(C2)) if block == "auto" else block
    scale = None
    if reduction != "none":
        valid = (flat >= 0).to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        scale = valid / valid.sum().clamp(min=1) if reduction == "mean" else valid
    with torch.autocast(device, enabled=False):
        each = _Loss.apply(rows, C1, C2, flat, cells, scale, vocab_size, softcap, size)
    return each.view(targets.shape) if scale is None else each.sum()  # type: ignore[union-attr]


def _check(
    h: Tensor, C1: Tensor, C2: Tensor, targets: Tensor, V: int, cells: Tensor | None
) -> None:
    cores = f"cores {tuple(C1.shape)}, {tuple(C2.shape)}"
    if C1.ndim != 3 or C2.ndim != 3 or C1.shape[1] != C2.shape[1]:
        raise ValueError(f"{cores} do not fit each other")
    if h.shape[-1] > C1.shape[2] * C2.shape[2]:
        raise ValueError(f"h {tuple(h.shape)} does not fit {cores}")
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit h {tuple(h.shape)}")
    if not 1 <= V <= len(C1) * len(C2):
        raise ValueError(f"vocab_size {V} does not fit {cores}")
    if cells is not None and cells.shape != (V,):
        raise ValueError(f"cells {tuple(cells.shape)} must name one for each of {V} ids")


class _Loss(torch.autograd.Function):
    """Losses of rows, times scale where it is given (then the caller sums them)."""

    @staticmethod
    def forward(ctx, h, C1, C2, targets, cells, scale, vocab_size, softcap, block):
        engine = load(NAME) if decide(NAME, h.device, h.dtype) else None
        head = Head(C1, C2, cells, vocab_size, h.shape[1])
        ctx.engine, ctx.sizes = engine, (vocab_size, softcap, block)
        ctx.whole = scale is not None and block >= len(C1)
        if ctx.whole:
            needed = scale if any(ctx.needs_input_grad[:3]) else None
            compute = engine.whole if engine else whole
            each, *grads = compute(h, head, targets, needed, softcap=softcap)
            ctx.save_for_backward(*grads)
        else:
            compute = engine.losses if engine else losses
            each, lse = compute(h, head, targets, softcap=softcap, block=block)
            ctx.save_for_backward(h, C1, C2, targets, cells, scale, lse)
        return each if scale is None else each * scale

    @staticmethod
    def backward(ctx, upstream):
        if ctx.whole:  # the caller sums the rows, so that upstream is one number
            grads = (g * upstream[:1].sum().to(g.dtype) for g in ctx.saved_tensors)
        else:
            h, C1, C2, targets, cells, scale, lse = ctx.saved_tensors
            vocab_size, softcap, block = ctx.sizes
            head = Head(C1, C2, cells, vocab_size, h.shape[1])
            upstream = upstream if scale is None else upstream * scale
            compute = ctx.engine.gradients if ctx.engine else gradients
            grads = compute(h, head, targets, lse, upstream, softcap=softcap, block=block)
        return *grads, None, None, None, None, None, None
