"""Exact and near duplicates of a recipe: which documents go, and because of which (data.md 7).

In:    per document, in order (validation first, then training): a 64-bit prekey, the full key on
       demand, MinHash bands, shingles on demand.   Out: pairs (dropped, kept), ascending.
Law:   the dropped set is the one that full keys alone, and exact Jaccard alone, would give: equal
       full keys imply equal prekeys, and bands only propose. No worker count enters.
Note:  the full key needs NFKC, 80 ns a character on Japanese text, forty times a prekey. So it is
       made only for documents whose prekeys collide.
Memory: a partition of 2^22 prekeys at a time; 112 bytes a document for bands.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from lib.core import rng
from lib.core.errors import UserError

PARTITION = 1 << 22  # prekeys sorted at once
SHORT = 64  # weighed characters; a shorter text is keyed by its full key
KEY_BYTES = 16
PERMUTATIONS, BANDS = 112, 14  # knee of the S-curve at (1/14)^(1/8) = 0.72
BAND_BYTES = 8 * BANDS  # per document
JACCARD = 0.8
WORDS, CHARACTERS = 5, 9  # of a shingle
MAX_NEAR = 20_000_000
_PRIME = np.uint64(2**31 - 1)
_COUNT = np.uint64((1 << 20) - 1)
_SHINGLES_AT_ONCE = 1 << 16

# ---------------------------------------------------------------- keys


def normal_text(text: str) -> str:
    """NFKC, lower case, white space runs to one space, none at the ends: what makes texts equal."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def full_key(text: str) -> bytes:
    """blake2b-128 of the normal text."""
    return hashlib.blake2b(normal_text(text).encode(), digest_size=KEY_BYTES).digest()


def prekeys(texts: Sequence[str]) -> np.ndarray:
    """uint64 (documents,): equal for texts of equal `normal_text`, rarely equal for others.

    The sum of a weight per character, blind to order. The weights are chosen so that neither NFKC
    nor lower case changes the sum and white space adds nothing (`_weights`). Short texts are often
    anagrams of each other (ten million numbers: 19,441 sums), so they take their full key instead;
    which texts are short is read from the sum, so equal texts agree on it.
    """
    if not len(texts):
        return np.empty(0, np.uint64)
    keys = _sums(texts)
    for at in np.flatnonzero((keys & _COUNT) <= SHORT).tolist():
        keys[at] = int.from_bytes(full_key(texts[at])[:8], "little")
    return keys


def _sums(texts: Sequence[str]) -> np.ndarray:
    """Sums of the weights; the lowest 20 bits count the characters that weigh something."""
    table = _weights()
    codes = np.frombuffer(("\n".join(texts) + "\n").encode("utf-16-le"), "<u2")
    sizes = np.fromiter(map(len, texts), np.int64, len(texts)) + 1  # with \n, which weighs nothing
    ends = np.cumsum(sizes)
    if ends[-1] == len(codes):
        return np.add.reduceat(table[codes], ends - sizes)
    # Characters above U+FFFF take two codes and weigh what they decompose to.
    high = np.flatnonzero((codes & 0xFC00) == 0xD800)
    owner = np.searchsorted(ends, high - np.arange(len(high)), side="right")
    sizes += np.bincount(owner, minlength=len(texts))
    keys = np.add.reduceat(table[codes], np.cumsum(sizes) - sizes)
    pairs = np.stack([codes[high], codes[high + 1]], 1).view("<u4").ravel()
    distinct, which = np.unique(pairs, return_inverse=True)
    parts = unicodedata.normalize("NFKD", "\0".join(distinct.tobytes().decode("utf-16-le")) + "\0")
    np.add.at(keys, owner, _totals(table, parts)[which])
    return keys


@functools.cache
def _weights() -> np.ndarray:
    """uint64 (65536,): weights W with W(white space) = 0 and, for each character c up to U+FFFF,

    W(c) = sum of W over NFKD(c), and W(c) = sum of W over lower(c). So W is additive over canonical
    and compatibility equivalence and over case, hence equal sums for equal normal texts. Random
    weights are given to fully folded characters; those of the few characters where folding and
    decomposing do not commute are 0, as are surrogates.
    """
    codes = np.arange(1 << 16, dtype=np.uint64)
    atoms = (codes + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    atoms = (atoms ^ (atoms >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    atoms = (atoms ^ (atoms >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    atoms = ((atoms ^ (atoms >> np.uint64(31))) & ~_COUNT) | np.uint64(1)
    atoms[0xD800:0xE000] = 0
    # One call over all characters at a time, each ended by NUL, which neither joins nor decomposes.
    # NUL itself, a control character that cleaning removes, weighs nothing.
    characters = [chr(c) for c in range(1, 1 << 16) if not 0xD800 <= c < 0xE000]
    atoms[[0, *(ord(c) for c in characters if c.isspace())]] = 0
    whole = "".join(f"{c}\0" for c in characters)
    decomposed = unicodedata.normalize("NFKD", whole)
    lowered = whole.lower()
    folded = unicodedata.normalize("NFKD", decomposed.lower()).replace("ς", "σ")  # lower(Σ): either
    places = np.array([ord(c) for c in characters])
    for _ in range(8):  # none is wrong at first in Unicode 14
        weights = np.zeros(1 << 16, np.uint64)
        weights[places] = _totals(atoms, folded)
        wrong = (weights[places] != _totals(weights, decomposed)) | (
            weights[places] != _totals(weights, lowered)
        )
        if not wrong.any():
            return weights
        forms = [text.split("\0") for text in (whole, decomposed, lowered, folded)]
        for at in np.flatnonzero(wrong):
            involved = "".join(form[at] for form in forms)
            atoms[[ord(c) for c in involved if ord(c) < 1 << 16]] = 0
    raise AssertionError("character weights do not settle")


def _totals(weights: np.ndarray, parts: str) -> np.ndarray:
    """Sums of the weights of parts that end with NUL."""
    codes = np.frombuffer(parts.encode("utf-16-le"), "<u2")
    ends = np.flatnonzero(codes == 0)
    return np.add.reduceat(weights[codes], np.concatenate([[0], ends[:-1] + 1]))


# ---------------------------------------------------------------- exact


def exact_pairs(
    keys: Sequence[np.ndarray], full_keys: Callable[[np.ndarray], Iterable[np.ndarray]]
) -> np.ndarray:
    """int64 (pairs, 2): each document equal to an earlier one, and the first of its kind.

    keys: prekeys, parts in order. full_keys: given ascending document numbers, their full keys as
    uint8 (n, 16), in parts. Ascending by the first column.
    """
    found = [np.empty((0, 2), np.int64)]
    total = sum(map(len, keys))
    partitions = np.uint64(1 + total // PARTITION)
    for partition in range(int(partitions)):
        mine, values, start = [], [], 0
        for part in keys:
            chosen = np.flatnonzero(part % partitions == partition)
            mine.append(chosen + start)
            values.append(part[chosen])
            start += len(part)
        if not mine:
            continue
        documents = np.concatenate(mine)
        twins = np.sort(documents[_in_groups(np.concatenate(values))[0]])
        if len(twins):
            full = np.concatenate(list(full_keys(twins)))
            halves = full.view("<u8")
            # Two halves, both must agree: which one sorts first does not matter to the pairs.
            members, groups = _in_groups(halves[:, 0], halves[:, 1])
            first = np.full(groups.max(initial=-1) + 1, total, np.int64)
            np.minimum.at(first, groups, twins[members])
            pairs = np.stack([twins[members], first[groups]], 1)
            found.append(pairs[pairs[:, 0] != pairs[:, 1]])
    pairs = np.concatenate(found)
    return pairs[np.argsort(pairs[:, 0])]


def _in_groups(first: np.ndarray, *more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the values that occur more than once, and the number of the group of each.

    A value is a row of the columns, which are equally long.
    """
    if not len(first):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    columns = (first, *more)
    order = np.lexsort(columns) if more else np.argsort(first, kind="stable")
    equal = np.ones(len(order) - 1, bool)
    for column in columns:
        ranked = column[order]
        equal &= ranked[1:] == ranked[:-1]
    edge = np.concatenate([[False], equal, [False]])
    member = edge[1:] | edge[:-1]
    groups = np.cumsum(~edge[:-1][member]) - 1
    return order[member], groups


# ---------------------------------------------------------------- near


def shingles(text: str) -> np.ndarray:
    """Sorted distinct uint32: 32-bit blake2b of each run of 5 words, or of 9 characters where white

    space is under 5 % of the text. A text shorter than a run is one shingle.
    """
    text = text.lower()
    words = text.split()
    spaces = len(text) - sum(map(len, words))
    if spaces < 0.05 * len(text):
        units: Sequence[str] = text
        size, glue = CHARACTERS, ""
    else:
        units, size, glue = words, WORDS, " "
    runs = {glue.join(units[i : i + size]) for i in range(max(len(units) - size, 0) + 1)}
    digests = b"".join(hashlib.blake2b(r.encode(), digest_size=4).digest() for r in runs)
    return np.unique(np.frombuffer(digests, "<u4"))


def band_keys(sets: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 (documents, 14): a hash of each band of eight MinHash values, shingle sets given.

    MinHash (Broder 1997): min over a set of (a x + b) mod (2^31 - 1), for 112 fixed (a, b).
    """
    keys = np.empty((len(sets), BANDS), np.uint64)
    start = 0
    while start < len(sets):  # as many whole documents as keep the arrays below small
        stop, held = start + 1, len(sets[start])
        while stop < len(sets) and held + len(sets[stop]) <= _SHINGLES_AT_ONCE:
            held += len(sets[stop])
            stop += 1
        keys[start:stop] = _bands(sets[start:stop])
        start = stop
    return keys


def _bands(sets: Sequence[np.ndarray]) -> np.ndarray:
    factors, shifts, mixers = _permutations()
    values = np.concatenate(sets).astype(np.uint64)
    sizes = np.fromiter(map(len, sets), np.int64, len(sets))
    starts = np.cumsum(sizes) - sizes
    keys = np.zeros((len(sets), BANDS), np.uint64)
    for k in range(PERMUTATIONS):
        hashed = values * factors[k] + shifts[k]  # below 2^63
        hashed = (hashed & _PRIME) + (hashed >> np.uint64(31))
        hashed = (hashed & _PRIME) + (hashed >> np.uint64(31))  # congruent, at most the prime + 1
        hashed -= _PRIME * (hashed >= _PRIME)
        keys[:, k // 8] += np.minimum.reduceat(hashed, starts) * mixers[k]
    return keys


@functools.cache
def _permutations() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors, shifts below the prime; odd 64-bit factors that fold a band into one key."""
    draw = rng.numpy_generator(0, "minhash")
    factors = draw.integers(1, int(_PRIME), PERMUTATIONS, dtype=np.uint64)
    shifts = draw.integers(0, int(_PRIME), PERMUTATIONS, dtype=np.uint64)
    mixers = draw.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return factors, shifts, mixers


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted distinct arrays."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def near_pairs(
    bands: np.ndarray, alive: np.ndarray, sets: Callable[[int], np.ndarray]
) -> np.ndarray:
    """int64 (pairs, 2): each document like an earlier kept one (Jaccard >= 0.8), and that one.

    bands: (documents, 14). alive: documents that exact deduplication left. sets: shingles of one.
    Greedy in document order: who is dropped drops nobody.
    """
    check_near(len(bands))
    documents, groups, count = [], [], 0
    numbers = np.flatnonzero(alive)
    for band in range(BANDS):
        members, group = _in_groups(bands[numbers, band])
        documents.append(numbers[members])
        groups.append(group + count)
        count += int(group.max(initial=-1)) + 1
    document, group = np.concatenate(documents), np.concatenate(groups)
    order = np.lexsort((group, document))
    document, group = document[order], group[order]
    kept: dict[int, list[int]] = {}  # group -> its kept documents, ascending
    recent = functools.lru_cache(maxsize=256)(sets)
    pairs = []
    distinct, starts = np.unique(document, return_index=True)
    borders = pairwise([*starts.tolist(), len(group)])
    for number, (start, end) in zip(distinct.tolist(), borders, strict=True):
        mine = group[start:end].tolist()
        earlier = sorted({k for g in mine for k in kept.get(g, ())})
        alike = (k for k in earlier if jaccard(recent(k), recent(number)) >= JACCARD)
        if (original := next(alike, None)) is not None:
            pairs.append((number, original))
            continue
        for g in mine:
            kept.setdefault(g, []).append(number)
    return np.array(pairs, np.int64).reshape(-1, 2)


def check_near(documents: int) -> None:
    """UserError when near deduplication would need more memory than is reasonable."""
    if documents > MAX_NEAR:
        raise UserError(
            "too many documents for near deduplication",
            value=f"{documents}: {documents * BAND_BYTES / 1e9:.1f} GB of memory for bands",
            remedy=f"set dedup.near: false, or use at most {MAX_NEAR} documents",
        )


# ---------------------------------------------------------------- report


def clusters(pairs: np.ndarray, largest: int = 10) -> tuple[int, list[tuple[int, int]]]:
    """Number of clusters, and the largest as (kept document, documents in all).

    A document may be dropped for one that is itself dropped later (an exact copy of a near copy):
    both belong to the one that is kept.
    """
    dropped, original = pairs[:, 0], pairs[:, 1].copy()
    order = np.argsort(dropped)
    for _ in range(2):  # exact -> near -> kept
        at = np.minimum(np.searchsorted(dropped[order], original), max(len(pairs) - 1, 0))
        again = dropped[order][at] == original if len(pairs) else np.empty(0, bool)
        original[again] = pairs[:, 1][order][at[again]]
    kept, sizes = np.unique(original, return_counts=True)
    ranked = np.lexsort((kept, -sizes))[:largest]
    return len(kept), [(int(kept[i]), int(sizes[i]) + 1) for i in ranked]
