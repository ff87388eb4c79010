"""Cross-entropy of a linear head with softcap, without the logits of all rows (kernels.md 5.2).

In:  hidden rows, head weight, targets (-1 = ignored).   Out: the loss; gradients for hidden and
weight.
Note: gradients are first order only, and cost nothing in backward but a scaling (reduction `none`:
      a second sweep). A compiled graph sees two opaque operators, so chunking is never unrolled
      into it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lib.kernels import decide, eager, load
from lib.kernels.linear_cross_entropy.reference import chunk_rows, sweep

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | Literal["auto"] = "auto",
) -> Tensor:
    """Loss in nats, fp32: mean over valid targets (none valid: 0), sum, or one per row (…,).

    h (…, d); weight (>= V, d), rows beyond vocab_size are padding; targets (…,) int64; softcap 0 =
    off; chunk = rows whose logits exist at once. Under autocast the matmuls run in its dtype.
    """
    V = weight.shape[0] if vocab_size is None else vocab_size
    _check(h, weight, targets, V)
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h = h.to(torch.get_autocast_dtype(device))
    rows, flat = h.reshape(-1, h.shape[-1]).contiguous(), targets.reshape(-1)
    half = h.dtype in (torch.bfloat16, torch.float16)
    size = (
        chunk_rows(rows.shape[0], rows.shape[1], V, device, half=half) if chunk == "auto" else chunk
    )
    run = _forward if torch.compiler.is_compiling() else _eager
    scale = None
    if reduction != "none":
        valid = (flat >= 0).to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        scale = valid / valid.sum().clamp(min=1) if reduction == "mean" else valid
        if not torch.is_grad_enabled() or not (h.requires_grad or weight.requires_grad):
            losses, _, _ = run(rows, weight, flat, None, V, softcap, size)
            return (losses * scale).sum()
    losses, _, _ = run(rows, weight, flat, scale, V, softcap, size)
    return losses.view(targets.shape) if scale is None else losses.sum()


def _check(h: Tensor, weight: Tensor, targets: Tensor, V: int) -> None:
    if weight.ndim != 2 or h.shape[-1] != weight.shape[1]:
        raise ValueError(f"h {tuple(h.shape)} does not fit weight {tuple(weight.shape)}")
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit h {tuple(h.shape)}")
    if not 1 <= V <= weight.shape[0]:
        raise ValueError(f"vocab_size {V} does not fit weight {tuple(weight.shape)}")


def _compute(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    vocab_size: int,
    softcap: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses times scale (None: 1, without gradients), and the gradients of their sum."""
    kernel = decide("linear_cross_entropy", h.device, h.dtype)
    compute = load("linear_cross_entropy").sweep if kernel else sweep
    with torch.autocast(h.device.type, enabled=False):
        sizes = {"vocab_size": vocab_size, "softcap": softcap, "chunk": chunk}
        losses, dh, dw = compute(h, weight, targets, scale, **sizes)
    return losses if scale is None else losses * scale, dh, dw


# Named after the module: an exported copy of this file, opened in the same process, is another op.
_NAME = f"kumiki::{__name__.replace('.', '_')}"
_forward = torch.library.custom_op(_NAME, _compute, mutates_args=())


@_forward.register_fake
def _(h, weight, targets, scale, vocab_size, softcap, chunk):
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    grads = (h.new_empty(0), weight.new_empty(0))
    if scale is not None:
        grads = (torch.empty_like(h), torch.empty_like(weight))
    return h.new_empty(h.shape[0], dtype=wide), *grads


def _save(ctx, inputs, output) -> None:
    h, weight, targets, scale, *ctx.sizes = inputs
    ctx.set_materialize_grads(False)  # nobody has gradients for dh and dw: no zeros in their place
    ctx.scaled = scale is not None
    if ctx.scaled:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(h, weight, targets)


def _backward(ctx, upstream, _dh, _dw):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has first-order gradients only")
    if upstream is None:  # the losses were not used
        return (None,) * 7
    if ctx.scaled:  # the caller sums the rows, so that upstream is one number
        dh, dw = (grad * upstream[:1].sum().to(grad.dtype) for grad in ctx.saved_tensors)
    else:
        h, weight, targets = ctx.saved_tensors
        _, dh, dw = _forward(h, weight, targets, upstream.contiguous(), *ctx.sizes)
    return dh, dw, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
_eager = eager(_compute, _save, _backward)
