"""Numbers to read a model's BPB against: general compressors, and a bigram over the same tokens.

In:    the validation texts; the training ids and the tokenizer.   Out: bits per byte.
Note:  they stand in eval_record.json and in the log, never among metrics. A compressor learns the
       validation text while it reads it, so it is a peer of small corpora only.
Letters: V vocabulary, N training ids, c(.) counts, t(h) different ids seen after h.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lib.eval.bpb import Document, encode_checked
from lib.eval.scorer import Rules, Tokenizer, bits_per_byte, plan_windows

TRAIN_IDS = 2**25  # ids a bigram counts at most; beyond, it hardly moves, and it must stay cheap
CHUNK_IDS = 2**22  # ids counted at once
_XZ_LEAST, _XZ_MOST = 2**16, 2**26  # bytes of dictionary; 2^26 is that of preset 9


def compressed_bpb(texts: Iterable[str], total_bytes: int) -> dict[str, float]:
    """Bits per byte of gzip -9 and of xz -9e on the texts one after the other.

    total_bytes: of all texts. xz's dictionary is no larger than the text: the same matches, without
    the 674 MB that preset 9 takes for any input.
    """
    dictionary = min(_XZ_MOST, max(_XZ_LEAST, 1 << max(0, total_bytes - 1).bit_length()))
    chain = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary},
    ]
    gzip, xz = zlib.compressobj(9, zlib.DEFLATED, 31), lzma.LZMACompressor(filters=chain)
    sizes = {"gzip": 0, "xz": 0}
    for text in texts:
        data = text.encode()
        sizes["gzip"] += len(gzip.compress(data))
        sizes["xz"] += len(xz.compress(data))
    sizes["gzip"] += len(gzip.flush())
    sizes["xz"] += len(xz.flush())
    return {name: 8 * size / total_bytes for name, size in sizes.items()}


@dataclass(frozen=True, kw_only=True)
class Bigram:
    """P(w | h) = (c(h, w) + t(h) P(w)) / (c(h) + t(h)), P(w) = (c(w) + t / V) / (N + t).

    Witten-Bell smoothing (IEEE Trans. Inf. Theory 37(4), 1991, method C), twice: a bigram backs off
    to the unigram, that to the uniform distribution over V. After an unseen h it is the unigram.
    """

    vocab_size: int
    pairs: np.ndarray  # int64, sorted: h V + w
    counts: np.ndarray  # int64, of each pair
    followed: np.ndarray  # int64 (V,), c(h) as a history
    kinds: np.ndarray  # int64 (V,), t(h)
    unigram: np.ndarray  # fp64 (V,), P(w)

    @classmethod
    def count(cls, chunks: Iterable[np.ndarray], vocab_size: int) -> Bigram:
        """From the training ids, given in consecutive pieces of any size, read once."""
        V = vocab_size
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        seen, last = np.zeros(V, np.int64), None
        for chunk in chunks:
            ids = np.asarray(chunk).astype(np.int64)
            seen += np.bincount(ids, minlength=V)
            joined = ids if last is None else np.concatenate(([last], ids))
            last = ids[-1] if len(ids) else last
            new, new_counts = np.unique(joined[:-1] * V + joined[1:], return_counts=True)
            pairs, counts = _merge(pairs, counts, new, new_counts)
        total, different = int(seen.sum()), int(np.count_nonzero(seen))
        floor = different / V if total else 1 / V
        heads = pairs // V
        return cls(
            vocab_size=V,
            pairs=pairs,
            counts=counts,
            followed=np.bincount(heads, counts, minlength=V).astype(np.int64),
            kinds=np.bincount(heads, minlength=V).astype(np.int64),
            unigram=(seen + floor) / (total + different if total else 1),
        )

    def nats(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """-ln P(ids | before), fp64, elementwise over two int64 arrays (n,)."""
        if not len(self.pairs):
            return -np.log(self.unigram[ids])
        key = before * self.vocab_size + ids
        at = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == key, self.counts[at], 0)
        kinds = self.kinds[before]
        base = self.unigram[ids]
        weight = self.followed[before] + kinds
        seen = (count + kinds * base) / np.maximum(weight, 1)
        return -np.log(np.where(weight > 0, seen, base))


def _merge(
    a: np.ndarray, a_counts: np.ndarray, b: np.ndarray, b_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two sorted sets of keys with counts as one."""
    keys, where = np.unique(np.concatenate((a, b)), return_inverse=True)
    weights = np.concatenate((a_counts, b_counts)).astype(np.float64)
    return keys, np.bincount(where, weights, minlength=len(keys)).astype(np.int64)


def bigram_bpb(
    documents: Iterable[Document], tokenizer: Tokenizer, rules: Rules, bigram: Bigram
) -> float:
    """The bigram's BPB under the model's own protocol: same ids, windows and boundary."""
    nats: list[float] = []
    total = 0
    for document in documents:
        ids = encode_checked(document, tokenizer)
        total += len(document[1].encode())
        before, wanted = _histories(ids, rules)
        nats.append(float(bigram.nats(before, wanted).sum()))
        if rules.boundary_id is None and len(ids):
            nats.append(math.log(rules.vocab_size))
    return bits_per_byte(math.fsum(nats), total)


def _histories(ids: np.ndarray, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """The id before each target, as its window shows it, and the targets."""
    if rules.boundary_id is None:
        return ids[:-1], ids[1:]
    before = np.concatenate(([rules.boundary_id], ids[:-1])).astype(np.int64)[: len(ids)]
    for window in plan_windows(len(ids), rules.context, rules.stride):
        if window.scored == window.start:
            before[window.start] = rules.boundary_id
    return before, ids


def read_chunks(
    tokens: Callable[[int, int], np.ndarray], length: int, limit: int = TRAIN_IDS
) -> Iterator[np.ndarray]:
    """The first `limit` of `length` ids in pieces; tokens(start, count) reads them."""
    end = min(length, limit)
    for start in range(0, end, CHUNK_IDS):
        yield tokens(start, min(CHUNK_IDS, end - start))
