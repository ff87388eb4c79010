"""Files that grow: logs of JSON lines, and downloads that continue after a kill.

Unlike what files.py writes, their bytes are seen before they are complete; who reads them again
cuts what is torn, or knows by a hash that all is there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.core.errors import EnvError
from lib.core.files import disk_errors, make_folder, rename


class AppendLog:
    """A file of JSON lines that only grows: one line is one write, durable at `sync`.

    A torn last line (power loss) is cut when the log is opened, it is not an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        data = path.read_bytes()
        self.truncate(data.rfind(b"\n") + 1)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; keys keep their order."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with disk_errors(self.path, len(line)):
            while line:
                line = line[os.write(self._fd, line) :]
        self.position += 1

    def sync(self) -> int:
        """Make all lines durable; returns the size in bytes, which a checkpoint remembers."""
        with disk_errors(self.path):
            os.fsync(self._fd)
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        """Cut the log to `size` bytes, the position that a checkpoint remembered."""
        with disk_errors(self.path):
            if os.fstat(self._fd).st_size != size:  # a finished run is opened, not touched
                os.ftruncate(self._fd, size)
        self.position = self.path.read_bytes()[:size].count(b"\n")

    def close(self) -> None:
        """Close without syncing."""
        os.close(self._fd)


class ResumableFile:
    """A file that grows over several runs as `<name>.part` and is named once it is verified.

    Unlike `atomic_file`, what was written survives a kill and an error, so the caller must know
    what the bytes are (lib.core.transfer keeps a note beside them). After a disk error they
    are removed: the space is needed, and pages whose fsync failed may be marked clean though lost.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        make_folder(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with disk_errors(self.part):
            self._fd = os.open(self.part, flags, 0o644)
        self.size = os.fstat(self._fd).st_size
        self._unsynced = self.size > 0  # a killed run may have left bytes that no fsync has seen

    def append(self, data: bytes, needed_bytes: int = 0) -> None:
        """Add `data` at the end. needed_bytes: what the whole file takes, for the message."""
        view = memoryview(data)
        with self._removed_on_error(needed_bytes):
            self._unsynced = True
            while view:
                written = os.write(self._fd, view)
                self.size += written
                view = view[written:]

    def sync(self) -> None:
        """Make everything appended durable."""
        if self._unsynced and self._fd >= 0:
            with self._removed_on_error():
                os.fsync(self._fd)
            self._unsynced = False

    def restart(self) -> None:
        """Cut to nothing, durably: before a note beside it may speak of other bytes."""
        with self._removed_on_error():
            os.ftruncate(self._fd, 0)
            os.fsync(self._fd)
        self.size, self._unsynced = 0, False

    def commit(self) -> None:
        """Give the file its name. The caller has verified it."""
        self.sync()
        self.close()
        rename(self.part, self.path)

    def remove(self) -> None:
        """Close and remove the part."""
        with contextlib.suppress(OSError, EnvError):
            self.close()
        with contextlib.suppress(OSError):
            self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Close, keeping the part for the next run."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with disk_errors(self.part):
                os.close(fd)

    @contextlib.contextmanager
    def _removed_on_error(self, needed_bytes: int = 0) -> Iterator[None]:
        try:
            with disk_errors(self.part, max(needed_bytes, self.size)):
                yield
        except (OSError, EnvError):
            self.remove()
            raise
