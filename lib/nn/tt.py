"""Embedding and head in one: a tensor train of two cores, and its baselines, all tied.

In:    ids, or hidden rows.   Out: vectors, logits, or the loss, from the same parameters.
Rule:  in training the table of all ids is never made beyond a block (phase7.md 3.2, 3.3).
Letters: V ids, d width, R rank; v1 v2 >= V cells, d1 d2 >= d; C1 (v1, R, d1), C2 (v2, R, d2).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.rng import torch_generator
from lib.kernels.linear_cross_entropy import linear_cross_entropy
from lib.kernels.tt_gather import tt_gather
from lib.kernels.tt_gather.reference import expand
from lib.kernels.tt_linear_cross_entropy import tt_linear_cross_entropy
from lib.nn.linear import Table

Order = Literal["identity", "strided", "random"]
Kind = Literal["tt", "lowrank", "dense"]
FEW_ROWS = 16  # up to here logits go by v1 R d2 numbers a row instead of the table's rows
BLOCK_BYTES = 64 * 2**20  # of table rows that `logits` makes at once


def factors(vocab_size: int, width: int) -> tuple[int, int, int, int]:
    """v1, v2, d1, d2: near-square grids that hold all ids and all columns."""
    v1, d1 = (math.isqrt(x - 1) + 1 for x in (vocab_size, width))
    return v1, -(-vocab_size // v1), d1, -(-width // d1)


def tt_parameters(vocab_size: int, width: int, rank: int, phase: bool = False) -> int:
    """R (v1 d1 + v2 d2), and R more with phases."""
    v1, v2, d1, d2 = factors(vocab_size, width)
    return rank * (v1 * d1 + v2 * d2 + phase)


def embedding_std(width: int) -> float:
    """s, the deviation of first embeddings: min(0.02, 0.5 / sqrt d)."""
    return min(0.02, 0.5 / math.sqrt(width))


class TensorTrain(nn.Module):
    """E[i, a d2 + b] = sum_k C1[i1, k, a] cos(theta_k) C2[i2, k, b], (i1, i2) the cell of id i.

    phase: theta exists. It is a gauge, `fold` puts it into C1. order: which cell an id has.
    """

    permutation: Tensor  # (V,) int32, of the order random

    def __init__(
        self, vocab_size: int, width: int, rank: int, order: Order = "identity", phase: bool = False
    ) -> None:
        super().__init__()
        self.vocab_size, self.width, self.order = vocab_size, width, order
        v1, v2, d1, d2 = factors(vocab_size, width)
        self.C1 = nn.Parameter(torch.empty(v1, rank, d1))
        self.C2 = nn.Parameter(torch.empty(v2, rank, d2))
        self.theta = nn.Parameter(torch.empty(rank)) if phase else None
        if order == "random":
            self.register_buffer("permutation", torch.empty(vocab_size, dtype=torch.int32))

    def init_buffers(self) -> None:
        """The permutation of `random`, one for each vocabulary size."""
        if self.order == "random":
            draw = torch_generator(0, "order of ids", self.vocab_size)
            self.permutation.copy_(torch.randperm(self.vocab_size, generator=draw))

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """Cores N(0, (s^2 / R)^(1/2)): std(E) = s. Phases away from 0, where cos is flat."""
        if name == "theta":
            return torch.empty(shape).uniform_(-math.pi / 4, math.pi / 4, generator=draw)
        std = (embedding_std(self.width) ** 2 / shape[1]) ** 0.25
        return torch.empty(shape).normal_(0, std, generator=draw)

    def cores(self) -> tuple[Tensor, Tensor]:
        """C1 with the phases in it, and C2."""
        if self.theta is None:
            return self.C1, self.C2
        return self.C1 * self.theta.cos()[:, None], self.C2

    def cells(self, device: torch.device) -> Tensor | None:
        """(V,) int64: the cell of each id; None where it is its own number."""
        if self.order == "identity":
            return None
        if self.order == "random":
            return self.permutation.long()
        ids = torch.arange(self.vocab_size, device=device)
        return ids % len(self.C1) * len(self.C2) + ids // len(self.C1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (...) int64 -> (..., d) in the cores' dtype."""
        cells = self.cells(tokens.device)
        return tt_gather(tokens if cells is None else cells[tokens], *self.cores(), self.width)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., V) by id, fp32 (fp64 for fp64), block by block."""
        C1, C2 = self.cores()
        rows = h.flatten(0, -2)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        with torch.autocast(h.device.type, enabled=False):
            few = len(rows) <= FEW_ROWS
            z = self._by_rows(rows.to(wide), C1, C2) if few else self._by_blocks(rows, C1, C2, wide)
        cells = self.cells(h.device)
        z = z[:, : self.vocab_size] if cells is None else z[:, cells]
        return z.view(*h.shape[:-1], self.vocab_size)

    def _by_rows(self, rows: Tensor, C1: Tensor, C2: Tensor) -> Tensor:
        """P[t, i1, k, b] = sum_a h C1, then P C2: reads the cores, makes no row of the table."""
        padded = F.pad(rows, (0, C1.shape[2] * C2.shape[2] - self.width))
        grid = padded.unflatten(1, (C1.shape[2], C2.shape[2]))  # (t, d1, d2)
        P = torch.einsum("tab,xka->txkb", grid, C1).flatten(2)
        return (P @ C2.flatten(1).mT).flatten(1)

    def _by_blocks(self, rows: Tensor, C1: Tensor, C2: Tensor, wide: torch.dtype) -> Tensor:
        v1, v2 = len(C1), len(C2)
        size = max(1, BLOCK_BYTES // (4 * v2 * self.width))
        z = rows.new_empty(len(rows), v1 * v2, dtype=wide)
        for first in range(0, v1, size):
            table = expand(C1[first : first + size], C2, self.width).to(rows.dtype)
            z[:, first * v2 : first * v2 + len(table)] = rows @ table.mT
        return z

    def loss(self, h: Tensor, targets: Tensor, reduction: Any = "mean") -> Tensor:
        """Cross-entropy of h (..., d) at targets (...), -1 ignored; fp32."""
        sizes = {"vocab_size": self.vocab_size, "cells": self.cells(h.device)}
        return tt_linear_cross_entropy(h, *self.cores(), targets, reduction=reduction, **sizes)


class LowRank(nn.Module):
    """E = A B with A (V, q), B (q, d): q gives the tensor train's parameter count, rounded down."""

    def __init__(self, vocab_size: int, width: int, tt_rank: int) -> None:
        super().__init__()
        q = max(1, tt_parameters(vocab_size, width, tt_rank) // (vocab_size + width))
        self.width = width
        self.A = nn.Parameter(torch.empty(vocab_size, q))
        self.B = nn.Parameter(torch.empty(q, width))

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """Both N(0, (s^2 / q)^(1/2)), so that std(E) = s."""
        std = (embedding_std(self.width) ** 2 / self.A.shape[1]) ** 0.25
        return torch.empty(shape).normal_(0, std, generator=draw)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (...) int64 -> (..., d)."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.embedding(tokens, self.A) @ self.B

    def logits(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., V)."""
        z = F.linear(F.linear(h, self.B), self.A)
        return z if z.dtype == torch.float64 else z.float()

    def loss(self, h: Tensor, targets: Tensor, reduction: Any = "mean") -> Tensor:
        """Cross-entropy, by way of rows of q numbers."""
        return linear_cross_entropy(F.linear(h, self.B), self.A, targets, reduction=reduction)


class Dense(Table):
    """The ordinary tied table (V, d)."""

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """N(0, s^2)."""
        return torch.empty(shape).normal_(0, embedding_std(shape[1]), generator=draw)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., V)."""
        z = F.linear(h, self.weight)
        return z if z.dtype == torch.float64 else z.float()

    def loss(self, h: Tensor, targets: Tensor, reduction: Any = "mean") -> Tensor:
        """Cross-entropy of h at targets."""
        return linear_cross_entropy(h, self.weight, targets, reduction=reduction)


def tied_table(
    kind: Kind, vocab_size: int, width: int, rank: int, order: Order, phase: bool
) -> TensorTrain | LowRank | Dense:
    """The embedding of a Config's `embedding`, `tt_rank`, `tt_order`, `tt_phase`."""
    if kind == "tt":
        return TensorTrain(vocab_size, width, rank, order, phase)
    return LowRank(vocab_size, width, rank) if kind == "lowrank" else Dense(vocab_size, width)
