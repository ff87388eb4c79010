"""Crash points: kill a forked child at its Nth change of the file system, for every N.

After each kill two things must hold: nothing committed is wrong, and the same action run again
ends with the same bytes as if nothing had happened (reliability.md 1.3, 6.1). Failing the Nth
operation for every N is the method of SQLite's crash tests. Instead of a kill the operation may
fail with an errno: then the process must end with exit code 4, or do without it. Or the process may
get a signal that it handles: then it ends with 75, or with 0 where it was as good as done.
"""

from __future__ import annotations

import errno
import functools
import gc
import hashlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

MUTATIONS = (
    "open", "write", "pwrite", "fsync", "fdatasync", "replace", "rename", "link", "symlink",
    "unlink", "remove", "mkdir", "rmdir", "ftruncate", "posix_fallocate", "chmod", "close",
)  # fmt: skip
FAILING = {  # the operations that fail, by errno
    errno.ENOSPC: ("open", "write", "pwrite", "mkdir", "link", "symlink", "replace",
                   "posix_fallocate"),
    errno.EIO: ("write", "pwrite", "fsync", "fdatasync", "close"),
}  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


class Injector:
    """Counts the mutations of this process; at number `kill_at` it writes half and dies.

    error: the operation raises OSError with this errno instead; on a full disk (ENOSPC) every later
    one that takes space does too. number: the signal that is sent; one that is handled finds the
    operation not begun.
    """

    def __init__(
        self, kill_at: int | None, error: int | None = None, number: int = signal.SIGKILL
    ) -> None:
        self.kill_at, self.error, self.number, self.count = kill_at, error, number, 0
        self.ours: set[int] = set()  # descriptors opened for writing

    def install(self) -> None:
        """Patch `os` for the rest of this process's life."""
        for name in MUTATIONS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable) -> Callable:
        def counted(*args, **kwargs):
            if name == "open" and not (args[1] & _WRITE_FLAGS):
                return real(*args, **kwargs)
            if name in ("write", "pwrite", "close") and args[0] not in self.ours:
                return real(*args, **kwargs)
            if self.error is not None and name not in FAILING[self.error]:
                return self._done(name, args, real(*args, **kwargs))
            self.count += 1
            if self.kill_at is not None and self._strikes():
                if self.number != signal.SIGKILL:
                    os.kill(os.getpid(), self.number)
                    return self._done(name, args, real(*args, **kwargs))
                if name in ("write", "pwrite"):
                    data = memoryview(args[1])
                    real(args[0], data[: len(data) // 2], *args[2:])
                if self.error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "close":
                    self._done(name, args, real(*args, **kwargs))
                raise OSError(self.error, os.strerror(self.error))
            return self._done(name, args, real(*args, **kwargs))

        return counted

    def _strikes(self) -> bool:
        full = self.error == errno.ENOSPC and self.count > (self.kill_at or 0)
        return full or self.count == self.kill_at

    def _done(self, name, args, result):
        if name == "open":
            self.ours.add(result)
        if name == "close":
            self.ours.discard(args[0])
        return result


def in_child(action: Callable[[], object], injector: Injector | None = None) -> int:
    """Run `action` in a fork; returns its wait status: 0 = done, else its code or signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if injector is not None:
                injector.install()
            found = action()
            code = found if isinstance(found, int) else 0
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
    action: Callable[[Path], int | None],
    folder: Callable[[int], Path],
    inspect: Callable[[Path], None] = lambda path: None,
    skip: Callable[[str], bool] = lambda name: False,
    every: int = 1,
    first: int = 1,
    error: int | None = None,
    number: int = signal.SIGKILL,
    twice: bool = False,
) -> int:
    """Kill `action(folder(N))` at N = first, first + every, ...; returns how often it was killed.

    folder(N) makes a fresh working folder. inspect(path) raises when something committed is wrong.
    error: the operation fails with this errno instead, and the action ends with code 4 (or 0).
    number: this signal is sent instead, and the action ends with code 75 (or 0).
    twice: the rerun is killed too, somewhere, and the run after that must end well.
    AssertionError names the points that went wrong; after three of them no more are tried.
    The rerun is left out where the kill leaves what an earlier one has left: about every second.
    """
    gc.freeze()  # or the collector of every fork would copy the pages of what is imported here
    whole = folder(0)
    assert in_child(lambda: action(whole)) == 0, "the undisturbed run fails"
    expected = tree(whole, skip)
    assert expected, "the undisturbed run left nothing to compare"
    point, wrong, seen = first, [], set[tuple]()
    while len(wrong) < 3:
        path, injector = folder(point), Injector(point, error, number)
        status = in_child(functools.partial(_strike, action, path, injector), injector)
        struck = (path / STRUCK).exists() or os.WIFSIGNALED(status)
        (path / STRUCK).unlink(missing_ok=True)
        if not struck:
            assert status == 0, f"point {point}: {status}"
            break
        try:
            _judge(status, error, number)
            inspect(path)
            if twice:
                in_child(lambda path=path: action(path), Injector(1 + 31 * point % (point + 17)))
                inspect(path)
            left = _state(path, skip)
            if left not in seen:
                assert in_child(lambda path=path: action(path)) == 0, "the rerun fails"
                found = tree(path, skip)
                assert found == expected, _first_difference(found, expected)
                seen.add(left)
        except Exception as failure:  # whatever `inspect` raises
            wrong.append(f"point {point}: {failure}")
        shutil.rmtree(path)
        point += every
    assert not wrong, "\n".join(wrong)
    return len(range(first, point, every))


def _state(folder: Path, skip: Callable[[str], bool]) -> tuple:
    """All below `folder`: hashes, but of what follows the clock the number of lines and the end."""
    found: list[tuple] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.endswith(".lock"):
            found.append((name,))
            continue
        data = path.read_bytes()
        clocked = skip(name) and ".part" not in name and "/units/" not in name
        told = (data.count(b"\n"), data[-1:]) if clocked else hashlib.sha256(data).hexdigest()
        found.append((name, told))
    return tuple(found)


def _judge(status: int, error: int | None, number: int) -> None:
    """Whether the struck child ended as it should."""
    if number != signal.SIGKILL:
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 75), f"exit {code} after signal {number}"
    elif error is None:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"status {status}"
    else:
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 4), f"exit {code} after {os.strerror(error)}"


STRUCK = "struck"  # left by a child whose injected error or signal happened


def _strike(action: Callable[[Path], int | None], path: Path, injector: Injector) -> int | None:
    """`action(path)`; word is left where it lived on after its injected error or signal."""
    code = action(path)
    if injector.kill_at is not None and injector.count >= injector.kill_at:
        injector.kill_at = None
        (path / STRUCK).touch()
    return code


def _first_difference(found: dict[str, str], expected: dict[str, str]) -> str:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name}: {found.get(name)} instead of {expected.get(name)}"
    return "equal"
