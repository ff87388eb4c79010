"""What a command that makes text writes: texts on stdout, notes on stderr, times (cli.md 1.3, 1.4).

Rule:  a pipe gets the text and nothing else; on a terminal control characters are left out and a
       newline ends the text. One text appears as it grows, several when they are whole.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.export.generate import Row, TextStream

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """Text on stdout, at once. What would move a terminal's cursor reaches files only."""
    sys.stdout.write(_CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Clock:
    """When the first token came, and how long all took."""

    def __init__(self) -> None:
        self.start, self.first_s = time.perf_counter(), None

    def tick(self) -> None:
        """A token has come."""
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.start

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.start


@dataclass
class Texts:
    """The rows of one generation as text."""

    streams: Sequence[TextStream]
    prompt: str = ""  # printed in front of each text
    stream: bool = True
    as_json: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        self.texts = [self.prompt] * len(self.streams)
        self.live = self.stream and len(self.streams) == 1 and not self.as_json
        if self.live:
            write(self.prompt)

    def take(self, made: Sequence[int | None], rows: Sequence[Row]) -> None:
        """The ids of one step; a row whose text has met a stop string is told to end."""
        for number, token in enumerate(made):
            if token is not None:
                self._add(number, self.streams[number].feed(token))
                if self.streams[number].stopped:
                    rows[number].stop = "stop"

    def _add(self, number: int, text: str) -> None:
        self.texts[number] += text
        if self.live and text:
            write(text)

    def finish(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
        """What was held back, then the footer `facts`; or all of it as one JSON document."""
        for number, stream in enumerate(self.streams):
            self._add(number, stream.finish())
        if self.as_json:
            write(json.dumps({**facts, "texts": self._json(rows)}, ensure_ascii=False) + "\n")
            return
        if not self.live:
            write("\n\n".join(self.texts))
        if sys.stdout.isatty():
            write("\n")  # for the shell's next line
        for row in rows if self.logprobs else ():
            for token, nats in zip(row.ids, row.logprobs, strict=True):
                note(f"{token} {nats:.6f}")
        note(", ".join(f"{name} {_short(value)}" for name, value in facts.items()))

    def _json(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        found = []
        for text, row in zip(self.texts, rows, strict=True):
            one: dict[str, Any] = {"text": text, "ids": row.ids, "stop": row.stop}
            found.append({**one, "logprobs": row.logprobs} if self.logprobs else one)
        return found


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
