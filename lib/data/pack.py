"""Packing: documents -> rows of context + 1 tokens, as an index over the token files (data.md 10).

In:    blocks of (start, length) of documents in visiting order.  Out: blocks of rows; see RowBlock.
Laws:  best fit: tokens + boundaries = rows (context + 1) + cropped + tail; stream: tokens = rows
       context + 1 + tail. Checked when a pass ends, and every row's length is; a violation is a
       bug.
Pure:  the same lengths and options give the same rows. No clock, no randomness, no files. Memory is
       the buffer and one block; an endless input is fine.
Note:  a segment whose start is negative has the boundary id in front: (~s, n) is the boundary id
       followed by the n - 1 tokens from s on. Only `crop: requeue` makes such segments.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np

from lib.data.tokens import SEGMENT

BLOCK_ROWS = 16_384  # rows that are yielded at once

Documents = Iterable[
    tuple[np.ndarray, np.ndarray]
]  # (starts int64 (n,), lengths int (n,)), block by block


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows: row i holds the next `row_segments[i]` of `segments`."""

    segments: np.ndarray  # SEGMENT (n,)
    row_segments: np.ndarray  # int64 (rows,), >= 1


@dataclass
class PackCounts:
    """What a pass read and what became of it, in tokens unless the name says otherwise."""

    documents: int = 0
    empty_documents: int = 0  # of no token at all; in no row
    tokens: int = 0
    boundaries: int = 0  # boundary ids put in front of requeued tails
    rows: int = 0
    segments: int = 0
    cropped: int = 0  # lost at the ends of rows
    crops: int = 0  # documents cut
    tail: int = 0  # of the last row, which stayed incomplete

    @property
    def crop_share(self) -> float:
        """Share of the tokens read that no row holds because a document was cut."""
        return self.cropped / self.tokens if self.tokens else 0.0


def pack_bestfit(
    documents: Documents,
    counts: PackCounts,
    *,
    context: int,
    buffer: int,
    crop: Literal["drop", "requeue"],
    refill: int = 128,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[RowBlock]:
    """Yield rows that each begin with a document, filled by the longest document that fits.

    A list of >= `buffer` documents is refilled `refill` at a time before each pick while the input
    lasts. The longest document that fits the rest of the row is taken, ties to the earliest in the
    list; where none fits, the shortest, ties to the earliest, is cropped to the rest: `drop` loses
    its tail, `requeue` puts the tail at the end of the list behind a boundary id. The last row, if
    incomplete, is dropped. One pass, O(log buffer) comparisons a pick.
    """
    capacity = context + 1
    entries = _entries(documents, counts)
    waiting: dict[int, deque[int]] = {}  # length -> starts, in list order: ties go to the earliest
    lengths: list[int] = []  # the keys of waiting, ascending
    waiting_documents, rest = 0, capacity
    starts, takes, row_ends = [], [], []

    def put(start: int, length: int) -> None:
        if length in waiting:
            waiting[length].append(start)
        else:
            waiting[length] = deque((start,))
            insort(lengths, length)

    while True:
        while waiting_documents < buffer:
            fresh = list(islice(entries, refill))
            for start, length in fresh:
                put(start, length)
            waiting_documents += len(fresh)
            if not fresh:
                break
        if not waiting_documents:
            break
        # Left of where `rest` would go stands the longest that fits; else take the shortest.
        at = max(bisect_right(lengths, rest) - 1, 0)
        length = lengths[at]
        queue = waiting[length]
        start = queue.popleft()
        if not queue:
            del waiting[length], lengths[at]
        take = min(length, rest)
        starts.append(start)
        takes.append(take)
        rest -= take
        waiting_documents -= 1
        if length > take:
            counts.crops += 1
            if crop == "requeue":
                # A start below zero stands for a boundary id and the token after it: see the head.
                after = start + take if start >= 0 else ~start + take - 1
                put(~after, length - take + 1)
                waiting_documents += 1
                counts.boundaries += 1
            else:
                counts.cropped += length - take
        if rest == 0:
            rest = capacity
            row_ends.append(len(starts))
            if len(row_ends) == block_rows:
                yield _block(starts, takes, row_ends, capacity, counts)
                starts, takes, row_ends = [], [], []
    counts.tail = capacity - rest
    if row_ends:
        yield _block(starts, takes, row_ends, capacity, counts)
    _check_bestfit(counts, capacity, crop)


def _check_bestfit(counts: PackCounts, capacity: int, crop: str) -> None:
    out = counts.rows * capacity + counts.cropped + counts.tail
    assert counts.tokens + counts.boundaries == out, f"packing law broken: {counts}"
    assert crop == "drop" or counts.cropped == 0, f"requeue lost tokens: {counts}"


def _entries(documents: Documents, counts: PackCounts) -> Iterator[tuple[int, int]]:
    """(start, length) of the documents that hold a token, one by one; counts them as they pass."""

    def blocks() -> Iterator[Iterator[tuple[int, int]]]:
        for starts, lengths in documents:
            starts, lengths = _counted(starts, lengths, counts)
            yield zip(starts.tolist(), lengths.tolist(), strict=True)

    return chain.from_iterable(blocks())


def _counted(
    starts: np.ndarray, lengths: np.ndarray, counts: PackCounts
) -> tuple[np.ndarray, np.ndarray]:
    """The documents of a block that hold a token, entered into `counts`."""
    full = lengths > 0
    counts.documents += len(lengths)
    counts.empty_documents += len(lengths) - int(full.sum())
    counts.tokens += int(lengths.sum())
    return starts[full], lengths[full]


def _block(
    starts: list[int], takes: list[int], row_ends: list[int], capacity: int, counts: PackCounts
) -> RowBlock:
    """The finished rows; segments behind the last row end belong to an incomplete row."""
    segments = np.empty(row_ends[-1], SEGMENT)
    segments["start"] = starts[: row_ends[-1]]
    segments["length"] = takes[: row_ends[-1]]
    return _checked(segments, np.diff(np.array(row_ends), prepend=0), capacity, counts)


def _checked(
    segments: np.ndarray, row_segments: np.ndarray, capacity: int, counts: PackCounts
) -> RowBlock:
    ends = np.cumsum(row_segments)
    sums = np.add.reduceat(segments["length"].astype(np.int64), ends - row_segments)
    assert (sums == capacity).all(), "a row is not full"
    counts.rows += len(row_segments)
    counts.segments += len(segments)
    return RowBlock(segments, row_segments)


def pack_stream(documents: Documents, counts: PackCounts, *, context: int) -> Iterator[RowBlock]:
    """Yield the rows x[r T : r T + T + 1] of the concatenation x of all documents, T = `context`.

    Neighbouring rows share one token, so that every token but the first is a target exactly once.
    Documents that lie one behind the other in the store become one segment. Vectorised over the
    blocks of the input.
    """
    done = 0  # rows yielded
    begins = np.empty(0, np.int64)  # pieces of x from row `done` on: where they begin in x
    starts = np.empty(0, np.int64)  # and in the store
    end = 0  # length of x so far
    for block_starts, block_lengths in documents:
        fresh, lengths = _counted(block_starts, block_lengths, counts)
        begins = np.concatenate([begins, end + np.cumsum(lengths) - lengths])
        starts = np.concatenate([starts, fresh])
        end += int(lengths.sum())
        begins, starts = _joined(begins, starts)
        ready = max(end - 1, 0) // context  # rows that are complete
        if ready == done:
            continue
        ends = np.append(begins[1:], end)
        for low in range(done, ready, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, ready)
            first = int(np.searchsorted(ends, low * context, side="right"))
            last = int(np.searchsorted(begins, high * context, side="right"))
            pieces = begins[first:last], ends[first:last], starts[first:last]
            yield _cut(*pieces, context, range(low, high), counts)
        open_ = ends > ready * context
        begins, starts = begins[open_], starts[open_]
        # The last token of a row opens the next one, so at least one piece is left.
        skip = max(ready * context - int(begins[0]), 0)
        begins[0] += skip
        starts[0] += skip
        done = ready
    counts.tail = end - done * context - 1 if end else 0
    out = counts.rows * context + 1 + counts.tail if end else 0
    assert counts.tokens == out and counts.tail >= 0, f"packing law broken: {counts}"


def _joined(begins: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of x where the store does not go on from the piece before."""
    fresh = np.ones(len(begins), bool)
    fresh[1:] = np.diff(starts) != np.diff(begins)
    return begins[fresh], starts[fresh]


def _cut(
    begins: np.ndarray,
    ends: np.ndarray,
    starts: np.ndarray,
    context: int,
    rows: range,
    counts: PackCounts,
) -> RowBlock:
    """The segments of `rows`: pieces [begins, ends) of x cut at the rows' borders, in row order."""
    # Row k is [k T, (k + 1) T], both ends included.
    first = np.maximum(-(-begins // context) - 1, rows.start)
    last = np.minimum((ends - 1) // context, rows.stop - 1)
    times = np.maximum(last - first + 1, 0)
    upto = np.cumsum(times)
    piece = np.repeat(np.arange(len(begins)), times)
    row = np.arange(upto[-1]) + np.repeat(first - (upto - times), times)
    low = np.maximum(begins[piece], row * context)
    segments = np.empty(len(row), SEGMENT)
    segments["start"] = starts[piece] + low - begins[piece]
    segments["length"] = np.minimum(ends[piece], row * context + context + 1) - low
    return _checked(segments, np.bincount(row - rows.start), context + 1, counts)
