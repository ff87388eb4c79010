"""The arbiter of one JSON line: exact rules, explicit stack, memory independent of the line.

In:    the bytes of one line, in blocks.   Out: the value of one top-level key, in decoded chunks.
Rules: data.md 4.4.4. Precedence when several apply: invalid_utf8, malformed, not_object,
       duplicate_key, no_text, lone_surrogate.
Note:  chunks come out before the line is known to be good; who takes them drops them on `Rejected`.
       Quick parsers decide the ordinary line (readers.py); whatever they refuse or might judge
       otherwise comes here, so both ways accept the same records.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator

MAX_DEPTH = 1000  # levels of [] and {}, the record itself being the first
MAX_DIGITS = 4300  # of one number: Python's own limit for integers, here for every number

_SPACE = re.compile(r"[ \t\n\r]*+")
_NUMBER_RUN = re.compile(r"[-+.eE0-9]*+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?")
# Whole escapes only, so a run may be decoded by itself; a high surrogate waits for its partner.
# Plain characters stand last: what fails there has consumed nothing. Before Python 3.11.5 a
# possessive group keeps what its last alternative had consumed when it failed (gh-106052).
_STRING_RUN = re.compile(
    r'(?:\\(?:["\\/bfnrt]|u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r'|[^"\\\x00-\x1f]++)*+'
)
_HIGH_ALONE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_PAIR = 12  # characters of a surrogate pair as two escapes, the longest there is


class Rejected(Exception):
    """The record is not accepted; `reason` is a key of the ledger."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def field_chunks(blocks: Iterable[bytes], field: str) -> Iterator[str]:
    """Chunks of the string at the top-level key `field`; `Rejected` once the line is known bad."""
    scan = _Scan(blocks, field)
    try:
        yield from scan.record()
    except Rejected:
        while scan.more():  # bytes that are no UTF-8 outrank every other fault, wherever they are
            scan.position = len(scan.buffer)
        raise
    scan.judge()


def field_of(line: bytes, field: str) -> str:
    """The text of one line held in memory; raises `Rejected`."""
    return "".join(field_chunks([line], field))


class _Scan:
    """A pushdown automaton over a window of decoded text."""

    def __init__(self, blocks: Iterable[bytes], field: str) -> None:
        self.blocks, self.field = iter(blocks), field
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.position, self.ended = "", 0, False
        self.is_object = self.lone_surrogate = self.found_string = False
        self.occurrences = 0

    def more(self) -> bool:
        """Drop what was read, append the next block; False at the end of the line."""
        try:
            for block in self.blocks:
                if text := self.decoder.decode(block):
                    self.buffer, self.position = self.buffer[self.position :] + text, 0
                    return True
            if not self.ended:
                self.ended = True
                self.decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            self.blocks, self.ended = iter(()), True
            raise Rejected("invalid_utf8") from None
        return False

    def ahead(self, count: int) -> str:
        """The next `count` characters, fewer only at the end of the line; nothing is consumed."""
        while len(self.buffer) - self.position < count and self.more():
            pass
        return self.buffer[self.position : self.position + count]

    def next_mark(self) -> str:
        """The next character after white space, empty at the end; not consumed."""
        while True:
            match = _SPACE.match(self.buffer, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.more():
                return ""

    def record(self) -> Iterator[str]:
        """Check the whole line; yields the pieces of the wanted string on the way."""
        stack: list[str] = []  # the closing marks that are due
        expect, wanted = "value", False
        while True:
            mark = self.next_mark()
            if expect == "end":
                if mark:
                    raise Rejected("malformed")
                return
            if stack and mark == stack[-1] and expect in ("first_key", "first_value", "comma"):
                self.position += 1
                stack.pop()
                expect = "comma" if stack else "end"
            elif expect == "comma":
                self.take(mark, ",")
                expect = "key" if stack[-1] == "}" else "value"
            elif expect in ("first_key", "key"):
                self.take(mark, '"')
                wanted = self.key() and len(stack) == 1
                self.occurrences += wanted
                self.take(self.next_mark(), ":")
                expect = "value"
            elif mark in ("{", "["):
                self.position += 1
                self.is_object = self.is_object or (mark == "{" and not stack)
                stack.append("}" if mark == "{" else "]")
                if len(stack) > MAX_DEPTH:
                    raise Rejected("malformed")
                expect, wanted = ("first_key" if mark == "{" else "first_value"), False
            else:
                if mark == '"':
                    self.position += 1
                    self.found_string = self.found_string or wanted
                    for piece in self.string():
                        if wanted:
                            self.lone_surrogate |= bool(_SURROGATE.search(piece))
                            yield piece
                else:
                    self.scalar(mark)
                expect, wanted = ("comma" if stack else "end"), False

    def take(self, mark: str, due: str) -> None:
        if mark != due:
            raise Rejected("malformed")
        self.position += 1

    def key(self) -> bool:
        """Read a key; True when it is the wanted one. A key is never held whole."""
        head = ""
        for piece in self.string():
            if len(head) <= len(self.field):
                head += piece
        return head == self.field

    def string(self) -> Iterator[str]:
        """Decoded pieces of a string whose opening quote is consumed; lone surrogates stay."""
        while True:
            match = _STRING_RUN.match(self.buffer, self.position)
            assert match is not None
            if run := match.group():
                self.position = match.end()
                yield json.loads(f'"{run}"') if "\\" in run else run
            if self.position == len(self.buffer):
                if not self.more():
                    raise Rejected("malformed")  # the line ends inside the string
                continue
            mark = self.buffer[self.position]
            if mark == '"':
                self.position += 1
                return
            if mark != "\\":
                raise Rejected("malformed")  # a raw control character
            escape = self.ahead(_ESCAPED_PAIR)
            if _STRING_RUN.match(escape).end():  # type: ignore[union-attr]  # it always matches
                continue  # the block had ended inside the escape
            if not _HIGH_ALONE.match(escape):
                raise Rejected("malformed")
            self.position += 6
            yield chr(int(escape[2:6], 16))

    def scalar(self, mark: str) -> None:
        """Check a number or one of the three words."""
        word = {"t": "true", "f": "false", "n": "null"}.get(mark)
        if word is not None:
            if self.ahead(len(word)) != word:
                raise Rejected("malformed")
            self.position += len(word)
            return
        while True:
            match = _NUMBER_RUN.match(self.buffer, self.position)
            assert match is not None
            number = match.group()
            if sum(map(str.isdigit, number)) > MAX_DIGITS:
                raise Rejected("malformed")
            if match.end() < len(self.buffer) or not self.more():
                break
        if not _NUMBER.fullmatch(number):
            raise Rejected("malformed")
        self.position += len(number)

    def judge(self) -> None:
        """The rules about a line that is JSON."""
        if not self.is_object:
            raise Rejected("not_object")
        if self.occurrences > 1:
            raise Rejected("duplicate_key")
        if not self.found_string:
            raise Rejected("no_text")
        if self.lone_surrogate:
            raise Rejected("lone_surrogate")
