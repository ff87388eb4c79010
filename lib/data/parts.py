"""One documents part x tokenizer -> ids, boundaries included: the unit of work of encoding.

In:    a Parquet part with columns text, id, and what decides its bytes (`Unit`).
Out:   `<split>_<part>.bin`, ids little endian without header, and in `units/` the length and text
       bytes of every document and a JSON of numbers, which is written last and commits the unit.
Law:   for a lossless tokenizer the ids of each document stand for exactly its bytes (L5), and a
       sample is decoded again and compared (data.md 9.4). InputError names the document.
Note:  memory is one batch of about 2 MB of text, whatever the part holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lib.core import files
from lib.core.errors import InputError
from lib.data.tokens import INT64, Split, id_dtype, part_name
from lib.data.vocab import chat
from lib.data.vocab.tokenizer import Tokenizer

BATCH_BYTES = 2_000_000  # text encoded at once, about; bounds the memory
CHECK_EVERY, CHECK_LEAST = 1000, 100  # documents of a part that are decoded again


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One documents part to be encoded: all that decides its bytes, and where they go."""

    part: Path  # Parquet file with columns text, id
    sha256: str  # of the part
    split: Split
    number: int  # of the part within its split
    source: str
    folder: Path  # of the token files
    tokenizer_folder: Path
    open_tokenizer: Callable[[Path], Tokenizer]
    boundary: str
    truncate_tokens: int | None  # train only
    threads: int  # changes no byte
    framed: bool = False  # documents are conversations (lib.data.vocab.chat)

    @property
    def ids_path(self) -> Path:
        """Where the ids go."""
        return self.folder / part_name(self.split, self.number)

    def side(self, suffix: str) -> Path:
        """Where a file of the unit's numbers lies."""
        return self.folder / "units" / f"{self.split}_{self.number:05d}.{suffix}"


@dataclass(kw_only=True)
class PartCounts:
    """The numbers of a part, or of many."""

    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of the texts, before truncation
    tokens: int = 0  # ids written, boundaries included
    content_bytes: int = 0  # bytes that the content ids stand for, before truncation
    truncated_documents: int = 0
    truncated_tokens: int = 0  # content ids dropped by `truncate_tokens`
    checked_documents: int = 0  # decoded again and compared
    frame_bytes: int = 0  # of conversations: what stands around contents, and becomes chat ids

    def plain(self) -> dict[str, int]:
        """By name; without the frames where there are none."""
        return {n: v for n, v in asdict(self).items() if v or n != "frame_bytes"}

    def add(self, other: PartCounts) -> None:
        """Add the numbers of another part."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A finished unit as its JSON states it."""

    counts: PartCounts
    ids_sha256: str
    documents_sha256: str


def encode_part(unit: Unit) -> Part:
    """Encode one part, or find it finished; its JSON is written last and commits it.

    InputError when the part is damaged or a lossless tokenizer does not give its text back.
    """
    if part := _finished(unit):
        return part
    if not unit.part.is_file() or files.sha256_file(unit.part) != unit.sha256:
        raise InputError(
            "documents differ from their manifest", file=unit.part, remedy="run extract_texts again"
        )
    tokenizer = open_cached(unit.open_tokenizer, unit.tokenizer_folder)
    counts, sizes = PartCounts(), []
    with files.atomic_file(unit.ids_path) as out:
        for batch in _read_batches(unit.part):
            ids, lengths, held = _encode_batch(batch, unit, tokenizer, counts)
            out.write(ids.tobytes())
            sizes.append(np.stack([lengths, held], axis=1))
    with files.atomic_file(unit.side("documents.bin")) as documents:
        for block in sizes:
            documents.write(block.astype(INT64).tobytes())
    part = Part(counts=counts, ids_sha256=out.sha256, documents_sha256=documents.sha256)
    files.write_note(unit.side("json"), asdict(part))
    return part


def _finished(unit: Unit) -> Part | None:
    """The unit as a former run left it, if every byte is still right."""
    raw = files.read_note(unit.side("json"))
    if raw is None:
        return None
    part = Part(**{**raw, "counts": PartCounts(**raw["counts"])})
    wanted = {unit.ids_path: part.ids_sha256, unit.side("documents.bin"): part.documents_sha256}
    same = all(p.is_file() and files.sha256_file(p) == sha for p, sha in wanted.items())
    return part if same else None


@lru_cache(maxsize=2)
def open_cached(open_tokenizer: Callable[[Path], Tokenizer], folder: Path) -> Tokenizer:
    """The tokenizer, read once in each process."""
    return open_tokenizer(folder)


@dataclass(frozen=True)
class _Batch:
    texts: list[str]
    ids: list[str]
    bytes: np.ndarray  # int64 (documents,)
    first: int  # index of the first document within the part
    part_documents: int


def _read_batches(path: Path) -> Iterator[_Batch]:
    """The documents of a part, about `BATCH_BYTES` of text at a time, page checksums compared."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        # Streams the pages; by default a whole row group is read ahead (seen: 540 against 56 MB).
        reader = pq.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
        first, total = 0, reader.metadata.num_rows
        for group in range(reader.num_row_groups):
            about = reader.metadata.row_group(group)
            step = BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)
            step = min(max(step, 1), 1024)
            for batch in reader.iter_batches(step, [group], ["text", "id"], use_threads=False):
                text, ids = batch.column("text"), batch.column("id").to_pylist()
                sizes = pc.call_function("binary_length", [text])
                sizes = sizes.to_numpy(zero_copy_only=False).astype(np.int64)
                # The estimate fails where long documents stand together or pages have a dictionary.
                for a, b in _cuts(sizes):
                    yield _Batch(text[a:b].to_pylist(), ids[a:b], sizes[a:b], first + a, total)
                first += len(batch)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            "documents cannot be read", file=path, value=error, remedy="run extract_texts again"
        ) from error


def _cuts(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents of at most 1.5 x `BATCH_BYTES`, or of one document."""
    upto, a = np.cumsum(sizes), 0
    while a < len(sizes):
        limit = (upto[a - 1] if a else 0) + BATCH_BYTES + BATCH_BYTES // 2
        b = max(int(np.searchsorted(upto, limit, side="right")), a + 1)
        yield a, b
        a = b


def _encode_batch(
    batch: _Batch, unit: Unit, tokenizer: Tokenizer, counts: PartCounts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the batch with boundaries, in the stored dtype; length, text bytes by document."""
    if unit.framed:
        encoded, contents = chat.encode(batch.texts, tokenizer, unit.threads)
        sizes = np.array([len(text.encode()) for text in contents], np.int64)
        counts.frame_bytes += int((batch.bytes - sizes).sum())
        batch = replace(batch, texts=contents, bytes=sizes)
    else:
        encoded = tokenizer.encode_batch(batch.texts, unit.threads)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    flat = _flatten(encoded, lengths, id_dtype(tokenizer.vocab_size))
    if tokenizer.lossless:
        _verify(batch, unit.part, flat, lengths, tokenizer, counts)
    counts.documents += len(lengths)
    counts.bytes += int(batch.bytes.sum())
    limit = unit.truncate_tokens
    if unit.split == "train" and limit is not None and (lengths > limit).any():
        place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = np.minimum(lengths, limit)
        counts.truncated_documents += int((lengths > limit).sum())
        counts.truncated_tokens += int((lengths - kept).sum())
        flat, lengths = flat[place < limit], kept
    flat, lengths = _add_boundaries(flat, lengths, unit.boundary, tokenizer)
    counts.tokens += len(flat)
    return flat, lengths, batch.bytes


def _flatten(encoded: list[Any], lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if encoded and isinstance(encoded[0], np.ndarray):
        return np.concatenate(encoded).astype(dtype)
    return np.fromiter(chain.from_iterable(encoded), dtype, int(lengths.sum()))


def _add_boundaries(
    flat: np.ndarray, lengths: np.ndarray, boundary: str, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """[bos] ids [eos] for each document, as `boundary` says."""
    ends = np.cumsum(lengths)
    columns = []  # (where, id), bos before eos: at one place the eos of a document comes first
    if boundary in ("bos", "both"):
        columns.append((ends - lengths, tokenizer.bos_id))
    if boundary in ("eos", "both"):
        columns.append((ends, tokenizer.eos_id))
    if not columns:
        return flat, lengths
    places = np.stack([where for where, _ in columns], axis=1).ravel()
    ids = np.tile(np.array([id_ for _, id_ in columns], flat.dtype), len(lengths))
    return np.insert(flat, places, ids), lengths + len(columns)


def _verify(
    batch: _Batch,
    part: Path,
    flat: np.ndarray,
    lengths: np.ndarray,
    tokenizer: Tokenizer,
    counts: PartCounts,
) -> None:
    """L5 for every document of the batch, and decode(encode(x)) = x for the sampled ones."""
    upto = np.zeros(len(flat) + 1, np.int64)
    np.cumsum(tokenizer.token_bytes[flat], out=upto[1:])
    ends = np.cumsum(lengths)
    held = upto[ends] - upto[ends - lengths]
    counts.content_bytes += int(upto[-1])
    every = max(min(CHECK_EVERY, batch.part_documents // CHECK_LEAST), 1)
    sampled = range(-batch.first % every, len(lengths), every)
    counts.checked_documents += len(sampled)
    for i in chain(np.flatnonzero(held != batch.bytes).tolist(), sampled):
        wanted = batch.texts[i].encode()
        found = tokenizer.decode_bytes(flat[ends[i] - lengths[i] : ends[i]].tolist())
        if found == wanted and held[i] == batch.bytes[i]:
            continue
        pairs = zip(wanted, found, strict=False)
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))
        raise InputError(
            "tokenizer does not give a document back",
            file=part,
            value=f"{batch.ids[i]} at byte {at}: {len(wanted)} bytes, ids stand for {held[i]}",
            remedy="train the tokenizer again; if it stays, report it with this document",
        )
