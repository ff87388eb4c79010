"""One holder at a time: a lock that dies with its process and tells who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.core.errors import EnvError, relative
from lib.core.files import disk_errors, make_folder


@contextlib.contextmanager
def exclusive_lock(target: Path, waiting: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold `<parent>/.<name>.lock` for the output `target`; EnvError at once when another holds it.

    waiting: for what several may want at once (scratch): told who holds it, then waited for.
    flock, so the lock dies with its holder. The file tells who holds it: pid, host, start, command.
    """
    path = target.parent / f".{target.name}.lock"
    make_folder(path.parent)
    with disk_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 400, 0).decode(errors="replace").strip() or "another process"
            if waiting is None:
                raise EnvError(
                    f"{relative(target)} is busy", value=holder, remedy="wait for it, or stop it"
                ) from None
            waiting(f"{relative(target)} is being made by {holder}; waiting")
            fcntl.flock(fd, fcntl.LOCK_EX)
        note = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}: "
        os.ftruncate(fd, 0)
        os.pwrite(fd, (note + " ".join(sys.argv)).encode(errors="replace")[:400], 0)
        yield
    finally:
        os.close(fd)
