"""When a position of a recursive model stops thinking, and what a head learns for it: trm.md 4.3.

q:      q = sigmoid(w . rms(y) + b), learned as "the most probable id is right"; 1 - q < tau stops.
kl:     KL(p_s || p_s-1) < tau stops; it has no weights.
pooled: the published recipe's head on the mean of y. It sees the future and never stops anything.
Letters: B batch, n positions, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.nn.norm import rms_norm

Q_WEIGHT, Q_BIAS = 0.5, -5.0  # share of the q-head's loss; it begins by not halting
RISE, ROUNDS, LOWEST, HIGHEST = 1e-3, 12, 1e-6, 10.0  # of the search for tau


class Halting(nn.Module):
    """The head of one kind; threshold and weight are the pooled one's."""

    def __init__(
        self, kind: Literal["q", "kl", "pooled"], width: int, threshold: float, weight: float
    ) -> None:
        super().__init__()
        self.kind, self.threshold, self.weight = kind, threshold, weight
        self.head = nn.Linear(width, 1) if kind != "kl" else None
        self.norm = nn.LayerNorm(width) if kind == "pooled" else None

    def done(
        self, y: Tensor, tau: float, logits: Callable[[Tensor], Tensor], before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(positions (B, n) that may stop after this step, log-probabilities for the next one)."""
        if self.kind == "q":
            return torch.sigmoid(-self.q(y)) < tau, None  # 1 - q
        now = logits(y).log_softmax(-1)
        if before is None:
            return torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device), now
        return (now.exp() * (now - before)).sum(-1).clamp(min=0) < tau, now

    def q(self, y: Tensor) -> Tensor:
        """Logit (B, n) of the q-head."""
        assert self.head is not None, "kl has no head"
        return self.head(rms_norm(y)).squeeze(-1)

    def pooled(self, y: Tensor, mask: Tensor) -> Tensor:
        """Logit (B,) of the recipe's head on the mean of y over `mask`."""
        assert self.head is not None and self.norm is not None, "not the pooled head"
        mean = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.head(self.norm(mean)).squeeze(-1)

    def loss(self, y: Tensor, right: Tensor, valid: Tensor, mask: Tensor | None) -> Tensor:
        """Binary cross-entropy of q or of the pooled head, times its factor.

        q: by position, label `right` (B, n), mean over `valid`. pooled: by row over `mask` (None:
        all positions), label 1 where the share of right ids reaches the threshold.
        """
        if self.kind == "q":
            label = right.to(y.dtype)
            raw = F.binary_cross_entropy_with_logits(self.q(y), label, reduction="none")
            return Q_WEIGHT * (raw * valid).sum() / valid.sum().clamp(min=1)
        seen = torch.ones_like(right) if mask is None else mask.bool()
        label = (right & seen).sum(1) / seen.sum(1).clamp(min=1) >= self.threshold
        q = self.pooled(y, seen)
        return self.weight * F.binary_cross_entropy_with_logits(q, label.to(q.dtype))


def largest_tau(bpb: Callable[[float], float]) -> float:
    """The largest tau, by bisection of its logarithm, that costs 0.1 % of bits per byte at most.

    bpb(tau) is that of the validation text, bpb(0) without halting. 0, never, where even the
    smallest costs more.
    """
    allowed, low, high = bpb(0.0) * (1 + RISE), LOWEST, HIGHEST
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if bpb(middle) <= allowed else (low, middle)
    return low if low > LOWEST else 0.0
