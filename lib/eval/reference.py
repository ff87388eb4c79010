"""CORE's scores and decisions as a definition: one prompt at a time, all its logits.

In:    a model of the family contract, examples.   Out: per prompt, the nats of its span and what
       the model would have said; per example, a decision (evaluation.md 3.8, 3.9).
Rule:  this file is the specification. The fast path (batched.py) must decide the same on every
       example, and asks here again where two answers are nearly equal.
Letters: V vocabulary, N scored ids.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.core.errors import InputError
from lib.eval.bundle import Kind
from lib.eval.prompts import Example


class Model(Protocol):
    """The part of the family contract that a decision needs."""

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Tokens (B, n) int64 -> logits (B, n, >= V), state."""
        ...


@dataclass(frozen=True)
class Scores:
    """Of the N ids of one span."""

    nats: np.ndarray  # fp64 (N,), cross-entropy
    best: np.ndarray  # int64 (N,), the id with the largest logit, the lowest of equals
    gap: np.ndarray  # fp64 (N,), between the two largest logits

    @property
    def sum(self) -> float:
        """Nats of the span."""
        return math.fsum(self.nats)

    @property
    def mean(self) -> float:
        """Nats per id; NaN for an empty span."""
        return self.sum / len(self.nats) if len(self.nats) else math.nan


@dataclass(frozen=True)
class Answer:
    """What the model decided on one example."""

    correct: bool
    pred: int | list[int]  # choice; for language modelling the ids said
    scores: tuple[Scores, ...]


def answer(
    model: Model,
    kind: Kind,
    example: Example,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Answer:
    """The decision on `example`; InputError where logits are not finite."""
    found = []
    for j, (start, stop) in enumerate(example.spans):
        ids = torch.from_numpy(example.ids(j).astype(np.int64)).to(device)
        with evaluating(device, dtype):
            logits, _ = model(ids[None])  # (1, n, V)
        span = logits[0, start - 1 : stop - 1, :vocab_size]
        found.append(score(span, ids[start:stop]))
    return decide(kind, example, found)


@contextlib.contextmanager
def evaluating(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """No gradients; matmuls in `dtype`."""
    kind, half = torch.device(device).type, dtype not in (torch.float32, torch.float64)
    with torch.inference_mode(), torch.autocast(kind, dtype, enabled=half):
        yield


def score(logits: Tensor, wanted: Tensor) -> Scores:
    """logits (N, V), wanted ids (N,) -> their scores; InputError for NaN and infinities."""
    if not len(wanted):
        return Scores(np.empty(0), np.empty(0, np.int64), np.empty(0))
    z = logits if logits.dtype == torch.float64 else logits.float()
    if not torch.isfinite(z).all():
        raise InputError("logits are not finite", remedy="train again from a good checkpoint")
    nats = F.cross_entropy(z, wanted, reduction="none")
    top = z.topk(min(2, z.shape[-1]), dim=-1).values
    return Scores(
        nats.double().cpu().numpy(),
        z.argmax(dim=-1).cpu().numpy(),  # the first of equals
        (top[:, 0] - top[:, -1]).double().cpu().numpy(),
    )


def decide(kind: Kind, example: Example, scores: Sequence[Scores]) -> Answer:
    """Multiple choice and schema: the least mean; language modelling: every id as wanted."""
    if kind == "language_modeling":
        start, stop = example.spans[0]
        said = scores[0].best
        right = stop > start and np.array_equal(said, example.ids(0)[start:stop])
        return Answer(bool(right), said.tolist(), tuple(scores))
    chosen = least([one.mean for one in scores])
    return Answer(chosen == example.gold, chosen, tuple(scores))


def least(means: Sequence[float]) -> int:
    """Index of the smallest, the first of equals. NaN compares false: it keeps what it meets."""
    best = 0
    for j, mean in enumerate(means):
        if mean < means[best]:
            best = j
    return best


def margin(kind: Kind, scores: Sequence[Scores]) -> float:
    """How near the decision is to another one: nats between means, or between logits."""
    if kind == "language_modeling":
        return float(min(scores[0].gap, default=math.inf))
    means = sorted(m for m in (one.mean for one in scores) if not math.isnan(m))
    return means[1] - means[0] if len(means) > 1 else math.inf
