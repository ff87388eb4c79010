"""Lines of a file of any size: plain, gzip or zstd by its name, in memory that does not grow.

In:    a path.   Out: groups of lines in order, or the place of a line too long to be held.
Law:   a damaged compressed file is an InputError by the end of the iteration at the latest. Who
       reads must therefore commit nothing before the iterator ends: so no line of a file counts
       before its checksum held, without reading it twice (a truncated gzip yields half its lines).
Note:  a line over LONG bytes is read again from the file by `region`, as often as it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa

from lib.core.errors import EnvError, InputError

try:  # three times as fast; the same bytes and the same refusals
    from isal import isal_zlib as zlib_module
except ImportError:
    import zlib as zlib_module

BLOCK = 1 << 20  # decompressed bytes handled at once
LONG = 1 << 24  # bytes; a line above this is streamed
POSITIONS = 20  # kept per reason
AGAIN = "fetch the file again, then run the same command"
_READ = 1 << 18
_BOM = b"\xef\xbb\xbf"
_InflateError: type[Exception] = zlib_module.error  # type: ignore[assignment]  # isal's is untyped


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes; InputError when it is missing."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise InputError("file is missing", file=path, remedy=AGAIN) from None
    except OSError as error:
        raise EnvError("file cannot be opened", file=path, value=error.strerror) from None
    with stream:
        yield stream


def damaged(path: Path, cause: object) -> InputError:
    """The error for a file that contradicts itself."""
    return InputError("damaged file", file=path, value=cause, remedy=AGAIN)


def blocks_of(path: Path) -> Iterator[bytes]:
    """Decompressed bytes of a file in blocks, by its name: .gz, .zst, else as it is."""
    with opened(path) as stream:
        if path.suffix == ".gz":
            yield from _inflated(stream, path)
        elif path.suffix == ".zst":
            yield from _zstd(path)
        else:
            while block := stream.read(BLOCK):
                yield block


def _inflated(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """gzip members one after the other; their checksums and lengths are compared by the library.

    Whatever follows the last member is damage, padding included.
    """
    data = stream.read(_READ)
    if not data:
        raise damaged(path, "0 bytes")
    while data:
        member = zlib_module.decompressobj(31)  # 31: the gzip wrapper is due
        while not member.eof:
            try:
                block = member.decompress(data, BLOCK)
            except _InflateError as error:
                raise damaged(path, error) from None
            if block:
                yield block
            data = member.unused_data if member.eof else member.unconsumed_tail
            if not data and not member.eof:
                data = stream.read(_READ)
                if not data:
                    raise damaged(path, "ends inside a gzip member")
        data = data or stream.read(_READ)


def _zstd(path: Path) -> Iterator[bytes]:
    if path.stat().st_size == 0:
        raise damaged(path, "0 bytes")
    try:
        with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            while block := stream.read(BLOCK):
                yield block
    except OSError as error:
        if error.errno is not None:
            raise
        raise damaged(path, error) from None


def without_bom(blocks: Iterator[bytes], counts: ReadCounts) -> Iterator[bytes]:
    """The same bytes without a BOM at the start, which is counted."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(_BOM):
            break
    counts.bom += head.startswith(_BOM)
    if head := head.removeprefix(_BOM):
        yield head
    yield from blocks


# ---------------------------------------------------------------- lines


@dataclass
class ReadCounts:
    """What became of the lines: lines = records + blank; records = accepted + rejected."""

    lines: int = 0
    records: int = 0
    blank: int = 0
    bom: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    positions: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, reason: str, position: str) -> None:
        """Count one rejected record; the first positions of each reason are kept."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        kept = self.positions.setdefault(reason, [])
        if len(kept) < POSITIONS:
            kept.append(position)

    @property
    def accepted(self) -> int:
        """Records that are documents."""
        return self.records - sum(self.rejected.values())


@dataclass(frozen=True)
class Lines:
    """Consecutive lines, without their ends."""

    number: int  # of the first line, counted from 1
    lines: list[bytes]
    block: bytes  # the same with their ends: what is asked of all lines is asked faster here


@dataclass(frozen=True)
class LongLine:
    """Where a line over LONG bytes lies; blank: nothing but ASCII white space."""

    number: int
    start: int  # first byte, counted after the BOM in the decompressed file
    length: int
    blank: bool


def read_lines(path: Path, counts: ReadCounts) -> Iterator[Lines | LongLine]:
    """Lines ending at 0x0A, with one trailing 0x0D removed; counts lines and the BOM."""
    number, start = 1, 0
    held, held_bytes, blank = [], 0, True  # the line that the last block left open
    for block in without_bom(blocks_of(path), counts):
        end = block.rfind(b"\n")
        if end < 0:
            blank = blank and block.isspace()
            held_bytes += len(block)
            held = [*held, block] if held_bytes <= LONG else []  # too long: read again if wanted
            continue
        first = 0
        if held_bytes > LONG:
            first, held = block.find(b"\n") + 1, []
            counts.lines += 1
            yield LongLine(number, start, held_bytes + first - 1, blank and block[:first].isspace())
            number += 1
        if end >= first:
            whole = b"".join(held) + block[first:end]
            lines = [line.removesuffix(b"\r") for line in whole.split(b"\n")]
            counts.lines += len(lines)
            yield Lines(number, lines, whole)
            number += len(lines)
        start += held_bytes + end + 1
        held, held_bytes = [block[end + 1 :]], len(block) - end - 1
        blank = not held_bytes or held[0].isspace()
    if held_bytes:
        counts.lines += 1
        if held_bytes > LONG:
            yield LongLine(number, start, held_bytes, blank)
        else:
            whole = b"".join(held)
            yield Lines(number, [whole.removesuffix(b"\r")], whole)


def region(path: Path, start: int, length: int) -> Iterator[bytes]:
    """Bytes [start, start + length) of the decompressed file; one trailing 0x0D is removed."""
    skip = start
    for block in without_bom(blocks_of(path), ReadCounts()):
        part = block[skip : skip + length]
        skip = max(0, skip - len(block))
        length -= len(part)
        if not length:
            yield part.removesuffix(b"\r")
            return
        if part:
            yield part
