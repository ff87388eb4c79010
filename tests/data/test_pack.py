"""Both packers against the reference loaders, against a plain restatement, and their laws."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count, islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data import pack
from lib.data.pack import PackCounts, RowBlock, pack_bestfit, pack_stream
from lib.data.tokens import SEGMENT

BOS = -1  # no id of the stores below, so that boundaries put in by the packer are seen


def blocks(lengths: list[int], size: int = 5) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of a store that holds them one behind the other."""
    starts = np.cumsum([0, *lengths])
    for first in range(0, len(lengths), size):
        part = lengths[first : first + size]
        yield starts[first : first + len(part)], np.array(part, np.int64)


def rows_of(block: RowBlock, store: np.ndarray) -> list[list[int]]:
    """The rows as ids, by the rule in the head of tokens.py."""
    rows, segments = [], iter(block.segments.tolist())
    for segments_of_row in block.row_segments.tolist():
        row: list[int] = []
        for _ in range(segments_of_row):
            start, length = next(segments)
            row += (
                [BOS, *store[~start : ~start + length - 1]]
                if start < 0
                else [*store[start : start + length]]
            )
        rows.append([int(token) for token in row])
    assert next(segments, None) is None
    return rows


def all_rows(packed: Iterator[RowBlock], store: np.ndarray) -> list[list[int]]:
    return [row for block in packed for row in rows_of(block, store)]


# ---------------------------------------------------------------- reference results


def hashed_integers(k: int, size: int, m: int) -> np.ndarray:
    """I(k, (size,), m) of the reference results' input formula, seed 11."""
    x = (np.arange(size, dtype=np.uint64) + np.uint64(1_000_003 * k + 7_654_321 * 11)) % 2**32
    x = x * 0x9E3779B1 % 2**32
    x ^= x >> np.uint64(16)
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> np.uint64(13)
    x = x * 0xC2B2AE35 % 2**32
    x ^= x >> np.uint64(16)
    return np.floor((x.astype(np.float64) + 0.5) / 2**32 * m).astype(np.int64)


class ReferenceInput:
    """The endless document order of a reference case, and where it has been read to."""

    def __init__(self, case: dict, lengths: list[int]) -> None:
        self.case, self.lengths = case, [n + 1 for n in lengths]  # every document begins with BOS
        self.ends = np.cumsum(self.lengths)
        documents = [[0, *(1 + hashed_integers(5000 + d, n, 999))] for d, n in enumerate(lengths)]
        self.store = np.array([token for one in documents for token in one])
        self.state: list[int] = []

    def documents(self, shards: range, rank: int, world: int) -> Iterator:
        groups, rows = self.case["row_groups_per_shard"], self.case["rows_per_group"]
        batch = self.case["tokenizer_batch"]
        for epoch in count(1):
            for shard in shards:
                for group in range(rank, groups, world):
                    for at in range(0, rows, batch):
                        first = (shard * groups + group) * rows + at
                        self.state = [shard, group, epoch]
                        read = slice(first, first + batch)
                        lengths = np.array(self.lengths[read])
                        yield self.ends[read] - lengths, lengths


@pytest.mark.parametrize("number", range(5))
def test_best_fit_equals_the_reference_row_by_row(shared, number):
    """Rows, and how far the input was read for them, over several epochs and for each rank."""
    cases = json.loads((shared / "golden" / "bestfit.json").read_text())["cases"]
    assert len(cases) == 5
    case = cases[number]
    given_ = ReferenceInput(case, case["doc_length_without_bos"])
    options = {"context": case["T"], "buffer": case["buffer_size"], "crop": "drop"}
    options |= {"refill": case["tokenizer_batch"], "block_rows": case["B"]}
    last = case["shards"] - 1
    train = given_.documents(range(last), case["rank"], case["world_size"])
    packed = pack_bestfit(train, PackCounts(), **options)
    rows, states = [], []
    for block in packed:
        rows += rows_of(block, given_.store)
        states.append(given_.state)
        if len(rows) == len(case["rows"]):
            break
    assert rows == case["rows"]
    assert states == case["states_pq_rg_epoch"]
    val = given_.documents(range(last, last + 1), case["rank"], case["world_size"])
    first = islice(pack_bestfit(val, PackCounts(), **options | {"block_rows": 1}), 4)
    assert all_rows(first, given_.store) == case["val_first_4_rows"]


def test_stream_equals_the_reference_windows(shared):
    """The reference advances by B T tokens a batch, into the second epoch: our rows in order."""
    whole = json.loads((shared / "golden" / "classic_loaders.json").read_text())
    case = whole["cases"][0] | whole
    given_ = ReferenceInput(case, whole["doc_length_without_bos"])
    packed = pack_stream(given_.documents(range(2), 0, 1), PackCounts(), context=case["T"])
    wanted = [
        [*row, targets[-1]]
        for batch in whole["cases"][0]["batches"]
        for row, targets in zip(batch["inputs"], batch["targets"], strict=True)
    ]
    rows: list[list[int]] = []
    while len(rows) < len(wanted):
        rows += rows_of(next(packed), given_.store)
    assert len(wanted) == 48 and rows[:48] == wanted


def test_stream_shows_what_the_seed_era_loader_lost(shared):
    """It consumed B T + 1 tokens a batch: its rows are ours over windows that share no token."""
    whole = json.loads((shared / "golden" / "classic_loaders.json").read_text())
    case = whole["cases"][1]
    given_ = ReferenceInput(case | whole, whole["doc_length_without_bos"])
    window = case["B"] * case["T"] + 1
    for number, batch in enumerate(case["batches"]):
        piece = np.array([number * window]), np.array([window])
        rows = all_rows(pack_stream([piece], PackCounts(), context=case["T"]), given_.store)
        assert [row[:-1] for row in rows] == batch["inputs"], number
        assert [row[1:] for row in rows] == batch["targets"], number


# ---------------------------------------------------------------- a plain restatement, and laws


def plain_bestfit(lengths, context, buffer, crop, refill):
    """data.md 10.2 word by word over a list of token lists."""
    store = iter(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))
    waiting, rows, row = [], [], []
    cropped = boundaries = 0
    while True:
        while len(waiting) < buffer:
            fresh = [one.tolist() for _, one in zip(range(refill), store, strict=False)]
            if not fresh:
                break
            waiting += [one for one in fresh if one]
        if not waiting:
            return rows, cropped, boundaries, len(row)
        rest = context + 1 - len(row)
        fitting = [i for i, one in enumerate(waiting) if len(one) <= rest]
        if fitting:
            row += waiting.pop(max(fitting, key=lambda i: (len(waiting[i]), -i)))
        else:
            one = waiting.pop(min(range(len(waiting)), key=lambda i: (len(waiting[i]), i)))
            row += one[:rest]
            if crop == "requeue":
                waiting.append([BOS, *one[rest:]])
                boundaries += 1
            else:
                cropped += len(one) - rest
        if len(row) == context + 1:
            rows.append(row)
            row = []


CONTEXTS = st.sampled_from([2, 7, 64])


def lengths_around(context: int) -> st.SearchStrategy[list[int]]:
    """Documents shorter than, equal to and longer than a row, empty ones too."""
    one = st.one_of(
        st.integers(0, 5),
        st.integers(max(context - 2, 0), context + 4),
        st.integers(0, 4 * context),
    )
    return st.lists(one, max_size=60)


CASES = CONTEXTS.flatmap(lambda context: st.tuples(st.just(context), lengths_around(context)))


@given(CASES, st.sampled_from(["drop", "requeue"]), st.integers(1, 12), st.integers(1, 5))
def test_best_fit_equals_the_plain_restatement(case, crop, buffer, refill):
    """The index by length must pick as a search through the list does, ties included."""
    context, lengths = case
    lengths = [n for n in lengths if n]  # see the test of empty documents
    counts = PackCounts()
    packed = pack_bestfit(
        blocks(lengths),
        counts,
        context=context,
        buffer=buffer,
        crop=crop,
        refill=refill,
        block_rows=3,
    )
    rows = all_rows(packed, np.arange(sum(lengths)))
    wanted, cropped, boundaries, tail = plain_bestfit(lengths, context, buffer, crop, refill)
    assert rows == wanted
    assert (counts.cropped, counts.boundaries, counts.tail) == (cropped, boundaries, tail)


@given(CASES, st.sampled_from(["drop", "requeue"]))
def test_best_fit_loses_no_token_uncounted(case, crop):
    """Law: tokens + boundaries = rows (T + 1) + cropped + tail, and no token twice."""
    context, lengths = case
    counts = PackCounts()
    packed = pack_bestfit(blocks(lengths), counts, context=context, buffer=4, crop=crop)
    rows = all_rows(packed, np.arange(sum(lengths)))
    assert all(len(row) == context + 1 for row in rows)
    seen = [token for row in rows for token in row if token != BOS]
    assert len(seen) == len(set(seen))
    out = len(rows) * (context + 1) + counts.cropped + counts.tail
    assert sum(lengths) + counts.boundaries == out
    assert counts.cropped == 0 or crop == "drop"
    assert (counts.documents, counts.tokens) == (len(lengths), sum(lengths))
    assert counts.empty_documents == lengths.count(0)
    if crop == "requeue":  # only the last row, which stayed incomplete, may miss tokens
        assert sum(lengths) - len(seen) <= counts.tail <= context


@given(CASES, st.integers(1, 7))
def test_stream_makes_every_token_but_the_first_a_target_once(case, size):
    """Law: tokens = rows T + 1 + tail, whatever the documents and the blocks they come in."""
    context, lengths = case
    counts = PackCounts()
    packed = pack_stream(blocks(lengths, size), counts, context=context)
    rows = all_rows(packed, np.arange(sum(lengths)))
    pairs = [pair for row in rows for pair in pairwise(row)]
    assert pairs == [(i, i + 1) for i in range(len(rows) * context)]
    assert len(rows) == max(sum(lengths) - 1, 0) // context
    if sum(lengths):
        assert sum(lengths) == len(rows) * context + 1 + counts.tail


@given(CASES, st.randoms(use_true_random=False), st.integers(1, 4))
def test_stream_follows_the_order_of_visits(case, random, block_rows):
    """Rows over documents that lie elsewhere in the store, and blocks of rows cut anywhere."""
    context, lengths = case
    starts = np.cumsum([0, *lengths])[: len(lengths)]
    order = list(range(len(lengths)))
    random.shuffle(order)
    store = np.arange(sum(lengths))
    whole = [int(t) for d in order for t in store[starts[d] : starts[d] + lengths[d]]]
    parts = [order[i : i + 3] for i in range(0, len(order), 3)]
    given_ = [(starts[part], np.array(lengths)[part]) for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "BLOCK_ROWS", block_rows)
        rows = all_rows(pack_stream(given_, PackCounts(), context=context), store)
    wanted = range(max(len(whole) - 1, 0) // context)
    assert rows == [whole[r * context : r * context + context + 1] for r in wanted]


def test_stream_joins_documents_that_lie_side_by_side():
    """One segment a row for a corpus in its own order: the index stays small."""
    (block,) = pack_stream(blocks([3] * 100), PackCounts(), context=290)
    assert block.segments.tolist() == [(0, 291)]


def test_a_requeued_tail_carries_its_boundary_in_the_segment():
    """(~s, n): the boundary id, then n - 1 tokens from s; tails of tails as well."""
    counts = PackCounts()
    (block,) = pack_bestfit(blocks([9]), counts, context=2, buffer=1, crop="requeue")
    assert block.segments.tolist() == [(0, 3), (~3, 3), (~5, 3), (~7, 3)]
    assert (counts.boundaries, counts.crops, counts.tail) == (3, 3, 0)


def test_a_boundary_alone_may_end_a_row():
    """A tail that is cut after its boundary id stands in the list again, whole."""
    counts = PackCounts()
    packed = pack_bestfit(blocks([6, 5]), counts, context=2, buffer=9, crop="requeue")
    rows = all_rows(packed, np.arange(11))
    assert rows == [[6, 7, 8], [BOS, 9, 10], [0, 1, 2], [BOS, 3, 4]]
    assert counts.boundaries == 3 and counts.tail == 2


def test_a_broken_law_is_an_assertion():
    """The checks at the end of a pass must be able to fail."""
    counts = PackCounts(tokens=1)  # as if a token had been read and forgotten
    with pytest.raises(AssertionError, match="law"):
        list(pack_bestfit(blocks([5]), counts, context=2, buffer=1, crop="drop"))
    with pytest.raises(AssertionError, match="law"):
        list(pack_stream(blocks([5]), PackCounts(tokens=1), context=2))
    short = np.array([(0, 2)], SEGMENT)
    with pytest.raises(AssertionError, match="full"):
        pack._checked(short, np.array([1]), 3, PackCounts())


def test_packing_keeps_a_tenth_of_the_time_of_encoding():
    """20,000 documents as a web corpus has them: encoding takes about 4 s of a core."""
    lengths = np.random.default_rng(0).lognormal(6, 1, 20_000).astype(np.int64) + 1
    began = time.process_time()
    counts = PackCounts()
    whole = [(np.cumsum(lengths) - lengths, lengths)]
    for _ in pack_bestfit(whole, counts, context=2048, buffer=1000, crop="drop"):
        pass
    assert counts.rows and time.process_time() - began < 0.4
