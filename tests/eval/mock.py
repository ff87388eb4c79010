"""A closed-form causal model over GPT-2's vocabulary, as the golden files' README defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.models.base import Family

V, CLASSES, BUCKETS = 50257, 101, 97


class Mock(Family):
    """logits[t, v] = base(c_t, v mod 97) + 4 [v favourite] + 6 [v copied]; state: the ids."""

    vocab_size = V

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        c = torch.arange(CLASSES, dtype=torch.float64)[:, None]
        b = torch.arange(BUCKETS, dtype=torch.float64)[None]
        base = torch.sin(0.37 * c + 0.11 * b) + 0.5 * torch.cos(0.05 * c * (b + 1))
        self.base = base[:, torch.arange(V) % BUCKETS].to(dtype)  # (101, V)
        self.positions = 0  # that were asked for

    def forward(self, tokens: Tensor, state: Tensor | None = None):
        logits, state = self.logits_at(tokens, torch.ones_like(tokens, dtype=torch.bool), state)
        return logits.view(*tokens.shape, V), state

    def logits_at(self, tokens: Tensor, where: Tensor, state: Tensor | None = None, keep=True):
        past = tokens[:, :0] if state is None else state
        whole, rows = torch.cat((past, tokens), dim=1), []
        for row, t in where.nonzero().tolist():
            ids = whole[row, : past.shape[1] + t + 1]
            rows.append(self.one(ids))
        self.positions += len(rows)
        empty = self.base.new_empty((0, V))
        return torch.stack(rows) if rows else empty, whole

    def one(self, ids: Tensor) -> Tensor:
        now, before = int(ids[-1]), int(ids[-2]) if len(ids) > 1 else 0
        z = self.base[(7 * now + 3 * before + 5) % CLASSES].clone()
        z[(131 * now + 17 * before + 1009) % V] += 4.0
        same = (ids[:-1] == now).nonzero()
        if len(same):
            z[ids[same[-1] + 1]] += 6.0
        return z
