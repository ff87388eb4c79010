"""The two row kernels of the tensor-train cross-entropy; algorithm in reference.py.

Over blocks of first indices: `block_stats` carries maximum, sum and the target's logit of each row,
`block_grad` makes G = (exp(z - lse) - onehot) slope upstream. Rows of the block, logits and the
products with cores are the library's. One program a row. Where one block holds all cells the dense
sweep runs, with its own kernel. Letters: n rows, X columns of the block (x v2 cells).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, launch, name_of, wide
from lib.kernels.linear_cross_entropy.reference import _matmul, chunk_rows
from lib.kernels.linear_cross_entropy.triton import capped, slope
from lib.kernels.linear_cross_entropy.triton import sweep as dense_sweep
from lib.kernels.tt_linear_cross_entropy.configs import CANDIDATES, TUNED
from lib.kernels.tt_linear_cross_entropy.reference import Head


@triton.jit(do_not_specialize=["X"])
def block_stats_kernel(
    z, unused, wanted, top, total, chosen, X, z_row, softcap,
    CAPPED: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and target's logit (n,), updated by z (n, X) raw; grid (n,)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(wanted + row)
    high, mass, hit = tl.load(top + row), tl.load(total + row), tl.load(chosen + row)
    for first in range(0, X, BV):
        col = first + tl.arange(0, BV)
        off = tl.load(unused + col, mask=col < X, other=1)
        value = tl.load(z + row * z_row + col, mask=col < X, other=0.0).to(ACC)
        value = capped(value, softcap, CAPPED)
        hit += tl.sum(tl.where((col == target) & (col < X), value, 0.0), axis=0)
        value = tl.where((off == 0) & (col < X), value, float("-inf"))
        higher = tl.maximum(high, tl.max(value, axis=0))
        # A block may hold no used cell: exp of -inf - -inf has no value.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(high - safe) + tl.sum(tl.exp(value - safe), axis=0)
        high = higher
    tl.store(top + row, high)
    tl.store(total + row, mass)
    tl.store(chosen + row, hit)


@triton.jit(do_not_specialize=["X"])
def block_grad_kernel(
    z, unused, wanted, lse, upstream, G, X, z_row, g_row, softcap,
    CAPPED: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G (n, X) from z (n, X) raw; in place where their dtypes agree; grid (n,)."""
    row = tl.program_id(0).to(tl.int64)
    target, norm = tl.load(wanted + row), tl.load(lse + row)
    factor = tl.load(upstream + row)
    for first in range(0, X, BV):
        col = first + tl.arange(0, BV)
        used = (col < X) & (tl.load(unused + col, mask=col < X, other=1) == 0)
        value = tl.load(z + row * z_row + col, mask=col < X, other=0.0).to(ACC)
        value = capped(value, softcap, CAPPED)
        p = tl.exp(tl.where(used, value - norm, float("-inf")))
        g = (p - tl.where(col == target, 1.0, 0.0)) * slope(value, softcap, CAPPED) * factor
        tl.store(G + row * g_row + col, g.to(G.dtype.element_ty), mask=col < X)


def losses(
    h: Tensor, head: Head, targets: Tensor, *, softcap: float, block: int
) -> tuple[Tensor, Tensor]:
    """As `reference.losses`: losses and lse (n,)."""
    n, kind, wanted = len(h), wide(h), head.cell_of(targets)
    top = torch.full((n,), -torch.inf, dtype=kind, device=h.device)
    total, chosen = (torch.zeros(n, dtype=kind, device=h.device) for _ in range(2))
    for z, common, _, _ in _blocks(h, head, wanted, softcap, block):
        config = _config(z, h.dtype)
        launch(block_stats_kernel, (n,), config, z=z, top=top, total=total, chosen=chosen, **common)
    lse = top + total.log()
    return torch.where(targets >= 0, lse - chosen, 0), lse


def gradients(
    h: Tensor,
    head: Head,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    *,
    softcap: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.gradients`: dh, dC1, dC2."""
    kind, wanted = wide(h), head.cell_of(targets)
    upstream = torch.where(targets >= 0, upstream.to(kind), 0).contiguous()
    dh, dC1, dC2 = (torch.zeros_like(x, dtype=kind) for x in (h, head.C1, head.C2))
    for z, common, first, last in _blocks(h, head, wanted, softcap, block):
        G = z if z.dtype == h.dtype else torch.empty(z.shape, dtype=h.dtype, device=h.device)
        launch(
            block_grad_kernel, (len(h),), _config(z, h.dtype),
            z=z, lse=lse, upstream=upstream, G=G, g_row=G.stride(0), **common,
        )  # fmt: skip
        dh += _matmul(G, head.rows(first, last, h.dtype), kind)
        one, two = head.core_gradients(first, last, _matmul(G.mT, h, kind))
        dC1[first:last] = one
        dC2 += two
    return dh.to(h.dtype), dC1.to(head.C1.dtype), dC2.to(head.C2.dtype)


def whole(
    h: Tensor, head: Head, targets: Tensor, upstream: Tensor | None, *, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.whole`, with the dense operator's row kernel."""
    v1, V = head.C1.shape[0], head.vocab_size
    table = head.rows(0, v1, torch.promote_types(h.dtype, head.C1.dtype))
    used = slice(V) if head.cells is None else head.cells
    sizes = {"vocab_size": V, "softcap": softcap, "chunk": chunk_rows(*h.shape, V, h.device.type)}
    each, dh, dw = dense_sweep(h, table[used], targets, upstream, **sizes)
    if upstream is None:
        return each, dh, dh, dh
    dE = torch.zeros_like(table)
    dE[used] = dw
    return each, dh, *head.core_gradients(0, v1, dE)


def _config(z: Tensor, dtype: torch.dtype) -> configs.Config:
    return configs.pick(CANDIDATES, TUNED, "block", z.shape[1], z.device, name_of(dtype))


def _blocks(h: Tensor, head: Head, wanted: Tensor, softcap: float, block: int):
    """Raw logits (n, X) fp32 of each block, the kernels' common arguments, first and last index."""
    v2, unused = head.C2.shape[0], head.unused()
    for first in range(0, head.C1.shape[0], block):
        last = min(first + block, head.C1.shape[0])
        z = _matmul(h, head.rows(first, last, h.dtype).mT, wide(h)).contiguous()
        common = {
            "unused": unused[first * v2 : last * v2].to(torch.uint8), "wanted": wanted - first * v2,
            "X": z.shape[1], "z_row": z.stride(0), "softcap": softcap or 1.0,
            "CAPPED": softcap > 0, "ACC": acc(z),
        }  # fmt: skip
        yield z, common, first, last
