"""Large arrays of rows on disk, read and written by position: embeddings and context vectors.

Files: real `.npy` whose header is padded to 4 KiB, so that rows are page-aligned. The padding is a
       comment with JSON: kind, key, crc32; `np.load(path, mmap_mode="r")` opens the file.
Rule:  space is reserved before the first row; rows move by pread and pwrite through buffers of
       ours, never through a writable mapping: a full disk is an error, not SIGBUS.
Note:  pages are given back behind readers and writers: a scan larger than memory gains nothing from
       the page cache and would evict everything else.
"""

from __future__ import annotations

import ast
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib.core import files
from lib.core.errors import EnvError, InputError

HEADER = 4096  # bytes before the first row
BLOCK_BYTES = 16 << 20  # of one read or write
SPARE_BYTES = 1 << 30  # left free on any disk that rows are written to
MAGIC = b"\x93NUMPY\x01\x00"

StoreDtype = Literal["float16", "bfloat16", "float32", "float64", "int8"]


# ---------------------------------------------------------------- how rows are stored


def stored(dtype: StoreDtype, width: int) -> tuple[np.dtype, int]:
    """(numpy dtype, items of a row) on disk: bfloat16 as its bits, int8 with a fp16 scale a row."""
    if dtype == "int8":
        return np.dtype("u1"), width + 2
    names = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
    return np.dtype(names[dtype]), width


def encode(rows: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """Rows (n, width) fp32 or fp64 as they are stored, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    if dtype == "int8":
        scale = (np.abs(rows).max(1, keepdims=True) / 127).astype("<f2")
        scale = np.maximum(scale, np.float16(6e-8))
        values = np.clip(np.rint(rows / scale.astype(rows.dtype)), -127, 127).astype("<i1")
        return np.concatenate((values.view("u1"), scale.view("u1")), axis=1)
    return rows.astype(stored(dtype, 1)[0])


def decode(raw: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """The inverse of `encode`: fp32 (fp64 for float64), (n, width)."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "int8":
        scale = np.ascontiguousarray(raw[:, -2:]).view("<f2").astype(np.float32)
        return np.ascontiguousarray(raw[:, :-2]).view("<i1").astype(np.float32) * scale
    return raw.astype(np.float64 if dtype == "float64" else np.float32)


# ---------------------------------------------------------------- one file


class RowFile:
    """Rows (n, items) of one dtype on disk. `create` reserves the space, `open` checks the header.

    note: what the header tells beside shape and dtype; `open` refuses a file whose note differs.
    """

    def __init__(self, path: Path, fd: int, dtype: np.dtype, shape: tuple[int, int]) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape
        self.row_bytes = dtype.itemsize * shape[1]
        self.read_bytes = self.written_bytes = 0  # by this process
        self._fd = fd
        self._reader: ThreadPoolExecutor | None = None

    @classmethod
    def create(
        cls, path: Path, dtype: np.dtype, shape: tuple[int, int], note: dict[str, Any]
    ) -> RowFile:
        """A new file of its full size, header durable; EnvError when the disk is too small."""
        total = HEADER + dtype.itemsize * shape[0] * shape[1]
        files.make_folder(path.parent)
        files.check_space(path.parent, total)
        part = path.with_name(path.name + ".part")
        with files.disk_errors(part, total):
            part.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(part, flags, 0o644)
        try:
            files.allocate(fd, part, total)
            made = cls(path, fd, dtype, shape)
            made._pwrite(header(dtype, shape, note), 0)
            made.sync()
            files.rename(part, path)  # a file under its own name has its header
        except BaseException:
            os.close(fd)
            part.unlink(missing_ok=True)
            raise
        return made

    @classmethod
    def open(
        cls, path: Path, note: dict[str, Any] | None = None, *, writable: bool = False
    ) -> RowFile:
        """InputError when it is damaged, cut short, or not the file that `note` describes."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            raise _wrong("file is missing", path, None) from None
        try:
            dtype, shape, found = parse_header(os.pread(fd, HEADER, 0), path)
            wanted = HEADER + dtype.itemsize * shape[0] * shape[1]
            if os.fstat(fd).st_size != wanted:
                value = f"expected {wanted} bytes, found {os.fstat(fd).st_size}"
                raise _wrong("size differs", path, value)
            if note is not None and found != note:
                keys = [k for k in note.keys() | found.keys() if note.get(k) != found.get(k)]
                told = ", ".join(f"{k} {found.get(k)}, not {note.get(k)}" for k in sorted(keys))
                raise _wrong("file is of another generation", path, told)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, dtype, shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        out = np.empty((stop - start, self.shape[1]), self.dtype)
        view, at = _bytes_of(out), 0
        while at < len(view):  # a read may be short
            with files.disk_errors(self.path):
                got = os.preadv(self._fd, [view[at:]], HEADER + start * self.row_bytes + at)
            if not got:
                raise _wrong("file ends early", self.path, f"row {start + at // self.row_bytes}")
            at += got
        self.read_bytes += len(view)
        return out

    def write(self, start: int, rows: np.ndarray) -> None:
        """Put rows at `start`; durable after `sync`."""
        assert rows.dtype == self.dtype and rows.shape[1] == self.shape[1], (rows.dtype, rows.shape)
        assert 0 <= start <= start + len(rows) <= self.shape[0], (start, len(rows), self.shape)
        if len(rows):
            self._pwrite(_bytes_of(rows), HEADER + start * self.row_bytes)

    def stream(self, start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        """Rows [start, stop) in pieces of `rows`; blocks are read ahead in a thread.

        An error of the thread is raised here at the next piece.
        """
        block = max(1, BLOCK_BYTES // self.row_bytes // rows) * rows
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        waiting = self._reader.submit(self.read, start, min(stop, start + block))
        for first in range(start, stop, block):
            held, after = waiting.result(), min(stop, first + block)
            if after < stop:
                waiting = self._reader.submit(self.read, after, min(stop, after + block))
            for at in range(0, len(held), rows):
                yield held[at : at + rows]

    def forget(self, start: int, stop: int) -> None:
        """Tell the system that rows [start, stop) need not stay in memory."""
        if hasattr(os, "posix_fadvise"):
            place = HEADER + start * self.row_bytes
            size = (stop - start) * self.row_bytes
            os.posix_fadvise(self._fd, place, size, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make all rows written durable."""
        with files.disk_errors(self.path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close without syncing."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _pwrite(self, data: Any, place: int) -> None:
        view = memoryview(data)
        with files.disk_errors(self.path, len(view)):
            while view:  # a write may be short
                done = os.pwrite(self._fd, view[:BLOCK_BYTES], place)
                self.written_bytes += done
                view, place = view[done:], place + done


def crc32(rows: np.ndarray, before: int = 0) -> int:
    """crc32 of rows as stored, continued from `before`."""
    return zlib.crc32(_bytes_of(rows), before)


def _bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of rows, of the array itself where it is contiguous."""
    return memoryview(np.ascontiguousarray(rows).reshape(-1).view("u1"))  # type: ignore[arg-type]  # a buffer


# ---------------------------------------------------------------- header


def header(dtype: np.dtype, shape: tuple[int, ...], note: dict[str, Any]) -> bytes:
    """4,096 bytes of `.npy` header; the note and its crc32 stand in a comment."""
    plain = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    told = {**note, "crc32": zlib.crc32(files.canonical_json(note) + plain.encode())}
    text = plain + " # " + files.canonical_json(told).decode().strip()
    room = HEADER - len(MAGIC) - 2
    assert len(text) < room, "the note does not fit into the header"
    return MAGIC + room.to_bytes(2, "little") + text.ljust(room - 1).encode() + b"\n"


def parse_header(data: bytes, path: Path) -> tuple[np.dtype, tuple[int, int], dict[str, Any]]:
    """(dtype, shape, note) of a header of ours; InputError for anything else."""
    try:
        assert len(data) == HEADER and data.startswith(MAGIC)
        plain, _, told = data[len(MAGIC) + 2 :].decode().partition(" # ")
        note = json.loads(told)
        crc, held = note.pop("crc32"), ast.literal_eval(plain)
        assert crc == zlib.crc32(files.canonical_json(note) + plain.encode())
        rows, items = held["shape"]
        return np.dtype(held["descr"]), (int(rows), int(items)), note
    except (AssertionError, ValueError, SyntaxError, KeyError, TypeError, AttributeError) as error:
        raise _wrong("header is damaged", path, type(error).__name__) from error


def _wrong(what: str, path: Path, value: object) -> InputError:
    return InputError(what, file=path, value=value, remedy="remove it and run the same command")


# ---------------------------------------------------------------- before the first byte


def check_place(folder: Path, needed_bytes: int, large_bytes: int = 20 * 10**9) -> str:
    """A line about the disk below `folder`; EnvError unless `needed_bytes` may be written there.

    Refused: too little room (5 % and 1 GiB more than needed), a file system in memory, more than
    `large_bytes` on a disk that nobody chose: KUMIKI_SCRATCH unset, or on the device of `/` or of
    its own parent, as an unmounted drive is (KUMIKI_SCRATCH_ANY=1 overrides).
    """
    place = files.existing(folder)
    kind = mount_of(place)
    free = files.free_bytes(place)
    if kind in ("tmpfs", "ramfs"):
        raise EnvError("scratch lies in memory", file=folder, value=kind, remedy=SCRATCH)
    if needed_bytes * 1.05 + SPARE_BYTES > free:
        value = f"{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise EnvError("disk too small", file=folder, value=value, remedy=SCRATCH)
    if not os.access(place, os.W_OK):
        value = f"owner {place.stat().st_uid}"
        remedy = f"sudo chown {os.getuid()}: {place}, or choose another folder"
        raise EnvError("no permission to write", file=folder, value=value, remedy=remedy)
    root = os.environ.get("KUMIKI_SCRATCH")
    device = place.stat().st_dev
    here = root is None or device in (Path("/").stat().st_dev, _device_above(Path(root)))
    if needed_bytes > large_bytes and here and os.environ.get("KUMIKI_SCRATCH_ANY") != "1":
        value = f"{needed_bytes / 1e9:.0f} GB on the system's disk"
        raise EnvError("no disk of its own for scratch", file=folder, value=value, remedy=SCRATCH)
    own = "system disk" if here else "own device"
    return f"free {free / 1e9:.1f} GB ({kind}, {own})"


SCRATCH = "mount a larger disk and export KUMIKI_SCRATCH (docs/nvme.md)"


def _device_above(root: Path) -> int:
    """The device that holds the mount point's parent: equal to the root's own when not mounted."""
    return files.existing(root).parent.stat().st_dev


def mount_of(place: Path) -> str:
    """File system type below `place`, as /proc/mounts says; `unknown` elsewhere."""
    table = Path("/proc/mounts")
    if not table.is_file():
        return "unknown"
    best, kind = "", "unknown"
    for line in table.read_text().splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = point == "/" or str(place) == point or str(place).startswith(point + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind
