"""The only writer: every durable byte of the project goes through this file (reliability.md 2).

What grows over time stands beside it in growing.py, on the same terms.

Rule:  temporary name in the same folder -> write, hash on the way -> fsync -> rename -> fsync
       the folder. So a final name never carries incomplete bytes, wherever the process is killed.
Disk:  errno is mapped by cause: no space, read-only, I/O error become an EnvError (exit 4) with the
       folder and the numbers. After a failed fsync the file is abandoned, fsync is never repeated.
Note:  callers hold the lock of the output they build, so a stale `*.part` is theirs to sweep.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.core import progress
from lib.core.errors import EnvError, InputError, KumikiError, UserError

MANIFEST = "manifest.json"
FULL = "No space left on device"  # in the text of libraries that raise what is no OSError
WATCHED_BYTES = 1 << 28  # from here on reading a file takes long enough for a bar
_BUFFER = 1 << 18  # bytes gathered before one write call
_DISK_CAUSES = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.ENAMETOOLONG: "file name too long",
}
_REMEDIES = {
    errno.ENOSPC: "free space and run the same command",
    errno.EDQUOT: "free space and run the same command",
    errno.EIO: "check the disk, then run the same command",
    errno.EMFILE: "raise `ulimit -n` and run the same command",
    errno.ENFILE: "close other programs and run the same command",
}


def as_env_error(error: OSError, path: Path, needed_bytes: int = 0) -> KumikiError | None:
    """The EnvError that stands for `error` while writing `path`; None when it is no disk matter."""
    what = _DISK_CAUSES.get(error.errno or 0)
    if what is None:
        return None
    folder = existing(path.parent)
    value = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        value = f"needs {_size(max(needed_bytes, 1))}, {_size(free_bytes(folder))} free"
    remedy = _REMEDIES.get(error.errno or 0, "choose a writable folder")
    return EnvError(what, file=path.parent, value=value, remedy=remedy)


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's complaints about `path` into EnvError, by cause."""
    try:
        yield
    except OSError as error:
        mapped = as_env_error(error, Path(path), needed_bytes)
        if mapped is None:
            raise
        raise mapped from error


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write at `folder` (or its nearest existing parent)."""
    stat = os.statvfs(existing(folder))
    return stat.f_bavail * stat.f_frsize


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise EnvError unless `folder` has room for `needed_bytes` and 5 % more."""
    free = free_bytes(folder)
    if needed_bytes * 1.05 > free:
        raise EnvError(
            "disk too small",
            file=folder,
            value=f"{_size(needed_bytes)} needed, {_size(free)} free",
            remedy="free space, or set KUMIKI_SCRATCH to a larger disk, and run the same command",
        )


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folder = Path(folder).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _size(count: int) -> str:
    """Bytes as decimal kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


# ---------------------------------------------------------------- files


class Output:
    """A file being written: hashed on the way, fsynced at `close`. pyarrow takes it as a sink."""

    mode = "wb"

    def __init__(self, path: Path, needed_bytes: int = 0) -> None:
        self.path, self.needed_bytes = path, needed_bytes
        self.total_bytes, self.closed = 0, False
        self._hash, self._pending = hashlib.sha256(), bytearray()
        with disk_errors(path, needed_bytes):
            path.unlink(missing_ok=True)  # a leftover of a killed run; ours under the lock
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    @property
    def sha256(self) -> str:
        """Hash of everything given to `write` so far, 64 hex digits."""
        return self._hash.hexdigest()

    def write(self, data: Any) -> int:
        """Append any bytes-like `data`; returns its length."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.total_bytes += len(view)
        if len(view) >= _BUFFER:
            self._drain()
            self._write_all(view)
        else:
            self._pending += view
            if len(self._pending) >= _BUFFER:
                self._drain()
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.total_bytes

    def flush(self) -> None:
        """Hand everything to the operating system (durable only after `close`)."""
        self._drain()

    def close(self) -> None:
        """Flush, fsync, close. ENOSPC may surface here as well."""
        if self.closed:
            return
        try:
            self._drain()
            with disk_errors(self.path, self.total_bytes):
                os.fsync(self._fd)
        finally:
            self.closed = True
            with disk_errors(self.path, self.total_bytes):
                os.close(self._fd)

    def abandon(self) -> None:
        """Close without fsync and remove the file."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):
                os.close(self._fd)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _drain(self) -> None:
        pending, self._pending = self._pending, bytearray()
        self._write_all(memoryview(pending))

    def _write_all(self, view: memoryview) -> None:
        with disk_errors(self.path, max(self.needed_bytes, self.total_bytes)):
            while view:  # a write may be short
                view = view[os.write(self._fd, view) :]


@contextlib.contextmanager
def atomic_file(path: Path, estimate_bytes: int = 0) -> Iterator[Output]:
    """Write `path` whole or not at all. Yields an `Output`; an exception leaves nothing behind."""
    path = Path(path)
    make_folder(path.parent)
    check_space(path.parent, estimate_bytes)
    out = Output(path.with_name(path.name + ".part"), estimate_bytes)
    try:
        yield out
        out.close()
    except BaseException:
        out.abandon()
        raise
    rename(out.path, path)


@contextlib.contextmanager
def library_file(path: Path, estimate_bytes: int = 0) -> Iterator[Path]:
    """Let a library write to a temporary name; then fsync, mode 0644, rename.

    For writers that neither fsync nor set a mode (safetensors, SentencePiece).
    """
    path = Path(path)
    make_folder(path.parent)
    check_space(path.parent, estimate_bytes)
    temp = path.with_name(path.name + ".part")
    with disk_errors(temp, estimate_bytes):
        temp.unlink(missing_ok=True)
    try:
        with disk_errors(temp, estimate_bytes):
            yield temp
        with disk_errors(temp, estimate_bytes):
            temp.chmod(0o644)
        _fsync(temp)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        if FULL in str(error) and not isinstance(error, KumikiError):  # its own exception
            mapped = as_env_error(OSError(errno.ENOSPC, FULL), temp, estimate_bytes)
            assert mapped is not None
            raise mapped from error
        raise
    rename(temp, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with atomic_file(path, len(data)) as out:
        out.write(data)


def write_json(path: Path, value: object) -> None:
    """Write `value` as canonical JSON."""
    write_bytes(path, canonical_json(value))


def canonical_json(value: object) -> bytes:
    """Sorted keys, compact, UTF-8, one trailing newline: equal values give equal bytes.

    NaN and infinities are refused with ValueError (they are no JSON).
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode() + b"\n"


def read_json(path: Path) -> Any:
    """Read a small JSON file of ours; UserError when missing, InputError when damaged."""
    return read_json_and_bytes(path)[0]


def read_json_and_bytes(path: Path) -> tuple[Any, bytes]:
    """As `read_json`, with the bytes that the value was read from, for who compares them."""
    try:
        data = path.read_bytes()
        return json.loads(data), data
    except FileNotFoundError:
        raise UserError("no such file", file=path, remedy="run the stage that makes it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            "not valid JSON", file=path, value=error, remedy="remove it and run the same command"
        ) from error


def write_note(path: Path, value: object) -> None:
    """Keep `value`, JSON of finished work that a rerun takes over, with a checksum of itself."""
    write_json(path, {"check": _check(value), "note": value})


def read_note(path: Path) -> Any | None:
    """What `write_note` kept; None where it is absent or damaged: then the work is done again."""
    try:
        raw = json.loads(path.read_bytes())
        return raw["note"] if raw["check"] == _check(raw["note"]) else None
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _check(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits; 0.8 to 1.8 GB/s a core."""
    with Path(path).open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        if total < WATCHED_BYTES or not progress.on_terminal():
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        with progress.progress(total, "B", f"sha256 of {Path(path).name}") as advance:
            while block := stream.read(8 << 20):
                digest.update(block)
                advance(len(block))
        return digest.hexdigest()


def rename(source: Path, target: Path) -> None:
    """Give `source` its final name, durably."""
    with disk_errors(target):
        source.replace(target)
    fsync_folder(target.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with disk_errors(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    _fsync(folder)


def allocate(fd: int, path: Path, total_bytes: int) -> None:
    """Reserve `total_bytes` on disk for the open file `fd`; EnvError when the disk is too small."""
    if total_bytes == 0:
        return
    with disk_errors(path, total_bytes):
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, total_bytes)
        else:  # macOS: writing zeros reserves as well
            for start in range(0, total_bytes, 1 << 20):
                os.pwrite(fd, bytes(min(1 << 20, total_bytes - start)), start)


# ---------------------------------------------------------------- folders


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, mode 0755."""
    with disk_errors(folder / "x"):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Build a folder under `<name>.part/`, then give it its name: whole or not at all.

    The caller writes the manifest last. An older folder is retired after that.
    """
    path = Path(path)
    make_folder(path.parent)
    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old.part")
    remove_tree(part)
    remove_tree(old)
    make_folder(part)
    try:
        yield part
        for folder, _, names in os.walk(part):
            for name in sorted(names):
                _fsync(Path(folder) / name)
            fsync_folder(Path(folder))
    except BaseException:
        with contextlib.suppress(OSError, KumikiError):
            remove_tree(part)
        raise
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            path.replace(old)
        else:
            path.unlink(missing_ok=True)
        part.replace(path)
    fsync_folder(path.parent)
    remove_tree(old)


def remove_tree(folder: Path) -> None:
    """Remove a folder, its manifest first: half a removal is never taken for an artefact."""
    if not folder.is_dir():
        return
    with disk_errors(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def sweep_parts(folder: Path, keep: Callable[[Path], bool] = lambda path: False) -> int:
    """Remove stale `*.part` files and folders directly below `folder`; returns how many.

    Only under the lock of that output. `keep` spares those that a rerun continues (downloads).
    """
    removed = 0
    for path in sorted(folder.glob("*.part")) if folder.is_dir() else []:
        if keep(path):
            continue
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            with disk_errors(path):
                path.unlink(missing_ok=True)
        removed += 1
    return removed


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`; across file systems copy it, fsynced."""
    try:
        with disk_errors(target):
            target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            mapped = as_env_error(error, target)
            if mapped is None:
                raise
            raise mapped from error
        out = Output(target, source.stat().st_size)
        try:
            with source.open("rb") as stream:
                while block := stream.read(1 << 20):
                    out.write(block)
            out.close()
        except BaseException:
            out.abandon()
            raise


def point(source: Path, target: Path) -> None:
    """Make `target` a symbolic link to `source`: large inputs of the user are not copied."""
    part = target.with_name(target.name + ".part")
    make_folder(target.parent)
    with disk_errors(target):
        part.unlink(missing_ok=True)
        part.symlink_to(source.absolute())
    rename(part, target)


def publish(source: Path, target: Path) -> None:
    """Give the finished file or folder `source` a second name `target`, by hard links where it can.

    Never writes in place: DVC's cache may share the inode of what lies there.
    """
    if source.is_file():
        make_folder(target.parent)
        part = target.with_name(target.name + ".part")
        link_or_copy(source, part)
        if target.is_dir() and not target.is_symlink():
            remove_tree(target)
        rename(part, target)
        return
    with atomic_folder(target) as part:
        for path in sorted(source.rglob("*")):
            twin = part / path.relative_to(source)
            if path.is_dir():
                make_folder(twin)
            else:
                link_or_copy(path, twin)
