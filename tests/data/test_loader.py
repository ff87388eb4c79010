"""The loader and the store beneath it: batches are a function of (seed, step) and nothing else."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lib.core.errors import UserError
from lib.core.ramp import Ramp
from lib.data import tokens as tokens_module
from lib.data.loader import Loader
from lib.data.tokens import TokenStore
from tests.data.encoding_double import encode_all, write_documents

G = 8  # rows a step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """35 rows of 16 + 1 ids: an epoch ends within the fifth step of 8 rows."""
    folder = tmp_path_factory.mktemp("store")
    text = np.random.default_rng(0).integers(97, 123, 20 * 27 + 1, np.uint8).tobytes().decode()
    cut = [text[i * 27 : i * 27 + 27] for i in range(19)] + [text[19 * 27 :]]  # and a bos each
    parts = {f"train_en_{i}": cut[4 * i : 4 * i + 4] for i in range(5)} | {"val_en_0": ["v"]}
    documents = write_documents(folder / "d", parts)
    _, whole = encode_all(documents, folder, context=16, packing="stream")
    assert whole.rows == 35
    return whole


def test_every_rank_and_micro_batch_reads_its_slice_of_the_same_batch(store):
    """W = 1, 2, 4, 8 and three micro-batch sizes, over two epoch borders."""
    loader = Loader(store, G * 16, seed=3)
    for step in range(2 * store.rows // G + 2):
        whole = Loader(store, G * 16, seed=3).batch(step)
        assert whole.shape == (G, 17) and whole.dtype == np.int64
        for world in (1, 2, 4, 8):
            shares = [loader.batch(step, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(shares), whole), (step, world)
            for device in (1, 3, 8):
                size = loader.micro_batch_size(device, world)
                micro = [
                    share[i : i + size] for share in shares for i in range(0, len(share), size)
                ]
                assert all(len(one) == size <= device for one in micro)
                assert np.array_equal(np.concatenate(micro), whole), (step, world, device)


def test_every_epoch_visits_every_row_once_in_its_own_order(store):
    """Slots across the border belong to two epochs; the next epoch begins at once."""
    loader = Loader(store, G * 16, seed=3)
    rows = np.concatenate([loader.row_numbers(step) for step in range(3 * store.rows // G + 1)])
    epochs = [rows[e * store.rows : (e + 1) * store.rows].tolist() for e in range(3)]
    assert all(sorted(one) == list(range(store.rows)) for one in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != Loader(store, G * 16, seed=4).row_numbers(0).tolist()


def test_a_batch_depends_on_no_batch_before_it(store):
    """Resume at, one before and one after the step across the epoch border, and jumps back."""
    border = store.rows // G
    walked = Loader(store, G * 16, seed=3)
    whole = [walked.batch(step) for step in range(4 * border)]
    for step in (border - 1, border, border + 1):
        fresh = Loader(store, G * 16, seed=3)  # as after a kill
        for later in range(step, 4 * border):
            assert np.array_equal(fresh.batch(later), whole[later]), f"step {later}"
    for step in reversed(range(4 * border)):
        assert np.array_equal(walked.batch(step), whole[step]), f"step {step}"


FIRST_ROWS = [24, 20, 11, 21, 1, 31, 9, 13]


def test_the_permutation_is_fixed(store):
    """The first slots of seed 3; another generator or seed rule would reshuffle every run."""
    assert Loader(store, G * 16, seed=3).row_numbers(0).tolist() == FIRST_ROWS


def test_only_two_permutations_are_kept(store):
    loader = Loader(store, G * 16, seed=3)
    for step in range(8 * store.rows // G):
        loader.row_numbers(step)
        assert len(loader._orders) <= 2


def test_an_epoch_may_end_exactly_with_a_step(store):
    loader = Loader(store, 5 * 16, seed=1)
    last = store.rows // 5
    first = np.concatenate([loader.row_numbers(step) for step in range(last)])
    assert sorted(first.tolist()) == list(range(store.rows))
    assert len(loader._orders) == 1
    assert len(set(loader.row_numbers(last).tolist())) == 5


def test_what_does_not_fit_is_refused_with_the_numbers(store):
    with pytest.raises(UserError, match=rf"{store.rows} rows, 40 a step; set batch_tokens to 560"):
        Loader(store, 40 * 16, seed=0)
    Loader(store, store.rows * 16, seed=0).batch(1)
    with pytest.raises(UserError, match=r"batch_tokens 100, context 16; use 96"):
        Loader(store, 100, seed=0)
    with pytest.raises(UserError, match="8 rows, 3 ranks; use 1, 2, 4, 8 ranks"):
        Loader(store, G * 16, seed=0).batch(0, 0, 3)


def test_prefetch_gives_the_same_batches_and_leaves_no_thread(store):
    before = set(threading.enumerate())
    loader = Loader(store, G * 16, seed=3)
    fetched = list(loader.prefetch(2, 9, rank=1, world=2))
    for step, batch in zip(range(2, 9), fetched, strict=True):
        assert np.array_equal(batch, loader.batch(step, 1, 2))
    stream = loader.prefetch(0, 1_000_000)
    next(stream)
    stream.close()
    assert set(threading.enumerate()) <= before


def test_an_error_while_prefetching_reaches_the_trainer(store):
    with pytest.raises(UserError, match="3 ranks"):
        list(Loader(store, G * 16, seed=3).prefetch(0, 5, world=3))


def test_tokens_are_one_array_over_the_parts(store, monkeypatch):
    """Reads across part borders, and with fewer maps open than there are parts."""
    whole = store.tokens("train", 0, store.length("train"))
    monkeypatch.setattr(tokens_module, "MAX_MAPS", 2)
    store = TokenStore(store.folder, store.manifest)
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
        assert np.array_equal(store.tokens("train", a, b - a), whole[a:b])
        assert len(store._maps) <= 2
    with pytest.raises(AssertionError):
        store.tokens("train", 5, len(whole))


def test_empty_parts_and_empty_texts_are_no_trouble(tmp_path):
    parts = {"train_en_0": [], "train_en_1": ["", "abc", ""], "train_en_2": [], "val_en_0": ["v"]}
    folder = write_documents(tmp_path / "d", parts)
    manifest, store = encode_all(folder, tmp_path, context=2, boundary="none", packing="stream")
    assert store.tokens("train", 0, 3).tolist() == list(b"abc")
    assert store.tokens("train", 3, 0).tolist() == []
    assert store.documents("train").offsets.tolist() == [0, 0, 3, 3]
    assert manifest.counts["rows"]["empty_documents"] == 2
    assert Loader(store, 2, seed=0).batch(7).tolist() == [list(b"abc")]


def test_the_store_is_read_only_and_knows_its_tokenizer(store):
    assert not store.documents("train").offsets.flags.writeable
    assert not store.tokens("train", 0, 3).flags.writeable
    store.require_tokenizer(store.fingerprint)
    with pytest.raises(UserError, match=r"made with bbbbbbbb, given cccccccc; run"):
        store.require_tokenizer("c" * 64)


def test_a_ramp_reads_the_same_rows_in_steps_of_other_sizes(store):
    """Every rank and every fresh loader finds its place from the step alone."""
    ramp = Ramp(values=(2, 4, 8), steps=12)
    plain, ramped = Loader(store, G * 16, seed=3), Loader(store, G * 16, 3, ramp)
    order = np.concatenate([plain.row_numbers(step) for step in range(8)])
    for step in (11, 0, 5, 4, 3, 8):
        shares = [ramped.row_numbers(step, rank, 2) for rank in range(2)]
        start, size = ramp.before(step), ramp.at(step)
        assert np.array_equal(np.concatenate(shares), order[start : start + size]), f"step {step}"
