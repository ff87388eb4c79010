"""The memory term of the fixed-point phase: predict ids ahead, or recall earlier vectors.

The original has none: there forgetting minimises the loss (cvfp.md 1.3, 5.3). Letters: n rows, d
width, e token width, T time, B rows in parallel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.rng import torch_generator
from lib.nn.contexts.context import matmul_dtype
from lib.nn.contexts.objective import Learner

CANDIDATES = 512  # of the predictive term, the true one included


class Memory:
    """The memory term of one step: predict ids ahead, or recall earlier vectors (cvfp.md 5.3)."""

    def __init__(self, model: Learner, step: int, ids: Tensor) -> None:
        """ids: those of the step; candidates are drawn from them."""
        self.model, config = model, model.config
        self.active = config.get("memory") > 0
        self.predicts = config.memory_kind == "predict"
        self.offsets = config.horizons if self.predicts else tuple(-k for k in config.lags)
        if self.active and self.predicts:
            flat = ids.flatten()
            draw = torch_generator(model.seed, "candidates", step)
            at = torch.randint(len(flat), (CANDIDATES - 1,), generator=draw)
            self.candidates = flat[at.to(flat.device)]
            with torch.no_grad():
                self.vectors = model.embed(self.candidates)

    def loss(self, c: Tensor, targets: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
        """Sum over pairs; c (n, d), and for each offset targets (n,) ids, valid (n,)."""
        total = c.new_zeros(())
        for head, ids, mask in zip(self.model.memory_head, targets, valid, strict=True):
            rows, wanted = c[mask], ids[mask]
            with torch.no_grad():
                true = self.model.embed(wanted)
            dtype = matmul_dtype(c)
            assert isinstance(head, nn.Linear)
            guess = F.linear(rows.to(dtype), head.weight.to(dtype))  # (m, e)
            if not self.predicts:
                total = total + (guess.to(c.dtype) - true).square().sum() / true.shape[-1]
                continue
            scale = 1 / math.sqrt(true.shape[-1])
            scores = F.linear(guess, self.vectors.to(dtype)).to(c.dtype) * scale
            scores = scores.masked_fill(wanted[:, None] == self.candidates, -math.inf)
            own = (guess.to(c.dtype) * true).sum(-1, keepdim=True) * scale
            nats = torch.logsumexp(torch.cat((own, scores), 1), 1) - own[:, 0]
            total = total + nats.sum() / math.log(CANDIDATES)
        return total


def offset_targets(
    ids: Tensor, keep: Tensor | None, offsets: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each offset: the id at t + offset (T, B), and whether it lies in the same document."""
    document = torch.zeros_like(ids) if keep is None else (1 - keep.long()).cumsum(0)
    targets, valid = [], []
    for offset in offsets:
        target, other = ids.roll(-offset, 0), document.roll(-offset, 0)
        t = torch.arange(len(ids), device=ids.device) + offset
        inside = ((t >= 0) & (t < len(ids)))[:, None]
        targets.append(target)
        valid.append(inside & (other == document))
    return targets, valid
