"""Every reader of outside data, fed damaged and invented bytes: a value or a sentence, soon, small.

No traceback, nothing over 5 s, no allocation over ten times the input (Python's own are counted;
libraries meet a limit of the address space). A new reader is one entry in `READERS`. hypothesis
changes good input; KUMIKI_FAULTS_EVERY=1 takes 25 times the examples.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.core import params
from lib.core.archive import unpack
from lib.core.artifact import FileEntry, Manifest
from lib.core.errors import KumikiError
from lib.data.ledger import ReadCounts
from lib.data.raw.readers import Shard, read_shard
from lib.data.raw.strict_json import Rejected, field_of
from lib.data.vocab import spm_file
from lib.train.checkpoint import read_tensors
from tests.conftest import ROOT
from tests.faults.tally import tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
EXAMPLES = 1000 if os.environ.get("KUMIKI_FAULTS_EVERY") == "1" else 40
SLACK_BYTES = 24 << 20  # buffers of fixed size: blocks, decompressors, a schema
NATIVE_BYTES = 512 << 20  # what libraries may map beside what is mapped already, threads included
LINES = b'{"text": "a b"}\n{"text": "\\u00e9", "n": [1, {"x": null}]}\n\n{"text": "\xe5\xb7\x9d"}\n'


def _shard(path: Path, kind: str) -> None:
    shard = Shard(source="s", split="train", index=0, path=path, kind=kind)  # type: ignore[arg-type]
    for _ in read_shard(shard, ReadCounts()):
        pass


def _unpack(path: Path) -> None:
    out = path.parent / f"{path.name}.out"
    out.mkdir(exist_ok=True)
    unpack(path, out)


def _params(path: Path) -> None:
    (path.parent / "params.yaml").write_bytes(path.read_bytes())
    params.load(path.parent)


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(50)]}), out, compression="zstd")
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("core.yaml", "a: 1\n" * 20)
        archive.writestr("data/x.jsonl", LINES)
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("core.yaml")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"a: 1\n"))
    return out.getvalue()


def _tensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def _manifest() -> bytes:
    entry = FileEntry(path="a", bytes=3, sha256="0" * 64, dtype="<u2", shape=(3,))
    return Manifest(kind="x", recipe={"a": 1}, files=(entry,), counts={"n": 2}).to_bytes()


def _spm() -> bytes:
    piece = b"\x0a\x03abc\x15\x00\x00\x00\x00\x18\x01"
    return (b"\x0a" + bytes([len(piece)]) + piece) * 4 + b"\x12\x02\x18\x02"


# name -> (good input, what reads the file that holds it, errors it may raise)
READERS: dict[str, tuple[Callable[[], bytes], Callable[[Path], object], tuple]] = {
    "json line": (lambda: LINES.splitlines()[1], lambda p: field_of(p.read_bytes(), "text"),
                  (Rejected,)),
    "jsonl": (lambda: LINES, lambda p: _shard(p, "jsonl"), ()),
    "jsonl.gz": (lambda: gzip.compress(LINES, mtime=0), lambda p: _shard(p, "jsonl"), ()),
    "text": (lambda: LINES, lambda p: _shard(p, "txt"), ()),
    "parquet": (_parquet, lambda p: _shard(p, "parquet"), ()),
    "zip": (_zip, _unpack, ()),
    "tar": (_tar, _unpack, ()),
    "params.yaml": (lambda: b"profile: small\nseed: 1\nprofiles:\n  small: {}\n", _params, ()),
    "manifest": (_manifest, Manifest.read, ()),
    "safetensors": (_tensors, read_tensors, ()),
    "sentencepiece model": (_spm, lambda p: spm_file.read_spec(p.read_bytes()), (ValueError,)),
}  # fmt: skip
SUFFIXES = {"jsonl.gz": ".jsonl.gz", "zip": ".zip", "tar": ".tar"}


def changes(good: bytes) -> st.SearchStrategy[bytes]:
    """Edits of good input (bytes set, runs repeated, cut, large lengths), or invented bytes."""
    edit = st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255))
    length = st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"9" * 5000])

    def edited(edits, cut, run, grown):
        data = bytearray(good)
        for place, value in edits:
            data[place] = value
        if grown is not None:
            data[run : run + 8] = grown
        return bytes(data[:cut])

    damaged = st.builds(
        edited,
        st.lists(edit, max_size=6),
        st.one_of(st.just(None), st.integers(0, len(good))),
        st.integers(0, len(good) - 1),
        st.one_of(st.none(), length),
    )
    deep = st.integers(1, 20_000).map(lambda n: b'{"text": ' + b"[" * n)
    return st.one_of(damaged, damaged, damaged, st.binary(max_size=200), deep)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within the block a C++ or Rust library that believes a length of gigabytes fails."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + NATIVE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", READERS)
def test_d01_to_d05_any_bytes_are_a_value_or_a_sentence(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, read, allowed = READERS[name]
    good, outcomes = make(), {"read": 0, "refused": 0}
    path = tmp_path / f"input{SUFFIXES.get(name, '')}"
    path.write_bytes(good)
    read(path)  # the good input is good; lazy imports happen here

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changes(good))
    def feed(data: bytes) -> None:
        path.write_bytes(data)
        began = time.process_time()
        tracemalloc.start()
        try:
            read(path)
            outcomes["read"] += 1
        except (KumikiError, *allowed) as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) or isinstance(error, KumikiError)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert time.process_time() - began < 5
        assert peak <= 10 * len(data) + SLACK_BYTES, f"{peak:,} bytes for {len(data):,}"

    with bounded_memory():
        feed()
    assert outcomes["refused"] > 0, outcomes
    told = f"{outcomes['read']} read, {outcomes['refused']} refused"
    tally("D1" if name.startswith("json") else "D5", f"fuzzed {name}", sum(outcomes.values()), told)


@pytest.mark.parametrize("name", ["json line", "manifest", "sentencepiece model", "zip"])
def test_d01_to_d05_bytes_that_reach_new_branches_are_a_value_or_a_sentence(name):
    """The parsers that are ours, by libFuzzer; it exits with another code than 0 for a finding."""
    pytest.importorskip("atheris", reason="atheris is absent: pip install -e '.[fuzz]'")
    runs = 20 * EXAMPLES
    command = [sys.executable, "-m", "tests.faults.guided", name, f"-runs={runs}", "-seed=1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    tally("D1" if name == "json line" else "D5", f"guided fuzzing of {name}", runs, "no finding")


def test_control_a_reader_that_lets_its_librarys_error_out_is_caught(tmp_path, monkeypatch):
    read = functools.partial(json.loads)
    monkeypatch.setitem(READERS, "json", (lambda: b'{"a": 1}', lambda p: read(p.read_bytes()), ()))
    with pytest.raises((ValueError, RecursionError, ExceptionGroup)):
        test_d01_to_d05_any_bytes_are_a_value_or_a_sentence(tmp_path, "json", monkeypatch)


def test_control_a_reader_that_believes_a_length_meets_the_limit():
    with bounded_memory(), pytest.raises(MemoryError):
        bytearray(NATIVE_BYTES + (64 << 20))
