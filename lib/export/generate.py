"""Sampling from any family: ids from a model with its state, text from ids, character by character.

In:    a model (forward, repeat_state), prompt ids, a `Sampling`.   Out: ids row by row, text.
Law:   row i's ids depend on (model, prompt, sampling, i) alone, not on the number of rows; greedy
       with state equals greedy without; the pieces of a `TextStream` join to the decoded bytes.
Note:  one uniform number a row and step, turned into an id by the inverse of the cumulative
       distribution: rounding in a kernel moves a draw as rarely as it moves a probability.
Letters: n rows, V vocabulary.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lib.core.errors import InputError, UserError
from lib.core.rng import numpy_generator

PREFILL = 512  # prompt ids that go in at once


class Model(Protocol):
    """The part of the family contract that generation needs."""

    training: bool
    vocab_size: int
    max_context: int | None

    def __call__(self, tokens: Any, state: Any = None) -> tuple[Any, Any]:
        """Tokens (B, n) int64 -> logits (B, n, >= V), state."""
        ...

    def repeat_state(self, state: Any, n: int) -> Any:
        """The state of row 0, n times."""
        ...


class Tokenizer(Protocol):
    """What a prompt needs of a tokenizer."""

    token_bytes: np.ndarray

    def encode(self, text: str) -> Any:
        """Ids of `text`, without any special id."""
        ...

    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes that ids stand for."""
        ...


# ---------------------------------------------------------------- choosing an id, pure


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an id is chosen. UserError for a value that means nothing."""

    temperature: float = 0.8  # 0: the most probable id
    top_k: int = 40  # ids that stay, 0 = all
    top_p: float = 1.0  # smallest set of ids with this much probability
    min_p: float = 0.0  # least probability that stays, as a share of the largest
    repetition_penalty: float = 1.0  # logits of ids seen before: z / x above 0, z x below
    seed: int = 0

    def __post_init__(self) -> None:
        for bad, name, wanted in (
            (not 0 <= self.temperature < math.inf, "temperature", "0 or more"),
            (self.top_k < 0, "top_k", "0 (off) or more"),
            (not 0 < self.top_p <= 1, "top_p", "0 < x <= 1"),
            (not 0 <= self.min_p <= 1, "min_p", "0 <= x <= 1"),
            (not 0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0"),
        ):
            if bad:
                value = f"{name} is {getattr(self, name)}"
                raise UserError("not possible", value=value, remedy=f"use {wanted}")


def penalise(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Logits (V,) with ids seen before made less likely (arXiv 1909.05858 section 4.1)."""
    if penalty == 1 or not len(seen):
        return logits
    ids, out = np.unique(np.asarray(seen)), logits.copy()
    out[ids] = np.where(out[ids] > 0, out[ids] / penalty, out[ids] * penalty)
    return out


def choose(logits: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """One id from logits (V,) fp64 by a number 0 <= uniform < 1.

    temperature 0: the largest, the lowest id on ties. Else top-k, then top-p on
    softmax(z / temperature), then min-p; ties go to the lower id.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits))  # the first of equals
    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(logits >= least)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    ids = ids[: sampling.top_k or None]
    scaled = (logits[ids] - logits[ids[0]]) / sampling.temperature
    p = np.exp(scaled)
    p /= p.sum()
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        ids, p = ids[:keep], p[:keep]
    if sampling.min_p > 0:
        keep = p >= sampling.min_p * p[0]
        ids, p = ids[keep], p[keep]
    total = np.cumsum(p)
    at = int(np.searchsorted(total, uniform * total[-1], side="right"))
    return int(ids[min(at, len(ids) - 1)])


# ---------------------------------------------------------------- rows of ids


@dataclass
class Row:
    """One continuation: its ids without the stop id, their log-probabilities, why it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nats, of the model's own distribution
    stop: str | None = None  # None while it goes on; eos, length, stop, interrupted


Carried = tuple[Sequence[int], Any]  # ids that a model has read, and its state after them


class Generation:
    """n continuations of one prompt; iterating makes one id for each unfinished row.

    The prompt runs once, its state is copied to the rows. UserError where there is nothing to begin
    with, or where prompt and new ids pass the model's context (unless `beyond_context`).
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        rows: int = 1,
        stop_ids: Iterable[int] = (),
        device: Any = "cpu",
        beyond_context: bool = False,
        cached: bool = True,  # False: the whole row again for each id, the definition
        carried: Carried = ((), None),  # of a generation whose ids this prompt begins with
    ) -> None:
        self.model, self.prompt, self.sampling = model, [int(i) for i in prompt], sampling
        self.max_new_tokens, self.stop_ids = max_new_tokens, frozenset(stop_ids)
        self.device, self.cached = device, cached
        self.carried = carried  # at the end: all that a next turn may go on from (one row)
        self.rows = [Row() for _ in range(rows)]
        self._draws = [numpy_generator(sampling.seed, "sample", row) for row in range(rows)]
        self._check(beyond_context)

    def _check(self, beyond_context: bool) -> None:
        wanted, context = len(self.prompt) + self.max_new_tokens, self.model.max_context
        if not self.prompt:
            raise UserError("empty prompt", remedy="give some text: this model has no start id")
        if self.max_new_tokens < 0 or not self.rows:
            value = f"{self.max_new_tokens} ids for {len(self.rows)} rows"
            raise UserError("nothing to generate", value=value, remedy="ask for 1 or more")
        if context is not None and wanted > context and not beyond_context:
            raise UserError(
                "longer than the model's context",
                value=f"{len(self.prompt)} prompt + {self.max_new_tokens} new ids, {context} fit",
                remedy="ask for fewer ids, or shorten the prompt",
            )

    def __iter__(self) -> Iterator[list[int | None]]:
        """The new id of every row, None for rows that have ended; stops when all have."""
        import torch

        was_training = self.model.training
        self.model.train(False)  # type: ignore[attr-defined]  # every nn.Module has it
        try:
            with torch.no_grad():
                yield from self._steps(torch)
        finally:
            self.model.train(was_training)  # type: ignore[attr-defined]

    def _steps(self, torch: Any) -> Iterator[list[int | None]]:
        logits, state = self._prefill(torch)
        last = [self.prompt[-1]] * len(self.rows)
        for number in range(self.max_new_tokens):
            made = [self._next(row, logits[row]) for row in range(len(self.rows))]
            yield made
            if all(row.stop for row in self.rows):
                return
            if number + 1 == self.max_new_tokens:
                break
            # Rows that have ended go on with their last id: the state is opaque, no row can leave.
            last = [old if new is None else new for old, new in zip(last, made, strict=True)]
            logits, state = self._advance(torch, last, state)
        for row in self.rows:
            row.stop = row.stop or "length"

    def _prefill(self, torch: Any) -> tuple[np.ndarray, Any]:
        """Logits after the prompt for every row (n, V) fp64, and the state of all rows."""
        from lib.models.base import read_in_pieces  # torch comes with it

        ids = torch.tensor([self.prompt], device=self.device)
        held, state = self.carried
        if (
            not self.cached
            or not held
            or tuple(self.prompt[: len(held)]) != tuple(held)
            or len(held) == len(self.prompt)
        ):
            held, state = (), None
        if self.cached:
            logits, state = read_in_pieces(self.model, ids[:, len(held) :], state, piece=PREFILL)
        else:
            logits = self.model(ids)[0][:, -1]
        n = len(self.rows)
        self.carried = (tuple(self.prompt), state)
        state = self.model.repeat_state(state, n) if self.cached and n > 1 else state
        return np.repeat(self._array(logits), n, axis=0), state

    def _advance(self, torch: Any, last: list[int], state: Any) -> tuple[np.ndarray, Any]:
        if self.cached:
            tokens = torch.tensor(last, device=self.device)[:, None]
            logits, state = self.model(tokens, state)
            self.carried = ((*self.carried[0], last[0]), state)
            return self._array(logits[:, -1]), state
        whole = [torch.tensor([[*self.prompt, *row.ids]], device=self.device) for row in self.rows]
        return np.concatenate([self._array(self.model(ids)[0][:, -1]) for ids in whole]), None

    def _array(self, logits: Any) -> np.ndarray:
        """Logits (rows, >= V) as fp64 (rows, V); InputError when they are not finite."""
        z = logits[:, : self.model.vocab_size].double().cpu().numpy()
        if np.isnan(z).any() or np.isposinf(z).any():
            position = len(self.prompt) + max(len(row.ids) for row in self.rows)
            raise InputError(
                "logits are not finite", value=f"position {position}", remedy="train it again"
            )
        return z

    def _next(self, number: int, logits: np.ndarray) -> int | None:
        row, sampling = self.rows[number], self.sampling
        if row.stop:
            return None
        seen = [*self.prompt, *row.ids] if sampling.repetition_penalty != 1 else []
        z = penalise(logits, seen, sampling.repetition_penalty)
        uniform = self._draws[number].random() if sampling.temperature > 0 else 0.0
        chosen = choose(z, sampling, uniform)
        if chosen in self.stop_ids:
            row.stop = "eos"
            return None
        row.ids.append(chosen)
        largest = logits.max()
        row.logprobs.append(
            float(logits[chosen] - largest - math.log(np.exp(logits - largest).sum()))
        )
        return chosen


def generate(model: Model, prompt: Sequence[int], sampling: Sampling, **options: Any) -> list[Row]:
    """All rows of a `Generation` at their end."""
    generation = Generation(model, prompt, sampling, **options)
    for _ in generation:
        pass
    return generation.rows


# ---------------------------------------------------------------- text


class TextStream:
    """Ids in, whole characters out, ending before a stop string.

    Characters appear as soon as their last byte is there and no stop string can begin with them;
    bytes that are no UTF-8 become U+FFFD, exactly as decoding all bytes at once would have it.
    """

    def __init__(
        self,
        decode_bytes: Callable[[list[int]], bytes],
        stop: Sequence[str] = (),
        pending: bytes = b"",  # of a character that the prompt began
    ) -> None:
        self._decode_bytes, self._stop = decode_bytes, [one for one in stop if one]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = self._decoder.decode(pending)
        self.stopped = False  # a stop string came

    def feed(self, token: int) -> str:
        """The text that `token` completes."""
        return self._release(self._decoder.decode(self._decode_bytes([token])))

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a whole `stop` could still grow from."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def encode_prompt(tokenizer: Tokenizer, data: bytes) -> tuple[list[int], bytes]:
    """Ids of a prompt, and the bytes of a character that it leaves unfinished.

    A prompt may end inside a character (a file cut by size): its bytes go in one by one, and the
    text that follows completes it. UserError for other bytes that are no UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError as error:
        raise UserError(
            "prompt is not UTF-8", value=f"byte {error.start}", remedy="save it as UTF-8"
        ) from None
    pending = decoder.getstate()[0]
    ids = [int(i) for i in tokenizer.encode(text)] if text else []
    single = np.flatnonzero(np.asarray(tokenizer.token_bytes) == 1).tolist() if pending else []
    spelled = {tokenizer.decode_bytes([i]): i for i in reversed(single)}
    for value in pending:
        found = spelled.get(bytes([value]))
        if found is None:
            raise UserError(
                "prompt ends inside a character",
                value=pending.hex(),
                remedy="this tokenizer has no id for a single byte; complete the character",
            )
        ids.append(found)
    return ids, pending
