"""The one writer: whole or not there, at every crash point and on every full disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.core import files, growing, lock
from lib.core.errors import EnvError, InputError
from tests.faults.crash import enumerate_crashes, tree


def folder_maker(tmp_path: Path):
    def make(point: int) -> Path:
        path = tmp_path / f"point_{point}"
        path.mkdir()
        return path

    return make


def test_atomic_file_is_whole_or_absent_at_every_crash_point(tmp_path):
    """A reader that sees the final name must see all bytes, old or new."""
    data = os.urandom(3 * files._BUFFER + 17)

    def action(folder: Path) -> None:
        with files.atomic_file(folder / "x.bin") as out:
            for start in range(0, len(data), 50_000):
                out.write(data[start : start + 50_000])

    def inspect(folder: Path) -> None:
        if (folder / "x.bin").exists():
            assert (folder / "x.bin").read_bytes() == data

    points = enumerate_crashes(action, folder_maker(tmp_path), inspect)
    assert points >= 7, points


def test_a_replaced_file_keeps_its_old_bytes_until_the_new_are_whole(tmp_path):
    """Overwriting in place would lose the good version when killed half-way."""

    def make(point: int) -> Path:
        folder = folder_maker(tmp_path)(point)
        files.write_bytes(folder / "x", b"old")
        return folder

    def inspect(folder: Path) -> None:
        assert (folder / "x").read_bytes() in (b"old", b"new" * 1000)

    enumerate_crashes(lambda f: files.write_bytes(f / "x", b"new" * 1000), make, inspect)


def test_atomic_folder_never_shows_a_half_built_manifest(tmp_path):
    """The manifest's name may appear below the final folder only with every file it lists."""

    def make(point: int) -> Path:
        folder = folder_maker(tmp_path)(point)
        (folder / "out").mkdir()
        (folder / "out" / "manifest.json").write_text("1")
        (folder / "out" / "old").write_text("o")
        return folder

    def action(folder: Path) -> None:
        with files.atomic_folder(folder / "out") as part:
            files.write_bytes(part / "a", b"A" * 1000)
            files.write_bytes(part / "sub" / "b", b"B")
            files.write_json(part / "manifest.json", 2)

    def inspect(folder: Path) -> None:
        if not (folder / "out" / "manifest.json").exists():
            return
        if json.loads((folder / "out" / "manifest.json").read_text()) == 2:
            assert (folder / "out" / "a").stat().st_size == 1000
            assert (folder / "out" / "sub" / "b").exists()
        else:
            assert (folder / "out" / "old").exists()

    assert enumerate_crashes(action, make, inspect) > 15


def test_publish_survives_every_crash_point_and_leaves_the_source_alone(tmp_path):
    def make(point: int) -> Path:
        folder = folder_maker(tmp_path)(point)
        files.write_bytes(folder / "work" / "a", b"A")
        files.write_bytes(folder / "work" / "s" / "b", b"B")
        return folder

    def inspect(folder: Path) -> None:
        assert tree(folder / "work").keys() == {"a", "s/b"}
        if (folder / "out").exists():
            assert tree(folder / "out") == tree(folder / "work")

    enumerate_crashes(lambda f: files.publish(f / "work", f / "out"), make, inspect)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "close"])
def test_a_failing_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, number, call):
    """B1, B3: exit 4, the partial file removed, and fsync never asked twice."""
    real, calls = getattr(os, call), []

    def failing(fd, *rest):
        target = str(Path(f"/proc/self/fd/{fd}").readlink())
        if target.endswith("x.part"):
            calls.append(target)
            if call == "close":
                real(fd)
            raise OSError(number, os.strerror(number))
        return real(fd, *rest)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(EnvError) as caught:
        files.write_bytes(tmp_path / "x", b"data")
    monkeypatch.undo()
    assert caught.value.code == 4
    assert list(tmp_path.iterdir()) == []
    if call == "fsync":
        assert len(calls) == 1
    if number == errno.ENOSPC:
        assert "needs" in str(caught.value) and "free" in str(caught.value)


def test_b2_an_estimate_above_the_free_space_stops_before_any_byte(tmp_path):
    with pytest.raises(EnvError, match="disk too small"):
        files.check_space(tmp_path, 10**18)
    with (
        pytest.raises(EnvError, match="disk too small"),
        files.atomic_file(tmp_path / "x", 10**18),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    files.write_bytes(tmp_path / "x", bytes(range(256)) * 9)
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == bytes(range(256)) * 9


def test_equal_values_give_equal_json_bytes_and_nan_is_refused():
    first = files.canonical_json({"b": 1, "a": [0.1, "か", None]})
    assert first == '{"a":[0.1,"か",null],"b":1}\n'.encode()
    assert first == files.canonical_json({"a": [0.1, "か", None], "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json(float("nan"))


def test_append_log_cuts_a_torn_line_and_truncates_to_a_position(tmp_path):
    log = growing.AppendLog(tmp_path / "log.jsonl")
    log.append({"step": 1})
    position = log.sync()
    log.append({"step": 2})
    log.close()
    with (tmp_path / "log.jsonl").open("ab") as torn:
        torn.write(b'{"step": 3, "lo')
    log = growing.AppendLog(tmp_path / "log.jsonl")
    assert log.position == 2
    log.truncate(position)
    log.append({"step": 2})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a12_a_second_holder_is_refused_at_once_and_told_the_pid(tmp_path):
    """flock dies with its holder, so a killed stage never blocks the next."""
    code = (
        "import sys, time; from pathlib import Path; from lib.core import lock\n"
        f"with lock.exclusive_lock(Path({str(tmp_path / 'out')!r})):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(EnvError, match=f"pid {holder.pid}"), lock.exclusive_lock(tmp_path / "out"):
        pytest.fail("two holders")
    holder.kill()
    holder.wait()
    with lock.exclusive_lock(tmp_path / "out"):
        pass


def test_sweep_removes_stale_parts_only(tmp_path):
    files.write_bytes(tmp_path / "good", b"1")
    (tmp_path / "x.part").write_bytes(b"1")
    (tmp_path / "f.part").mkdir()
    (tmp_path / "f.part" / "y").write_bytes(b"1")
    (tmp_path / "d.part").write_bytes(b"1")
    assert files.sweep_parts(tmp_path, keep=lambda path: path.name == "d.part") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.part", "good"]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"x\.json"):
        files.read_json(tmp_path / "x.json")


def test_every_flipped_bit_of_a_note_makes_it_absent(tmp_path):
    """A flipped digit of a finished unit once became a published number, with exit code 0."""
    path = tmp_path / "note.json"
    files.write_note(path, {"nats": [1.25, 7], "name": "川"})
    data = path.read_bytes()
    assert files.read_note(path) == {"nats": [1.25, 7], "name": "川"}
    for bit in range(8 * (len(data) - 1)):  # not the last newline, which says nothing
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert files.read_note(path) is None, bit
    path.unlink()
    assert files.read_note(path) is None
