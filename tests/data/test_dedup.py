"""Deduplication: prekeys lose no pair, bands propose, exact Jaccard decides, order is law."""

from __future__ import annotations

import hashlib
import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.errors import UserError
from lib.data import dedup

WORDS = [f"word{i}" for i in range(3000)]


def text_of(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(text: str, share: float) -> str:
    """The same text with a run of words at the end replaced, `share` of all."""
    words = text.split()
    count = int(len(words) * share)
    return " ".join([*words[: len(words) - count], *[f"new{i}" for i in range(count)]])


ANAGRAMS = ["ab" + "z" * 99, "ba" + "z" * 99, "ＡB " + "Z" * 99]


def exact(texts: list[str]) -> list[tuple[int, int]]:
    def full(rows: np.ndarray):
        yield np.frombuffer(b"".join(dedup.full_key(texts[i]) for i in rows), np.uint8).reshape(
            -1, dedup.KEY_BYTES
        )

    cut = len(texts) // 2
    parts = [dedup.prekeys(texts[:cut]), dedup.prekeys(texts[cut:])]
    return [tuple(p) for p in dedup.exact_pairs(parts, full).tolist()]


def near(texts: list[str], alive: list[bool] | None = None) -> list[tuple[int, int]]:
    sets = [dedup.shingles(t) for t in texts]
    mask = np.array(alive if alive is not None else [True] * len(texts))
    pairs = dedup.near_pairs(dedup.band_keys(sets), mask, sets.__getitem__)
    return [tuple(p) for p in pairs.tolist()]


# ---------------------------------------------------------------- exact


def test_full_key_is_blake2b_of_the_normal_text():
    expected = hashlib.blake2b(b"abc (1) x", digest_size=16).digest()
    for text in ("abc (1) x", "ABC\n (1)\t x", "ａｂｃ\u3000(①)\u00a0Ｘ", "\u3000abc (1) x\u2028"):
        assert dedup.full_key(text) == expected


LONG = "z" * (dedup.SHORT + 1)  # what is longer is keyed by weights, what is shorter by full key


@pytest.mark.parametrize("rest", ["", LONG])
def test_prekey_is_unchanged_by_normalising_any_code_point(rest):
    """Every character of Unicode beside two others: else an equal pair could be overlooked."""
    points = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    texts = [f"x{c}y" for c in points]
    changed = [t for t in texts if dedup.normal_text(t) != t]
    assert len(changed) > 6_000
    mine = dedup.prekeys([t + rest for t in changed])
    normal = dedup.prekeys([dedup.normal_text(t) + rest for t in changed])
    wrong = np.flatnonzero(mine != normal)
    assert not len(wrong), [hex(ord(changed[i][1])) for i in wrong[:5]]


MIXED = st.sampled_from(
    "aAａＡσςΣİıßẞ①㈱が か゛\u3099\u0301éＦﬁ\u212b\u00a0\u3000\n\t𝐀𝔘𠀀ﾟﾊ가각\u1100\u1161"
)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(MIXED | st.characters(exclude_categories=["Cs"]), max_size=12),
    rest=st.sampled_from(["", LONG, LONG[:-4]]),
)
def test_prekey_depends_on_the_normal_text_only(text, rest):
    """On both sides of the length where the kind of key changes, and across it."""
    text = rest + text
    variants = [text, dedup.normal_text(text), text.upper(), unicodedata.normalize("NFD", text)]
    variants += [unicodedata.normalize("NFKD", text), f" {text}\n", text.replace(" ", "\u3000")]
    keys = dedup.prekeys(variants)
    for variant, key in zip(variants, keys, strict=True):
        if dedup.normal_text(variant) == dedup.normal_text(text):
            assert key == keys[0], ascii(variant)


@settings(deadline=None)
@given(texts=st.lists(st.text(MIXED, max_size=6) | st.text(MIXED, max_size=6).map(LONG.__add__)))
def test_prekeys_of_a_batch_equal_those_of_each_text(texts):
    assert dedup.prekeys(texts).tolist() == [int(dedup.prekeys([t])[0]) for t in texts]


def test_prekeys_tell_different_texts_apart():
    """Numbers are anagrams: with sums alone 100,000 of them share 2,002 keys and memory grows."""
    texts = [text_of(i, 12) for i in range(2000)]
    assert len(set(dedup.prekeys(texts).tolist())) == len(set(texts))
    numbers = [f"{i:05d}" for i in range(100_000)]
    assert len(set(dedup.prekeys(numbers).tolist())) == 100_000


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.sampled_from(["ab", "ba", "AB ", "ａｂ", "C\n", "\U0001f600", *ANAGRAMS])))
def test_exact_pairs_equal_those_of_full_keys_alone(texts):
    """Long anagrams share a prekey: only the full key may decide."""
    first: dict[bytes, int] = {}
    expected = []
    for number, text in enumerate(texts):
        original = first.setdefault(dedup.full_key(text), number)
        if original != number:
            expected.append((number, original))
    assert exact(texts) == expected
    one, other, _ = dedup.prekeys(ANAGRAMS).tolist()
    assert one == other


def test_keys_agree_in_both_halves_or_not_at_all():
    first, second = np.array([1, 1, 1, 4, 1, 4, 7]), np.array([2, 3, 2, 5, 3, 6, 2])
    members, groups = dedup._in_groups(first, second)
    assert {g: sorted(members[groups == g].tolist()) for g in (0, 1)} in (
        {0: [0, 2], 1: [1, 4]},
        {0: [1, 4], 1: [0, 2]},
    )
    assert len(members) == 4


def test_partitions_change_nothing(monkeypatch):
    texts = [text_of(i % 40, 5) for i in range(100)]
    whole = exact(texts)
    assert len(whole) == 60
    monkeypatch.setattr(dedup, "PARTITION", 7)
    assert exact(texts) == whole


# ---------------------------------------------------------------- near


def test_shingles_are_words_or_characters():
    def key(run: str) -> int:
        return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=4).digest(), "little")

    words = dedup.shingles("A b  c\nd e F")
    assert words.tolist() == sorted({key("a b c d e"), key("b c d e f")})
    assert dedup.shingles("one two").tolist() == [key("one two")]
    characters = dedup.shingles("日本語の文章です。")  # exactly 9
    assert characters.tolist() == [key("日本語の文章です。")]
    assert len(dedup.shingles("日本語の文章です。あいう")) == 4
    assert dedup.shingles("短い").tolist() == [key("短い")]


def test_minhash_is_the_formula():
    """min over x of (a x + b) mod (2^31 - 1), here in Python integers."""
    sets = [dedup.shingles(text_of(i, 40)) for i in range(5)]
    factors, shifts, mixers = (a.tolist() for a in dedup._permutations())
    prime = 2**31 - 1
    zero = -shifts[0] * pow(factors[0], -1, prime) % prime  # a x + b is a multiple of the prime
    sets.append(np.array([zero], np.uint32))
    for one, keys in zip(sets, dedup.band_keys(sets).tolist(), strict=True):
        values = [
            min((a * x + b) % prime for x in one.tolist())
            for a, b in zip(factors, shifts, strict=True)
        ]
        for band in range(14):
            mine = range(8 * band, 8 * band + 8)
            assert keys[band] == sum(values[k] * mixers[k] for k in mine) % 2**64


@pytest.mark.parametrize("size", [3, 1 << 16])
def test_band_keys_do_not_depend_on_blocks(monkeypatch, size):
    sets = [dedup.shingles(text_of(i, 1 + 7 * i)) for i in range(20)]
    whole = np.concatenate([dedup.band_keys([s]) for s in sets])
    monkeypatch.setattr(dedup, "_SHINGLES_AT_ONCE", size)
    assert np.array_equal(dedup.band_keys(sets), whole)


def test_planted_copies_are_found_and_others_stay():
    """5 % edited is near (Jaccard about 0.9), 30 % edited is not (about 0.54)."""
    base = [text_of(i) for i in range(30)]
    texts = [*base, edited(base[3], 0.05), edited(base[4], 0.30), base[5].upper()]
    assert near(texts) == [(30, 3), (32, 5)]


def test_jaccard_alone_decides_about_candidates():
    """All documents in one band group: bands only propose."""
    sets = [dedup.shingles(text_of(i)) for i in range(5)] + [
        dedup.shingles(edited(text_of(2), 0.04))
    ]
    bands = np.zeros((6, dedup.BANDS), np.uint64)
    pairs = dedup.near_pairs(bands, np.ones(6, bool), sets.__getitem__)
    assert pairs.tolist() == [[5, 2]]
    assert dedup.jaccard(np.arange(8), np.arange(10)) == dedup.JACCARD
    both = [np.arange(8, dtype=np.uint32), np.arange(10, dtype=np.uint32)]
    assert dedup.near_pairs(bands[:2], np.ones(2, bool), both.__getitem__).tolist() == [[1, 0]]


def test_who_is_dropped_drops_nobody():
    """A chain a ~ b ~ c with a not like c: greedy keeps a and c."""
    sets = [np.arange(0, 100), np.arange(10, 110), np.arange(20, 120)]
    bands = np.zeros((3, dedup.BANDS), np.uint64)
    assert dedup.jaccard(sets[0], sets[1]) > 0.8 > dedup.jaccard(sets[0], sets[2])
    assert dedup.near_pairs(bands, np.ones(3, bool), sets.__getitem__).tolist() == [[1, 0]]
    alive = np.array([False, True, True])  # a went as an exact copy: b stands, c goes
    assert dedup.near_pairs(bands, alive, sets.__getitem__).tolist() == [[2, 1]]


def test_near_pairs_equal_all_pairs_greedily():
    """No pair at 0.9 or above is missed here: the curve gives 1 - (1 - 0.9^8)^14 = 0.9997."""
    rng = random.Random(7)
    texts = []
    for i in range(60):
        old = rng.choice(texts) if texts and i % 3 else None
        texts.append(edited(old, rng.choice([0.02, 0.04])) if old else text_of(1000 + i))
    sets = [dedup.shingles(t) for t in texts]
    kept, expected = [], []
    for i in range(len(texts)):
        original = next((k for k in kept if dedup.jaccard(sets[k], sets[i]) >= 0.8), None)
        if original is None:
            kept.append(i)
        else:
            expected.append((i, original))
    assert near(texts) == expected
    assert len(expected) > 20


def test_too_many_documents_for_near_is_a_sentence():
    with pytest.raises(UserError, match=r"2\.8 GB of memory"):
        dedup.check_near(25_000_000)
    dedup.check_near(20_000_000)


def test_clusters_follow_copies_of_copies():
    pairs = np.array([[3, 0], [5, 4], [6, 2], [7, 6], [8, 2], [9, 6]])  # 6 went for 2
    assert dedup.clusters(pairs) == (3, [(2, 5), (0, 2), (4, 2)])
    assert dedup.clusters(pairs, 1) == (3, [(2, 5)])
    assert dedup.clusters(np.empty((0, 2), np.int64)) == (0, [])
