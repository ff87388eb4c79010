"""Archives of strangers: zip, tar and tar.gz, checked whole before the first byte is written.

In:    an archive, a folder (the caller's `files.atomic_folder`), globs of what to keep.
Out:   the kept files, mode 0644, names normalised; everything else is not written.
Rules: no absolute name, `..`, drive letter, backslash, control character; no link, device or
       encrypted member; no two names that are one after NFC and case folding; bounded in members,
       bytes and expansion; the bytes that come are those the header states (reliability.md 8.3).
Note:  every archive is decompressed twice, the first time only to count: headers lie.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gzip
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from lib.core import files
from lib.core.errors import InputError

_BLOCK = 1 << 18
_EXTENDED_BYTES = 64 << 10  # of a long name or a PAX header in a tar
_SMALL_BYTES = 64 << 10  # up to here no ratio is asked for: short text repeats itself
_DIRECTORY_BYTES = 8 << 20  # of a zip's central directory: 10,000 members of 800 bytes
_EXTENDED_HEADERS = 4  # in a row, before one member of a tar
_PADDING_BYTES = 1 << 20  # zeros after the end of a tar
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an archive may cost; the defaults are those of reliability.md 8.3."""

    members: int = 10_000
    member_bytes: int = 512 << 20
    total_bytes: int = 1 << 30
    ratio: int = 200


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class _Member:
    """One entry: its name as written, its stated size, why it is refused, its bytes in blocks."""

    name: str
    size: int
    is_folder: bool
    refused: str | None
    blocks: Iterable[bytes]


def unpack(
    archive: Path, folder: Path, keep: Sequence[str] = ("**",), limits: Limits | None = None
) -> list[str]:
    """Write the kept files of `archive` below `folder`; returns their names, sorted.

    keep: globs over the normalised name; `*` stays within one level, `**` spans any number.
    Raises InputError naming the member, before anything is written.
    """
    limits, wanted = limits or Limits(), [_glob(pattern) for pattern in keep]
    with _named(archive):
        sizes = _check(archive, limits)
        kept = {name for name in sizes if any(glob.fullmatch(name) for glob in wanted)}
        files.check_space(folder, sum(sizes[name] for name in kept))
        for member in _members(archive, limits):
            name = "" if member.is_folder else _normal(member.name)
            if name in kept:
                with files.atomic_file(folder / name, member.size) as out:
                    for block in member.blocks:
                        out.write(block)
            else:
                _drain(member.blocks)
    return sorted(kept)


@contextlib.contextmanager
def _named(archive: Path) -> Iterator[None]:
    """Every complaint names the archive."""
    try:
        yield
    except _Refused as error:
        remedy = "do not use this archive"
        raise InputError("archive refused", file=archive, value=error, remedy=remedy) from error
    except _BROKEN as error:
        remedy = "remove it and fetch it again"
        raise InputError("damaged archive", file=archive, value=error, remedy=remedy) from error


class _Refused(Exception):
    """Why, with the member's name."""


def _check(archive: Path, limits: Limits) -> dict[str, int]:
    """Read everything, write nothing. Returns normalised name -> bytes of each file."""
    sizes: dict[str, int] = {}
    seen: dict[str, tuple[str, bool]] = {}  # folded name -> name as written, is a folder
    total, packed = 0, archive.stat().st_size
    for count, member in enumerate(_members(archive, limits), 1):
        total += member.size
        if count > limits.members:
            raise _Refused(f"more than {limits.members} members")
        if member.refused:
            raise _Refused(f"{member.name!r} is {member.refused}")
        name = _normal(member.name)
        if member.size > limits.member_bytes:
            raise _Refused(f"{name} has {member.size} bytes, at most {limits.member_bytes}")
        if total > limits.total_bytes:
            raise _Refused(f"more than {limits.total_bytes} bytes in all")
        if total > max(limits.ratio * packed, _SMALL_BYTES):
            raise _Refused(f"it expands more than {limits.ratio} times")
        if name in sizes:
            raise _Refused(f"{name} occurs twice")
        if not name and not member.is_folder:
            raise _Refused("a file without a name")
        if name:
            _check_unique(name, member.is_folder, seen)
        found = _drain(member.blocks)
        if found != member.size:
            raise _Refused(f"{name} has {found} bytes, its header says {member.size}")
        if not member.is_folder:
            sizes[name] = found
    return sizes


def _drain(blocks: Iterable[bytes]) -> int:
    return sum(len(block) for block in blocks)


def _normal(name: str) -> str:
    """The name in NFC and without `.` levels; _Refused if it may leave the folder."""
    if _CONTROL.search(name):
        raise _Refused(f"{name!r} holds a backslash or a control character")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise _Refused(f"{name!r} is an absolute name")
    levels = [level for level in unicodedata.normalize("NFC", name).split("/") if level != "."]
    levels = levels[:-1] if levels and levels[-1] == "" else levels  # a folder's closing slash
    if ".." in levels or "" in levels:
        raise _Refused(f"{name!r} leaves its folder")
    try:
        if any(len(level.encode()) > 255 for level in levels):
            raise _Refused(f"{name[:40]!r}… is too long a name")
    except UnicodeEncodeError:
        raise _Refused(f"{name!r} is not valid text") from None
    return "/".join(levels)


def _check_unique(name: str, is_folder: bool, seen: dict[str, tuple[str, bool]]) -> None:
    """No two names that some file system takes for one, and no file that is also a folder."""
    levels = name.split("/")
    for end in range(1, len(levels) + 1):
        part, whole = "/".join(levels[:end]), end == len(levels)
        entry = part, is_folder or not whole
        before = seen.setdefault(unicodedata.normalize("NFC", part.casefold()), entry)
        if before[0] != part:
            raise _Refused(f"{before[0]} and {part} are one name on some systems")
        if before[1] != entry[1]:
            raise _Refused(f"{part} is a file and a folder")


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` within one level, `**` over any number of levels; case matters."""
    *folders, last = pattern.split("/")
    text = "".join("(?:[^/]+/)*" if f == "**" else _level(f) + "/" for f in folders)
    return re.compile(text + (".*" if last == "**" else _level(last)))


def _level(level: str) -> str:
    wild = {"*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(letter, re.escape(letter)) for letter in level)


def _members(archive: Path, limits: Limits) -> Iterator[_Member]:
    """The members in the order of the archive; the blocks of each must be read before the next."""
    with archive.open("rb") as stream:
        magic = stream.read(4)
        stream.seek(0)
        if magic[:2] == b"PK":
            yield from _zip_members(stream, limits)
        elif magic[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=stream) as plain:
                yield from _tar_members(plain)
        else:
            yield from _tar_members(stream)


def _zip_members(stream: BinaryIO, limits: Limits) -> Iterator[_Member]:
    _check_directory(stream, limits)
    with _zip_damage():
        archive = zipfile.ZipFile(stream)
    for info in archive.infolist():
        # orig_filename: zipfile cuts `filename` at a NUL
        name, is_folder = info.orig_filename, info.orig_filename.endswith("/")
        blocks = _zip_blocks(archive, info)
        yield _Member(name, info.file_size, is_folder, _zip_refusal(info, limits), blocks)


@contextlib.contextmanager
def _zip_damage() -> Iterator[None]:
    """zipfile knows more complaints than its own: bad names, versions, offsets, short headers."""
    try:
        yield
    except (struct.error, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to before the start
            raise
        raise zipfile.BadZipFile(str(error)) from error


def _check_directory(stream: BinaryIO, limits: Limits) -> None:
    """Bound the central directory before zipfile builds an object for each of its entries."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - 22 - 65_535 - 20))  # end record, its comment, a zip64 locator
    tail = stream.read()
    at = len(tail) - 22
    if tail[at : at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":  # with a comment: as zipfile looks
        at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise zipfile.BadZipFile("no end of central directory")
    entries = int.from_bytes(tail[at + 10 : at + 12], "little")
    directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
    is_zip64 = tail[max(0, at - 20) : at].startswith(b"PK\6\7")
    if is_zip64 or entries > limits.members or directory_bytes > _DIRECTORY_BYTES:
        raise _Refused(f"more than {limits.members} members")


def _zip_refusal(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device"
    if info.flag_bits & 0x2041:  # encrypted, strongly encrypted, masked header
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by an unknown method"
    if info.file_size > max(limits.ratio * info.compress_size, _SMALL_BYTES):
        return f"expanding more than {limits.ratio} times"
    return None


def _zip_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    probe = copy.copy(info)
    probe.file_size += 1  # zipfile stops at the stated size: one byte more shows that there is more
    with _zip_damage():
        stream = archive.open(probe)
    with stream:
        while True:
            with _zip_damage():
                block = stream.read(_BLOCK)
            if not block:
                return
            yield block


def _tar_members(stream: _Readable) -> Iterator[_Member]:
    """Walk a tar front to back. The library's own walk takes a damaged header for the end."""
    name: str | None = None
    size: int | None = None
    extended = 0
    while True:
        header = _exactly(stream, tarfile.BLOCKSIZE)
        if not any(header):
            break
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            extended += 1
            if extended > _EXTENDED_HEADERS or not 0 <= info.size <= _EXTENDED_BYTES:
                raise _Refused("too long a header")
            data = _exactly(stream, _padded(info.size))[: info.size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(data)
                name = records.get("path", name)
                size = _pax_size(records.get("size"), size)
            continue
        total = info.size if size is None else size
        if total < 0:
            raise tarfile.TarError("negative size")
        refused = None if info.type in (b"0", b"\0", b"5") else "a link, a device or sparse"
        blocks = _tar_blocks(stream, total)
        yield _Member(name or info.name, total, info.isdir(), refused, blocks)
        _drain(blocks)
        name, size, extended = None, None, 0
    for _ in range(_PADDING_BYTES // _BLOCK):
        rest = stream.read(_BLOCK)
        if any(rest):
            raise tarfile.TarError("data after the end")
        if not rest:
            return
    raise _Refused("too much padding")


def _pax_records(data: bytes) -> dict[str, str]:
    """`<length> <key>=<value>\\n` (POSIX pax); sparse files are refused."""
    records: dict[str, str] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        line = data[len(digits) + 1 : length]
        if length <= len(digits) + 1 or length > len(data) or not line.endswith(b"\n"):
            raise tarfile.TarError("malformed header")
        key, _, value = line[:-1].decode("utf-8", "surrogateescape").partition("=")
        if key.startswith("GNU.sparse"):
            raise _Refused("a sparse file")
        records[key] = value
        data = data[length:]
    return records


def _pax_size(text: str | None, otherwise: int | None) -> int | None:
    if text is None:
        return otherwise
    if not re.fullmatch("[0-9]{1,19}", text):
        raise tarfile.TarError("malformed size")
    return int(text)


def _tar_blocks(stream: _Readable, size: int) -> Iterator[bytes]:
    left = size
    while left:
        block = stream.read(min(left, _BLOCK))
        if not block:
            raise EOFError("the archive ends early")
        left -= len(block)
        yield block
    _exactly(stream, _padded(size) - size)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _exactly(stream: _Readable, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError("the archive ends early")
    return data
