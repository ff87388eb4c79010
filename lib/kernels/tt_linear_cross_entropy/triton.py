"""The two row kernels of the tensor-train cross-entropy; algorithm in reference.py.

Over blocks of first indices: `block_stats` carries maximum, sum and the target's logit of each row,
`block_grad` makes G = (exp(z - lse) - onehot) slope upstream. The loops and products are the
reference's. One program a row. Where one block holds all cells the dense sweep runs, with its own
kernel. Letters: n rows, X columns of the block (x v2 cells).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, launch, name_of
from lib.kernels.linear_cross_entropy.triton import capped, slope
from lib.kernels.linear_cross_entropy.triton import sweep as dense_sweep
from lib.kernels.tt_linear_cross_entropy.configs import CANDIDATES, TUNED
from lib.kernels.tt_linear_cross_entropy.reference import Engine


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


def stats(
    z: Tensor, unused: Tensor, wanted: Tensor, so_far: tuple[Tensor, Tensor, Tensor],
    softcap: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference.stats`, in place."""
    top, total, chosen = so_far
    common = _common(z, unused, wanted, softcap)
    config = _config(z, dtype)
    launch(block_stats_kernel, (len(z),), config, top=top, total=total, chosen=chosen, **common)
    return so_far


def grad(
    z: Tensor, unused: Tensor, wanted: Tensor, lse: Tensor, upstream: Tensor, softcap: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `reference.grad`; in z where the dtypes agree."""
    G = z if z.dtype == dtype else torch.empty(z.shape, dtype=dtype, device=z.device)
    common = _common(z, unused, wanted, softcap)
    launch(
        block_grad_kernel, (len(z),), _config(z, dtype),
        lse=lse, upstream=upstream, G=G, g_row=G.stride(0), **common,
    )  # fmt: skip
    return G


ENGINE = Engine(stats, grad, dense_sweep)


def _config(z: Tensor, dtype: torch.dtype) -> configs.Config:
    return configs.pick(CANDIDATES, TUNED, "block", z.shape[1], z.device, name_of(dtype))


def _common(z: Tensor, unused: Tensor, wanted: Tensor, softcap: float) -> dict[str, Any]:
    """Arguments of both kernels."""
    assert z.stride(1) == 1 or z.shape[1] == 1, "a product's rows are contiguous"
    return {
        "z": z, "unused": unused.to(torch.uint8), "wanted": wanted, "X": z.shape[1],
        "z_row": z.stride(0), "softcap": softcap or 1.0, "CAPPED": softcap > 0, "ACC": acc(z),
    }  # fmt: skip
