"""Amounts for people: bytes, counts, seconds, measured numbers; what is not known is `-`."""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
TIMES = (("years", 31_557_600.0), ("days", 86400.0), ("hours", 3600.0), ("min", 60.0))
COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def size(total_bytes: float | None) -> str:
    """Bytes for people, decimal units: 39.3 GB."""
    return _scaled(total_bytes, SIZES, "B")


def count(number: float | None) -> str:
    """A count for people: 1.10 B, 524 k."""
    return _scaled(number, COUNTS, "")


def duration(seconds: float | None) -> str:
    """Seconds for people; days up to ten years, then years."""
    years = seconds is not None and seconds >= 10 * TIMES[0][1]
    return _scaled(seconds, TIMES if years else TIMES[1:], "s")


def _scaled(value: float | None, units: Sequence[tuple[str, float]], one: str) -> str:
    if value is None:
        return "-"
    for name, unit in units:
        if value >= unit:
            scaled = value / unit
            digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:,.{digits}f} {name}"
    return f"{value:.3g} {one}".strip()


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with fixed digits."""
    return "-" if value is None else f"{value:.{digits}f}"
