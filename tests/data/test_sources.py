"""Sources to shards: what is fetched, what is refused, what is made again."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.core import artifact, files, hosts
from lib.core.artifact import Manifest
from lib.core.data_settings import (
    ArchiveSource,
    DownloadShards,
    EmbeddedSource,
    FilesSource,
    JsonlSource,
    ParquetSource,
    PinnedFile,
    TextSource,
)
from lib.core.errors import EnvError, InputError, SeveralErrors, UserError, report_lines
from lib.core.process import worker_pool
from lib.core.run_settings import Runtime
from lib.data.raw import embedded, remote, sources
from lib.data.raw.shards import ShardFolder, check_parquet, write_parquet
from tests.conftest import HANG_S, ROOT
from tests.core.hostile import HostileServer

RUNTIME = Runtime(allow_private_hosts=("127.0.0.1",), workers=1, download_workers=2)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = [f"shard_{i:05d}.parquet" for i in range(10)]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    quick = functools.partial(hosts.Policy, patience=hosts.Patience().scaled(0.02))
    monkeypatch.setattr(remote, "Policy", quick)
    return tmp_path


@pytest.fixture
def host():
    with HostileServer() as running:
        running.commit, running.linked = COMMIT, False
        yield running


@pytest.fixture
def said():
    return []


def collect(said, seed=1, **declared) -> Manifest:
    with worker_pool(1) as pool:
        return sources.collect(DownloadShards(sources=declared), seed, RUNTIME, pool, said.append)


def parquet(rows, column="text", kind=None) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(rows, kind or pa.string())}), sink)
    return sink.getvalue()


def small(host, shards=3, **more) -> ParquetSource:
    """Ten shards on the loopback; the last one is validation."""
    if not host.files:
        host.files = {f"d/main/{n}": parquet([f"{n} {i}" for i in range(5)]) for n in NAMES}
    return ParquetSource(
        kind="parquet",
        repo="d",
        pattern=f"{host.url('/')}{{repo}}/{{revision}}/shard_{{i:05d}}.parquet",
        count=10,
        shards=shards,
        val_name=NAMES[9],
        **more,
    )


def names(manifest: Manifest, split: str) -> list[str]:
    listed = [e for e in manifest.files if e.extra and e.extra["split"] == split]
    return [e.path for e in sorted(listed, key=lambda e: e.extra["index"])]


def folder_of(manifest: Manifest, source: str) -> Path:
    return ShardFolder(manifest.recipe["sources"][source]).path


def flip(path: Path, at: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------- over HTTP


def test_real_shards_three_to_five_sends_exactly_two_gets(host, said, shared):
    """Raising a count fetches the new shards only; lowering it fetches nothing."""
    host.files = {f"d/main/{n}": (shared / "data" / "en_shards" / n).read_bytes() for n in NAMES}
    three = collect(said, en=small(host))
    assert host.count("GET") == 4  # three train shards and the validation shard
    host.seen.clear()
    five = collect(said, en=small(host, 5))
    assert host.count("GET") == 2
    assert names(five, "train") == [f"en/{n}" for n in NAMES[:5]]
    assert names(five, "val") == [f"en/{NAMES[9]}"]
    host.seen.clear()
    assert collect(said, en=small(host)) == three
    assert host.seen == []
    assert three.counts["sources"]["en"]["splits"]["train"]["rows"] == 3 * 3072


def test_the_manifest_tells_where_each_shard_came_from(host, said):
    manifest = collect(said, en=small(host, 1))
    entry = next(e for e in manifest.files if e.path == f"en/{NAMES[0]}")
    data = host.files[f"d/main/{NAMES[0]}"]
    assert entry.bytes == len(data)
    assert entry.extra == {
        "split": "train",
        "index": 0,
        "origin": "first_use",
        "url": f"{host.url('/')}d/{COMMIT}/{NAMES[0]}",
        "revision": COMMIT,
        "etag": entry.extra["etag"],
        "rows": 5,
        "row_groups": 1,
    }
    assert str(Path.cwd()) not in manifest.to_bytes().decode()
    manifest.write(Path("m.json"))
    assert Manifest.read(Path("m.json"), "shards") == manifest


def test_a_branch_is_resolved_once_and_kept(host, said):
    """`main` may move between two runs; a source is one commit."""
    collect(said, en=small(host, 1))
    collect(said, en=small(host, 2))
    gets = [s.path for s in host.seen if s.method == "GET"]
    assert all(f"/{COMMIT}/" in path for path in gets)
    assert sum("/main/" in s.path for s in host.seen) == 1


def test_the_hubs_own_sha256_is_noted_and_enforced(host, said):
    host.linked = True
    manifest = collect(said, en=small(host, 1))
    assert {e.extra["origin"] for e in manifest.files} == {"server"}


def test_pins_come_before_everything(host, said):
    source = small(host, 1)
    right = {n: files.hashlib.sha256(host.files[f"d/main/{n}"]).hexdigest() for n in NAMES}
    lines = [f"{right[n]}  {n}" for n in NAMES]
    Path("sums").write_text("\n".join(lines))
    manifest = collect(said, en=small(host, 1, checksums="sums"))
    assert {e.extra["origin"] for e in manifest.files} == {"pinned"}
    lines[0] = f"{'0' * 64}  {NAMES[0]}"
    Path("sums").write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf"sha256 differs.*{NAMES[0]}"):
        collect(said, en=small(host, 1, checksums="sums"))
    Path("sums").write_text("nonsense")
    with pytest.raises(UserError, match="line 1"):
        collect(said, en=small(host, 1, checksums="sums"))
    assert source.checksums is None


def test_the_validation_shard_is_fetched_by_name_or_the_stage_stops(host, said):
    """Without it elsewhere the last train shard silently became validation."""
    source = small(host, 2)
    del host.files[f"d/main/{NAMES[9]}"]
    with pytest.raises(InputError, match="the validation shard is absent"):
        collect(said, en=source)
    assert host.count("GET") == 0
    renamed = ParquetSource(**{**vars(source), "val_name": "validation.parquet"})
    with pytest.raises(UserError, match=r"no such shard: val_name validation\.parquet"):
        collect(said, en=renamed)


def test_a_train_shard_equal_to_the_validation_shard_is_refused(host, said):
    source = small(host, 2)
    host.files[f"d/main/{NAMES[1]}"] = host.files[f"d/main/{NAMES[9]}"]
    with pytest.raises(InputError, match=f"validation.*{NAMES[9]} and {NAMES[1]}"):
        collect(said, en=source)


def test_the_validation_shard_among_the_indices_is_not_trained_on(host, said):
    source = ParquetSource(**{**vars(small(host, 3)), "val_name": NAMES[1]})
    manifest = collect(said, en=source)
    assert names(manifest, "train") == [f"en/{NAMES[0]}", f"en/{NAMES[2]}"]


def test_a_shard_that_the_host_changed_is_refused_and_the_old_one_stays(host, said):
    manifest = collect(said, en=small(host, 1))
    path = folder_of(manifest, "en") / NAMES[9]
    before = path.read_bytes()
    host.files[f"d/main/{NAMES[9]}"] = parquet(["swapped"] * 5)
    assert collect(said, en=small(host, 1)) == manifest  # what is right is not asked for
    flip(path)
    with pytest.raises(InputError, match=rf"differs.*{NAMES[9]}"):
        collect(said, en=small(host, 1))
    assert path.stat().st_size == len(before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>login</html>", "not a Parquet file"),
        (parquet(["a"] * 9)[:-20] + b"PAR1", "damaged Parquet file"),
        (parquet(["a"], column="body"), "no column text.*it has body"),
        (parquet([1, 2], kind=pa.int64()), "column text is no text.*: type int64"),
        (parquet([]), "no rows"),
    ],
    ids=["html", "truncated", "no column", "other type", "no rows"],
)
def test_what_is_no_shard_never_gets_the_name_of_one(host, said, data, message):
    source = small(host, 2)
    host.files[f"d/main/{NAMES[0]}"] = data
    with pytest.raises(InputError, match=message):
        collect(said, en=source)
    folder = ShardFolder(sources.identity_of(source, "en", 1)).path
    assert not (folder / NAMES[0]).exists()
    host.seen.clear()
    host.files[f"d/main/{NAMES[0]}"] = parquet(["right"])
    collect(said, en=source)
    assert host.count("GET") == 1  # the others stayed


def test_a_damaged_page_is_found_at_first_use(tmp_path):
    """Nobody vouches for the sha256, so every row group is decoded once."""
    path = tmp_path / "x.parquet"
    write_parquet(path, {"text": [f"{i} " * 50 for i in range(3000)]}, 1024)
    for at in range(200, 2000, 50):
        flip(path, at)
    check_parquet(path, "text", decode=False)
    with pytest.raises(InputError, match="damaged Parquet file"):
        check_parquet(path, "text", decode=True)


def test_every_failure_is_listed_and_what_was_right_stays(host, said):
    source = small(host, 5)
    host.files[f"d/main/{NAMES[1]}"] = b"PAR1 no"
    host.files[f"d/main/{NAMES[3]}"] = parquet([])
    with pytest.raises(SeveralErrors) as caught:
        collect(said, en=source)
    told = report_lines(caught.value)
    assert len(told) == 3 and NAMES[1] in told[0] and NAMES[3] in told[1]
    assert caught.value.code == 3
    for index in (1, 3):
        host.files[f"d/main/{NAMES[index]}"] = parquet([f"right {index}"])
    host.seen.clear()
    collect(said, en=source)
    assert host.count("GET") == 2


def test_an_unreachable_host_is_known_after_one_question(host, said):
    source = ParquetSource(**{**vars(small(host, 9)), "pattern": small(host).pattern})
    gone = source.pattern.replace(str(host.port), "9")
    with pytest.raises(EnvError, match="host unreachable"):
        collect(said, en=ParquetSource(**{**vars(source), "pattern": gone}))
    assert host.seen == []


def test_space_is_asked_for_before_the_first_byte(host, said, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(EnvError, match=r"disk too small.*needed, 1\.00 kB free"):
        collect(said, en=small(host))
    assert host.count("GET") == 0


# ---------------------------------------------------------------- ensure


def ensure(manifest, said, section=None):
    return sources.ensure_shards(manifest, section, RUNTIME, said.append)


def test_one_flipped_byte_is_named_and_fetched_again(host, said):
    manifest = collect(said, en=small(host))
    path = folder_of(manifest, "en") / NAMES[2]
    whole = path.read_bytes()
    flip(path)
    host.seen.clear()
    shards = ensure(manifest, said)
    assert path.read_bytes() == whole
    assert host.count("GET") == 1
    assert any(f"en/{NAMES[2]} is missing or damaged" in line for line in said)
    assert [(s.split, s.index, s.name) for s in shards] == [
        ("val", 9, NAMES[9]),
        *(("train", i, NAMES[i]) for i in range(3)),
    ]


def test_a_shard_that_cannot_come_back_is_named(host, said):
    manifest = collect(said, en=small(host))
    flip(folder_of(manifest, "en") / NAMES[2])
    host.files[f"d/main/{NAMES[2]}"] = parquet(["other"] * 5)
    with pytest.raises(InputError, match=rf"differs.*{NAMES[2]}: expected .*found"):
        ensure(manifest, said)


def test_a_wiped_scratch_is_filled_from_the_manifest_alone(host, said):
    manifest = collect(said, en=small(host))
    files.remove_tree(folder_of(manifest, "en"))
    assert set(sources.damaged(manifest)) == {e.path for e in manifest.files}
    ensure(manifest, said)
    assert sources.damaged(manifest) == {}


def test_nothing_is_hashed_twice_and_a_touched_file_is(host, said, monkeypatch):
    manifest = collect(said, en=small(host))
    ensure(manifest, said)
    hashed = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    ensure(manifest, said)
    assert hashed == []
    os.utime(folder_of(manifest, "en") / NAMES[0])
    ensure(manifest, said)
    assert hashed == [NAMES[0]]


# ---------------------------------------------------------------- local files


def en_local(shared, **more) -> ParquetSource:
    keys = {"train": ("shard_0000[0-2].parquet",), "val": (NAMES[9],)}
    keys |= {"folder": str(shared / "data" / "en_shards"), **more}
    return ParquetSource(kind="parquet", **keys)


def test_local_shards_are_linked_and_the_folder_is_not_told(shared, said):
    manifest = collect(said, en=en_local(shared))
    assert names(manifest, "train") == [f"en/{n}" for n in NAMES[:3]]
    assert (folder_of(manifest, "en") / NAMES[0]).is_symlink()
    assert "shared" not in manifest.to_bytes().decode()
    shards = ensure(manifest, said)
    assert [s.path.read_bytes()[:4] for s in shards] == [b"PAR1"] * 4
    assert all(s.kind == "parquet" and s.field == "text" for s in shards)


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "mine"
    made.mkdir()
    for index in range(3):
        (made / f"s{index}.parquet").write_bytes(parquet([f"{index}"] * 3))
    return made


def mine(folder, train=("s[01].parquet",), val=("s2.parquet",), **more) -> ParquetSource:
    return ParquetSource(kind="parquet", folder=str(folder), train=train, val=val, **more)


def test_the_local_validation_shard_is_never_replaced(folder, said):
    (folder / "s2.parquet").rename(folder / "renamed.parquet")
    with pytest.raises(UserError, match=r"required file missing.*s2\.parquet"):
        collect(said, own=mine(folder))
    (folder / "renamed.parquet").rename(folder / "s2.parquet")
    with pytest.raises(InputError, match=r"also a train shard.*s2\.parquet"):
        collect(said, own=mine(folder, train=("*.parquet",)))
    (folder / "s1.parquet").write_bytes((folder / "s2.parquet").read_bytes())
    with pytest.raises(InputError, match=r"also a train shard.*s2\.parquet and s1\.parquet"):
        collect(said, own=mine(folder))
    (folder / "s1.parquet").write_bytes((folder / "s0.parquet").read_bytes())
    with pytest.raises(InputError, match=r"duplicate shard.*s0\.parquet and s1\.parquet"):
        collect(said, own=mine(folder))


def test_swapped_local_shards_are_refused_by_their_checksums(folder, said):
    sums = [f"{files.sha256_file(p)}  {p.name}" for p in sorted(folder.glob("*.parquet"))]
    Path("sums").write_text("\n".join(sums))
    collect(said, own=mine(folder, checksums="sums"))
    first, last = (folder / "s0.parquet").read_bytes(), (folder / "s2.parquet").read_bytes()
    (folder / "s0.parquet").write_bytes(last)
    (folder / "s2.parquet").write_bytes(first)
    with pytest.raises(InputError, match="sha256 differs in mine/s2"):
        collect(said, own=mine(folder, checksums="sums"))


def test_a_moved_folder_changes_nothing_and_an_edit_changes_the_identity(folder, said, tmp_path):
    before = collect(said, own=mine(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    assert collect(said, own=mine(moved)) == before
    ensure(before, said)
    (moved / "s0.parquet").write_bytes(parquet(["edited"]))
    with pytest.raises(InputError, match=r"sha256 differs|size differs"):
        ensure(before, said, DownloadShards(sources={"own": mine(moved)}))
    after = sources.identity_of(mine(moved), "own", 1)
    assert after != before.recipe["sources"]["own"]


def test_a_lost_link_is_made_again_where_the_folder_is_known(folder, said):
    manifest = collect(said, own=mine(folder))
    files.remove_tree(folder_of(manifest, "own"))
    with pytest.raises(InputError, match="file of a local source is missing"):
        ensure(manifest, said)
    ensure(manifest, said, DownloadShards(sources={"own": mine(folder)}))


def test_several_broken_sources_are_told_at_once(folder, said):
    with pytest.raises(SeveralErrors) as caught:
        collect(
            said,
            a=mine(folder, val=("absent.parquet",)),
            b=JsonlSource(kind="jsonl_gz", train=("x",), val=("y",)),
        )
    text = "\n".join(report_lines(caught.value))
    assert (
        "absent.parquet" in text and "missing in data/local: y" in text and caught.value.code == 2
    )


def lines(folder: Path, *listed: str) -> None:
    for name in listed:
        (folder / name).write_bytes(b'{"text": "%s"}\n' % name.encode())


def test_json_lines_keep_the_written_order_and_miss_aloud(folder, said):
    """train_10 after train_9; a missing training file is counted, a missing val file is fatal."""
    written = tuple(f"train_{i}.jsonl.gz" for i in range(11))
    lines(folder, *written, "validation_0.jsonl.gz")
    source = JsonlSource(
        kind="jsonl_gz", folder=str(folder), train=written, val=("validation_0.jsonl.gz",)
    )
    assert names(collect(said, ja=source), "train") == [f"ja/{n}" for n in written]
    (folder / "train_3.jsonl.gz").unlink()
    manifest = collect(said, ja=source)
    assert manifest.counts["sources"]["ja"]["missing"] == ["train_3.jsonl.gz"]
    assert any("warning: file is missing: train_3.jsonl.gz" in line for line in said)
    assert [s.index for s in ensure(manifest, said) if s.split == "train"] == [
        i for i in range(11) if i != 3
    ]
    strict = JsonlSource(**{**vars(source), "required": "all"})
    with pytest.raises(UserError, match=r"missing in mine: train_3\.jsonl\.gz.*sources\.ja\.train"):
        collect(said, ja=strict)
    (folder / "validation_0.jsonl.gz").unlink()
    with pytest.raises(
        UserError, match=r"missing in mine: validation_0.*change download_shards\.sources\.ja\.val"
    ):
        collect(said, ja=source)


def test_no_train_file_at_all_is_an_error_and_an_empty_one_too(folder, said):
    lines(folder, "val.jsonl")
    source = JsonlSource(
        kind="jsonl_gz", folder=str(folder), train=("a.jsonl", "b.jsonl"), val=("val.jsonl",)
    )
    with pytest.raises(UserError, match=r"a\.jsonl, b\.jsonl"):
        collect(said, ja=source)
    (folder / "a.jsonl").touch()
    with pytest.raises(InputError, match="empty file"):
        collect(said, ja=source)


def test_text_files_are_one_shard_for_each_split(folder, said):
    (folder / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (folder / name).write_text(f"{name}\nzwei\n")
    source = TextSource(kind="txt", paths=(str(folder),), val_fraction=0.25)
    manifest = collect(said, t=source)
    shards = ensure(manifest, said)
    assert [(s.split, s.path.name) for s in shards] == [
        (split, name) for split in ("val", "train") for name in ("a.txt", "b.txt", "c.txt")
    ]
    assert all(s.kind == "txt" and s.val_fraction == 0.25 for s in shards)
    whole = TextSource(kind="txt", paths=(str(folder),), val_fraction=0.25, document="file")
    with pytest.raises(UserError, match="a split without a file"):
        collect(said, t=TextSource(**{**vars(whole), "val_fraction": 1e-9}))
    named = TextSource(kind="txt", paths=(str(folder / "sub"),), val=(str(folder / "a.txt"),))
    splits = [(s.split, s.name, s.val_fraction) for s in ensure(collect(said, t=named), said)]
    assert splits == [("val", "a.txt", None), ("train", "c.txt", None)]


# ---------------------------------------------------------------- files and archives


def test_pinned_files_are_those_or_nothing(host, said):
    host.files = {"v.json": b"{}" * 50}
    pin = files.hashlib.sha256(b"{}" * 50).hexdigest()

    def source(sha256):
        one = PinnedFile(url=f"{host.url('/')}v.json?download=1", sha256=sha256, bytes=100)
        return FilesSource(kind="files", files={"encoder.json": one})

    manifest = collect(said, gpt2=source(pin))
    found = sources.ensure_files(manifest, "gpt2", None, RUNTIME, said.append)
    assert found["encoder.json"].read_bytes() == b"{}" * 50
    assert ensure(manifest, said) == []  # no text
    assert manifest.files[0].extra["url"] == f"{host.url('/')}v.json"  # no query
    files.remove_tree(folder_of(manifest, "gpt2"))
    assert sources.ensure_files(manifest, "gpt2", None, RUNTIME, said.append) == found
    with pytest.raises(InputError, match="sha256 differs"):
        collect(said, gpt2=source("0" * 64))
    with pytest.raises(UserError, match="no such source"):
        sources.ensure_files(manifest, "other", None, RUNTIME, said.append)


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("bundle/core.yaml", "tasks: []")
        archive.writestr("bundle/data/a.jsonl", "{}")
        archive.writestr("bundle/readme.md", "no")
    return sink.getvalue()


@pytest.mark.parametrize("way", ["fetched", "local", "unpacked"])
def test_an_archive_is_its_kept_members(way, host, said, tmp_path):
    host.files = {"b.zip": zipped()}
    (tmp_path / "b.zip").write_bytes(zipped())
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        for name in archive.namelist():
            files.write_bytes(tmp_path / "open" / name, archive.read(name))
    where = {
        "fetched": {"url": f"{host.url('/')}b.zip"},
        "local": {"path": "b.zip"},
        "unpacked": {"path": "open"},
    }[way]
    source = ArchiveSource(kind="archive", keep=("bundle/*.yaml", "bundle/data/**"), **where)
    section = DownloadShards(sources={"core": source})
    manifest = collect(said, core=source)
    found = sources.ensure_files(manifest, "core", section, RUNTIME, said.append)
    assert sorted(found) == ["bundle/core.yaml", "bundle/data/a.jsonl"]
    assert found["bundle/core.yaml"].read_text() == "tasks: []"
    files.remove_tree(folder_of(manifest, "core"))
    again = sources.ensure_files(manifest, "core", section, RUNTIME, said.append)
    assert again["bundle/data/a.jsonl"].read_text() == "{}"
    assert collect(said, core=source) == manifest


# ---------------------------------------------------------------- embedded


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """A package of twenty files, in place of the large ones."""
    root = tmp_path / "package"
    for index in range(20):
        text = f'"""Module {index}. {"It says something long. " * 8}"""\n'
        files.write_bytes(root / f"m{index}.py", text.encode())
    monkeypatch.setattr(embedded, "_root", lambda package: root)
    about = {"p": {"version": "1.0", "licence": "MIT"}}
    monkeypatch.setattr(embedded, "versions", lambda source: about)
    return about


DOCS = EmbeddedSource(kind="embedded", packages=("p",), val_fraction=0.1)


def test_the_embedded_corpus_comes_back_byte_for_byte(documented, said, monkeypatch):
    manifest = collect(said, docs=DOCS)
    assert manifest.recipe["sources"]["docs"]["about"] == documented
    assert manifest.counts["sources"]["docs"]["unparsable"] == []
    folder = folder_of(manifest, "docs")
    table = pq.read_table(folder / "val_00000.parquet")
    assert table.column_names == ["text", "id"] and table.num_rows == 2
    monkeypatch.setattr(embedded, "SHARD_DOCUMENTS", 4096)
    flip(folder / "val_00000.parquet")
    ensure(manifest, said)
    files.remove_tree(folder)
    ensure(manifest, said)
    assert sources.damaged(manifest) == {}
    read = embedded.read
    monkeypatch.setattr(embedded, "read", lambda *_: pytest.fail("parsed again"))
    assert collect(said, docs=DOCS) == manifest
    monkeypatch.setattr(embedded, "read", read)


def test_other_versions_are_another_corpus(documented, said, monkeypatch):
    manifest = collect(said, docs=DOCS)
    newer = {"p": {"version": "2.0", "licence": "MIT"}}
    monkeypatch.setattr(embedded, "versions", lambda source: newer)
    assert sources.identity_of(DOCS, "docs", 1) != manifest.recipe["sources"]["docs"]
    ensure(manifest, said)  # the bytes are there
    files.remove_tree(folder_of(manifest, "docs"))
    with pytest.raises(InputError, match=r"other packages in docs: p 1\.0; install"):
        ensure(manifest, said)


def test_the_layout_is_that_of_the_web_shards(tmp_path):
    """Row groups of 256, zstd, no dictionary, no statistics; equal columns give equal bytes."""
    columns = {"text": [f"text {i}" for i in range(600)], "id": [str(i) for i in range(600)]}
    one, _ = write_parquet(tmp_path / "a.parquet", columns, 256)
    two, facts = write_parquet(tmp_path / "b.parquet", columns, 256)
    assert one.sha256 == two.sha256 == files.sha256_file(tmp_path / "a.parquet")
    meta = pq.ParquetFile(tmp_path / "a.parquet").metadata
    groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    column = meta.row_group(0).column(0)
    assert groups == [256, 256, 88] and facts.row_groups == 3
    assert column.compression == "ZSTD" and not column.is_stats_set
    assert "PLAIN_DICTIONARY" not in column.encodings and "RLE_DICTIONARY" not in column.encodings


def test_the_key_knows_no_counts(host):
    """More shards extend the same folder; another dataset or commit is another folder."""

    def key(**more):
        return artifact.key_of(
            "shards",
            sources.identity_of(ParquetSource(**{**vars(small(host)), **more}), "en", 1),
        )

    assert key() == key(shards=7) == key(count=12) == key(max_bytes=5)
    assert len({key(), key(repo="e"), key(revision="v2"), key(text_column="body")}) == 4


# ---------------------------------------------------------------- the stage


PARAMS = """
profile: small
download_shards:
  sources:
    own:
      kind: jsonl_gz
      folder: mine
      train: [a.jsonl]
      val: [b.jsonl]
extract_texts:
  recipes:
    r: {sources: {own: 1.0}}
profiles:
  small: {}
"""


def run_stage(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stages.download_shards", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def test_the_stage_is_a_no_op_until_a_file_or_scratch_changes(folder, project):
    """DVC may call it again; nothing is touched then. An edit and a wiped scratch are noticed."""
    Path("params.yaml").write_text(PARAMS)
    lines(folder, "a.jsonl", "b.jsonl")
    out = project / "data" / "shards.manifest.json"
    first = run_stage(project)
    assert first.returncode == 0, first.stderr
    before, stamp = out.read_bytes(), out.stat().st_mtime_ns
    again = run_stage(project)
    assert "up to date" in again.stderr and out.stat().st_mtime_ns == stamp
    files.remove_tree(project / "scratch")
    wiped = run_stage(project)
    assert "shard own/a.jsonl: missing" in wiped.stderr, wiped.stderr
    assert sources.damaged(Manifest.read(out, "shards")) == {}
    assert out.read_bytes() == before
    lines(folder, "c.jsonl")
    (folder / "c.jsonl").replace(folder / "a.jsonl")
    assert run_stage(project).returncode == 0
    assert out.read_bytes() != before
    (folder / "b.jsonl").unlink()
    gone = run_stage(project)
    assert gone.returncode == 2
    assert gone.stderr.splitlines()[-1] == (
        "error: required file missing in mine: b.jsonl; "
        "add it, or change download_shards.sources.own.val"
    )
