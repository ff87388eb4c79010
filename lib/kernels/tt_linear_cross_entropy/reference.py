"""Linear cross-entropy whose weight is a tensor train: the specification (phase7.md 3.3).

    z_t = h_t E^T with E the rows of all cells, unused cells -inf;  loss_t = lse(z_t) - z[t, y_t]

Loop 1 goes over blocks of first indices: rows of a block, logits, running maximum and sum. Loop 2
makes the logits again: G = (exp(z - lse) - onehot) upstream, dh += G E, dE = G^T h, and from dE the
gradients of the cores. Neither (V, d) nor (n, V) exists beyond a block. Where one block holds all
it is the dense sweep, with its gradients in the first pass: three products instead of four.
Letters: n rows, d width, C1 (v1, R, d1), C2 (v2, R, d2), x first indices of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels.linear_cross_entropy.reference import chunk_rows
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


def losses(
    h: Tensor, head: Head, targets: Tensor, *, softcap: float, block: int
) -> tuple[Tensor, Tensor]:
    """Losses and lse (n,), fp32: loop 1. h (n, d) in the compute dtype, targets (n,) int64."""
    n, v2, wide = len(h), head.C2.shape[0], _wide(h)
    unused, wanted = head.unused(), head.cell_of(targets)
    top, total = h.new_full((n,), -torch.inf, dtype=wide), h.new_zeros(n, dtype=wide)
    chosen = h.new_zeros(n, dtype=wide)
    for first in range(0, head.C1.shape[0], block):
        last = min(first + block, head.C1.shape[0])
        _, z = _logits(h, head, first, last, unused, softcap)
        here = wanted - first * v2
        inside = (here >= 0) & (here < z.shape[1])
        picked = z.gather(1, here.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        chosen = torch.where(inside, picked, chosen)
        higher = torch.maximum(top, z.amax(1))
        # A block may hold no used cell: exp of -inf - -inf has no value.
        safe = torch.where(higher == -torch.inf, 0, higher)
        total = total * torch.exp(top - safe) + z.sub_(safe[:, None]).exp_().sum(1)
        top = higher
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
    """dh (n, d), dC1, dC2 of sum(upstream losses): loop 2. upstream (n,) fp32."""
    v2, wide = head.C2.shape[0], _wide(h)
    unused, wanted = head.unused(), head.cell_of(targets)
    upstream = torch.where(targets >= 0, upstream.to(wide), 0)
    dh, dC1, dC2 = (torch.zeros_like(x, dtype=wide) for x in (h, head.C1, head.C2))
    for first in range(0, head.C1.shape[0], block):
        last = min(first + block, head.C1.shape[0])
        tanh, z = _logits(h, head, first, last, unused, softcap)
        G = z.sub_(lse[:, None]).exp_()
        here = wanted - first * v2
        mine = ((here >= 0) & (here < G.shape[1])).nonzero().squeeze(1)
        G[mine, here[mine]] -= 1
        if tanh is not None:
            G.mul_(tanh.square_().neg_().add_(1))  # slope of the softcap
        G = G.mul_(upstream[:, None]).to(h.dtype)
        dh += G @ head.rows(first, last, h.dtype)
        one, two = head.core_gradients(first, last, G.mT @ h)
        dC1[first:last] = one
        dC2 += two
    return dh.to(h.dtype), dC1.to(head.C1.dtype), dC2.to(head.C2.dtype)


def whole(
    h: Tensor, head: Head, targets: Tensor, upstream: Tensor | None, *, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and, given `upstream`, dh, dC1, dC2, where one block holds all cells."""
    v1, V = head.C1.shape[0], head.vocab_size
    table = head.rows(0, v1, torch.promote_types(h.dtype, head.C1.dtype))
    used = slice(V) if head.cells is None else head.cells
    chunk = chunk_rows(len(h), h.shape[1], V, h.device.type)
    sizes = {"vocab_size": V, "softcap": softcap, "chunk": chunk}
    each, dh, dw = dense_sweep(h, table[used], targets, upstream, **sizes)
    if upstream is None:
        return each, dh, dh, dh
    dE = torch.zeros_like(table)
    dE[used] = dw
    return each, dh, *head.core_gradients(0, v1, dE)


def plain(h: Tensor, head: Head, targets: Tensor, *, softcap: float = 0.0) -> Tensor:
    """The definition by ordinary autograd, per row, with the whole table."""
    table = expand(head.C1, head.C2, head.width)
    weight = table[: head.vocab_size] if head.cells is None else table[head.cells]
    return dense_plain(h, weight, targets, vocab_size=head.vocab_size, softcap=softcap)


def _logits(
    h: Tensor, head: Head, first: int, last: int, unused: Tensor, softcap: float
) -> tuple[Tensor | None, Tensor]:
    """(tanh(z / c) or None, softcapped logits (n, x v2)), fp32; -inf in unused cells."""
    v2 = head.C2.shape[0]
    z = (h @ head.rows(first, last, h.dtype).mT).to(_wide(h))
    tanh = None
    if softcap > 0:
        tanh = z.div_(softcap).tanh_()
        z = tanh * softcap
    return tanh, z.masked_fill_(unused[first * v2 : last * v2], -torch.inf)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
