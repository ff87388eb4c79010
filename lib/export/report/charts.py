"""Line charts as inline SVG: text and lines in the page's own colours, no script.

In:    series of points.   Out: one <svg> element; the same points give the same bytes.
Note:  the drawing is as wide as a phone and a third of a desk's page, so text is read on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 370, 290
LEFT, TOP, BOTTOM = 46, 12, 40
LETTER, LEAST_RIGHT = 7.3, 60  # width of a name's letter at 11.5 px
COLOURS = 8  # classes c0 ... c7 of the style sheet
LABEL_GAP = 13


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: a name, a colour of the style sheet, dashed for a twin."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """One direction: values low..high onto pixels first..last, by logarithm or not."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, v = self._scaled(self.low), self._scaled(self.high), self._scaled(value)
        share = 0.5 if high == low else (v - low) / (high - low)
        return self.first + share * (self.last - self.first)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """Round values between the ends: 1, 2, 5 x 10^n, at most six."""
        if self.log and self.high >= 4 * self.low:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1,)):
                found = [s * 10.0**p for p in powers for s in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= 6:
                    break
            if len(found) >= 3:
                return found[:: -(-len(found) // 6) or 1]
        span = (self.high - self.low) or abs(self.low) or 1.0
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= next((m for m in (1, 2, 5) if span / (step * m) <= 5), 10)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_x: bool = False
) -> str:
    """A chart of all series that have points; an empty text where none has."""
    shown = [s for s in series if s.points]
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    if not xs:
        return ""
    right = WIDTH - max(LEAST_RIGHT, round(LETTER * max(len(s.name) for s in shown)) + 10)
    pad = 0.05 * ((max(ys) - min(ys)) or abs(max(ys)) or 1)
    x = Axis(min(xs), max(xs), LEFT, right, log_x and min(xs) > 0)
    y = Axis(min(ys) - pad, max(ys) + pad, HEIGHT - BOTTOM, TOP)
    names = ", ".join(s.name for s in shown)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {escape(names)}">',
        *_grid(x, y, x_label, y_label),
        *(_line(s, x, y) for s in shown),
        *_labels(shown, x, y),
        "</svg>",
    ]
    return "".join(parts)


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.last}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">')
        parts.append(f"{short(value)}</text>")
    for value in x.ticks():
        at = f"{x.at(value):.1f}"
        parts.append(f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 16}" ')
        parts.append(f'text-anchor="middle">{short(value)}</text>')
    middle = (LEFT + x.last) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">')
    parts.append(f"{escape(x_label)}</text>")
    turn = f"translate(11 {(HEIGHT - BOTTOM + TOP) / 2:.0f}) rotate(-90)"
    parts.append(f'<text class="axis" transform="{turn}" text-anchor="middle">')
    parts.append(f"{escape(y_label)}</text>")
    return parts


def _line(series: Series, x: Axis, y: Axis) -> str:
    points = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in series.points)
    kind = f"c{series.colour % COLOURS}" + (" dashed" if series.dashed else "")
    title = f"<title>{escape(series.name)}</title>"
    if len(series.points) == 1:
        a, b = points.split(",")
        return f'<circle class="dot {kind}" cx="{a}" cy="{b}" r="3">{title}</circle>'
    return f'<polyline class="line {kind}" points="{points}">{title}</polyline>'


def _labels(series: Sequence[Series], x: Axis, y: Axis) -> list[str]:
    """Names at the right ends of the lines, moved apart where they would overlap."""
    wanted = sorted((y.at(s.points[-1][1]), n) for n, s in enumerate(series))
    places: list[float] = []
    for at, _ in wanted:
        places.append(max(at, places[-1] + LABEL_GAP) if places else at)
    over = max(0.0, places[-1] - (HEIGHT - BOTTOM))
    parts = []
    for place, (_, n) in zip(places, wanted, strict=True):
        one = series[n]
        at = f'x="{x.last + 6}" y="{max(TOP, place - over):.1f}" dy="4"'
        parts.append(f'<text class="name t{one.colour % COLOURS}" {at}>{escape(one.name)}</text>')
    return parts


def short(value: float) -> str:
    """A tick's number in few characters: 820k, 2.3e13, 1.85."""
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1000 * unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.3g}".replace("e+", "e")
