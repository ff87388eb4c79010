"""How fast sweeps go and what is left: a bar inside the chunk, a line after it (cvfp.md 13).

Work is counted in passes over a token: sweep 0 makes one, a learning sweep as many as its FLOPs
are of that one, so the first estimates hold for the sweeps to come.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from lib.core import files
from lib.nn.sweeps import Sweeps

KEPT, TWICE = 20.1 / 7.1, 27.2 / 7.1  # FLOPs of a learning token over sweep 0's (cvfp.md 15.2)
SMOOTH = 0.5  # weight of the last chunk in the mean


class Pace:
    """Of one run in this process."""

    def __init__(self, sweeps: int, learning: float) -> None:
        """learning: passes of a learning sweep, KEPT or TWICE."""
        self._sweeps, self.learning = sweeps, learning
        self._rate: float | None = None  # passes a second
        self._bar: Any = None
        self.numbers: dict[str, float] = {}  # of the last chunk

    def begin(self, disk: Sweeps, sweep: int, chunk: int) -> None:
        """A chunk is taken up."""
        start, stop = disk.span(chunk)
        self._tokens, self._work = stop - start, (stop - start) * self._passes(sweep)
        self._since, self._moved = time.monotonic(), disk.moved_bytes()
        if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            from tqdm import tqdm

            name = f"sweep {sweep} chunk {chunk + 1}/{disk.chunks}"
            self._bar = tqdm(total=self._tokens, desc=name, unit="tok", unit_scale=True,
                             leave=False, mininterval=1, position=1)  # fmt: skip

    def advance(self, tokens: int, share: float = 1.0) -> None:
        """tokens have passed, for this share of their work."""
        if self._bar is not None:
            self._bar.update(min(tokens * share, self._bar.total - self._bar.n))

    def end(self, disk: Sweeps, sweep: int, chunk: int) -> None:
        """The chunk is finished."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        seconds = max(1e-9, time.monotonic() - self._since)
        rate, old = self._work / seconds, self._rate
        self._rate = rate if old is None else SMOOTH * rate + (1 - SMOOTH) * old
        whole = disk.tokens * self._passes(sweep)
        here = (disk.tokens - disk.span(chunk)[1]) * self._passes(sweep)
        after = max(0, self._sweeps - 1 - sweep) * disk.tokens * self.learning
        read, written = (new - o for new, o in zip(disk.moved_bytes(), self._moved, strict=True))
        self.numbers = {
            "chunk_tokens_per_s": self._tokens / seconds, "read_bytes_per_s": read / seconds,
            "written_bytes_per_s": written / seconds, "chunk_s": seconds,
            "sweep_s": whole / self._rate, "left_s": (here + after) / self._rate,
        }  # fmt: skip

    def line(self, folder: Path) -> str:
        """Rates, memory, room on the disk of `folder`, times."""
        n = self.numbers
        free = files.free_bytes(folder) / 1e9
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        read, written = (n[f"{x}_bytes_per_s"] / 1e6 for x in ("read", "written"))
        times = f"chunk {spell(n['chunk_s'])}, iteration {spell(n['sweep_s'])}"
        return (
            f"  {n['chunk_tokens_per_s']:,.0f} tok/s | read {read:,.0f} MB/s, "
            f"write {written:,.0f} MB/s | memory {memory / 1e9:.1f} GB | "
            f"free {free:,.0f} GB | {times}, all {spell(n['left_s'])} left"
        )

    def _passes(self, sweep: int) -> float:
        return self.learning if sweep else 1.0


def spell(seconds: float) -> str:
    """In the unit that leaves a number people can read."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
