"""Nats of token sequences under a model: windows, batches, cross-entropy.

In:    ids of documents, a model of the family contract.   Out: nats and scored bytes per document.
Law:   every target is scored once. Batches, padding and window order change nothing beyond what the
       kernels round: sums are fp64 per window and exact (math.fsum) across windows.
Note:  a window begins with the boundary id, as training rows do; a target is scored in the first
       window that holds it, so later windows score with at least T - S ids of context.
Letters: B batch, T context, S stride, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.core.errors import EnvError, InputError, UserError

LOGIT_BYTES = 2**30  # fp32 logits that exist at once
# Padded tokens of a batch where nobody says otherwise. On a CPU logits should stay in its caches:
# at V 2,048 and T 256 a budget of 1,024 takes 0.6 of the time of 16,384 and 0.4 of that of 65,536.
CPU_TOKENS, DEVICE_TOKENS = 1024, 65_536


class Tokenizer(Protocol):
    """What is asked of a tokenizer here (data.md 8)."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    lossless: bool
    token_bytes: np.ndarray  # int32 (V,), raw bytes an id stands for, 0 for specials

    def encode(self, text: str) -> Any:
        """Ids of `text`, without any special id."""
        ...

    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes that ids stand for."""
        ...


class Model(Protocol):
    """The part of the family contract that BPB needs."""

    training: bool

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: Any = None, keep: bool = True
    ) -> tuple[Tensor, Any]:
        """Logits (N, >= V) of the marked positions (B, n), state."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""
        ...


# ---------------------------------------------------------------- the plan, pure


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides the number besides model and text."""

    context: int  # T, inputs of a window
    stride: int  # S, targets from one window's start to the next one's
    boundary_id: int | None  # b, in front of every window; None: x_1 costs ln V
    vocab_size: int  # V, logits from here on are padding

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.context:
            raise UserError(
                "stride does not fit",
                value=f"eval.bpb.stride is {self.stride}",
                remedy=f"use 1 to {self.context}, the context, or null",
            )

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, boundary: str, context: int, stride: int | None = None
    ) -> Rules:
        """Rules for a tokenizer and the boundary of its training rows; stride None = T // 2."""
        return cls(
            context=context,
            stride=max(1, context // 2) if stride is None else stride,
            boundary_id=boundary_id(tokenizer, boundary),
            vocab_size=tokenizer.vocab_size,
        )


def boundary_id(tokenizer: Tokenizer, boundary: str) -> int | None:
    """b, the id that stood before a document in training; None for boundary none."""
    if boundary == "none":
        return None
    found = tokenizer.eos_id if boundary == "eos" else tokenizer.bos_id
    if found is None:
        raise UserError(
            "the tokenizer has no such boundary", value=boundary, remedy="use boundary: none"
        )
    return found


@dataclass(frozen=True)
class Window:
    """Targets [start, stop) of a document; those from `scored` on belong to this window."""

    document: int
    start: int
    stop: int
    scored: int

    def __len__(self) -> int:
        return self.stop - self.start


def plan_windows(targets: int, context: int, stride: int, document: int = 0) -> list[Window]:
    """Windows that score each of `targets` targets once, in order."""
    windows: list[Window] = []
    start = scored = 0
    while scored < targets:
        stop = min(start + context, targets)
        windows.append(Window(document, start, stop, scored))
        start, scored = start + stride, stop
    return windows


def bits_per_byte(nats: float, total_bytes: int) -> float:
    """nats / (ln 2 x bytes); inf for no bytes."""
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf


def sum_rows(
    losses: np.ndarray, targets: np.ndarray, token_bytes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nats (fp64) and bytes (int64) of each row of targets, both (B,).

    losses, targets: (B, n). Target -1, and ids that stand for no byte, count in neither: a special
    id has no text to be charged to. The sum of a row depends on its counted losses alone, not on
    the padding between or after them.
    """
    bytes_of = token_bytes[np.maximum(targets, 0)] * (targets >= 0)  # (B, n), never index -1
    counted = bytes_of > 0
    nats = [row[keep].astype(np.float64).sum() for row, keep in zip(losses, counted, strict=True)]
    return np.array(nats, np.float64), bytes_of.sum(axis=1, dtype=np.int64)


# ---------------------------------------------------------------- the scorer


@dataclass(kw_only=True)
class Scorer:
    """Nats and scored bytes of token sequences under a model."""

    model: Model
    rules: Rules
    token_bytes: np.ndarray  # int (V,)
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32  # of the matmuls, by autocast
    budget_tokens: int | None = None  # rows x longest of a batch; changes no result
    warn: Callable[[str], None] = field(default=lambda text: None)

    def __call__(
        self, documents: Sequence[np.ndarray], names: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nats (fp64) and bytes (int64) of each document's ids; names are for messages.

        InputError where the model gives no finite loss, EnvError where one row does not fit memory.
        """
        rules, free = self.rules, 0 if self.rules.boundary_id is not None else 1
        windows = [
            window
            for d, ids in enumerate(documents)
            for window in plan_windows(len(ids) - free, rules.context, rules.stride, d)
        ]
        # Windows that score from the same place on go together: nothing is computed before it
        # that nobody looks at.
        windows.sort(key=lambda w: (-len(w), w.scored - w.start, w.document, w.start))
        nats: list[list[float]] = [[] for _ in documents]
        total = np.zeros(len(documents), np.int64)
        was_training = self.model.training
        self.model.train(False)
        try:
            for batch, losses, targets in self._batches(windows, documents):
                self._require_finite(batch, losses, targets, names)
                row_nats, row_bytes = sum_rows(losses, targets, self.token_bytes)
                for window, one, count in zip(batch, row_nats, row_bytes, strict=True):
                    nats[window.document].append(float(one))
                    total[window.document] += count
        finally:
            self.model.train(was_training)
        if free:  # nothing stands before x_1, so it has no prediction
            for d, ids in enumerate(documents):
                if len(ids):
                    nats[d].append(math.log(rules.vocab_size))
                    total[d] += self.token_bytes[ids[0]]
        return np.array([math.fsum(one) for one in nats], np.float64), total

    def _batches(
        self, windows: list[Window], documents: Sequence[np.ndarray]
    ) -> Iterator[tuple[list[Window], np.ndarray, np.ndarray]]:
        """(windows, losses (B, n), targets (B, n)) for all windows, which come longest first."""
        on_cpu = torch.device(self.device).type == "cpu"
        budget = self.budget_tokens or (CPU_TOKENS if on_cpu else DEVICE_TOKENS)
        done = 0
        while done < len(windows):
            longest = len(windows[done])
            most = min(budget, LOGIT_BYTES // (4 * self.rules.vocab_size))
            batch = windows[done : done + max(1, most // longest)]
            tokens, targets = self._fill(batch, longest, documents)
            losses = self._losses(tokens, targets)
            if losses is None:
                if len(batch) == 1:
                    raise EnvError(
                        "out of memory",
                        value=f"one row of {longest} tokens",
                        remedy="use a device with more memory, or a smaller context",
                    )
                self.budget_tokens = budget = len(batch) // 2 * longest
                self.warn(f"out of memory, going on with {budget} tokens a batch")
                continue
            yield batch, losses, targets.numpy()
            done += len(batch)

    def _fill(
        self, batch: list[Window], longest: int, documents: Sequence[np.ndarray]
    ) -> tuple[Tensor, Tensor]:
        """Inputs, targets (B, longest) int64; padding is id 0, targets not scored here -1."""
        tokens = np.zeros((len(batch), longest), np.int64)
        targets = np.full((len(batch), longest), -1, np.int64)
        b = self.rules.boundary_id
        for row, w in enumerate(batch):
            ids = documents[w.document]
            if b is None:
                tokens[row, : len(w)] = ids[w.start : w.stop]
                ids = ids[1:]
            else:
                tokens[row, 0] = b
                tokens[row, 1 : len(w)] = ids[w.start : w.stop - 1]
            targets[row, w.scored - w.start : len(w)] = ids[w.scored : w.stop]
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def _losses(self, tokens: Tensor, targets: Tensor) -> np.ndarray | None:
        """Cross-entropy of every target in nats (B, n), 0 at -1; None when memory ran out."""
        device = torch.device(self.device)
        half = self.dtype != torch.float32
        try:
            where = targets >= 0
            at = where.to(device)
            with torch.no_grad(), torch.autocast(device.type, self.dtype, enabled=half):
                logits, _ = self.model.logits_at(tokens.to(device), at, keep=False)
            z = logits[:, : self.rules.vocab_size]  # (N, V)
            z = z if z.dtype == torch.float64 else z.float()
            found = F.cross_entropy(z, targets[where].to(device), reduction="none").cpu()
            losses = torch.zeros(targets.shape, dtype=found.dtype)
            losses[where] = found
            return losses.numpy()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the tensors alive.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _require_finite(
        self, batch: list[Window], losses: np.ndarray, targets: np.ndarray, names: Sequence[str]
    ) -> None:
        bad = np.argwhere(~np.isfinite(losses) & (targets >= 0))
        if len(bad):
            row, column = bad[0]
            window = batch[row]
            position = window.start + int(column) + (self.rules.boundary_id is None)
            raise InputError(
                "loss is not finite",
                value=f"{losses[row, column]} at document {names[window.document]}, "
                f"position {position}",
                remedy="train again from a good checkpoint",
            )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is the allocator's complaint, of whatever type (torch uses RuntimeError too)."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "Cannot allocate")
    )
