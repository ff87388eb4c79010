"""Cross-entropy of a head held as a tensor train, its table never expanded (kernels.md 5.2).

In:  hidden rows, two cores, targets (-1 = ignored).   Out: the loss; gradients for rows and cores.
Note: gradients are first order only. A compiled graph sees opaque operators, so blocks are never
      unrolled into it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lib.kernels import decide, eager, load
from lib.kernels.tt_linear_cross_entropy.reference import (
    TORCH,
    Engine,
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
    C1, C2 = C1.contiguous(), C2.contiguous()
    size = first_indices(len(rows), rows.shape[1], len(C1), len(C2)) if block == "auto" else block
    sizes = vocab_size, softcap, size
    run = _forward if torch.compiler.is_compiling() else _eager
    scale = None
    if reduction != "none":
        valid = (flat >= 0).to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        scale = valid / valid.sum().clamp(min=1) if reduction == "mean" else valid
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (h, C1, C2)):
            return (run(rows, C1, C2, flat, cells, None, *sizes)[0] * scale).sum()
    each = run(rows, C1, C2, flat, cells, scale, *sizes)[0]
    return each.view(targets.shape) if scale is None else each.sum()


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


def _compute(
    h: Tensor, C1: Tensor, C2: Tensor, targets: Tensor, cells: Tensor | None, scale: Tensor | None,
    vocab_size: int, softcap: float, block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses times scale (None: 1), lse; and, where scale is given and one block holds all cells,

    dh, dC1, dC2 of their sum in the same pass: then lse is empty, else these are.
    """
    head, engine = Head(C1, C2, cells, vocab_size, h.shape[1]), _engine(h)
    with torch.autocast(h.device.type, enabled=False):
        if scale is not None and block >= len(C1):
            each, dh, dC1, dC2 = whole(h, head, targets, scale, softcap=softcap, engine=engine)
            dC1, dC2 = dC1.contiguous(), dC2.contiguous()  # as the fake: a compiled graph's belief
            lse = each.new_empty(0)
        else:
            sizes = {"softcap": softcap, "block": block}
            each, lse = losses(h, head, targets, **sizes, engine=engine)
            dh, dC1, dC2 = (x.new_empty(0) for x in (h, C1, C2))
    return each if scale is None else each * scale, lse, dh, dC1, dC2


# Named after the module: an exported copy of this file, opened in the same process, is another op.
_NAME = f"kumiki::{__name__.replace('.', '_')}"
_forward = torch.library.custom_op(_NAME, _compute, mutates_args=())


@torch.library.custom_op(f"{_NAME}_gradients", mutates_args=())
def _gradients(
    h: Tensor, C1: Tensor, C2: Tensor, targets: Tensor, cells: Tensor | None, lse: Tensor,
    upstream: Tensor, vocab_size: int, softcap: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dh, dC1, dC2 of sum(upstream losses), block by block."""
    head, sizes = Head(C1, C2, cells, vocab_size, h.shape[1]), {"softcap": softcap, "block": block}
    with torch.autocast(h.device.type, enabled=False):
        return gradients(h, head, targets, lse, upstream, **sizes, engine=_engine(h))


def _engine(h: Tensor) -> Engine:
    return load(NAME).ENGINE if decide(NAME, h.device, h.dtype) else TORCH


@_forward.register_fake
def _(h, C1, C2, targets, cells, scale, vocab_size, softcap, block):
    each = h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
    if scale is not None and block >= len(C1):
        return each, each.new_empty(0), *(torch.empty_like(x) for x in (h, C1, C2))
    return each, torch.empty_like(each), *(x.new_empty(0) for x in (h, C1, C2))


@_gradients.register_fake
def _(h, C1, C2, targets, cells, lse, upstream, vocab_size, softcap, block):
    return tuple(torch.empty_like(x) for x in (h, C1, C2))


def _save(ctx, inputs, output) -> None:
    h, C1, C2, targets, cells, scale, *ctx.sizes = inputs
    ctx.set_materialize_grads(False)  # only the losses have a gradient from above
    ctx.made = scale is not None and ctx.sizes[2] >= len(C1)
    if ctx.made:
        ctx.save_for_backward(*output[2:])
    else:
        ctx.save_for_backward(h, C1, C2, targets, cells, output[1], scale)


def _backward(ctx, upstream, *_unused):
    if torch.is_grad_enabled():
        raise RuntimeError("tt_linear_cross_entropy has first-order gradients only")
    if upstream is None:  # the losses were not used
        return (None,) * 9
    if ctx.made:  # the caller sums the rows, so that upstream is one number
        grads = (grad * upstream[:1].sum().to(grad.dtype) for grad in ctx.saved_tensors)
    else:
        *inputs, scale = ctx.saved_tensors
        upstream = upstream.contiguous() if scale is None else upstream * scale
        grads = _gradients(*inputs, upstream, *ctx.sizes)
    return *grads, None, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
_eager = eager(_compute, _save, _backward)
