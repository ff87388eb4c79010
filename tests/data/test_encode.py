"""Documents to token files: every byte arrives, killed work goes on, damage is named."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.core import files, lock
from lib.core.artifact import verify
from lib.core.errors import EnvError, InputError, UserError
from lib.core.process import worker_pool
from lib.data import encode as encode_module
from lib.data import parts as parts_module
from lib.data import recipe as recipe_module
from lib.data.encode import encode, plan_encoding
from lib.data.parts import encode_part
from lib.data.tokens import TokenStore
from tests.data.encoding_double import (
    ByteTokenizer,
    encode_all,
    open_double,
    open_gpt2,
    settings,
    texts,
    write_documents,
)

TRAIN = [texts(150, seed) for seed in range(3)]
VAL = texts(40, 9)
ALL = [text for part in TRAIN for text in part]
PARTS = {f"train_en_{i:05d}": one for i, one in enumerate(TRAIN)} | {"val_en_00000": VAL}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents", PARTS)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but locks and stamps."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found if p.name[0] != "."}


def ids_of(store: TokenStore, split) -> list[list[int]]:
    offsets = store.documents(split).offsets
    return [store.tokens(split, int(a), int(b - a)).tolist() for a, b in pairwise(offsets)]


@pytest.mark.parametrize("tokenizer", ["ByteTokenizer", "ArrayTokenizer"])
@pytest.mark.parametrize("boundary", ["bos", "eos", "both", "none"])
def test_documents_come_back_from_the_token_files(documents, tmp_path, boundary, tokenizer):
    """Ids, boundaries, offsets and text bytes, over several parts, 16 and 32 bits wide."""
    manifest, store = encode_all(documents, tmp_path, tokenizer, boundary=boundary)
    front = [256] * (boundary in ("bos", "both"))
    back = [257] * (boundary in ("eos", "both"))
    for split, wanted in (("train", ALL), ("val", VAL)):
        assert ids_of(store, split) == [[*front, *text.encode(), *back] for text in wanted]
        assert store.documents(split).bytes.tolist() == [len(text.encode()) for text in wanted]
        counts = manifest.counts[split]
        assert counts["documents"] == len(wanted)
        assert counts["bytes"] == counts["content_bytes"] == sum(len(t.encode()) for t in wanted)
        assert counts["tokens"] == store.length(split)
    assert manifest.counts["train"]["checked_documents"] == 3 * 150  # all, in parts this small
    assert store.fingerprint == open_double(Path(tokenizer)).fingerprint
    assert store.boundary == boundary
    wide = 4 if tokenizer == "ArrayTokenizer" else 2
    assert (store.folder / "val_00000.bin").stat().st_size == wide * store.length("val")


def test_batches_change_no_byte(documents, tmp_path, monkeypatch):
    """Text is read in batches by size; where one ends must not show."""
    encode_all(documents, tmp_path / "a", boundary="both")
    monkeypatch.setattr(parts_module, "BATCH_BYTES", 300)
    encode_all(documents, tmp_path / "b", boundary="both")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_worker_counts_change_no_byte(documents, tmp_path):
    encode_all(documents, tmp_path / "one")
    with worker_pool(2) as pool_map:
        encode_all(documents, tmp_path / "two", pool_map=pool_map)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_truncation_spares_val_and_counts_what_it_drops(documents, tmp_path):
    manifest, store = encode_all(documents, tmp_path, truncate_tokens=50, boundary="none")
    lengths = [len(text.encode()) for text in ALL]
    assert store.length("train") == sum(min(n, 50) for n in lengths)
    assert manifest.counts["train"]["truncated_tokens"] == sum(max(n - 50, 0) for n in lengths)
    assert manifest.counts["train"]["truncated_documents"] == sum(n > 50 for n in lengths)
    assert manifest.counts["train"]["content_bytes"] == sum(lengths)
    assert store.length("val") == sum(len(text.encode()) for text in VAL)
    assert store.documents("train").bytes.tolist() == lengths


@pytest.mark.parametrize("loss", ["unit", "ids", "numbers", "note", "torn note", "flip"])
def test_a_killed_encoding_goes_on_after_finished_parts(documents, tmp_path, monkeypatch, loss):
    """One unit loses one of its files, or all; only that unit is encoded again, to equal bytes."""
    _, store = encode_all(documents, tmp_path)
    before = tree(tmp_path)
    ids = store.folder / "train_00001.bin"
    numbers = store.folder / "units" / "train_00001.documents.bin"
    note = store.folder / "units" / "train_00001.json"
    if loss == "torn note":
        files.write_bytes(note, note.read_bytes()[:20])
    for path in {"unit": [ids, numbers, note], "ids": [ids], "numbers": [numbers]}.get(loss, []):
        path.unlink()
    if loss == "note":
        note.unlink()
    if loss == "flip":
        files.write_bytes(ids, ids.read_bytes()[:-1] + b"\7")
    files.write_bytes(store.folder / "train_00002.bin.part", b"of a killed run")
    encoded = []
    monkeypatch.setattr(
        ByteTokenizer,
        "encode_batch",
        lambda self, texts, threads: encoded.extend(texts) or [list(t.encode()) for t in texts],
    )
    encode_all(documents, tmp_path)
    assert encoded == TRAIN[1]
    assert tree(tmp_path) == before


def test_another_context_encodes_nothing(documents, tmp_path, monkeypatch):
    """Rows are an index: their settings stand outside the key of the token files."""
    first, store = encode_all(documents, tmp_path)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)
    second, other = encode_all(documents, tmp_path, context=16, packing="stream")
    assert first.key == second.key and first.sha256 != second.sha256
    assert store.rows and other.rows and store.context == 32 and other.context == 16


def test_tasks_together_do_the_whole(documents, tmp_path):
    """A job array encodes units i, i + n, ...; the run without a task merges."""
    whole, _ = encode_all(documents, tmp_path / "whole")
    plan = plan_encoding(
        settings(n_tasks=2), documents, Path("ByteTokenizer"), tmp_path, open_tokenizer=open_double
    )
    for task in (0, 1):
        seen = []

        def note(function, units, seen=seen):
            seen += [f"{unit.split} {unit.number}" for unit in units]
            return map(function, units)

        assert encode(plan, note, lambda line: None, task=task) is None
        assert seen == [["train 0", "train 2"], ["train 1", "val 0"]][task]
    merged = encode(plan, lambda f, units: map(f, units), lambda line: None)
    assert merged is not None and merged.sha256 == whole.sha256


@pytest.mark.parametrize("tokenizer", ["LossyTokenizer", "SwappingTokenizer"])
def test_a_tokenizer_that_loses_a_byte_is_refused(tmp_path, tokenizer):
    """L5 sees missing bytes, decoding sees changed ones; the document and the byte are named."""
    part = ["abc"] * 5 + ["ab zq"] + ["abc"] * 5
    folder = write_documents(tmp_path / "d", {"train_en_00000": part, "val_en_00000": ["abc"]})
    with pytest.raises(InputError) as caught:
        encode_all(folder, tmp_path, tokenizer)
    at = 3 if tokenizer == "LossyTokenizer" else 4
    assert f"train_en_00000#5 at byte {at}" in str(caught.value)
    assert not list(tmp_path.rglob("train_00000.bin*"))


def test_every_document_is_counted_against_its_bytes(tmp_path, monkeypatch):
    """L5 holds for documents outside the decoded sample too."""
    monkeypatch.setattr(parts_module, "CHECK_LEAST", 1)
    part = ["abc"] * 1500 + ["z"] + ["abc"] * 10
    folder = write_documents(tmp_path / "d", {"train_en_00000": part, "val_en_00000": ["abc"]})
    with pytest.raises(InputError, match="train_en_00000#1500 at byte 0"):
        encode_all(folder, tmp_path, "LossyTokenizer")


def test_one_document_in_a_thousand_is_decoded(tmp_path, monkeypatch):
    """At least 100 of a part, or all; the sample goes on across batches."""
    monkeypatch.setattr(parts_module, "BATCH_BYTES", 400)
    for count, wanted in ((99, 99), (150, 150), (1234, 103)):
        name = f"d{count}"
        folder = write_documents(
            tmp_path / name, {"train_en_00000": ["abcd " * 9] * count, "val_en_00000": ["abc"]}
        )
        manifest, _ = encode_all(folder, tmp_path)
        assert manifest.counts["train"]["checked_documents"] == wanted


def test_a_lossy_tokenizer_is_not_held_to_it(tmp_path):
    folder = write_documents(tmp_path / "d", {"train_en_00000": ["azb"] * 50, "val_en_0": ["z"]})
    manifest, _ = encode_all(folder, tmp_path, "HonestlyLossyTokenizer", boundary="none")
    assert manifest.counts["train"]["tokens"] == 100
    assert manifest.counts["train"]["checked_documents"] == 0
    with pytest.raises(UserError, match="no bos id"):
        encode_all(folder, tmp_path, "HonestlyLossyTokenizer", boundary="bos")


def test_a_document_lost_on_the_way_is_a_bug(documents, tmp_path, monkeypatch):
    """L5: documents and bytes encoded = extracted, per source."""

    def forgetful(unit):
        part = encode_part(unit)
        return replace(part, counts=replace(part.counts, documents=part.counts.documents - 1))

    monkeypatch.setattr(encode_module, "encode_part", forgetful)
    with pytest.raises(AssertionError, match=r"train en: 450 documents extracted, 447 encoded"):
        encode_all(documents, tmp_path)


def test_gpt2_ids_of_the_english_shard_equal_the_reference(shared, tmp_path):
    """Token count and bytes of the validation shard (data.md 13.12), ids of its documents."""
    texts = pq.read_table(shared / "data" / "en_shards" / "shard_00009.parquet")["text"].to_pylist()
    parts = {"train_en_0": texts[:300], "val_en_0": texts}
    plan = plan_encoding(
        settings(),
        write_documents(tmp_path / "d", parts, row_group_size=1024),
        shared / "data" / "gpt2_bpe",
        tmp_path,
        open_tokenizer=open_gpt2,
    )
    manifest = encode(plan, map, lambda line: None)
    assert manifest is not None
    assert manifest.counts["val"]["tokens"] - len(texts) == 1_197_496
    assert manifest.counts["val"]["bytes"] == 5_360_189
    store, gpt2 = TokenStore(plan.folder, manifest), open_gpt2(shared / "data" / "gpt2_bpe")
    wanted = [[50_256, *gpt2.encode(text).tolist()] for text in texts[:300]]
    assert ids_of(store, "train") == wanted


@pytest.mark.parametrize("damage", ["flip", "swap", "missing"])
def test_a_changed_part_is_named(documents, tmp_path, damage):
    """Another part under the name is as whole as the right one: only its hash differs."""
    part = documents / "train_en_00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    other = (documents / "train_en_00002.parquet").read_bytes()
    part.unlink()
    if damage != "missing":
        part.write_bytes(data if damage == "flip" else other)
    with pytest.raises(InputError, match=r"documents differ .*train_en_00001\.parquet"):
        encode_all(documents, tmp_path)


def test_no_flip_in_a_page_reads_as_other_text(documents, tmp_path):
    """Without page checksums 17 of these 60 flips give other text in silence (seen)."""
    part = tmp_path / "flipped.parquet"
    whole = (documents / "train_en_00001.parquet").read_bytes()
    for at in np.random.default_rng(0).integers(100, len(whole) * 3 // 4, 60).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        part.write_bytes(data)
        try:
            read = [text for batch in parts_module._read_batches(part) for text in batch.texts]
        except InputError as error:
            assert "cannot be read in" in str(error) and "flipped.parquet" in str(error)
        else:
            assert read == TRAIN[1], at


def test_long_documents_that_stand_together_come_in_small_batches(tmp_path, monkeypatch):
    """The mean size of a row group says little about 9 long documents among 900 short ones."""
    monkeypatch.setattr(parts_module, "BATCH_BYTES", 5000)
    part = ["ab"] * 500 + ["x" * 4000] * 8 + ["y" * 9000] + ["ab"] * 400
    folder = write_documents(
        tmp_path / "d", {"train_en_0": part, "val_en_0": ["v"]}, row_group_size=1024
    )
    batches = list(parts_module._read_batches(folder / "train_en_0.parquet"))
    assert [text for batch in batches for text in batch.texts] == part
    assert max(batch.bytes.sum() for batch in batches if len(batch.texts) > 1) <= 7500
    assert [b.first for b in batches] == np.cumsum([0, *(len(b.texts) for b in batches)])[
        :-1
    ].tolist()


def test_a_flipped_byte_and_a_short_token_file_are_named(documents, tmp_path):
    manifest, store = encode_all(documents, tmp_path)
    path = store.folder / "train_00002.bin"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"size differs in .*train_00002\.bin: expected \d+ bytes"):
        TokenStore(store.folder, manifest)
    data[7] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"sha256 differs in .*train_00002\.bin"):
        verify(store.folder, manifest)
    path.unlink()
    with pytest.raises(InputError, match=r"missing in .*train_00002\.bin"):
        TokenStore(store.folder, manifest)


def test_two_runs_do_not_write_the_same_files(documents, tmp_path):
    plan = plan_encoding(
        settings(), documents, Path("ByteTokenizer"), tmp_path, open_tokenizer=open_double
    )
    with lock.exclusive_lock(plan.folder), pytest.raises(EnvError, match="busy"):
        encode(plan, map, lambda line: None)


def test_memory_follows_the_batch_not_the_part(tmp_path):
    """120 documents of 100 kB in one row group. Seen: 20 to 28 MB more, all at once 347 MB."""
    text = np.random.default_rng(0).integers(97, 123, 100_000, np.uint8).tobytes().decode()
    for name, documents in (("few", 4), ("many", 120)):
        parts = {"train_en_0": [text] * documents, "val_en_0": ["abc"]}
        write_documents(tmp_path / name, parts, row_group_size=1024)
    script = """if True:
        import sys
        from pathlib import Path
        from lib.data import parts
        from tests.data.encoding_double import encode_all
        parts.BATCH_BYTES = 200_000
        def peak():  # kB; ru_maxrss would begin with what the parent has
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        peaks = []
        for name in ("few", "many"):
            encode_all(Path(sys.argv[1]) / name, Path(sys.argv[1]), "ArrayTokenizer")
            peaks.append(peak())
        sys.stdout.write(str((peaks[1] - peaks[0]) // 1024))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60, f"{done.stdout} MB more for 30 times the documents"


# ---------------------------------------------------------------- rows


def test_rows_hold_the_documents_in_recipe_order(tmp_path):
    """Two sources of weights 2 : 1, packed as a stream: the mixture decides, not the parts."""
    folder = write_documents(
        tmp_path / "d",
        {"train_b_0": ["b" * 10] * 30, "train_a_0": ["a" * 10] * 30, "val_b_0": ["v"]},
        sources={"a": 2.0, "b": 1.0},
    )
    said: list[str] = []
    manifest, store = encode_all(
        folder, tmp_path, boundary="none", packing="stream", context=10, log=said.append
    )
    text = bytes(row_ids(store, row)[0] for row in range(store.rows)).decode()
    assert text[:9] == "abaabaaba"
    assert manifest.counts["sources"]["a"]["documents"] == 30
    assert manifest.counts["sources"]["b"]["documents"] == 15
    assert manifest.counts["sources"]["a"]["realised_share"] == 300 / 450
    assert any(line.startswith("b: target 33.3 %, realised 33.3 %") for line in said)


def row_ids(store: TokenStore, row: int) -> list[int]:
    out = np.zeros(store.context + 1, np.int64)
    store.read_row(row, out)
    return out.tolist()


def test_requeued_rows_hold_every_byte_once(documents, tmp_path):
    """Rows rebuilt from the index, boundaries in front of tails included."""
    manifest, store = encode_all(documents, tmp_path, crop="requeue", context=20)
    rows = [row_ids(store, row) for row in range(store.rows)]
    assert all(row[0] == 256 for row in rows)
    counts = manifest.counts["rows"]
    assert counts["boundaries"] > 0 and counts["cropped"] == 0
    assert sum(row.count(256) for row in rows) <= 450 + counts["boundaries"]
    left = sum(len(t.encode()) for t in ALL) - sum(i < 256 for r in rows for i in r)
    assert 0 <= left <= counts["tail"]


@pytest.mark.parametrize("order", ["as_is", "shuffled"])
def test_a_repeated_source_comes_in_another_order(tmp_path, order):
    """`repeat` sees a source again with a new order seed; `shuffled` shuffles every pass."""
    folder = write_documents(
        tmp_path / "d", PARTS, on_exhausted="repeat", max_epochs=3, sources={"en": 0.5}
    )
    options = {"packing": "stream", "context": 2, "order": order}
    manifest, store = encode_all(folder, tmp_path, **options)
    assert manifest.counts["sources"]["en"]["epochs"] == 3
    ids = [token for row in range(store.rows) for token in row_ids(store, row)[:2]]
    found = bytes(ids[i] if ids[i] < 256 else 0 for i in range(len(ids))).split(b"\0")[1:]
    wanted = [text.encode() for text in ALL]
    passes = [found[:450], found[450:900], found[900:1350]]
    assert [sorted(one) == sorted(wanted) for one in passes[:2]] == [True, True]
    assert (passes[0] == wanted) == (order == "as_is")
    assert passes[1] != wanted and passes[0] != passes[1] != passes[2]


def test_max_tokens_ends_with_the_document_that_reaches_it(documents, tmp_path, monkeypatch):
    lengths = [len(text.encode()) + 1 for text in TRAIN[0]]
    monkeypatch.setattr(recipe_module, "BLOCK", 7)  # the limit lies some blocks away
    for limit, wanted in ((sum(lengths[:60]), 60), (sum(lengths[:60]) + 1, 61)):
        manifest, _ = encode_all(documents, tmp_path, max_tokens=limit)
        assert manifest.counts["rows"]["documents"] == wanted
        assert manifest.counts["sources"]["en"]["tokens"] == sum(lengths[:wanted])


def test_no_row_at_all_is_a_user_error_with_the_numbers(documents, tmp_path):
    with pytest.raises(UserError, match=r"no row can be packed: \d+ tokens .* context 1000000"):
        encode_all(documents, tmp_path, context=1_000_000, packing="stream")


def test_much_cropping_is_a_warning(tmp_path):
    folder = write_documents(tmp_path / "d", {"train_en_0": ["a" * 99] * 9, "val_en_0": ["v"]})
    said: list[str] = []
    encode_all(folder, tmp_path, context=32, log=said.append)
    assert any("67.0 % cropped" in line for line in said)
    assert any(line.startswith("warning: packing loses tokens: 67.0 %") for line in said)


def test_sources_with_underscores_are_told_apart(tmp_path):
    folder = write_documents(
        tmp_path / "d",
        {"train_web_0": ["ab" * 40] * 5, "val_web_0": ["v"]},
        sources={"web": 1.0, "web_ja": 1.0},
        on_exhausted="continue",
    )
    from lib.core.artifact import Manifest

    documents = Manifest.read(folder / files.MANIFEST)
    split = encode_module._split_and_source
    assert split("train_web_ja_shard_00001.parquet", documents) == ("train", "web_ja")
    assert split("val_web_00001.parquet", documents) == ("val", "web")
    for name in ("test_web_0.parquet", "train_book_0.parquet"):
        with pytest.raises(InputError, match="no declared source"):
            split(name, documents)
