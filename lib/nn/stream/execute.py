"""Who carries out a plan: in order on the CPU, or on lanes of threads and CUDA streams.

In:    a plan and `act`, which does one operation.   Out: operations done, errors raised as they
       were.
Law:   both give the same numbers; `InOrder` is the reference.
Lanes: compute runs on the caller's thread and stream. Copies in, copies out and host additions have
       a thread each, so that a copy may wait for the host (a weight that is still being updated)
       without holding up what computes. Without CUDA the lanes are threads alone, which tests use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress

import torch

from lib.nn.stream.plan import Op

Act = Callable[[Op], None]


class InOrder:
    """Every operation at once, in issue order."""

    def __init__(self) -> None:
        self._ops: Sequence[Op] = ()
        self._act: Act = lambda op: None
        self._at = 0

    def start(self, ops: Sequence[Op], act: Act) -> None:
        """A new program; the one before is over."""
        self._ops, self._act, self._at = ops, act, 0

    def advance(self, to: int) -> None:
        """Issue operations up to number `to`, that one excluded."""
        for op in self._ops[self._at : to]:
            self._act(op)
        self._at = max(self._at, to)

    def finish(self) -> None:
        """Wait until all that was issued is done; raises the first error."""

    def abort(self) -> None:
        """Give up what is left and wait until nothing runs any more; raises nothing."""
        self._ops = ()

    def close(self) -> None:
        """End threads."""


class Lanes:
    """Lanes as threads, with a CUDA stream each where `device` has them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pools = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=f"stream {lane}")
            for lane in ("in", "out", "host")
        }
        on_gpu = device.type == "cuda"
        self._streams = {n: torch.cuda.Stream(device) for n in ("in", "out")} if on_gpu else {}
        self._ops: Sequence[Op] = ()
        self._act: Act = lambda op: None
        self._issued: list[Future] = []
        self._events: dict[int, torch.cuda.Event] = {}
        self._watched: set[int] = set()  # operations that another lane waits for
        self._aborted = False

    def start(self, ops: Sequence[Op], act: Act) -> None:
        """A new program; the one before is over."""
        wait(self._issued)
        self._ops, self._act, self._issued, self._events = ops, act, [], {}
        self._watched = {w for op in ops for w in op.waits}
        self._aborted = False
        if self._streams:
            here = torch.cuda.current_stream(self.device)
            for stream in self._streams.values():  # nothing of another program is under way
                here.wait_stream(stream)
                stream.wait_stream(here)

    def advance(self, to: int) -> None:
        """Issue operations up to number `to`, that one excluded."""
        for number in range(len(self._issued), min(to, len(self._ops))):
            lane = self._ops[number].lane
            if lane == "compute":
                done: Future = Future()
                self._run(number)
                done.set_result(None)
            else:
                done = self._pools[lane].submit(self._run, number)
            self._issued.append(done)

    def _run(self, number: int) -> None:
        op = self._ops[number]
        for other in op.waits:
            self._issued[other].result()  # an error over there comes out here too
        if self._aborted:
            return
        stream = self._streams.get(op.lane)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for other in op.waits:
                event = self._events.get(other)
                if event is None:
                    continue
                if op.lane == "host":
                    event.synchronize()
                else:
                    torch.cuda.current_stream(self.device).wait_event(event)
            self._act(op)
            if self._streams and op.lane != "host" and number in self._watched:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
                self._events[number] = event

    def finish(self) -> None:
        """Wait until all that was issued is done; raises the first error."""
        for done in self._issued:
            done.result()

    def abort(self) -> None:
        """Give up what is left and wait until nothing runs any more; raises nothing."""
        self._aborted = True
        wait(self._issued)
        if self._streams:
            with suppress(RuntimeError):  # the error that led here may be the device's own
                torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """End threads."""
        self.abort()
        for pool in self._pools.values():
            pool.shutdown()
