"""SentencePiece `.model` files: pieces with scores and types, the normaliser, the wire format.

In:    the bytes of a file, from anyone.   Out: a `Spec`, or ValueError; nothing else is raised.
Why:   the library tells neither piece types nor its normaliser, and its generated reader would tie
       us to one version of the protobuf package. The format is small: number, type, value.
Rule:  a field of another type than expected is not seen, as in the library itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

T = TypeVar("T", int, bytes)

SPACE_MARK = "\u2581"  # what the library writes for a space inside pieces
UNKNOWN_MARK = "\u2585"  # what its trainer keeps for itself: lines that hold it are skipped
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # algorithms


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What we need of a `.model` file."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    algorithm: int  # 1 unigram, 2 BPE
    byte_fallback: bool
    charsmap: bytes  # the normaliser's rewriting table; empty is identity
    dummy_prefix: bool
    collapse_spaces: bool
    escape_spaces: bool

    @property
    def keeps_bytes(self) -> bool:
        """Whether its form allows every text to come back."""
        values = {piece for piece, _, kind in self.pieces if kind == BYTE}
        marked = any(piece == SPACE_MARK and kind == NORMAL for piece, _, kind in self.pieces)
        rewrites = bool(self.charsmap) or self.dummy_prefix or self.collapse_spaces
        complete = self.byte_fallback and len(values) == 256
        return complete and marked and self.escape_spaces and not rewrites


def read_spec(proto: bytes) -> Spec:
    """Parse a `.model` file (a protocol buffer). ValueError when it is none."""
    pieces, trainer, normaliser = [], {}, {}
    for number, value, _ in _fields(proto):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            pieces.append(_read_piece(_message(value)))
        elif number == 2:
            trainer = _message(value)
        elif number == 3:
            normaliser = _message(value)
    if not pieces:
        raise ValueError("it holds no pieces")
    return Spec(
        pieces=pieces,
        algorithm=_get(trainer, 3, UNIGRAM),
        byte_fallback=bool(_get(trainer, 35, 0)),
        charsmap=_get(normaliser, 2, b""),
        dummy_prefix=bool(_get(normaliser, 3, 1)),
        collapse_spaces=bool(_get(normaliser, 4, 1)),
        escape_spaces=bool(_get(normaliser, 5, 1)),
    )


def _read_piece(message: dict[int, int | bytes]) -> tuple[str, float, int]:
    text, score = _get(message, 1, b""), _get(message, 2, bytes(4))
    kind = _get(message, 3, NORMAL)
    if kind == BYTE and not re.fullmatch(rb"<0x[0-9A-F]{2}>", text):
        raise ValueError("byte piece of another form")
    if len(score) != 4:
        raise ValueError("score of another type")
    return text.decode(), struct.unpack("<f", score)[0], kind


def _message(data: bytes) -> dict[int, int | bytes]:
    return {number: value for number, value, _ in _fields(data)}


def _get(message: dict[int, int | bytes], number: int, default: T) -> T:
    """A field of the default's type; like the library, a field of another wire type is not seen."""
    value = message.get(number, default)
    return value if isinstance(value, type(default)) else default


def without_circumstances(proto: bytes) -> bytes:
    """The model file without input (1), model_prefix (2) and num_threads (16) of its trainer."""
    out = bytearray()
    for number, value, raw in _fields(proto):
        if number == 2 and isinstance(value, bytes):
            kept = b"".join(part for key, _, part in _fields(value) if key not in (1, 2, 16))
            raw = bytes([2 << 3 | 2]) + _varint(len(kept)) + kept
        out += raw
    return bytes(out)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """(number, value, raw bytes) of each field of a protocol buffer message.

    Varints are int, everything else bytes. ValueError when the data end early.
    """
    at = 0
    while at < len(data):
        start = at
        tag, at = _read_varint(data, at)
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            value, at = _read_varint(data, at)
        elif tag & 7 == 2 or size:
            if size is None:
                size, at = _read_varint(data, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("it ends early")
        else:
            raise ValueError(f"unknown wire type {tag & 7}")
        yield tag >> 3, value, data[start:at]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(islice(data, at, at + 10)):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + shift + 1
    raise ValueError("it ends early")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
