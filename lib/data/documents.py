"""The documents folder: how extract_texts writes texts and how everybody reads them.

Files:  `<split>_<source>_<shard:05d>.parquet`, columns text and id, zstd 3, page checksums.
Order:  names sorted, then rows. It is the order of validation scores and of `val_sha256`.
Bytes:  a part depends on its documents and ids alone: row groups of 1,024 (fewer where they would
        exceed 64 MiB of text), no statistics, no dictionary, no schema blob, no time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.core import files
from lib.core.artifact import FileEntry, Manifest
from lib.core.errors import InputError, UserError
from lib.data.recipe import mix

KIND = "documents"
GROUP_ROWS = 1024
GROUP_BYTES = 1 << 26  # of text in a row group, so that one group always fits into memory
SCHEMA = pa.schema([pa.field("text", pa.string(), False), pa.field("id", pa.string(), False)])


def part_name(split: str, source: str, shard: int) -> str:
    """File name of one part."""
    return f"{split}_{source}_{shard:05d}.parquet"


class _Sink:
    """What pyarrow writes to: passes on to an output until it is cut off.

    pyarrow's destructor writes a footer, even to a file given up, whose descriptor may by then be
    another file's (test_a_writer_given_up_writes_nothing_more).
    """

    mode, closed = "wb", False

    def __init__(self, out: files.Output) -> None:
        self._out: files.Output | None = out
        self._position = 0

    def write(self, data: bytes | memoryview) -> int:
        if self._out is not None:
            self._out.write(data)
        self._position += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing: the output flushes at its end."""

    def close(self) -> None:
        """Nothing: the output is closed by who opened it."""

    def cut(self) -> None:
        self._out = None


class PartWriter:
    """Collects documents into row groups; counts what it was given."""

    def __init__(self, out: files.Output) -> None:
        self.documents = self.bytes = 0
        self._out, self._sink = out, _Sink(out)
        self._texts: list[pa.Array] = []
        self._ids: list[pa.Array] = []
        self._rows = self._held = 0
        self._writer = pq.ParquetWriter(
            self._sink,
            SCHEMA,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
            write_page_checksum=True,
        )

    def add(self, texts: pa.Array, ids: pa.Array) -> None:
        """Append documents (string arrays of equal length)."""
        lengths = pc.call_function("binary_length", [texts])
        ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
        start = done = 0
        while start < len(texts):
            fit = int(np.searchsorted(ends, done + GROUP_BYTES - self._held, side="right"))
            stop = min(fit, start + GROUP_ROWS - self._rows)
            if stop <= start and not self._rows:
                stop = start + 1  # above the limit alone: a group of its own
            if stop > start:
                self._texts.append(texts.slice(start, stop - start))
                self._ids.append(ids.slice(start, stop - start))
                self._rows += stop - start
                self._held += int(ends[stop - 1]) - done
                start, done = stop, int(ends[stop - 1])
            if start < len(texts) or self._rows == GROUP_ROWS:
                self._flush()
        self.documents += len(texts)
        self.bytes += int(ends[-1]) if len(ends) else 0

    def close(self) -> None:
        """Write the last group and the footer."""
        self._flush()
        self._writer.close()
        self._sink.cut()

    def entry(self, name: str) -> FileEntry:
        """The closed file as a manifest lists it, hashed while it was written."""
        return FileEntry(path=name, bytes=self._out.total_bytes, sha256=self._out.sha256)

    def abandon(self) -> None:
        """Give up: nothing more is written to a sink that will be gone."""
        self._sink.cut()

    def _flush(self) -> None:
        if self._rows:
            # One array a column: page borders would follow the pieces it was collected from.
            columns = [pa.concat_arrays(self._texts), pa.concat_arrays(self._ids)]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), GROUP_ROWS)
        self._texts, self._ids, self._rows, self._held = [], [], 0, 0


@contextmanager
def part_file(path: Path) -> Iterator[PartWriter]:
    """Write one part, whole or not at all."""
    with files.atomic_file(path) as out:
        writer = PartWriter(out)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def row_groups(path: Path) -> Iterator[pa.Table]:
    """Row groups of one part, page checksums verified; InputError names a damaged file."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as table:
            for group in range(table.num_row_groups):
                yield table.read_row_group(group, ["text", "id"], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not _missing(error):
            raise
        raise InputError(
            "damaged documents", file=path, value=error, remedy="run extract_texts again"
        ) from None


def _missing(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError)


def parts_of(names: Iterable[str], split: str, source: str | None = None) -> list[str]:
    """Those of `names` that are parts of a split (and source), in reading order."""
    start = f"{split}_" if source is None else f"{split}_{source}_"
    digits = len(part_name("", "", 0)) - len("__.parquet")
    return sorted(
        name
        for name in names
        if name.endswith(".parquet")
        and name.startswith(start)
        and (source is None or len(name) == len(start) + digits + len(".parquet"))
    )


def read_parts(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, text) of every document of some parts, a row group in memory at a time."""
    for name in names:
        for table in row_groups(folder / name):
            texts, ids = table.column("text").to_pylist(), table.column("id").to_pylist()
            yield from zip(ids, texts, strict=True)


def read_documents(
    folder: Path, split: str, source: str | None = None
) -> Iterator[tuple[str, str]]:
    """(id, text) of every document of a split (of one source) in order.

    Raises UserError when the folder is no finished artefact, InputError when a part is damaged.
    """
    if split not in ("train", "val"):
        raise UserError("no such split", value=split, remedy="use train or val")
    manifest = Manifest.read(folder / files.MANIFEST, KIND)
    yield from read_parts(folder, parts_of((e.path for e in manifest.files), split, source))


def read_mixture(folder: Path) -> Iterator[str]:
    """Training texts in the recipe's order, each at most once: what a tokenizer is trained on.

    Shares are kept in bytes, since tokens do not exist yet (data.md 5.1); the text ends where the
    recipe's first pass does. One source: its own order.
    """
    manifest = Manifest.read(folder / files.MANIFEST, KIND)
    weights: dict[str, float] = manifest.recipe["params"]["sources"]
    names = list(weights)
    texts = [(text for _, text in read_documents(folder, "train", name)) for name in names]
    if len(names) == 1:
        yield from texts[0]
        return
    parts = [entry.path for entry in manifest.files]
    lengths = [_text_bytes(folder, parts_of(parts, "train", name)) for name in names]
    ends = "continue" if manifest.recipe["params"]["on_exhausted"] == "continue" else "stop"
    for visits in mix(list(weights.values()), lengths, ends):
        for source in visits.source.tolist():  # without a second pass, documents come in order
            yield next(texts[source])


def write_lines(folder: Path, path: Path) -> int:
    """The training documents as text, one a line, newlines as spaces; returns their number.

    What the published Japanese recipe trains its tokenizer on (trm.md 7.1).
    """
    count = 0
    with files.atomic_file(path) as out:
        for _, text in read_documents(folder, "train"):
            out.write(text.replace("\n", " ").encode() + b"\n")
            count += 1
    return count


def _text_bytes(folder: Path, names: Iterable[str]) -> np.ndarray:
    """int64 (documents,): UTF-8 bytes of the texts of some parts."""
    counts = [
        pc.call_function("binary_length", [table.column("text")]).to_numpy().astype(np.int64)
        for name in names
        for table in row_groups(folder / name)
    ]
    return np.concatenate(counts) if counts else np.empty(0, np.int64)


def val_sha256(documents: Iterable[tuple[str, str]]) -> str:
    """Identity of a validation text (evaluation.md 2.9): sha256 over ids and texts in order.

    Each string is preceded by its length in bytes (8 bytes, little endian), so borders count.
    """
    digest = hashlib.sha256()
    for pair in documents:
        for text in pair:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
