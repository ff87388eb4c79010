"""CORE's decisions, fast: shared beginnings run once, prompts in batches, only the spans' logits.

In:    a model of the family contract, examples.   Out: the answers of reference.py.
Law:   whatever kernels round, decisions are the reference's: an example whose best two answers are
       nearer than `tau` is scored again by it. So batches, sorting and sharing change nothing.
Memory: rows x longest prompt <= the budget, rows x longest x V <= 1 GiB of fp32 logits, one row at
       least; a long beginning goes through in pieces.
Letters: B rows, n positions, V vocabulary, N scored ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lib.core.errors import EnvError, InputError
from lib.eval import reference
from lib.eval.bundle import Task
from lib.eval.prompts import Example
from lib.eval.reference import Answer, Scores
from lib.eval.scorer import LOGIT_BYTES, ran_out_of_memory
from lib.models.base import read_in_pieces

# Padded tokens of a batch where nobody says otherwise. On a CPU short rows go by few, whose logits
# stay in its caches; a long beginning by many, since a piece looks back at all before it.
CPU_ROWS, CPU_TOKENS, DEVICE_TOKENS = 1024, 4096, 65_536
# A beginning is run apart where that spares this many ids: below, one more call costs more.
SHARE_LEAST = 96
TAU = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2}  # nats, or of logits


class Model(Protocol):
    """The part of the family contract that is used here."""

    training: bool

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Tokens (B, n) int64 -> logits (B, n, >= V), state."""
        ...

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: Any = None, keep: bool = True
    ) -> tuple[Tensor, Any]:
        """Logits (N, >= V) of the marked positions (B, n), state where `keep` asks for it."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""
        ...


@dataclass(frozen=True)
class Scored:
    """An example's answer; `difference`: how far the fast means were off where both were made."""

    example: Example
    answer: Answer
    rescored: bool
    difference: float


@dataclass(kw_only=True)
class Answerer:
    """Answers examples under one model."""

    model: Model
    vocab_size: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32  # of the matmuls, by autocast
    budget_tokens: int | None = None  # rows x longest of a batch; changes no result
    share: bool = True  # run what the choices of an example have in common once
    warn: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        on_cpu = torch.device(self.device).type == "cpu"
        self.row_tokens = CPU_ROWS if on_cpu and not self.budget_tokens else None
        self.budget_tokens = self.budget_tokens or (CPU_TOKENS if on_cpu else DEVICE_TOKENS)
        self.share = self.share and hasattr(self.model, "repeat_state")

    def __call__(
        self,
        task: Task,
        examples: Sequence[Example],
        advance: Callable[[float], None] = lambda examples: None,
    ) -> list[Scored]:
        """Answers in the order of `examples`; `advance` hears of each finished one.

        InputError names task and row where logits are not finite, EnvError the length of a row that
        does not fit memory.
        """
        was_training = self.model.training
        self.model.train(False)
        try:
            found: dict[int, dict[int, Scores]] = {}
            for example, j, scores in self._scores(task, examples):
                found.setdefault(example.i, {})[j] = scores
                if len(found[example.i]) == len(example.spans):
                    advance(1)
            return [self._settle(task, one, found[one.i]) for one in examples]
        finally:
            self.model.train(was_training)

    def _settle(self, task: Task, example: Example, scores: dict[int, Scores]) -> Scored:
        """The decision; by the reference where it is a near thing."""
        ordered = [scores[j] for j in range(len(example.spans))]
        if reference.margin(task.kind, ordered) >= TAU[self.dtype]:
            return Scored(example, reference.decide(task.kind, example, ordered), False, 0.0)
        with _named(task, example):
            exact = reference.answer(
                self.model, task.kind, example,
                vocab_size=self.vocab_size, device=self.device, dtype=self.dtype,
            )  # fmt: skip
        pairs = zip(ordered, exact.scores, strict=True)
        off = [abs(fast.mean - slow.mean) for fast, slow in pairs if len(fast.nats)]
        return Scored(example, exact, True, max(off, default=0.0))

    # ------------------------------------------------------------ scores

    def _scores(
        self, task: Task, examples: Sequence[Example]
    ) -> Iterator[tuple[Example, int, Scores]]:
        """Of every prompt, longest first."""
        shared, rows = [], []
        for example in examples:
            if self.shares(example):
                shared.append(example)
            else:
                rows += [(example, j) for j in range(len(example.spans))]
        for example in sorted(shared, key=lambda one: (-one.longest, one.i)):
            for j, scores in enumerate(self._shared(task, example)):
                yield example, j, scores
        yield from self._rows(task, rows)

    def shares(self, example: Example) -> bool:
        """Whether what its prompts begin with is run once, apart from them."""
        return self.share and (len(example.spans) - 1) * len(example.shared) >= SHARE_LEAST

    def _rows(
        self, task: Task, rows: list[tuple[Example, int]]
    ) -> Iterator[tuple[Example, int, Scores]]:
        """Whole prompts in padded batches; causal models do not see the padding."""
        rows.sort(key=lambda row: (-row[0].length(row[1]), row[0].i, row[1]))
        done = 0
        while done < len(rows):
            longest = rows[done][0].length(rows[done][1])
            batch = rows[done : done + self._most_rows(longest, self.row_tokens)]
            inputs = [example.ids(j)[:-1] for example, j in batch]  # the last id predicts nothing
            spans = [example.spans[j] for example, j in batch]
            marks = [(start - 1, stop - 1) for start, stop in spans]
            made = self._run(inputs, marks, None)
            if made is None:
                self._halve(len(batch), longest)
                continue
            for (example, j), logits in zip(batch, made, strict=True):
                yield example, j, self._score(task, example, j, logits)
            done += len(batch)

    def _shared(self, task: Task, example: Example) -> list[Scores]:
        """The common beginning once, its state for every choice, then what follows it."""
        n, most = len(example.shared), self._most_rows(example.longest)
        first, state = self._beginning(example.shared, example.longest)
        order = sorted(range(len(example.tails)), key=lambda j: (-len(example.tails[j]), j))
        logits: dict[int, list[Tensor]] = {}
        for j, (start, stop) in enumerate(example.spans):
            logits[j] = [first] if start == n and stop > start else []
        todo = [j for j in order if len(example.tails[j]) > 1]
        while todo:
            batch = todo[:most]
            inputs = [example.tails[j][:-1] for j in batch]
            marks = [
                (max(0, example.spans[j][0] - 1 - n), len(example.tails[j]) - 1) for j in batch
            ]
            repeated = self.model.repeat_state(state, len(batch))  # type: ignore[attr-defined]  # `share`
            made = self._run(inputs, marks, repeated)
            if made is None:
                self._halve(len(batch), example.longest)
                most = max(1, len(batch) // 2)
                continue
            for j, rows in zip(batch, made, strict=True):
                logits[j].append(rows)
            todo = todo[len(batch) :]
        joined = [torch.cat(logits[j] or [first[:0]]) for j in range(len(logits))]
        return [self._score(task, example, j, z) for j, z in enumerate(joined)]

    def _beginning(self, ids: np.ndarray, longest: int) -> tuple[Tensor, Any]:
        """Logits (1, V) after `ids`, and the state; in pieces that keep to the budget."""
        tokens = torch.from_numpy(ids.astype(np.int64))[None].to(self.device)
        made = self._guarded(lambda: read_in_pieces(self.model, tokens, piece=self._most_rows(1)))
        if made is None:
            self._halve(1, longest)
        assert made is not None
        return made[0][:, : self.vocab_size], made[1]

    # ------------------------------------------------------------ one call

    def _run(
        self, inputs: Sequence[np.ndarray], marks: Sequence[tuple[int, int]], state: Any
    ) -> list[Tensor] | None:
        """Logits (N, V) of the marked positions of each row; None: no memory."""
        longest = max(map(len, inputs))
        tokens = np.zeros((len(inputs), longest), np.int64)  # padding is id 0, never looked at
        where = np.zeros((len(inputs), longest), bool)
        for row, (ids, (start, stop)) in enumerate(zip(inputs, marks, strict=True)):
            tokens[row, : len(ids)] = ids
            where[row, start:stop] = True
        at = torch.from_numpy(where).to(self.device)
        made = self._guarded(
            lambda: self.model.logits_at(
                torch.from_numpy(tokens).to(self.device), at, state, keep=False
            )
        )
        if made is None:
            return None
        return list(made[0][:, : self.vocab_size].split(where.sum(axis=1).tolist()))

    def _guarded(self, call: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any] | None:
        """What `call` gives, None where memory ran out."""
        try:
            with reference.evaluating(self.device, self.dtype):
                return call()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        if torch.device(self.device).type == "cuda":  # outside the handler: its traceback holds on
            torch.cuda.empty_cache()
        return None

    def _score(self, task: Task, example: Example, j: int, logits: Tensor) -> Scores:
        start, stop = example.spans[j]
        wanted = torch.from_numpy(example.ids(j)[start:stop].astype(np.int64)).to(logits.device)
        with _named(task, example), torch.inference_mode():
            return reference.score(logits, wanted)

    def _budget(self) -> int:
        assert self.budget_tokens is not None
        return self.budget_tokens

    def _most_rows(self, longest: int, limit: int | None = None) -> int:
        most = min(self._budget(), LOGIT_BYTES // (4 * self.vocab_size), limit or self._budget())
        return max(1, most // max(1, longest))

    def _halve(self, rows: int, longest: int) -> None:
        """Half the budget after memory ran out; EnvError where one row was too much."""
        if rows == 1:
            raise EnvError(
                "out of memory",
                value=f"one row of {longest} tokens",
                remedy="use a device with more memory, or lower eval.core.max_context",
            )
        self.budget_tokens = rows // 2 * longest
        self.warn(f"out of memory, going on with {self.budget_tokens} tokens a batch")


@contextlib.contextmanager
def _named(task: Task, example: Example) -> Iterator[None]:
    """Complaints about an example name its task and row."""
    try:
        yield
    except InputError as error:
        where = f"task {task.label}, line {example.row}"
        raise InputError(error.what, value=where, remedy=error.remedy) from error
