"""Baselines: compressors against the library's one-shot calls, the bigram against its law."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math

import numpy as np
import pytest
import torch

from lib.eval import baselines
from lib.eval.baselines import Bigram, bigram_bpb, compressed_bpb, read_chunks
from lib.eval.bpb import measure
from lib.eval.scorer import Rules, Scorer
from lib.models.base import Family
from tests.eval.test_bpb import DOCUMENTS, text_of
from tests.standins import ByteTokenizer

V = 258


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(97, 105, length).astype(np.uint16)


def table(bigram: Bigram) -> np.ndarray:
    """P(w | h) as a (V, V) matrix."""
    grid = np.meshgrid(np.arange(V), np.arange(V), indexing="ij")
    return np.exp(-bigram.nats(grid[0].ravel(), grid[1].ravel())).reshape(V, V)


def test_compressors_equal_the_library():
    texts = [text for _, text in DOCUMENTS] + ["a line again and again\n" * 300]
    data = "".join(texts).encode()
    found = compressed_bpb(texts, len(data))
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    assert found["gzip"] == 8 * len(gzip.compress(data, 9)) / len(data)
    assert found["xz"] == pytest.approx(8 * len(xz) / len(data), abs=8 * 8 / len(data))


@pytest.mark.parametrize("length", [0, 1, 2, 400])
def test_bigram_is_a_distribution_after_every_id(length):
    bigram = Bigram.count([ids_of(length)], V)
    assert np.allclose(table(bigram).sum(axis=1), 1, rtol=0, atol=1e-12)
    assert np.allclose(bigram.unigram.sum(), 1, rtol=0, atol=1e-12)


def test_bigram_equals_the_formula():
    ids = ids_of(400).tolist()
    P, bigram = table(Bigram.count([np.array(ids)], V)), Bigram.count([np.array(ids)], V)
    pairs = list(itertools.pairwise(ids))
    for h, w in [(97, 98), (100, 104), (97, 5), (5, 97)]:
        after = [b for a, b in pairs if a == h]
        unigram = (ids.count(w) + len(set(ids)) / V) / (len(ids) + len(set(ids)))
        assert bigram.unigram[w] == pytest.approx(unigram, rel=1e-13)
        wanted = unigram
        if after:
            kinds = len(set(after))
            wanted = (after.count(w) + kinds * unigram) / (len(after) + kinds)
        assert P[h, w] == pytest.approx(wanted, rel=1e-12), (h, w)


def test_bigram_does_not_depend_on_the_pieces_it_reads(monkeypatch):
    ids = ids_of(1000, 3)
    whole = Bigram.count([ids], V)
    monkeypatch.setattr(baselines, "CHUNK_IDS", 37)
    pieces = Bigram.count(read_chunks(lambda at, n: ids[at : at + n], len(ids)), V)
    for name in ("pairs", "counts", "followed", "kinds", "unigram"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name
    some = list(read_chunks(lambda at, n: ids[at : at + n], len(ids), limit=100))
    assert np.array_equal(np.concatenate(some), ids[:100])


@pytest.mark.parametrize("boundary", ["bos", "none"])
@pytest.mark.parametrize("stride", [8, 16])
def test_bigram_follows_the_models_protocol(boundary, stride):
    """Its BPB is what the scorer gives for a model with the same table."""
    tokenizer, text = ByteTokenizer(), text_of(300, 4)
    train = np.concatenate(([256], np.frombuffer(text.encode(), np.uint8))).astype(np.int64)
    bigram = Bigram.count([train], V)
    log_probs = torch.from_numpy(np.log(table(bigram)))

    class Model(Family):
        def forward(self, tokens, state=None):
            return log_probs[tokens], None

    rules = Rules.of(tokenizer, boundary, 16, stride)
    documents = [*DOCUMENTS, ("train", text)]
    scorer = Scorer(model=Model(), rules=rules, token_bytes=tokenizer.token_bytes)
    wanted = measure(documents, tokenizer, scorer).bpb
    assert bigram_bpb(documents, tokenizer, rules, bigram) == pytest.approx(wanted, rel=1e-12)


def test_bigram_learns_its_text():
    tokenizer, text = ByteTokenizer(), "abcabcabd" * 50
    rules = Rules.of(tokenizer, "bos", 16)
    known = Bigram.count([tokenizer.encode(text)], V)
    unknown = Bigram.count([], V)
    assert bigram_bpb([("a", text)], tokenizer, rules, unknown) == pytest.approx(math.log2(V))
    assert bigram_bpb([("a", text)], tokenizer, rules, known) < 0.5
