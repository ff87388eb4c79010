"""Bars with ETA on a terminal, a line now and then elsewhere (cli.md 1.4); stderr only.

Rule:  no carriage return reaches a log. What takes under a second shows no bar.
Note:  lines go through `write`, which keeps them above the bars that are open.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")
DELAY_S = 1.0  # a bar that would be gone before it is read is not drawn
CLEAR = "\r\x1b[K"  # the line of a bar, when no time is left to close it


def on_terminal() -> bool:
    """Whether bars and control characters are wanted on stderr."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    # The bars of several workers would write over each other.
    is_worker = multiprocessing.parent_process() is not None
    return sys.stderr.isatty() and not plain and not is_worker


def write(line: str, stream: TextIO | None = None) -> None:
    """One line on `stream` (stderr), above all bars; a reader that has left is no error."""
    out: TextIO = stream or sys.stderr
    with contextlib.suppress(BrokenPipeError):
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(line, file=out)
        else:
            out.write(line + "\n")
        out.flush()


@contextlib.contextmanager
def progress(
    total: float | None, unit: str, title: str, *, every_s: float = 30.0
) -> Iterator[Callable[[float], None]]:
    """Yields `advance(amount)`, called as the work goes on; total: of all, None is not known."""
    if on_terminal():
        from tqdm import tqdm

        with tqdm(
            total=total, unit=f" {unit}", unit_scale=unit in ("B", "bytes"), desc=title,
            leave=False, delay=DELAY_S, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            yield bar.update  # type: ignore[misc]  # returns bool, nobody looks
        return
    done, said = 0.0, time.monotonic()
    start = said

    def advance(amount: float) -> None:
        nonlocal done, said
        done += amount
        now = time.monotonic()
        if now - said < every_s or (total is not None and done >= total):
            return
        said = now
        left = f", {(now - start) / done * (total - done):.0f} s left" if done and total else ""
        of = f" of {total:,.0f}" if total is not None else ""
        write(f"{title}: {done:,.0f}{of} {unit}{left}")

    yield advance


def watched(
    items: Iterable[T], total: float | None, unit: str, title: str, *,
    every_s: float = 30.0, amount: Callable[[T], float] = lambda item: 1.0,
) -> Iterator[T]:  # fmt: skip
    """`items` one by one, with their progress; the bar moves when an item has been used."""
    with progress(total, unit, title, every_s=every_s) as advance:
        for item in items:
            yield item
            advance(amount(item))
