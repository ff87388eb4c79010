"""The stage as a whole: laws, duplicates, rerun, workers, real data balanced to the byte."""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.data_settings import Dedup, Recipe
from lib.core.errors import InputError, UserError
from lib.data import documents, extract
from lib.data.documents import part_file, parts_of, read_documents
from lib.data.extract import extract_texts
from lib.data.ledger import LedgerError
from lib.data.raw import lines, readers
from lib.data.raw.readers import Shard
from tests.data.test_dedup import edited, text_of

LENIENT = {"max_drop_fraction": 1.0}


def recipe(**more) -> Recipe:
    return Recipe(**({"sources": {"s": 1.0}} | more))


def jsonl(folder: Path, name: str, texts: list, split: str = "train", index: int = 0) -> Shard:
    folder.mkdir(exist_ok=True, parents=True)
    data = b"".join(
        t if isinstance(t, bytes) else json.dumps({"text": t}).encode() + b"\n" for t in texts
    )
    path = folder / name
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    return Shard(source="s", split=split, index=index, path=path, kind="jsonl")


def run(shards: list[Shard], settings: Recipe, folder: Path, pool_map=map) -> Path:
    """Extract into folder/out with units in folder/work."""
    with files.atomic_folder(folder / "out") as part:
        extract_texts(shards, settings, folder / "work", part, pool_map)
    return folder / "out"


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): files.sha256_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def ledger_of(out: Path) -> dict:
    return json.loads((out / "ledger.json").read_bytes())


def corpus(folder: Path) -> list[Shard]:
    """Three train shards and one val shard with planted duplicates of every kind."""
    base = [text_of(i, 60) for i in range(40)]
    val = ["validation one", "Validation two", base[39], "\x00control\r\n"]
    return [
        jsonl(folder, "a.jsonl.gz", [*base[:20], base[3]], index=0),
        jsonl(
            folder, "b.jsonl.gz", [*base[20:39], base[5].upper(), "VALIDATION\u3000two "], index=1
        ),
        jsonl(folder, "v.jsonl.gz", val, "val"),
        jsonl(folder, "c.jsonl.gz", [base[39], edited(base[7], 0.05), " \n", "x" * 50], index=2),
    ]


# ---------------------------------------------------------------- laws


RECORD = st.one_of(
    st.text(max_size=30),
    st.text(st.sampled_from("\r\n\t \x00\x7f\ufeff\u3000a。.\ud800😀"), max_size=25),
    st.sampled_from(["same", "Same ", "x" * 300, "long. " * 40, None, 7, b"", b"[]\n", b"oops\n"]),
    st.just(b'{"text": "a", "text": "b"}\n'),
    st.just(b'{"text": "\xff"}\n'),
)


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.lists(RECORD, max_size=25), min_size=2, max_size=3),
    unicode=st.sampled_from(["none", "nfkc"]),
    near=st.booleans(),
)
def test_d09_ledger_balances_for_any_records(tmp_path_factory, records, unicode, near):
    """L1 to L4 are asserted inside; here the files are compared with the ledger."""
    folder = tmp_path_factory.mktemp("laws")
    shards = [
        jsonl(folder, f"{i}.jsonl.gz", [*texts, f"own text {i}"], "train" if i else "val", i)
        for i, texts in enumerate(records)
    ]
    chosen = recipe(unicode=unicode, max_chars=100, dedup=Dedup(near=near), **LENIENT)
    out = run(shards, chosen, folder)
    manifest = Manifest.read(out / files.MANIFEST)
    artifact.verify(out, manifest)
    for split in ("train", "val"):
        found = list(read_documents(out, split))
        entry = ledger_of(out)["sources"]["s"][split]
        assert entry["documents_out"] == len(found)
        assert entry["bytes_out"] == sum(len(t.encode()) for _, t in found)
        counts = manifest.counts["splits"][split]["s"]
        assert counts == {"documents": len(found), "bytes": entry["bytes_out"]}
        assert len({i for i, _ in found}) == len(found), "ids repeat"
    keys = [extract.dedup.full_key(t) for s in ("val", "train") for _, t in read_documents(out, s)]
    assert len(set(keys)) == len(keys)


def test_d09_a_lost_document_is_a_bug(tmp_path, monkeypatch):
    """The writer counts by itself: dropping one document on the way shows in L3."""
    real = documents.PartWriter.add
    monkeypatch.setattr(documents.PartWriter, "add", lambda s, t, i: real(s, t[1:], i[1:]))
    with pytest.raises(LedgerError, match="L3"):
        run(corpus(tmp_path), recipe(), tmp_path)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "work").glob("*/manifest.json"))


def test_a_lost_document_in_the_last_pass_is_a_bug(tmp_path, monkeypatch):
    """As above, between the unit and the part."""
    shards = corpus(tmp_path)
    run(shards, recipe(), tmp_path)
    real = documents.PartWriter.add
    monkeypatch.setattr(documents.PartWriter, "add", lambda s, t, i: real(s, t[1:], i[1:]))
    with pytest.raises(LedgerError, match="L3"):
        run(shards, recipe(), tmp_path)


def test_lost_share_and_empty_split_stop_the_stage(tmp_path):
    good = jsonl(tmp_path, "g.jsonl.gz", ["a", "b"], "val")
    bad = jsonl(tmp_path, "b.jsonl.gz", [*[f"d{i}" for i in range(94)], *[b"[]\n"] * 6])
    with pytest.raises(InputError, match=r"6 of 100: not_object 6"):
        run([good, bad], recipe(), tmp_path)
    run([good, bad], recipe(max_drop_fraction=0.06), tmp_path)
    with pytest.raises(InputError, match="no val documents"):
        run(
            [jsonl(tmp_path, "g.jsonl.gz", ["d1"], "val"), jsonl(tmp_path, "t.jsonl.gz", ["x"])][
                1:
            ],
            recipe(),
            tmp_path,
        )


# ---------------------------------------------------------------- duplicates


def test_duplicates_leave_for_the_right_reason(tmp_path):
    """A copy, a case and space variant, a 5 % edited copy, train copies of validation text."""
    out = run(corpus(tmp_path), recipe(dedup=Dedup(near=True), **LENIENT), tmp_path)
    ledger = ledger_of(out)
    dropped = {r: d["documents"] for r, d in ledger["sources"]["s"]["train"]["dropped"].items()}
    assert dropped == {"dup_exact": 2, "dup_of_val": 2, "dup_near": 1, "empty": 1}
    assert ledger["sources"]["s"]["val"]["dropped"] == {}
    train = [i for i, _ in read_documents(out, "train")]
    gone = {"a.jsonl.gz:21", "b.jsonl.gz:20", "b.jsonl.gz:21", "c.jsonl.gz:1", "c.jsonl.gz:2"}
    assert not gone & set(train)
    assert len(train) == 20 + 19 + 1
    report = ledger["duplicates"]
    assert report["clusters"] == 5
    assert {c["id"]: c["documents"] for c in report["largest"]}["v.jsonl.gz:3"] == 2
    assert 0 < report["removed_share"] < 0.2
    kept = run(corpus(tmp_path), recipe(dedup=Dedup(exact=False), **LENIENT), tmp_path / "k")
    assert len(list(read_documents(kept, "train"))) == 20 + 19 + 1 + 5


def test_near_copies_of_validation_text_leave_train(tmp_path):
    text = text_of(1, 100)
    val = jsonl(tmp_path, "v.jsonl.gz", [text], "val")
    train = jsonl(tmp_path, "t.jsonl.gz", [edited(text, 0.05), edited(text, 0.04), "other"])
    out = run([train, val], recipe(dedup=Dedup(near=True)), tmp_path)
    table = ledger_of(out)["sources"]["s"]
    assert table["train"]["dropped"]["dup_of_val"]["documents"] == 2
    assert table["val"]["documents_out"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_do_not_depend_on_workers(tmp_path, workers):
    """Two processes finish in any order; the manifest's order is the only one."""
    chosen = recipe(dedup=Dedup(near=True), plain_text=True, **LENIENT)
    alone = contents(run(corpus(tmp_path / "in"), chosen, tmp_path / "alone"))
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        mine = run(corpus(tmp_path / "in"), chosen, tmp_path / "pool", pool.map)
    assert contents(mine) == alone


def test_d07_one_shard_twice_is_refused(tmp_path):
    one = jsonl(tmp_path, "a.jsonl.gz", ["x", "y"])
    for split in ("train", "val"):
        other = jsonl(tmp_path, "b.jsonl.gz", ["x", "y"], split, 1)
        with pytest.raises(InputError, match=r"train a\.jsonl\.gz, (train|val) b\.jsonl\.gz"):
            run([one, other], recipe(), tmp_path)


# ---------------------------------------------------------------- files


def test_rerun_after_a_lost_unit_gives_the_same_bytes(tmp_path, monkeypatch):
    """A kill costs one unit a worker; verified ones are not made again."""
    chosen = recipe(dedup=Dedup(near=True), **LENIENT)
    whole = contents(run(corpus(tmp_path), chosen, tmp_path))
    units = sorted((tmp_path / "work").iterdir())
    files.remove_tree(units[1])
    damaged = units[2] / extract.DOCUMENTS
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.unlink()  # the output may share the inode
    damaged.write_bytes(data)
    made = []
    real = extract._fill_unit
    monkeypatch.setattr(extract, "_fill_unit", lambda job, p: made.append(p.name) or real(job, p))
    assert contents(run(corpus(tmp_path), chosen, tmp_path)) == whole
    assert sorted(made) == sorted(f"{u.name}.part" for u in units[1:3])
    made.clear()
    run(corpus(tmp_path), recipe(max_chars=40, dedup=Dedup(near=True), **LENIENT), tmp_path)
    assert len(made) == 4, "other rules need other units"


def test_linked_part_equals_one_written_again(tmp_path):
    """A shard without duplicates is not encoded twice; its bytes must be those of writing it."""
    texts = [text_of(i, 30) for i in range(2500)]
    val = jsonl(tmp_path, "v.jsonl.gz", ["val"], "val")
    out = run([val, jsonl(tmp_path, "t.jsonl.gz", texts)], recipe(), tmp_path / "one")
    with_dup = jsonl(tmp_path, "t.jsonl.gz", [*texts, texts[0]])
    other = run([val, with_dup], recipe(), tmp_path / "two")
    name = "train_s_00000.parquet"
    assert (out / name).read_bytes() == (other / name).read_bytes()
    unit = next(
        p for p in (tmp_path / "one/work").glob("*/documents.parquet") if p.stat().st_size > 9999
    )
    assert unit.stat().st_ino == (out / name).stat().st_ino


def test_parts_have_the_promised_form(tmp_path):
    texts = [f"document\n{i}" for i in range(2500)]
    val = jsonl(tmp_path, "v.jsonl.gz", ["val"], "val")
    out = run([val, jsonl(tmp_path, "t.jsonl.gz", texts)], recipe(plain_text=True), tmp_path)
    table = pq.ParquetFile(out / "train_s_00000.parquet")
    assert [table.metadata.row_group(i).num_rows for i in range(3)] == [1024, 1024, 452]
    assert table.schema_arrow.names == ["text", "id"]
    assert table.schema_arrow.metadata is None
    assert table.metadata.row_group(0).column(0).compression == "ZSTD"
    assert (out / "train.txt").read_text() == "".join(f"document {i}\n" for i in range(2500))
    assert (out / "val.txt").read_text() == "val\n"
    manifest = Manifest.read(out / files.MANIFEST, "documents")
    assert [e.path for e in manifest.files] == [
        "ledger.json",
        "train.txt",
        "train_s_00000.parquet",
        "val.txt",
        "val_s_00000.parquet",
    ]
    assert manifest.files == artifact.describe(out)
    assert manifest.recipe["stage"] == "extract_texts"
    digest = hashlib.sha256()
    for text in (b"v.jsonl.gz:1", b"val"):
        digest.update(len(text).to_bytes(8, "little") + text)
    assert manifest.counts["val_sha256"] == digest.hexdigest()


def test_parts_do_not_depend_on_how_documents_arrive(tmp_path, monkeypatch):
    """Row groups close by rows and bytes; pieces of arrays must not move a page border."""
    monkeypatch.setattr(documents, "GROUP_BYTES", 3000)
    rng = random.Random(1)
    texts = ["x" * rng.choice([1, 10, 700, 2900, 3001, 9000]) for _ in range(300)]
    ids = [str(i) for i in range(300)]
    names = []
    for name, step in (("a", 300), ("b", 1), ("c", 7)):
        with part_file(tmp_path / name) as writer:
            for start in range(0, 300, step):
                stop = start + step
                writer.add(pa.array(texts[start:stop]), pa.array(ids[start:stop]))
        names.append(files.sha256_file(tmp_path / name))
        assert (writer.documents, writer.bytes) == (300, sum(map(len, texts)))
    assert len(set(names)) == 1
    groups = pq.ParquetFile(tmp_path / "a")
    sizes = [[len(t) for t in g["text"].to_pylist()] for g in documents.row_groups(tmp_path / "a")]
    assert groups.num_row_groups == len(sizes) > 50
    assert all(sum(s) <= 3000 or len(s) == 1 for s in sizes)


def test_row_groups_of_several_pages_do_not_depend_on_pieces(tmp_path):
    """3 MB in one group: the writer looks for a page's end after each piece it is handed."""
    texts = [random.Random(i).randbytes(1500).hex() for i in range(1000)]
    hashes = set()
    for step in (1000, 100, 3):
        with part_file(tmp_path / "p") as writer:
            for i in range(0, 1000, step):
                part = pa.array(texts[i : i + step])
                writer.add(part, part)
        hashes.add(files.sha256_file(tmp_path / "p"))
    assert len(hashes) == 1


def test_a_writer_given_up_writes_nothing_more(tmp_path, monkeypatch):
    """pyarrow writes a footer when a writer is collected; the descriptor may be another file's."""
    real = files.Output.write
    late = []

    def watched(self, data):
        late.extend([bytes(data)] if self.closed else [])
        return real(self, data)

    monkeypatch.setattr(files.Output, "write", watched)
    with pytest.raises(KeyError), part_file(tmp_path / "p") as writer:
        texts = pa.array([f"text {i}" for i in range(1500)])
        writer.add(texts, texts)
        raise KeyError
    del writer
    gc.collect()
    assert late == []
    assert list(tmp_path.iterdir()) == []


def test_reading_back_verifies_pages(tmp_path):
    """A flip is named or changes nothing; without page checksums a third would change the text."""
    out = run(corpus(tmp_path), recipe(**LENIENT), tmp_path)
    path = out / "train_s_00000.parquet"
    whole, given = path.read_bytes(), list(read_documents(out, "train"))
    refused = 0
    for at in range(30, len(whole) * 3 // 4, 23):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert list(read_documents(out, "train")) == given, f"silently wrong: byte {at}"
        except InputError as error:
            assert "train_s_00000.parquet" in str(error)
            refused += 1
    assert refused > 50
    path.unlink()
    with pytest.raises(InputError, match=r"train_s_00000\.parquet"):
        list(read_documents(out, "train"))
    with pytest.raises(UserError):
        list(read_documents(tmp_path / "nowhere", "train"))
    with pytest.raises(UserError):
        list(read_documents(out, "test"))


def test_parts_of_a_source_are_not_those_of_a_longer_name():
    names = ["train_a_00000.parquet", "train_a_b_00000.parquet", "val_a_00000.parquet", "x.json"]
    assert parts_of(names, "train") == names[:2]
    assert parts_of(names, "train", "a") == names[:1]
    assert parts_of(names, "train", "a_b") == names[1:2]


def test_full_disk_is_a_sentence(tmp_path, monkeypatch):
    """The error crosses pyarrow's writer and leaves neither unit nor output."""
    import errno
    import os

    from lib.core.errors import EnvError

    shards = corpus(tmp_path)
    real = os.write

    def full(fd, data):
        if bytes(data[:4]) == b"PAR1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(EnvError, match="disk full"):
        run(shards, recipe(), tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "work").iterdir())


def test_long_documents_come_in_numbered_pieces(tmp_path, monkeypatch):
    """Held whole or streamed: the same pieces under the same ids."""
    text = "一文。" * 500 + "\n\n" + "word " * 300 + "\r\nend"
    shards = [
        jsonl(tmp_path, "v.jsonl.gz", ["val"], "val"),
        jsonl(tmp_path, "t.jsonl.gz", ["short", text, "  " + "y" * 600, " " * 700]),
    ]
    chosen = recipe(max_chars=1000, **LENIENT)
    whole = contents(run(shards, chosen, tmp_path / "whole"))
    found = dict(read_documents(tmp_path / "whole/out", "train"))
    pieces = [t for i, t in found.items() if i.startswith("t.jsonl.gz:2#")]
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert list(found)[:2] == ["t.jsonl.gz:1", "t.jsonl.gz:2#0"]
    assert "t.jsonl.gz:3" in found
    monkeypatch.setattr(lines, "BLOCK", 50)
    monkeypatch.setattr(lines, "LONG", 99)
    monkeypatch.setattr(readers, "LONG", 99)
    assert contents(run(shards, chosen, tmp_path / "streamed")) == whole


# ---------------------------------------------------------------- real data


def real(source: str, split: str, index: int, path: Path, kind: str, **more) -> Shard:
    return Shard(source=source, split=split, index=index, path=path, kind=kind, **more)


def test_japanese_jsonl_balances_to_the_byte(shared, tmp_path):
    """Sums of the provenance: 2,790,249 bytes in train_0, 1,931,322 in validation_0."""
    folder = shared / "data/ja_jsonl"
    shards = [
        real("ja", "val", 0, folder / "validation_0.jsonl.gz", "jsonl"),
        real("ja", "train", 0, folder / "train_0.jsonl.gz", "jsonl"),
    ]
    out = run(shards, Recipe(sources={"ja": 1}), tmp_path)
    table = ledger_of(out)["sources"]["ja"]
    for split, records, size in (("train", 890, 2_790_249), ("val", 577, 1_931_322)):
        assert (table[split]["records"], table[split]["bytes_in"]) == (records, size)
        assert (
            sum(len(t.encode()) for _, t in read_documents(out, split)) == table[split]["bytes_out"]
        )


def test_english_shards_balance_to_the_byte(shared, tmp_path):
    folder = shared / "data/en_shards"
    shards = [
        real("en", "val", 0, folder / "shard_00009.parquet", "parquet"),
        real("en", "train", 0, folder / "shard_00000.parquet", "parquet"),
    ]
    out = run(shards, Recipe(sources={"en": 1}), tmp_path)
    table = ledger_of(out)["sources"]["en"]
    for split, size in (("train", 5_439_371), ("val", 5_360_189)):
        assert (table[split]["records"], table[split]["bytes_in"]) == (3072, size)
    given = pq.read_table(folder / "shard_00009.parquet")["text"].to_pylist()
    assert [t for _, t in read_documents(out, "val")] == [t.strip(" \t\n") for t in given]


def test_chat_gives_the_same_documents_from_parquet_and_json_lines(shared, tmp_path):
    """Nested messages beside the field, in both formats."""
    folder = shared / "data/chat"
    found = {}
    for kind, names in (
        ("jsonl", ("test_sft.jsonl", "train_sft.jsonl")),
        ("parquet", ("test_sft-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet")),
    ):
        shards = [
            real("chat", split, 0, folder / name, kind, field="prompt")
            for split, name in zip(("val", "train"), names, strict=True)
        ]
        out = run(shards, Recipe(sources={"chat": 1}), tmp_path / kind)
        table = ledger_of(out)["sources"]["chat"]
        assert (table["train"]["records"], table["val"]["records"]) == (2811, 255)
        found[kind] = [t for s in ("val", "train") for _, t in read_documents(out, s)]
    assert found["jsonl"] == found["parquet"]


def test_dropped_set_of_real_text_is_that_of_full_keys(shared, tmp_path):
    """The prekey is a shortcut: keys of all documents, in order, drop the same ones."""
    folder = shared / "data/ja_jsonl"
    shards = [
        real("ja", "val", 0, folder / "validation_0.jsonl.gz", "jsonl"),
        *(real("ja", "train", i, folder / f"train_{i}.jsonl.gz", "jsonl") for i in (5, 8)),
    ]
    out = run(shards, Recipe(sources={"ja": 1}), tmp_path / "with")
    every = run(shards, Recipe(sources={"ja": 1}, dedup=Dedup(exact=False)), tmp_path / "without")
    seen, expected = set(), []
    for split in ("val", "train"):
        for name, text in read_documents(every, split):
            key = extract.dedup.full_key(text)
            if key not in seen:
                expected.append(name)
            seen.add(key)
    assert [i for s in ("val", "train") for i, _ in read_documents(out, s)] == expected


def test_mixture_of_two_sources_reads_every_document_in_shares(tmp_path):
    """read_mixture lists the parts of each source by their names; one source takes another way."""
    short, long = [f"short {i}" for i in range(40)], ["long " * 40 + str(i) for i in range(10)]
    shards = [
        jsonl(tmp_path, "v.jsonl.gz", ["val"], "val"),
        jsonl(tmp_path, "a.jsonl.gz", short),
        replace(jsonl(tmp_path, "b.jsonl.gz", long), source="s_b"),
    ]
    mixed = recipe(sources={"s": 0.5, "s_b": 0.5}, on_exhausted="continue")
    out = run(shards, mixed, tmp_path)
    texts = list(documents.read_mixture(out))
    assert sorted(texts) == sorted(short + long)
    assert [t for t in texts if t in short] == short
    assert [t for t in texts if t in long] == long
