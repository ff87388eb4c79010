"""Crash points: kill a forked child at its Nth change of the file system, for every N.

After each kill two things must hold: nothing committed is wrong, and the same action run again
ends with the same bytes as if nothing had happened (reliability.md 1.3, 6.1). Failing the Nth
operation for every N is the method of SQLite's crash tests.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

MUTATIONS = (
    "open", "write", "fsync", "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir",
    "ftruncate", "posix_fallocate", "chmod", "close",
)  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


class Injector:
    """Counts the mutations of this process; at number `kill_at` it writes half and dies."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count = kill_at, 0
        self.ours: set[int] = set()  # descriptors opened for writing

    def install(self) -> None:
        """Patch `os` for the rest of this process's life."""
        for name in MUTATIONS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable) -> Callable:
        def counted(*args, **kwargs):
            if name == "open" and not (args[1] & _WRITE_FLAGS):
                return real(*args, **kwargs)
            if name in ("write", "close") and args[0] not in self.ours:
                return real(*args, **kwargs)
            self.count += 1
            if self.count == self.kill_at:
                if name == "write":
                    data = memoryview(args[1])
                    real(args[0], data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if name == "open":
                self.ours.add(result)
            if name == "close":
                self.ours.discard(args[0])
            return result

        return counted


def in_child(action: Callable[[], None], injector: Injector | None = None) -> int:
    """Run `action` in a fork; returns its wait status (0 = done)."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if injector is not None:
                injector.install()
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def tree(folder: Path, skip: Callable[[str], bool] = lambda name: False) -> dict[str, str]:
    """name -> sha256 of every file below `folder`; lock files and `skip` left out."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.endswith(".lock") and not skip(name):
            result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result


def enumerate_crashes(
    action: Callable[[Path], None],
    folder: Callable[[int], Path],
    inspect: Callable[[Path], None] = lambda path: None,
    skip: Callable[[str], bool] = lambda name: False,
    every: int = 1,
) -> int:
    """Kill `action(folder(N))` at every `every`-th mutation; returns the number of points killed.

    folder(N) makes a fresh working folder. inspect(path) raises when something committed is wrong.
    """
    whole = folder(0)
    assert in_child(lambda: action(whole)) == 0, "the undisturbed run fails"
    expected = tree(whole, skip)
    assert expected, "the undisturbed run left nothing to compare"
    point, killed = 1, 0
    while True:
        path = folder(point)
        status = in_child(lambda path=path: action(path), Injector(point))
        if status == 0:
            return killed
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"point {point}"
        killed += 1
        inspect(path)
        assert in_child(lambda path=path: action(path)) == 0, f"rerun after point {point} fails"
        found = tree(path, skip)
        assert found == expected, f"point {point}: {_first_difference(found, expected)}"
        point += every


def _first_difference(found: dict[str, str], expected: dict[str, str]) -> str:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name}: {found.get(name)} instead of {expected.get(name)}"
    return "equal"
