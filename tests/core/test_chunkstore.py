"""Row files: numpy opens them, damage is named, a full disk is refused, codecs round."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest

from lib.core import chunkstore
from lib.core.chunkstore import HEADER, RowFile, decode, encode, stored
from lib.core.errors import EnvError, InputError

NOTE = {"kind": "contexts", "key": "k" * 16, "dtype": "float16"}


def rows_of(n: int = 20, width: int = 6) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n, width)).astype(np.float32)


def make(path, dtype="float16", n=20, width=6) -> RowFile:
    kind, items = stored(dtype, width)
    return RowFile.create(path, kind, (n, items), {**NOTE, "dtype": dtype})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8"])
def test_rows_come_back_as_they_were_rounded(tmp_path, dtype):
    wanted = rows_of()
    file = make(tmp_path / "a.npy", dtype)
    file.write(0, encode(wanted, dtype))
    file.sync()
    found = decode(file.read(3, 9), dtype)
    bound = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 8e-3}.get(dtype, 0)
    assert np.abs(found - wanted[3:9]).max() <= bound * np.abs(wanted).max()
    again = encode(found, dtype)
    assert np.array_equal(decode(again, dtype), found) or dtype == "int8"
    file.close()


def test_bfloat16_rounds_as_torch_does():
    import torch

    values = rows_of(500)
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(decode(encode(values, "bfloat16"), "bfloat16"), wanted)


def test_numpy_opens_the_file_and_rows_begin_at_a_page(tmp_path):
    file = make(tmp_path / "a.npy")
    file.write(0, encode(rows_of(), "float16"))
    file.close()
    found = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert found.offset == HEADER and found.dtype == np.float16
    assert np.array_equal(found, rows_of().astype(np.float16))


def test_a_stream_gives_every_row_once_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(chunkstore, "BLOCK_BYTES", 60)
    file = make(tmp_path / "a.npy")
    wanted = encode(rows_of(), "float16")
    file.write(0, wanted)
    for size in (1, 3, 7, 20):
        found = np.concatenate(list(file.stream(2, 19, size)))
        assert np.array_equal(found, wanted[2:19]), size


def test_an_error_of_the_reading_thread_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(chunkstore, "BLOCK_BYTES", 60)
    file = make(tmp_path / "a.npy")
    real, calls = os.preadv, []

    def failing(*args):
        calls.append(threading.current_thread().name)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(EnvError, match="input/output error"):
        list(file.stream(0, 20, 5))
    assert all(name.startswith("read-ahead") for name in calls)


def test_short_reads_and_writes_are_completed(tmp_path, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, bytes(data[:7]), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:5]], at))
    file = make(tmp_path / "a.npy")
    wanted = encode(rows_of(), "float16")
    file.write(0, wanted)
    assert np.array_equal(file.read(0, 20), wanted)


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(fd, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EnvError, match="disk full"):
        make(tmp_path / "a.npy")
    assert list(tmp_path.iterdir()) == []


def test_damage_and_other_generations_are_named(tmp_path):
    path = tmp_path / "a.npy"
    make(path).close()
    with pytest.raises(InputError, match=r"another generation.*key kkkk"):
        RowFile.open(path, {**NOTE, "key": "z" * 16})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="size differs"):
        RowFile.open(path, NOTE)
    path.write_bytes(whole[:30] + b"7" + whole[31:])
    with pytest.raises(InputError, match="header is damaged"):
        RowFile.open(path, NOTE)
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        RowFile.open(path, NOTE)


def test_the_place_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.delenv("KUMIKI_SCRATCH", raising=False)
    monkeypatch.setattr(chunkstore, "mount_of", lambda place: "ext4")
    with pytest.raises(EnvError, match="too small"):
        chunkstore.check_place(tmp_path, 10**18)
    monkeypatch.setattr("lib.core.files.free_bytes", lambda place: 10**12)
    with pytest.raises(EnvError, match="no disk of its own"):
        chunkstore.check_place(tmp_path, 118 * 10**9)
    monkeypatch.setenv("KUMIKI_SCRATCH_ANY", "1")
    assert "free 1000.0 GB" in chunkstore.check_place(tmp_path, 118 * 10**9)
    monkeypatch.setattr(chunkstore, "mount_of", lambda place: "tmpfs")
    with pytest.raises(EnvError, match="in memory"):
        chunkstore.check_place(tmp_path, 1)
    monkeypatch.setattr(chunkstore, "mount_of", lambda place: "ext4")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(EnvError, match="chown"):
        chunkstore.check_place(tmp_path, 1)
