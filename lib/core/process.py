"""Living and dying as a process: parent's death, signals, worker pools (pipeline.md 7).

A stage dies with its parent, its workers die with it. The first SIGTERM or SIGINT asks to stop,
the second leaves at once; both are safe at any moment, since nothing half-written bears its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from lib.core import progress
from lib.core.errors import EnvError, Interrupted

_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0  # how often the parent is looked at where the kernel does not tell
DROP_GRACE_S = 4.0  # a native call that never returns to Python is left after this


class PoolMap(Protocol):
    """`map` with results in the order of the units, whatever order they finish in."""

    def __call__(self, function: Callable[[Any], Any], units: Iterable[Any], /) -> Iterator[Any]:
        """Call `function` on each of `units`, possibly in other processes."""
        ...


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Get signal `number` when the parent dies; at once if it is dead already."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died between the two calls
            os.kill(os.getpid(), number)
        return

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(_POLL_S)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


class StopRequest:
    """Turns SIGTERM and SIGINT into an orderly end.

    defer=False: `Interrupted` is raised where the main thread stands (the unit in hand is dropped);
    if native code does not return within `DROP_GRACE_S`, the process leaves with code 75.
    defer=True: only `asked` is set; the owner commits at its next step and raises `Interrupted`.
    """

    def __init__(self, message: str, defer: bool = False) -> None:
        self.message, self.defer, self.asked = message, defer, False
        self._left = False  # the block: its end is the owner's to tell

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals within the block."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        old = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        old_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            self._left = True
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(write_end)  # the watcher reads the end and leaves
            watcher.join(1.0)
            os.close(read_end)

    def _handle(self, number: int, frame: object) -> None:
        first, self.asked = not self.asked, True
        if first and not self.defer:
            raise Interrupted(self.message)

    def _watch(self, read_end: int) -> None:
        """Runs beside the main thread, so that a second signal works even inside native code."""
        signals = 0
        while data := os.read(read_end, 1):
            if data[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            signals += 1
            if signals > 1:
                self._leave()
            if not self.defer:
                timer = threading.Timer(DROP_GRACE_S, self._leave)
                timer.daemon = True
                timer.start()

    def _leave(self) -> None:
        if not self._left:  # else a slow end is cut short, and the message stands there
            with contextlib.suppress(OSError):
                start = progress.CLEAR if progress.on_terminal() else ""
                os.write(2, (start + self.message + "\n").encode())
        os._exit(Interrupted.code)


def _start_worker(threads: int) -> None:
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)


@contextlib.contextmanager
def worker_pool(workers: int, threads: int = 1) -> Iterator[PoolMap]:
    """A `PoolMap` over `workers` processes, or in this process when `workers` is 1.

    At most 2 x workers units are in flight, so a long list of units costs no memory. On an
    exception the workers are killed. A worker that dies (out of memory) is an EnvError.
    """
    if workers == 1:
        yield lambda function, units: map(function, units)
        return
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(threads,),
    )
    try:
        yield lambda function, units: _map_bounded(pool, function, units, 2 * workers)
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise EnvError(
                "a worker process was killed",
                value="probably out of memory",
                remedy="lower runtime.workers and run the same command",
            ) from error
        raise
    pool.shutdown()


def _map_bounded(
    pool: ProcessPoolExecutor, function: Callable, units: Iterable, limit: int
) -> Iterator:
    waiting: list[Future] = []
    for unit in units:
        waiting.append(pool.submit(function, unit))
        if len(waiting) >= limit:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def map_ray(ray: Any, workers: int) -> PoolMap:
    """The same `PoolMap` over a running Ray cluster: same units, same order, same bytes.

    An error of a unit comes out as itself, a worker that is lost as an EnvError.
    """

    @ray.remote(max_retries=2)  # units are idempotent; a lost node costs its units again
    def call(function: Callable, unit: Any) -> Any:
        return function(unit)

    def taken(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.WorkerCrashedError as error:
            remedy = "lower runtime.workers and run the same command"
            raise EnvError("a worker process was killed", value="Ray", remedy=remedy) from error

    def mapped(function: Callable, units: Iterable) -> Iterator:
        waiting: list[Any] = []
        for unit in units:
            waiting.append(call.remote(function, unit))
            if len(waiting) >= 2 * workers:
                yield taken(waiting.pop(0))
        for reference in waiting:
            yield taken(reference)

    return mapped
