"""Rules C1 to C6 of data.md 6.1: from an accepted text to documents, every change counted.

In:    texts without lone surrogates.   Out: documents; counts in documents and UTF-8 bytes.
Rules: C1 newlines, C2 control characters, C3 Unicode form, C4 edge space (repairs, in this order);
       C5 empty and too short texts are dropped; C6 long ones are split, pieces concatenate back.
Law:   bytes in + added = bytes out + dropped + removed (ledger.py, L4), text by text.
Note:  most texts change nothing. A batch is searched for the few that might, in its UTF-8 bytes,
       and only those go through the rules; a text of any length goes through them in chunks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from lib.core.data_settings import Recipe

EDGE = " \t\n"  # U+3000 is indentation and stays
BOM = "\ufeff"
SENTENCE_ENDS = ("。", "！", "？", ". ", "! ", "? ")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL_OR_CR = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
# Characters that no normal form joins with what stands before them: a text may be cut there.
_BOUNDARY = re.compile("[\n -~ぁ-ゖァ-ヺ一-鿿]")
_STARTS = frozenset(c for c in map(chr, range(0x3001)) if c.isspace()) | {BOM}  # U+3000 is the last
_SCAN = 1 << 18  # bytes searched at once: they stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What of a recipe decides how one text is cleaned."""

    unicode: Literal["none", "nfc", "nfkc"]
    min_chars: int
    max_chars: int

    @classmethod
    def of(cls, recipe: Recipe) -> Rules:
        """The rules of `recipe`."""
        return cls(unicode=recipe.unicode, min_chars=recipe.min_chars, max_chars=recipe.max_chars)

    @property
    def form(self) -> Literal["NFC", "NFKC"] | None:
        """The normal form by unicodedata's name."""
        return {"none": None, "nfc": "NFC", "nfkc": "NFKC"}[self.unicode]  # type: ignore[return-value]


@dataclass
class CleanCounts:
    """What cleaning did. repairs: name -> [texts, bytes added, removed]; dropped: [texts, bytes].

    split: documents made beyond one per text.
    """

    documents_in: int = 0
    bytes_in: int = 0
    split: int = 0
    repairs: dict[str, list[int]] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def repaired(self, name: str, before: int, after: int) -> None:
        """Count a repair of one text from `before` to `after` bytes."""
        entry = self.repairs.setdefault(name, [0, 0, 0])
        entry[0] += 1
        entry[1] += max(after - before, 0)
        entry[2] += max(before - after, 0)

    def drop(self, reason: str, size: int) -> None:
        """Count a dropped text of `size` bytes."""
        entry = self.dropped.setdefault(reason, [0, 0])
        entry[0] += 1
        entry[1] += size


# ---------------------------------------------------------------- the rules


def normalize_newlines(text: str) -> str:
    """C1: CR LF and CR become LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def remove_control(text: str) -> str:
    """C2: no control characters but tab and newline, no U+FEFF at the start."""
    return _CONTROL.sub("", text).lstrip(BOM)


def strip_edges(text: str) -> str:
    """C4: no space, tab or newline at either end."""
    return text.strip(EDGE)


def drop_reason(characters: int, blank: bool, rules: Rules) -> str | None:
    """C5: why a text of so many characters is no document; None when it is one."""
    if not characters or blank:
        return "empty"
    return "too_short" if characters < rules.min_chars else None


def split_text(text: str, limit: int) -> list[str]:
    """C6: pieces of at most `limit` characters whose concatenation is `text`."""
    pieces, start = [], 0
    while len(text) - start > limit:
        end = _cut(text, start, start + limit)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _cut(text: str, start: int, stop: int) -> int:
    """After the last blank line in [start, stop), else newline, else sentence, else at `stop`."""
    for ends in (("\n\n",), ("\n",), SENTENCE_ENDS):
        found = [(at, end) for end in ends if (at := text.rfind(end, start, stop)) >= 0]
        if found:
            return max(at + len(end) for at, end in found)
    return stop


def clean(text: str, rules: Rules, counts: CleanCounts) -> list[str]:
    """The documents of one text: none, one, or several when it is long."""
    form = rules.form
    size = len(text.encode())
    counts.documents_in += 1
    counts.bytes_in += size
    steps: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("newline", normalize_newlines),
        ("control", remove_control),
        ("unicode", lambda t: unicodedata.normalize(form, t) if form else t),
        ("edge_space", strip_edges),
    )
    for name, step in steps:
        repaired = step(text)
        if repaired != text:
            new_size = len(repaired.encode())
            counts.repaired(name, size, new_size)
            text, size = repaired, new_size
    if reason := drop_reason(len(text), text.isspace(), rules):
        counts.drop(reason, size)
        return []
    pieces = split_text(text, rules.max_chars)
    counts.split += len(pieces) - 1
    return pieces


# ---------------------------------------------------------------- batches


def clean_batch(
    texts: list[str], ids: list[str], rules: Rules, counts: CleanCounts
) -> tuple[list[str], list[str], pa.Array]:
    """Documents, their ids and the documents as an Arrow array; pieces are called `<id>#<k>`."""
    array = pa.array(texts, pa.string())
    dirty = find_dirty(texts, array, rules)
    counts.documents_in += len(texts) - len(dirty)
    if not dirty:
        counts.bytes_in += utf8_bytes(array)
        return texts, ids, array
    documents, names, previous = [], [], 0
    for at in [*dirty, len(texts)]:
        documents += texts[previous:at]
        names += ids[previous:at]
        counts.bytes_in += utf8_bytes(array.slice(previous, at - previous))
        if at < len(texts):
            pieces = clean(texts[at], rules, counts)
            documents += pieces
            names += piece_ids(ids[at], len(pieces))
        previous = at + 1
    return documents, names, pa.array(documents, pa.string())


def piece_ids(name: str, pieces: int) -> list[str]:
    """Ids of the pieces of one text."""
    return [name] if pieces == 1 else [f"{name}#{k}" for k in range(pieces)]


def utf8_bytes(array: pa.Array) -> int:
    """Bytes of text in a string array (32-bit offsets)."""
    offsets = np.frombuffer(array.buffers()[1], np.int32) if len(array) else np.zeros(1, np.int32)
    return int(offsets[array.offset + len(array)] - offsets[array.offset]) if len(array) else 0


def find_dirty(texts: list[str], array: pa.Array, rules: Rules) -> list[int]:
    """Indices of the texts that some rule may change; all others stay as they are.

    0.3 ns a byte for the whole batch and 0.1 us a text; one regex a text costs 4 ns a character.
    """
    low, high, form = max(rules.min_chars, 1), rules.max_chars, rules.form
    dirty = [
        i
        for i, t in enumerate(texts)
        if not low <= len(t) <= high or t[0] in _STARTS or t[-1] in EDGE
    ]
    more: list[int] = []
    if len(texts) and _has_control(np.frombuffer(array.buffers()[2] or b"", np.uint8)):
        more += [i for i, t in enumerate(texts) if _CONTROL_OR_CR.search(t)]
    if form:
        more += [i for i, t in enumerate(texts) if not unicodedata.is_normalized(form, t)]
    return sorted({*dirty, *more}) if more else dirty


def _has_control(data: np.ndarray) -> bool:
    """Whether UTF-8 bytes hold anything below 0x20 but tab and newline, or 0x7F."""
    count = np.count_nonzero
    for start in range(0, len(data), _SCAN):
        part = data[start : start + _SCAN]
        if count(part < 32) != count(part == 9) + count(part == 10) or count(part == 127):
            return True
    return False


# ---------------------------------------------------------------- texts of any length


def clean_long(
    chunks: Callable[[], Iterator[str]], rules: Rules, counts: CleanCounts
) -> Iterator[str]:
    """As `clean`, for a text that `chunks()` gives piece by piece, twice: measured, then cut.

    Memory: max_chars characters and a chunk, unless a normal form finds no boundary to cut at.
    """
    first, last, seen, blank = -1, 0, 0, True
    sizes = _Sizes()
    for chunk in _repaired(chunks(), rules.form, sizes):
        if core := chunk.strip(EDGE):
            lead = len(chunk) - len(chunk.lstrip(EDGE))
            first = seen + lead if first < 0 else first
            last = seen + lead + len(core)
            blank = blank and core.isspace()
        seen += len(chunk)
    first = max(first, 0)
    sizes.book(counts)
    edges = first + seen - last  # characters and bytes: the edge characters are ASCII
    if edges:
        counts.repaired("edge_space", sizes.bytes[-1], sizes.bytes[-1] - edges)
    if reason := drop_reason(last - first, blank, rules):
        counts.drop(reason, sizes.bytes[-1] - edges)
        return
    rest, seen, pieces = "", 0, 0
    for chunk in _repaired(chunks(), rules.form, _Sizes()):
        rest += chunk[max(first - seen, 0) : max(last - seen, 0)]
        seen += len(chunk)
        *done, rest = split_text(rest, rules.max_chars)
        pieces += len(done)
        yield from done
    counts.split += pieces
    yield rest


class _Sizes:
    """UTF-8 bytes of one text before C1 and after C1, C2, C3, and which of them changed it."""

    def __init__(self) -> None:
        self.bytes, self.changed = [0, 0, 0, 0], [False, False, False]

    def book(self, counts: CleanCounts) -> None:
        counts.documents_in += 1
        counts.bytes_in += self.bytes[0]
        for step, name in enumerate(("newline", "control", "unicode")):
            if self.changed[step]:
                counts.repaired(name, self.bytes[step], self.bytes[step + 1])


def _repaired(chunks: Iterable[str], form: str | None, sizes: _Sizes) -> Iterator[str]:
    """C1 to C3 over chunks, equal to the rules over the whole text."""

    def measured(step: int, before: str, after: str) -> str:
        sizes.bytes[step + 1] += len(after.encode())
        sizes.changed[step] |= before != after
        return after

    held, waiting, started = "", "", False
    for chunk in _with_end(chunks):
        text = held + (chunk or "")
        sizes.bytes[0] += len((chunk or "").encode())
        held = "\r" if chunk is not None and text.endswith("\r") else ""  # LF may follow
        text = text[: len(text) - len(held)]
        text = measured(0, text, normalize_newlines(text))
        bare = _CONTROL.sub("", text)
        text = measured(1, text, bare if started else bare.lstrip(BOM))
        started = started or bool(text)
        if form:
            waiting += text
            cut = len(waiting) if chunk is None else _last_boundary(waiting)
            text, waiting = waiting[:cut], waiting[cut:]
            text = measured(2, text, unicodedata.normalize(form, text))  # type: ignore[arg-type]
        else:
            sizes.bytes[3] = sizes.bytes[2]
        yield text


def _with_end(chunks: Iterable[str]) -> Iterator[str | None]:
    yield from chunks
    yield None


def _last_boundary(text: str) -> int:
    """Where the last character stands that starts anew in every normal form; 0 if none does."""
    for at in range(len(text) - 1, 0, -1):
        if _BOUNDARY.match(text, at):
            return at
    return 0
