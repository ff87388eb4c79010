"""`hf_dataset`: the same rows in the same shards, whatever was killed or asked for before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.core.data_settings import DownloadShards, HubDatasetSource, SampleShuffle
from lib.core.errors import EnvError, InputError, UserError
from lib.core.process import worker_pool
from lib.core.run_settings import Runtime
from lib.data.raw import hub, sources
from lib.data.raw.shards import ShardFolder
from lib.data.vocab import chat
from tests.conftest import HANG_S, ROOT

RUNTIME = Runtime(workers=1)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "SHARD_ROWS", 10)  # so that a small set has many shards
    monkeypatch.setattr(hub, "ROW_GROUP", 4)


@pytest.fixture
def rows(tmp_path):
    """A set of 57 train and 12 test samples in Parquet; sample 3 has no text."""
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [None if i == 3 else f"train {i}" for i in range(57)]
    halves = {"train-00000.parquet": texts[:30], "train-00001.parquet": texts[30:]}
    for name, part in {**halves, "test.parquet": [f"test {i}" for i in range(12)]}.items():
        pq.write_table(pa.table({"text": pa.array(part, pa.string())}), folder / name)
    return folder


def source(folder: Path, train: int = 57, val: int = 12, **more) -> HubDatasetSource:
    keys = {"kind": "hf_dataset", "repo": str(folder), "text_field": "text"}
    keys |= {"max_train_samples": train, "max_eval_samples": val, **more}
    return HubDatasetSource(**keys)


def collect(declared: HubDatasetSource, said: list[str] | None = None):
    section = DownloadShards(sources={"s": declared})
    with worker_pool(1) as pool:
        return sources.collect(section, 1, RUNTIME, pool, (said if said is not None else []).append)


def texts(manifest, split: str) -> list[str | None]:
    folder = ShardFolder(manifest.recipe["sources"]["s"]).path
    listed = sorted(
        (e for e in manifest.files if e.extra["split"] == split), key=lambda e: e.extra["index"]
    )
    found = [pq.read_table(folder / e.path.removeprefix("s/")) for e in listed]
    return [t for table in found for t in table.column("text").to_pylist()]


def shard_names(manifest) -> list[str]:
    return [e.path.removeprefix("s/") for e in manifest.files]


def test_samples_keep_the_order_of_the_stream_and_their_nulls(rows):
    manifest = collect(source(rows))
    assert texts(manifest, "train") == [None if i == 3 else f"train {i}" for i in range(57)]
    assert texts(manifest, "val") == [f"test {i}" for i in range(12)]
    assert shard_names(manifest) == [
        *(f"train_{i:05d}.parquet" for i in range(5)),
        "train_00005-7.parquet",
        "val_00000.parquet",
        "val_00001-2.parquet",
    ]
    assert str(rows) not in manifest.to_bytes().decode()


@pytest.mark.parametrize("kept", range(6))
def test_a_kill_between_two_shards_ends_with_the_same_bytes(rows, kept, monkeypatch):
    """The state after each shard is JSON beside it; the stream goes on after the last whole one."""
    whole = collect(source(rows))
    folder = ShardFolder(whole.recipe["sources"]["s"]).path
    for index in range(kept, 6):  # what a kill after `kept` shards leaves
        for path in (
            *folder.glob(f"train_{index:05d}*"),
            *folder.glob(f"notes/train_{index:05d}*"),
        ):
            path.unlink()
    opened = []
    real = hub._open
    monkeypatch.setattr(hub, "_open", lambda *a: opened.append(a) or real(*a))
    read = []
    text_of = hub.text_of
    monkeypatch.setattr(hub, "text_of", lambda sample, s: read.append(1) or text_of(sample, s))
    assert collect(source(rows)) == whole
    assert len(opened) == 1
    assert len(read) == 57 - 10 * kept  # finished shards are not read again


def test_a_shuffled_stream_is_the_same_after_a_kill(rows, monkeypatch):
    """The buffer of a shuffle is no part of its state: resuming without a replay would lose it."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # its own 5 s
    shuffled = source(rows, shuffle=SampleShuffle(seed=5, buffer=16))
    whole = collect(shuffled)
    found = texts(whole, "train")
    plain = [None if i == 3 else f"train {i}" for i in range(57)]
    assert found != plain and sorted(map(str, found)) == sorted(map(str, plain))
    folder = ShardFolder(whole.recipe["sources"]["s"]).path
    for path in (*folder.glob("train_0000[345]*"), *folder.glob("notes/train_0000[345]*")):
        path.unlink()
    assert collect(shuffled) == whole


def test_more_samples_extend_the_folder_and_fewer_stream_nothing(rows, monkeypatch):
    first = collect(source(rows, train=25))
    more = collect(source(rows, train=57))
    assert more.recipe == first.recipe
    assert texts(more, "train")[:25] == texts(first, "train")
    real = hub._open
    monkeypatch.setattr(hub, "_open", lambda *a: pytest.fail("streamed again"))
    fewer = collect(source(rows, train=33))
    assert texts(fewer, "train") == texts(more, "train")[:33]
    assert collect(source(rows, train=25)) == first
    monkeypatch.setattr(hub, "_open", real)


def test_a_set_that_ends_early_is_a_warning_with_both_numbers(rows, monkeypatch):
    said = []
    manifest = collect(source(rows, train=1000, val=5), said)
    assert manifest.counts["sources"]["s"]["short"] == {"train": {"asked": 1000, "found": 57}}
    assert any("train has 57 samples, 1000 were asked for" in line for line in said)
    monkeypatch.setattr(hub, "_open", lambda *a: pytest.fail("the end is remembered"))
    assert collect(source(rows, train=1000, val=5)) == manifest


def test_the_head_of_train_is_validation_when_there_is_no_eval_split(rows):
    manifest = collect(source(rows, train=20, val=12, eval_from_train=True))
    assert texts(manifest, "val") == [None if i == 3 else f"train {i}" for i in range(12)]
    assert texts(manifest, "train") == [f"train {i}" for i in range(12, 32)]
    folder = ShardFolder(manifest.recipe["sources"]["s"]).path
    (folder / "notes" / "train_00001.parquet.json").unlink()
    assert collect(source(rows, train=20, val=12, eval_from_train=True)) == manifest
    other = collect(source(rows, train=20, val=10, eval_from_train=True))
    assert other.recipe != manifest.recipe  # train begins elsewhere


def test_an_absent_split_and_an_absent_field_are_the_users_to_mend(rows):
    with pytest.raises(UserError, match=r"no such split.*: validation; choose one of train"):
        collect(source(rows, eval_split="validation"))
    with pytest.raises(UserError, match=r"no such field.*: body; choose one of text"):
        collect(source(rows, text_field="body"))
    with pytest.raises(UserError, match="no Parquet or JSON lines"):
        collect(source(rows, train_split="other"))


def test_no_sample_and_damaged_data_are_input_errors(rows):
    with pytest.raises(InputError, match="no sample in split train"):
        collect(source(rows, train=5, val=57, eval_from_train=True))  # the head is all there is
    (rows / "test.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match="damaged data"):
        collect(source(rows))


def test_a_damaged_shard_is_made_again_and_compared(rows):
    declared = source(rows)
    manifest = collect(declared)
    folder = ShardFolder(manifest.recipe["sources"]["s"]).path
    path = folder / "train_00002.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    section = DownloadShards(sources={"s": declared})
    shards = sources.ensure_shards(manifest, section, RUNTIME, lambda line: None)
    assert path.read_bytes() == data
    assert [(s.split, s.index) for s in shards] == [
        ("val", 0),
        ("val", 1),
        *(("train", i) for i in range(6)),
    ]
    assert all(s.kind == "parquet" and s.field == "text" for s in shards)


def test_fields_and_messages_become_one_text():
    def text(sample, **keys):
        return hub.text_of(sample, source(Path("x"), **{"text_field": None, **keys}))

    talk = {"m": [{"role": "user", "content": "a {role}"}, {"role": "assistant", "content": "b"}]}
    assert text(talk, messages_field="m") == "a {role}\nb"
    join = "{role}: {content}\n"
    assert text(talk, messages_field="m", join=join) == "user: a {role}\nassistant: b"
    turns = [("user", "a {role}"), ("assistant", "b")]
    assert chat.unframe(text(talk, messages_field="m", join="chat")) == turns
    assert text({"m": []}, messages_field="m") is None
    assert text({"m": [{"role": "user", "content": None}]}, messages_field="m") is None
    pair = {"q": "why", "a": "so", "n": None}
    assert text(pair, text_field=("q", "n", "a")) == "why\n\nso"
    assert text({"q": "", "a": None}, text_field=("q", "a")) is None
    assert text({"q": 5}, text_field="q") is None
    assert text({"q": "\ud800"}, text_field="q") is None


def test_json_lines_and_a_single_file_stream_as_well(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(9)))
    manifest = collect(source(path, train=7, val=2, eval_from_train=True))
    assert texts(manifest, "val") == ["0", "1"]
    assert texts(manifest, "train") == [str(i) for i in range(2, 9)]


def test_real_dialogues_in_the_layout_of_ultrachat(shared, monkeypatch):
    monkeypatch.setattr(hub, "SHARD_ROWS", 8192)
    keys = {"text_field": None, "messages_field": "messages"}
    keys |= {"train_split": "train_sft", "eval_split": "test_sft"}
    manifest = collect(source(shared / "data" / "chat", train=100, val=20, **keys))
    first = json.loads((shared / "data" / "chat" / "train_sft.jsonl").open().readline())
    expected = "\n".join(m["content"] for m in first["messages"])
    assert texts(manifest, "train")[0] == expected.removesuffix("\n")
    assert len(texts(manifest, "train")) == 100 and len(texts(manifest, "val")) == 20


def test_a_host_out_of_reach_is_exit_4_and_torch_stays_out(tmp_path):
    """In a process of its own: the library reads HF_HUB_OFFLINE when it is imported."""
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "own.parquet")
    code = (
        "import sys\n"
        "from lib.core.data_settings import HubDatasetSource\n"
        "from lib.core.errors import EnvError\n"
        "from lib.data.raw import hub\n"
        "from lib.data.raw.shards import ShardFolder\n"
        "keys = dict(kind='hf_dataset', text_field='text', max_train_samples=2,\n"
        "            max_eval_samples=1, eval_from_train=True)\n"
        "own = HubDatasetSource(repo='own.parquet', **keys)\n"
        "hub.materialise(own, ShardFolder({'a': 1}), lambda line: None)\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    far = HubDatasetSource(repo='nobody/nothing', **keys)\n"
        "    hub.materialise(far, ShardFolder({'a': 2}), lambda line: None)\n"
        "except EnvError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            "PATH": "",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "KUMIKI_SCRATCH": str(tmp_path / "scratch"),
        },
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert "host unreachable in nobody/nothing" in done.stdout


def test_the_library_errors_are_told_apart():
    """A refusal is the user's to mend, a broken line is the environment's."""
    with pytest.raises(EnvError, match="host unreachable"), hub._stream_errors("r"):
        raise ConnectionError("reset")
    with pytest.raises(EnvError), hub._stream_errors("r"):
        raise TimeoutError("slow")
    with pytest.raises(InputError), hub._stream_errors("r"):
        raise pa.ArrowInvalid("magic")
