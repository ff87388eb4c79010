"""The row kernel of the chunked linear cross-entropy; formulas in reference.py.

One program a row of logits: first maximum, sum and the target's logit over blocks of BV columns,
then G = (p - onehot) (1 - (z/c)^2) upstream. Bytes of a chunk: fp32 logits read twice, G written.
The three products of a chunk are the library's. fp32 logits become G in place; for half precision G
has a buffer of its own: within one row, warps would overwrite what others have yet to read.
Source: arXiv 2410.10989 section 3.2 (chunks); softcap: arXiv 2408.00118.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, launch, name_of, wide
from lib.kernels.linear_cross_entropy.configs import CANDIDATES, TUNED
from lib.kernels.linear_cross_entropy.reference import matmul


@triton.jit
def tanh(x):
    """2 sigmoid(2x) - 1 by an exponential of nothing positive; near 0 by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    squared = x * x
    near = x * (1.0 - squared * (0.3333333333333333 - squared * 0.13333333333333333))
    return tl.where(tl.abs(x) < 1e-2, near, far)


@triton.jit
def capped(z, softcap, CAPPED: tl.constexpr):
    """softcap tanh(z / softcap), or z."""
    if CAPPED:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def slope(z, softcap, CAPPED: tl.constexpr):
    """Derivative of `capped` from its value."""
    one = tl.full(z.shape, 1.0, z.dtype)
    if CAPPED:
        one = 1.0 - (z / softcap) * (z / softcap)
    return one


@triton.jit(do_not_specialize=["vocab_size"])
def row_kernel(
    z, targets, upstream, losses, G, z_row, g_row, vocab_size, softcap,
    CAPPED: tl.constexpr, GRAD: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z (rows, V) raw logits -> losses (rows,), G (rows, V) if GRAD; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    valid = target >= 0
    top = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0.0, ACC)
    for first in range(0, vocab_size, BV):
        col = first + tl.arange(0, BV)
        block = tl.load(z + row * z_row + col, mask=col < vocab_size, other=0.0).to(ACC)
        block = tl.where(col < vocab_size, capped(block, softcap, CAPPED), float("-inf"))
        higher = tl.maximum(top, tl.max(block, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(block - higher), axis=0)
        top = higher
    lse = top + tl.log(total)
    chosen = tl.load(z + row * z_row + tl.where(valid, target, 0)).to(ACC)
    # The raw logit goes through a block: a scalar has no tile shape for `capped`.
    chosen = tl.sum(capped(tl.full((1,), 0.0, ACC) + chosen, softcap, CAPPED), axis=0)
    tl.store(losses + row, tl.where(valid, lse - chosen, 0.0))
    if GRAD:
        factor = tl.where(valid, tl.load(upstream + row).to(ACC), 0.0)
        tl.debug_barrier()  # the target's logit is read before its place is overwritten
        for first in range(0, vocab_size, BV):
            col = first + tl.arange(0, BV)
            seen = col < vocab_size
            block = tl.load(z + row * z_row + col, mask=seen, other=0.0).to(ACC)
            block = capped(block, softcap, CAPPED)
            p = tl.exp(tl.where(seen, block - lse, float("-inf")))
            g = (p - tl.where(col == target, 1.0, 0.0)) * slope(block, softcap, CAPPED) * factor
            tl.store(G + row * g_row + col, g.to(G.dtype.element_ty), mask=seen)


def rows(
    z: Tensor, targets: Tensor, upstream: Tensor | None, softcap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Raw logits z (rows, V) fp32 -> losses (rows,) and, with upstream, G in `dtype`; spends z."""
    n, V = z.shape
    losses = torch.empty(n, dtype=z.dtype, device=z.device)
    G = z if dtype == z.dtype or upstream is None else z.new_empty(z.shape, dtype=dtype)
    config = configs.pick(CANDIDATES, TUNED, "rows", V, z.device, name_of(dtype))
    launch(
        row_kernel, (n,), config,
        z=z, targets=targets, upstream=losses if upstream is None else upstream, losses=losses, G=G,
        z_row=z.stride(0), g_row=G.stride(0), vocab_size=V, softcap=softcap or 1.0,
        CAPPED=softcap > 0, GRAD=upstream is not None, ACC=acc(z),
    )  # fmt: skip
    return losses, G


def sweep(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    *,
    vocab_size: int,
    softcap: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sweep`: losses (n,), and with upstream dh and dw, which is summed in fp32."""
    w, kind = weight[:vocab_size].to(h.dtype), wide(h)
    losses = torch.empty(len(h), dtype=kind, device=h.device)
    dh = torch.empty_like(h) if upstream is not None else h.new_empty(0)
    total = torch.zeros(weight.shape, dtype=kind, device=h.device) if upstream is not None else None
    for first in range(0, len(h), chunk):
        part = slice(first, first + chunk)
        z = matmul(h[part], w.mT, kind)
        up = None if upstream is None else upstream[part].contiguous()
        losses[part], G = rows(z, targets[part].contiguous(), up, softcap, h.dtype)
        if total is not None:
            torch.mm(G, w, out=dh[part])
            total[:vocab_size] += matmul(G.mT, h[part], kind)
    if total is None:
        return losses, dh, weight.new_empty(0)
    return losses, dh, total.to(weight.dtype)
