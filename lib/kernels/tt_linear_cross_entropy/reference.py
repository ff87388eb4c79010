"""Linear cross-entropy whose weight is a tensor train: the specification (phase7.md 3.3).

    z_t = h_t E^T with E the rows of all cells, unused cells -inf;  loss_t = lse(z_t) - z[t, y_t]

Loop 1 goes over blocks of first indices: rows of a block, logits, running maximum and sum. Loop 2
makes the logits again: G = (exp(z - lse) - onehot) upstream, dh += G E, dE = G^T h, and from dE the
gradients of the cores. Neither (V, d) nor (n, V) exists beyond a block. Where one block holds all
it is the dense sweep, with its gradients in the first pass: three products instead of four. The
loops stand here once; an `Engine` makes a block's steps, in PyTorch or as kernels.
Letters: n rows, d width, C1 (v1, R, d1), C2 (v2, R, d2), x first indices of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels.linear_cross_entropy.reference import chunk_rows, matmul
from lib.kernels.linear_cross_entropy.reference import plain as dense_plain
from lib.kernels.linear_cross_entropy.reference import sweep as dense_sweep
from lib.kernels.tt_gather.reference import expand

BLOCK_BYTES = 64 * 2**20


def first_indices(n: int, width: int, v1: int, v2: int) -> int:
    """First indices of a block: x v2 6 (n + d) bytes within 64 MiB, 1 at least."""
    return max(1, min(v1, BLOCK_BYTES // (v2 * 6 * (n + width))))


@dataclass(frozen=True)
class Head:
    """The cores and which cell is whose. `cells` (V,) int64: the cell of each id; None: its own."""

    C1: Tensor
    C2: Tensor
    cells: Tensor | None
    vocab_size: int
    width: int

    def cell_of(self, targets: Tensor) -> Tensor:
        """Cells of targets; -1 stays."""
        if self.cells is None:
            return targets
        return torch.where(targets >= 0, self.cells[targets.clamp(min=0)], -1)

    def unused(self) -> Tensor:
        """(v1 v2,) bool: cells of no id."""
        count = self.C1.shape[0] * self.C2.shape[0]
        if self.cells is None:
            return torch.arange(count, device=self.C1.device) >= self.vocab_size
        mask = torch.ones(count, dtype=torch.bool, device=self.C1.device)
        mask[self.cells] = False
        return mask

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """E of the cells whose first index is first .. last - 1, in dtype."""
        return expand(self.C1[first:last], self.C2, self.width).to(dtype)

    def core_gradients(self, first: int, last: int, dE: Tensor) -> tuple[Tensor, Tensor]:
        """dC1[first:last] and the block's share of dC2, from dE (x v2, d)."""
        (_, _, d1), (v2, _, d2) = self.C1.shape, self.C2.shape
        dE = F.pad(dE.to(self.C1.dtype), (0, d1 * d2 - self.width))
        dE = dE.view(last - first, v2, d1, d2)
        dC1 = torch.einsum("xyab,ykb->xka", dE, self.C2)
        return dC1, torch.einsum("xyab,xka->ykb", dE, self.C1[first:last])


@dataclass(frozen=True)
class Engine:
    """What a kernel may do instead: the steps of a block, and the dense sweep over all cells.

    stats(z, unused, wanted, so far, softcap, dtype) -> maximum, sum, target's logit of each row;
    grad(z, unused, wanted, lse, upstream, softcap, dtype) -> G. z (n, x v2) are raw logits, theirs
    to spend; unused (x v2,) bool; wanted (n,): the target's column, out of range in other blocks;
    dtype: that of h and G.
    """

    stats: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grad: Callable[..., Tensor]
    sweep: Callable[..., tuple[Tensor, Tensor, Tensor]]


def stats(
    z: Tensor, unused: Tensor, wanted: Tensor, so_far: tuple[Tensor, Tensor, Tensor],
    softcap: float, _dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loop 1's step in PyTorch."""
    top, total, chosen = so_far
    z = _capped(z, unused, softcap)[1]
    inside = (wanted >= 0) & (wanted < z.shape[1])
    picked = z.gather(1, wanted.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    chosen = torch.where(inside, picked, chosen)
    higher = torch.maximum(top, z.amax(1))
    # A block may hold no used cell: exp of -inf - -inf has no value.
    safe = torch.where(higher == -torch.inf, 0, higher)
    total = total * torch.exp(top - safe) + z.sub_(safe[:, None]).exp_().sum(1)
    return higher, total, chosen


def grad(
    z: Tensor, unused: Tensor, wanted: Tensor, lse: Tensor, upstream: Tensor, softcap: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Loop 2's step in PyTorch."""
    tanh, z = _capped(z, unused, softcap)
    G = z.sub_(lse[:, None]).exp_()
    mine = ((wanted >= 0) & (wanted < G.shape[1])).nonzero().squeeze(1)
    G[mine, wanted[mine]] -= 1
    if tanh is not None:
        G.mul_(tanh.square_().neg_().add_(1))  # slope of the softcap
    return G.mul_(upstream[:, None]).to(dtype)


def _capped(z: Tensor, unused: Tensor, softcap: float) -> tuple[Tensor | None, Tensor]:
    """(tanh(z / c) or None, softcapped logits), -inf in unused cells."""
    tanh = None
    if softcap > 0:
        tanh = z.div_(softcap).tanh_()
        z = tanh * softcap
    return tanh, z.masked_fill_(unused, -torch.inf)


TORCH = Engine(stats, grad, dense_sweep)


def losses(
    h: Tensor, head: Head, targets: Tensor, *, softcap: float, block: int, engine: Engine = TORCH
) -> tuple[Tensor, Tensor]:
    """Losses and lse (n,), fp32: loop 1. h (n, d) in the compute dtype, targets (n,) int64."""
    so_far = (
        h.new_full((len(h),), -torch.inf, dtype=_wide(h)),
        *h.new_zeros(2, len(h), dtype=_wide(h)),
    )
    for part in _blocks(h, head, targets, block):
        z = part.logits(h)
        so_far = engine.stats(z, part.unused, part.wanted, so_far, softcap, h.dtype)
    top, total, chosen = so_far
    lse = top + total.log()
    return torch.where(targets >= 0, lse - chosen, 0), lse


def gradients(
    h: Tensor, head: Head, targets: Tensor, lse: Tensor, upstream: Tensor, *, softcap: float,
    block: int, engine: Engine = TORCH,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dh (n, d), dC1, dC2 of sum(upstream losses): loop 2. upstream (n,) fp32."""
    wide = _wide(h)
    upstream = torch.where(targets >= 0, upstream.to(wide), 0)
    dh, dC1, dC2 = (torch.zeros_like(x, dtype=wide) for x in (h, head.C1, head.C2))
    for part in _blocks(h, head, targets, block):
        z = part.logits(h)
        G = engine.grad(z, part.unused, part.wanted, lse, upstream, softcap, h.dtype)
        dh += matmul(G, part.table, wide)
        one, two = head.core_gradients(part.first, part.last, matmul(G.mT, h, wide))
        dC1[part.first : part.last] = one
        dC2 += two
    return dh.to(h.dtype), dC1.to(head.C1.dtype), dC2.to(head.C2.dtype)


@dataclass(frozen=True)
class _Block:
    """Cells of the first indices first .. last - 1."""

    first: int
    last: int
    table: Tensor  # their rows, (x v2, d) in the compute dtype
    unused: Tensor
    wanted: Tensor  # (n,): the target's column in this block, outside of it elsewhere

    def logits(self, h: Tensor) -> Tensor:
        """Raw, (n, x v2) fp32."""
        return matmul(h, self.table.mT, _wide(h))


def _blocks(h: Tensor, head: Head, targets: Tensor, block: int) -> Iterator[_Block]:
    v1, v2, unused, wanted = len(head.C1), len(head.C2), head.unused(), head.cell_of(targets)
    for first in range(0, v1, block):
        last = min(first + block, v1)
        cells, table = slice(first * v2, last * v2), head.rows(first, last, h.dtype)
        yield _Block(first, last, table, unused[cells], wanted - first * v2)


def whole(
    h: Tensor, head: Head, targets: Tensor, upstream: Tensor, *, softcap: float,
    engine: Engine = TORCH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses, dh, dC1, dC2 of sum(upstream losses), where one block holds all cells."""
    v1, V = head.C1.shape[0], head.vocab_size
    table = head.rows(0, v1, torch.promote_types(h.dtype, head.C1.dtype))
    used = slice(V) if head.cells is None else head.cells
    chunk = chunk_rows(len(h), h.shape[1], V, h.device.type)
    sizes = {"vocab_size": V, "softcap": softcap, "chunk": chunk}
    each, dh, dw = engine.sweep(h, table[used], targets, upstream, **sizes)
    dE = torch.zeros_like(table)
    dE[used] = dw
    return each, dh, *head.core_gradients(0, v1, dE)


def plain(h: Tensor, head: Head, targets: Tensor, *, softcap: float = 0.0) -> Tensor:
    """The definition by ordinary autograd, per row, with the whole table."""
    table = expand(head.C1, head.C2, head.width)
    weight = table[: head.vocab_size] if head.cells is None else table[head.cells]
    return dense_plain(h, weight, targets, vocab_size=head.vocab_size, softcap=softcap)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
