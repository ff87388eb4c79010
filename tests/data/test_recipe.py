"""The rule of mixtures, what happens when a source runs out, and what the report says."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data import recipe
from lib.data.recipe import MixtureReport, exact_weights, hash_order, mix


def visits(*arguments, **options) -> list[tuple[int, int, int]]:
    """The whole mixture as a list of (source, document, epoch)."""
    return [
        visit
        for block in mix(*arguments, **options)
        for visit in zip(
            block.source.tolist(), block.document.tolist(), block.epoch.tolist(), strict=True
        )
    ]


def plain_mix(weights, lengths, on_exhausted, max_epochs):
    """data.md 5.1 and 5.2 word by word, one document at a time, in exact fractions."""
    weights = [Fraction(repr(weight)) for weight in weights]
    active, given_ = list(range(len(weights))), [0] * len(weights)
    position, epoch = [0] * len(weights), [0] * len(weights)
    while active:
        n, whole = sum(given_[s] for s in active), sum(weights[s] for s in active)
        s = max(active, key=lambda s: (weights[s] / whole * (n + 1) - given_[s], -s))
        if position[s] == len(lengths[s]):
            if on_exhausted == "continue":
                active.remove(s)
                continue
            if on_exhausted == "stop" or epoch[s] + 1 == max_epochs or not lengths[s]:
                return
            epoch[s], position[s] = epoch[s] + 1, 0
        yield s, position[s], epoch[s]
        given_[s] += lengths[s][position[s]]
        position[s] += 1


SOURCES = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.7, 1.0, 3.0, 1e-3]), min_size=n, max_size=n),
        st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=n, max_size=n),
    )
)


@given(SOURCES, st.sampled_from(["stop", "repeat", "continue"]), st.integers(1, 3))
def test_visits_follow_the_rule(sources, on_exhausted, max_epochs):
    """Documents are taken in runs for speed; each run must end where the rule would turn away."""
    weights, lengths = sources
    found = visits(weights, [np.array(one, np.int64) for one in lengths], on_exhausted, max_epochs)
    assert found == list(plain_mix(weights, lengths, on_exhausted, max_epochs))


@given(SOURCES)
def test_blocks_do_not_change_the_visits(sources):
    """A run is cut where a block is full."""
    weights, lengths = sources
    arrays = [np.array(one, np.int64) for one in lengths]
    whole = visits(weights, arrays, "continue")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "BLOCK", 3)
        assert visits(weights, arrays, "continue") == whole


def test_one_source_is_the_identity():
    assert visits([0.3], [np.array([5, 0, 7])]) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]


def test_shares_come_true_for_documents_of_any_length():
    """data.md 13.8: .7/.2/.1 over documents of 10, 1,000 and 50,000 tokens, 20 M tokens."""
    weights, sizes = {"short": 0.7, "middle": 0.2, "long": 0.1}, [10, 1000, 50_000]
    lengths = [np.full(20_000_000 // size, size) for size in sizes]
    report, began, total = MixtureReport.of(weights), time.process_time(), 0
    bound = 3 * 50_000  # longest document x number of sources, in tokens, at every moment
    given_ = np.zeros(3)
    for block in mix(list(weights.values()), lengths):
        tokens = np.array(sizes)[block.source]
        report.add(block, tokens, tokens)
        sums = given_ + np.cumsum(np.eye(3)[block.source] * tokens[:, None], axis=0)
        away = np.abs(sums - sums.sum(axis=1, keepdims=True) * list(weights.values()))
        assert away.max() <= bound
        given_, total = sums[-1], total + tokens.sum()
        if total >= 20_000_000:
            break
    assert time.process_time() - began < 2
    for share, tokens in zip(report.sources, given_, strict=True):
        assert abs(share.realised_share - share.target_share) < 0.01
        assert share.tokens == tokens
    assert report.warnings() == []


def test_weights_are_the_decimals_as_written():
    """0.1 + 0.2 is not 0.3 in binary, so ties would follow rounding."""
    assert exact_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert exact_weights([1e-05, 3]) == [1, 300_000]


def test_a_source_that_runs_out_stops_repeats_or_leaves():
    lengths = [np.full(4, 10), np.full(1, 10)]
    stop = visits([0.5, 0.5], lengths, "stop")
    assert stop == [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    repeat = visits([0.5, 0.5], lengths, "repeat", 3)
    assert repeat == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 2, 0), (1, 0, 2), (0, 3, 0)]
    left = visits([0.5, 0.5], lengths, "continue")
    assert left == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]


def test_the_rest_keeps_its_ratio_when_a_source_leaves():
    """Without new shares among the rest, the missing share would be dealt out in equal parts."""
    lengths = [np.full(10, 10), np.full(4000, 10), np.full(4000, 10)]
    found = visits([0.7, 0.2, 0.1], lengths, "continue")
    after = [s for s, _, _ in found[100:3100]]
    assert (after.count(0), after.count(1), after.count(2)) == (0, 2000, 1000)


def test_every_epoch_has_its_own_order():
    orders = {0: None, 1: np.array([2, 0, 1]), 2: np.array([1, 2, 0])}
    lengths = [np.array([1, 2, 3])]
    found = visits([1.0], lengths, "repeat", 3, order=lambda source, epoch: orders[epoch])
    assert [d for _, d, _ in found] == [0, 1, 2, 2, 0, 1, 1, 2, 0]
    assert [e for _, _, e in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_an_order_is_weighed_by_the_lengths_in_that_order():
    """The run lengths come from sums; sums in document order would switch sources too late."""
    rng = np.random.default_rng(1)
    lengths = [rng.integers(0, 50, 200), rng.integers(0, 50, 200)]
    order = [rng.permutation(200), rng.permutation(200)]
    found = visits([0.4, 0.6], lengths, order=lambda source, epoch: order[source])
    in_order = [one[o].tolist() for one, o in zip(lengths, order, strict=True)]
    wanted = plain_mix([0.4, 0.6], in_order, "stop", 1)
    assert found == [(s, int(order[s][d]), e) for s, d, e in wanted]


HASH_ORDER_SEED_0 = [3, 2, 0, 4, 5, 1]


def test_hash_order_is_a_permutation_fixed_by_the_seed():
    """The figures were taken from blake2b once; another byte order would reshuffle every corpus."""
    documents = np.arange(6)
    assert hash_order(documents, 0).tolist() == HASH_ORDER_SEED_0
    assert sorted(hash_order(documents, 1).tolist()) == list(range(6))
    assert hash_order(documents, 1).tolist() != hash_order(documents, 0).tolist()
    # The number counts, not the position: the rest of a corpus keeps its order.
    assert hash_order(documents[2:], 0).tolist() == [d - 2 for d in HASH_ORDER_SEED_0 if d >= 2]


def test_a_share_two_points_off_is_a_warning_with_the_source():
    report = MixtureReport.of({"a": 1.0, "b": 1.0})
    for block in mix([1.0, 1.0], [np.full(100, 10), np.full(10, 10)], "continue"):
        tokens = np.full(len(block), 10)
        report.add(block, tokens, tokens * 4)
    a, b = report.sources
    assert (a.tokens, a.bytes, a.documents, a.epochs) == (1000, 4000, 100, 1)
    assert b.realised_share == 100 / 1100
    named = [line.split(":")[0] for line in report.warnings()]
    assert named == ["share of source a", "share of source b"]
