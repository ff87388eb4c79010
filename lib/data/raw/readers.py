"""Records of one shard, streaming: Parquet, JSON lines (plain, gzip, zstd), text.

In:    a `Shard`.   Out: batches of (texts, ids); every line ends as a document, a blank or a
       counted reason (data.md 4.4.2-4.4.4), and the first positions per reason are kept.
Law:   nothing may be committed before the iterator ends: only then the file's checksum held
       (lines.py).
Note:  a line over LONG bytes is never held: it comes as a `LongText`, which reads it again from
       the file as often as it is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lib.core.errors import InputError
from lib.data.raw.lines import (
    AGAIN,
    LONG,
    LongLine,
    ReadCounts,
    blocks_of,
    opened,
    read_lines,
    region,
    without_bom,
)
from lib.data.raw.shards import is_utf8
from lib.data.raw.strict_json import MAX_DEPTH, MAX_DIGITS, Rejected, field_chunks, field_of

try:
    from orjson import loads as quick_loads

    _LENIENT = False
except ImportError:
    _LENIENT = True  # lone surrogates pass

    def quick_loads(line: bytes, /) -> object:
        """The standard library's parser; bytes are decoded first, or UTF-16 would be guessed."""
        return json.loads(line.decode(), parse_constant=_refuse_constant)


ROWS = 512  # Parquet rows handled at once
_STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_NUMBER_BYTES = frozenset(b"+-.0123456789Ee")


def _refuse_constant(name: str) -> object:
    raise ValueError(name)  # NaN, Infinity: Python reads them, they are no JSON


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One input file of a recipe and how it is read.

    index: its number within (source, split). sha256: as the shard manifest has it; empty: computed.
    field: key or column of the text. val_fraction (txt): the file serves both splits, by line.
    """

    source: str
    split: Literal["train", "val"]
    index: int
    path: Path
    kind: Literal["parquet", "jsonl", "txt"]
    field: str = "text"
    document: Literal["line", "file"] = "line"
    val_fraction: float | None = None
    sha256: str = ""

    @property
    def name(self) -> str:
        """File name: what ids and positions begin with."""
        return self.path.name


@dataclass(frozen=True)
class LongText:
    """A text too long to hold: `chunks()` reads it from the file, from the beginning each time."""

    id: str
    chunks: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Batch:
    """Accepted texts in shard order, with their ids."""

    texts: list[str]
    ids: list[str]


def read_shard(shard: Shard, counts: ReadCounts) -> Iterator[Batch | LongText]:
    """Batches of the shard's documents in order; `counts` is filled on the way.

    Raises InputError naming the file: damaged, missing, wrong column, or without any document.
    """
    reader = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}[shard.kind]
    yield from reader(shard, counts)
    if not counts.accepted and shard.val_fraction is None:
        rejected = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.rejected.items()))
        raise InputError(
            "no documents",
            file=shard.path,
            value=f"{counts.lines} lines, {rejected or 'none rejected'}",
            remedy="replace the file, or take it out of its source",
        )


# ---------------------------------------------------------------- lines


def _text_chunks(path: Path, start: int, length: int) -> Iterator[str]:
    """The same as decoded chunks."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in region(path, start, length):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise Rejected("invalid_utf8") from None


def _json_chunks(path: Path, start: int, length: int, name: str) -> Iterator[str]:
    return field_chunks(region(path, start, length), name)


def _read_lines(
    shard: Shard,
    counts: ReadCounts,
    parse_lines: Callable[[list[bytes], bytes], Sequence[str | Rejected]],
    long_chunks: Callable[[Path, int, int], Iterator[str]],
) -> Iterator[Batch | LongText]:
    """What JSON lines and text have in common: blanks, ids, counting, lines too long to hold."""
    prefix = f"{shard.name}:"
    for item in read_lines(shard.path, counts):
        if isinstance(item, LongLine):
            long = LongText(
                f"{prefix}{item.number}", partial(long_chunks, shard.path, item.start, item.length)
            )
            counts.blank += item.blank
            counts.records += not item.blank
            if not item.blank and _holds(long, counts):
                yield long
            continue
        lines, numbers = item.lines, range(item.number, item.number + len(item.lines))
        if any(not line or line.isspace() for line in lines):
            pairs = [(n, x) for n, x in zip(numbers, lines, strict=True) if x and not x.isspace()]
            counts.blank += len(lines) - len(pairs)
            numbers, lines = [n for n, _ in pairs], [x for _, x in pairs]
        if shard.val_fraction is not None:
            pairs = [(n, x) for n, x in zip(numbers, lines, strict=True) if _side(x, shard)]
            counts.lines -= len(lines) - len(pairs)  # the other split counts them
            numbers, lines = [n for n, _ in pairs], [x for _, x in pairs]
        counts.records += len(lines)
        texts, ids = parse_lines(lines, item.block), [f"{prefix}{n}" for n in numbers]
        if any(type(text) is Rejected for text in texts):
            for text, position in zip(texts, ids, strict=True):
                if isinstance(text, Rejected):
                    counts.reject(text.reason, position)
            ids = [i for i, t in zip(ids, texts, strict=True) if isinstance(t, str)]
        if ids:
            yield Batch([text for text in texts if isinstance(text, str)], ids)


def _holds(long: LongText, counts: ReadCounts) -> bool:
    """Read a long text once for its faults."""
    try:
        for _ in long.chunks():
            pass
    except Rejected as rejected:
        counts.reject(rejected.reason, long.id)
        return False
    return True


# ---------------------------------------------------------------- the three kinds


def _read_jsonl(shard: Shard, counts: ReadCounts) -> Iterator[Batch | LongText]:
    return _read_lines(
        shard, counts, JsonLines(shard.field).parse, partial(_json_chunks, name=shard.field)
    )


class JsonLines:
    """Texts of JSON lines: the quick parser's word where it cannot differ from the strict one."""

    def __init__(self, name: str) -> None:
        self.name = name
        plain = name.isascii() and name.replace("_", "").isalnum()
        self.quoted = f'"{name}"'.encode() if plain else None  # else it may be spelt in many ways

    def parse(self, lines: list[bytes], block: bytes) -> Sequence[str | Rejected]:
        """One text or reason a line; block: the bytes the lines come from."""
        try:
            records = [quick_loads(line) for line in lines]
        except (ValueError, RecursionError):
            return [self.parse_line(line) for line in lines]
        if (texts := self.trusted_block(records, block)) is not None:
            return texts
        return [
            self.trusted(line, record) or self.strict(line)
            for line, record in zip(lines, records, strict=True)
        ]

    def parse_line(self, line: bytes) -> str | Rejected:
        """One line, quickly where that is safe."""
        try:
            return self.trusted(line, quick_loads(line)) or self.strict(line)
        except (ValueError, RecursionError):
            return self.strict(line)

    def trusted(self, line: bytes, record: object) -> str | None:
        """The text, or None when the strict parser must decide.

        Quick parsers keep the last of equal keys, and may read deeper nesting or longer numbers.
        Spelt plainly once and with no escaped ASCII, the key stands there once. (orjson refuses
        lone surrogates; the standard library does not, so the text is encoded.)
        """
        if not isinstance(record, dict) or not isinstance(text := record.get(self.name), str):
            return None
        if not self.quoted or line.count(self.quoted) != 1 or b"\\u00" in line:
            return None
        if len(record) > 1:
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
                return None
            # A run of more than MAX_DIGITS number characters covers one of these positions.
            if not _NUMBER_BYTES.isdisjoint(line[MAX_DIGITS - 1 :: MAX_DIGITS]):
                return None
        if _LENIENT and not is_utf8(text):
            return None
        return text

    def trusted_block(self, records: list, block: bytes) -> list[str] | None:
        """`trusted` for records of one key each, asked of all lines at once."""
        if _LENIENT or not self.quoted or not all(type(r) is dict and len(r) == 1 for r in records):
            return None
        texts = [record.get(self.name) for record in records]
        if any(type(text) is not str for text in texts):
            return None
        # Each record has the key; as often as there are records means once in each.
        once = block.count(self.quoted) == len(records) and b"\\u00" not in block
        return texts if once else None

    def strict(self, line: bytes) -> str | Rejected:
        """The arbiter's word."""
        try:
            return field_of(line, self.name)
        except Rejected as rejected:
            return rejected


def _read_txt(shard: Shard, counts: ReadCounts) -> Iterator[Batch | LongText]:
    if shard.document == "line":
        yield from _read_lines(shard, counts, _decode_lines, _text_chunks)
        return
    counts.lines = counts.records = 1
    size = sum(map(len, without_bom(blocks_of(shard.path), counts)))
    text = LongText(f"{shard.name}:1", partial(_text_chunks, shard.path, 0, size))
    if not size:
        counts.records, counts.blank = 0, 1
    elif _holds(text, counts):
        yield text if size > LONG else Batch(["".join(text.chunks())], [text.id])


def _decode_lines(lines: list[bytes], block: bytes) -> Sequence[str | Rejected]:
    try:
        return [line.decode() for line in lines]
    except UnicodeDecodeError:
        return [_decode(line) for line in lines]


def _decode(line: bytes) -> str | Rejected:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return Rejected("invalid_utf8")


def _side(line: bytes, shard: Shard) -> bool:
    """Whether a line of a shared file belongs to the shard's split: equal lines on one side."""
    draw = int.from_bytes(hashlib.sha256(line).digest()[:8], "big") / 2**64
    return (draw < (shard.val_fraction or 0)) == (shard.split == "val")


def _read_parquet(shard: Shard, counts: ReadCounts) -> Iterator[Batch]:
    """Column `field`, and `id` where there is one; page checksums are verified where present."""
    with opened(shard.path) as stream, _parquet_errors(shard):
        table = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
        schema, columns = table.schema_arrow, [shard.field]
        where = schema.get_all_field_indices(shard.field)
        found = schema.field(where[0]).type if len(where) == 1 else f"{len(where)} columns"
        if found not in _STRINGS:
            raise InputError(
                "wrong text column",
                file=shard.path,
                value=f"{shard.field}: {found}",
                remedy="name the column that holds strings as text_column",
            )
        where = schema.get_all_field_indices("id")
        if shard.field != "id" and len(where) == 1 and schema.field(where[0]).type in _STRINGS:
            columns.append("id")
        for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
            yield _parquet_rows(shard, batch, counts)


def _parquet_rows(shard: Shard, batch: pa.RecordBatch, counts: ReadCounts) -> Batch:
    first = counts.lines  # rows count from 0
    counts.lines += len(batch)
    counts.records += len(batch)
    positions = [f"{shard.name}:{row}" for row in range(first, first + len(batch))]
    ids = positions
    if batch.num_columns > 1:
        given = _strings(batch.column("id"))
        ids = [i if isinstance(i, str) else p for i, p in zip(given, positions, strict=True)]
    texts = _strings(batch.column(shard.field))
    if all(isinstance(text, str) for text in texts):
        return Batch(texts, ids)  # type: ignore[arg-type]  # just checked
    for text, position in zip(texts, positions, strict=True):
        if not isinstance(text, str):
            counts.reject("no_text" if text is None else text.reason, position)
    pairs = [(t, i) for t, i in zip(texts, ids, strict=True) if isinstance(t, str)]
    return Batch([t for t, _ in pairs], [i for _, i in pairs])


def _strings(column: pa.Array) -> list[str | Rejected | None]:
    """Values of a string column; Parquet's readers do not check that the bytes are UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else _decode(value) for value in raw]


@contextmanager
def _parquet_errors(shard: Shard) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # a name that is no UTF-8
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = f"column {shard.field}: {error}"
        raise InputError("damaged Parquet", file=shard.path, value=cause, remedy=AGAIN) from None
