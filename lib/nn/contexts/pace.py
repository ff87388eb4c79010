"""How fast sweeps go and what is left: a bar inside the chunk, a line after it (cvfp.md 13).

Work is counted in passes over a token: sweep 0 makes one, a learning sweep as many as its FLOPs
are of that one, so the first estimates hold for the sweeps to come.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.core import files
from lib.core.progress import progress
from lib.nn.contexts.sweeps import Sweeps

KEPT, TWICE = 20.1 / 7.1, 27.2 / 7.1  # FLOPs of a learning token over sweep 0's (cvfp.md 15.2)
SMOOTH = 0.5  # weight of the last chunk in the mean


class Pace:
    """Of one run in this process."""

    def __init__(self, sweeps: int, learning: float) -> None:
        """learning: passes of a learning sweep, KEPT or TWICE."""
        self._sweeps, self.learning = sweeps, learning
        self._rate: float | None = None  # passes a second
        self.numbers: dict[str, float] = {}  # of the last chunk

    @contextlib.contextmanager
    def chunk(
        self, disk: Sweeps, sweep: int, chunk: int
    ) -> Iterator[Callable[[float, float], None]]:
        """Around the work on one chunk; yields advance(tokens, share of their work)."""
        start, stop = disk.span(chunk)
        left, began, moved = float(stop - start), time.monotonic(), disk.moved_bytes()
        title = f"sweep {sweep}, chunk {chunk + 1} of {disk.chunks}"
        with progress(stop - start, "tokens", title) as tell:

            def advance(tokens: float, share: float) -> None:
                nonlocal left
                done = min(left, tokens * share)
                left -= done
                tell(done)

            yield advance
        self._measure(disk, sweep, chunk, max(1e-9, time.monotonic() - began), moved)

    def _measure(
        self, disk: Sweeps, sweep: int, chunk: int, seconds: float, moved: tuple[int, int]
    ) -> None:
        start, stop = disk.span(chunk)
        rate, old = (stop - start) * self._passes(sweep) / seconds, self._rate
        self._rate = rate if old is None else SMOOTH * rate + (1 - SMOOTH) * old
        whole = disk.tokens * self._passes(sweep)
        here = (disk.tokens - stop) * self._passes(sweep)
        after = max(0, self._sweeps - 1 - sweep) * disk.tokens * self.learning
        read, written = (new - o for new, o in zip(disk.moved_bytes(), moved, strict=True))
        self.numbers = {
            "chunk_tokens_per_s": (stop - start) / seconds, "read_bytes_per_s": read / seconds,
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
