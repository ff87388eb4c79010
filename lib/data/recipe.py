"""Recipes: the order in which documents of several sources are visited, so that shares come true.

In:   a weight and the document lengths of every source (tokens, or bytes where no tokenizer
      exists).
Out:  blocks of visits (source, document, epoch) in order, and a report of target against realised
      shares.
Rule: the next document comes from the source that is furthest behind, argmax w_s (sum n + 1) - n_s
      with ties to the first written (data.md 5.1), where n_s counts what s has given so far: short
      documents are not starved. One source: identity.
Note: weights are read as the decimals that were written, so scores are exact integers and ties are
      real.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from hashlib import blake2b
from math import lcm
from typing import Literal

import numpy as np

BLOCK = 65_536  # visits that are yielded at once, at most

Order = Callable[[int, int], "np.ndarray | None"]  # (source, epoch) -> order, None = as written


@dataclass(frozen=True)
class Visits:
    """Consecutive documents of a mixture: three arrays of one length."""

    source: np.ndarray  # int32, index into the sources
    document: np.ndarray  # int64, index among the documents of that source
    epoch: np.ndarray  # int32, 0 on the first pass

    def __len__(self) -> int:
        return len(self.source)

    def head(self, count: int) -> Visits:
        """The first `count` visits."""
        return Visits(self.source[:count], self.document[:count], self.epoch[:count])


def mix(
    weights: Sequence[float],
    lengths: Sequence[np.ndarray],
    on_exhausted: Literal["stop", "repeat", "continue"] = "stop",
    max_epochs: int = 1,
    order: Order | None = None,
) -> Iterator[Visits]:
    """Yield the visits of the mixture, at most `BLOCK` at a time.

    lengths[s]: int (documents,), >= 0, in document order. A source has run out when a document of
    it is due and none is left; then `stop` ends the stream, `repeat` starts the source again,
    `max_epochs` passes in all, and then ends the stream, `continue` drops the source and goes on
    with the weights of the rest. `order(source, epoch)` gives the documents' order on a pass. Costs
    8 bytes a document and O(log documents) a run of documents from one source.
    """
    whole = exact_weights(weights)
    passes = [_Pass(s, one, order) for s, one in enumerate(lengths)]
    given = [0] * len(passes)  # n_s
    active = list(range(len(passes)))
    pending = _Pending()
    while active:
        s, limit = _furthest_behind(active, whole, given)
        source = passes[s]
        if source.position == source.documents:
            if on_exhausted == "continue":
                active.remove(s)
                continue
            if on_exhausted == "stop" or source.epoch + 1 >= max_epochs or not source.documents:
                break
            yield from pending.flush(passes)  # visits still to be written belong to the old order
            source.begin(source.epoch + 1)
        count, amount = source.take(limit, BLOCK - pending.visits)
        pending.add(s, source.epoch, source.position, count)
        source.position += count
        given[s] += amount
        if pending.visits == BLOCK:
            yield from pending.flush(passes)
    yield from pending.flush(passes)


def exact_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the decimals as written: (.7, .2, .1) -> [7, 2, 1]."""
    assert all(weight > 0 for weight in weights), "weights are checked by the settings"
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _furthest_behind(
    active: list[int], whole: list[int], given: list[int]
) -> tuple[int, int | None]:
    """The source that is due, and how much it may give before another one is (None: no bound).

    With W the integer weights and D their sum, all scores times D: A_s = W_s (n + 1) - D n_s. Once
    s has given c more, its score is A_s - (D - W_s) c and that of t is A_t + W_t c; s stays due
    while it leads.
    """
    if len(active) == 1:
        return active[0], None
    total = sum(whole[s] for s in active)
    amount = sum(given[s] for s in active) + 1
    scores = [(whole[s] * amount - total * given[s], -s) for s in active]
    best, minus = max(scores)
    due = -minus
    spare = total - whole[due]
    limit = min(
        (best - score - (other < due)) // (spare + whole[other])
        for (score, _), other in zip(scores, active, strict=True)
        if other != due
    )
    return due, limit


class _Pass:
    """One pass over one source: its order, the sums of lengths in it, and the position."""

    def __init__(self, source: int, lengths: np.ndarray, order: Order | None) -> None:
        self.source, self.lengths, self.make_order = source, lengths, order
        self.documents = len(lengths)
        self.begin(0)

    def begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self.order = self.make_order(self.source, epoch) if self.make_order else None
        sums = np.zeros(self.documents + 1, np.int64)
        np.cumsum(self.lengths if self.order is None else self.lengths[self.order], out=sums[1:])
        self.before = memoryview(sums.data)  # its items are Python integers, cheaper than numpy's

    def take(self, limit: int | None, most: int) -> tuple[int, int]:
        """Documents that begin within `limit` of the position, and what they hold; at least one."""
        first, end = self.position, min(self.position + most, self.documents)
        last = end
        if limit is not None:
            last = bisect_right(self.before, self.before[first] + limit, first, end)
        return last - first, self.before[last] - self.before[first]


class _Pending:
    """Runs of visits that wait to become arrays."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int, int]] = []
        self.visits = 0

    def add(self, source: int, epoch: int, first: int, count: int) -> None:
        self.runs.append((source, epoch, first, count))
        self.visits += count

    def flush(self, passes: list[_Pass]) -> Iterator[Visits]:
        if not self.runs:
            return
        source, epoch, first, count = np.array(self.runs, np.int64).T
        ends = np.cumsum(count)
        document = np.arange(ends[-1]) + np.repeat(first - (ends - count), count)
        visited = np.repeat(source, count)
        for s in np.unique(source):
            order = passes[s].order
            if order is not None:
                document[visited == s] = order[document[visited == s]]
        yield Visits(visited.astype(np.int32), document, np.repeat(epoch, count).astype(np.int32))
        self.runs, self.visits = [], 0


# ---------------------------------------------------------------- document orders


def hash_order(documents: np.ndarray, seed: int) -> np.ndarray:
    """Positions into `documents` by ascending blake2b-64(seed, document), ties by position.

    documents: int (n,), the documents' numbers within their split. About 1 us a document.
    """
    start = seed.to_bytes(8, "little", signed=True)
    keys = [
        blake2b(start + d.to_bytes(8, "little"), digest_size=8).digest() for d in documents.tolist()
    ]
    return np.argsort(np.frombuffer(b"".join(keys), ">u8"), kind="stable")


# ---------------------------------------------------------------- what came of it


@dataclass
class SourceShare:
    """One source of a mixture: what was asked for and what came."""

    name: str
    target_share: float
    realised_share: float = 0.0  # in tokens, or in whatever the lengths count
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    epochs: int = 0  # passes begun


@dataclass
class MixtureReport:
    """Target against realised shares, filled block by block."""

    sources: list[SourceShare]
    _total: int = field(default=0, repr=False)

    @classmethod
    def of(cls, weights: dict[str, float]) -> MixtureReport:
        """An empty report over named weights."""
        whole = exact_weights(list(weights.values()))
        pairs = zip(weights, whole, strict=True)
        return cls([SourceShare(name, weight / sum(whole)) for name, weight in pairs])

    def add(self, visits: Visits, tokens: np.ndarray, bytes_: np.ndarray) -> None:
        """Count a block; tokens, bytes_: int (len(visits),)."""
        count = len(self.sources)
        documents = np.bincount(visits.source, minlength=count)
        # float64 sums of integers: exact, a block holds far less than 2^53 tokens
        token_sums = np.bincount(visits.source, tokens, minlength=count)
        byte_sums = np.bincount(visits.source, bytes_, minlength=count)
        epochs = np.zeros(count, np.int64)
        np.maximum.at(epochs, visits.source, visits.epoch + 1)
        for s, share in enumerate(self.sources):
            share.documents += int(documents[s])
            share.tokens += int(token_sums[s])
            share.bytes += int(byte_sums[s])
            share.epochs = max(share.epochs, int(epochs[s]))
        self._total += int(token_sums.sum())
        for share in self.sources:
            share.realised_share = share.tokens / self._total if self._total else 0.0

    def as_json(self) -> dict[str, dict[str, float | int]]:
        """Per source name, the numbers, for a manifest."""
        return {s.name: {k: v for k, v in asdict(s).items() if k != "name"} for s in self.sources}

    def lines(self) -> list[str]:
        """One log line a source."""
        return [
            f"{s.name}: target {100 * s.target_share:.1f} %, realised "
            f"{100 * s.realised_share:.1f} % of tokens, {s.documents:,} documents, "
            f"{s.bytes:,} bytes, epochs {s.epochs}"
            for s in self.sources
        ]

    def warnings(self) -> list[str]:
        """One line for every source that is over 2 points away from its target."""
        return [
            f"share of source {s.name}: {100 * s.realised_share:.1f} % of tokens, asked for "
            f"{100 * s.target_share:.1f} %; add shards, or change its weight or on_exhausted"
            for s in self.sources
            if abs(s.realised_share - s.target_share) > 0.02
        ]
