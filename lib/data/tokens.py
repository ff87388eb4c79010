"""Token files as readers see them: parts of ids as one long array, documents, packed rows.

In:    the manifest of an encoding and its folder in scratch (data.md 9.1, 10.1).
Out:   ids by position, offsets and text bytes by document, rows of context + 1 ids.
Rule:  sizes are compared when the store is opened, hashes by `artifact.ensure` before that; ids are
       little endian uint16 while vocab_size <= 65,536, else uint32, and all maps are read-only.
Note:  a segment of a row whose start is negative, (~s, n), is the boundary id and then n - 1 tokens
       from s.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lib.core.artifact import FileEntry, Manifest
from lib.core.errors import InputError, UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INT64 = np.dtype("<i8")
SEGMENT = np.dtype([("start", "<i8"), ("length", "<i4")])  # 12 bytes, no padding
MAX_MAPS = 256  # parts mapped at once: each map holds a descriptor, and the usual limit is 1,024


def id_dtype(vocab_size: int) -> np.dtype:
    """The dtype of ids below `vocab_size`, little endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def part_name(split: str, part: int) -> str:
    """File name of the ids of one part."""
    return f"{split}_{part:05d}.bin"


def rows_folder(key: str) -> str:
    """Folder of one row index, relative to the token files."""
    return f"rows/{key}"


@dataclass(frozen=True)
class Documents:
    """The documents of a split; document i holds ids [offsets[i], offsets[i + 1])."""

    offsets: np.ndarray  # int64 (documents + 1,)
    bytes: np.ndarray  # int64 (documents,), UTF-8 bytes of each text

    def __len__(self) -> int:
        return len(self.bytes)


class TokenStore:
    """The token files that a manifest of kind `tokens` describes, opened read-only.

    InputError when a file is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        for entry in manifest.files:
            _check_size(folder, entry)
        self._entries = {entry.path: entry for entry in manifest.files}
        params, rows = manifest.recipe["params"], manifest.counts["rows"]
        self.fingerprint: str = manifest.recipe["inputs"]["tokenizer"]
        self.boundary: str = params["boundary"]
        self.template: str = params.get("template", "none")  # chat: lib.data.vocab.chat
        self.bos_id: int | None = params["bos_id"]
        self.eos_id: int | None = params["eos_id"]
        self.vocab_size: int = params["vocab_size"]
        self.context: int = rows["params"]["context"]
        self._parts = {split: self._list_parts(split) for split in SPLITS}
        ends = {s: np.cumsum([_length(e) for e in self._parts[s]], dtype=np.int64) for s in SPLITS}
        self._ends = ends
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        place = rows_folder(rows["key"])
        self._segments = self._map(f"{place}/segments.bin")
        self._row_ptr = self._map(f"{place}/row_ptr.bin")

    def _list_parts(self, split: Split) -> list[FileEntry]:
        parts, number = [], 0
        while (name := part_name(split, number)) in self._entries:
            parts.append(self._entries[name])
            number += 1
        return parts

    @property
    def rows(self) -> int:
        """R, the number of packed training rows."""
        return len(self._row_ptr) - 1

    def length(self, split: Split) -> int:
        """Ids in a split, boundaries included."""
        return int(self._ends[split][-1]) if len(self._ends[split]) else 0

    def documents(self, split: Split) -> Documents:
        """Offsets and text bytes of a split's documents."""
        return Documents(self._map(f"{split}_offsets.bin"), self._map(f"{split}_bytes.bin"))

    def tokens(self, split: Split, start: int, length: int) -> np.ndarray:
        """Ids [start, start + length) of the concatenated parts, in the stored dtype.

        A view of the file where they lie in one part, else a copy.
        """
        assert 0 <= start <= start + length <= self.length(split), (split, start, length)
        ends, pieces = self._ends[split], []
        part = int(np.searchsorted(ends, start, side="right"))
        while length or not pieces:
            ids = self._part(split, part)
            begin = start - (int(ends[part]) - len(ids)) if len(ids) else 0
            piece = ids[begin : begin + length]
            pieces.append(piece)
            start, length, part = start + len(piece), length - len(piece), part + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def read_row(self, row: int, out: np.ndarray) -> None:
        """Write the context + 1 ids of packed training row `row` into `out`, any integer dtype."""
        first, last = int(self._row_ptr[row]), int(self._row_ptr[row + 1])
        at = 0
        for start, length in self._segments[first:last].tolist():
            if start < 0:
                assert self.bos_id is not None, "a boundary in front of a segment needs a bos id"
                out[at] = self.bos_id
                start, length, at = ~start, length - 1, at + 1
            if length:  # a cut may leave a boundary id alone
                out[at : at + length] = self.tokens("train", start, length)
            at += length
        assert at == len(out), f"row {row} holds {at} ids, not {len(out)}"

    def row_positions(self, row: int) -> np.ndarray:
        """Where the context + 1 ids of a packed row lie in the train split; -1: a boundary id."""
        first, last = int(self._row_ptr[row]), int(self._row_ptr[row + 1])
        found = []
        for start, length in self._segments[first:last].tolist():
            if start < 0:
                found.append(np.full(1, -1, np.int64))
                start, length = ~start, length - 1
            found.append(np.arange(start, start + length, dtype=np.int64))
        return np.concatenate(found)

    def require_tokenizer(self, fingerprint: str) -> None:
        """UserError unless these ids were made by the tokenizer of that fingerprint."""
        if fingerprint != self.fingerprint:
            raise UserError(
                "tokenizer does not match the token files",
                file=self.folder,
                value=f"made with {self.fingerprint[:8]}, given {fingerprint[:8]}",
                remedy="run `dvc repro` so that encode_tokens uses this tokenizer",
            )

    def _part(self, split: Split, part: int) -> np.ndarray:
        """The ids of one part; only the `MAX_MAPS` parts used last stay mapped."""
        if part == len(self._parts[split]):  # only an empty read at the very end comes here
            return np.empty(0, id_dtype(self.vocab_size))
        name = self._parts[split][part].path
        ids = self._maps.pop(name, None)
        self._maps[name] = ids = self._map(name) if ids is None else ids
        if len(self._maps) > MAX_MAPS:
            self._maps.popitem(last=False)
        return ids

    def _map(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        assert entry.dtype is not None and entry.shape is not None, f"{name} is no array"
        dtype = SEGMENT if name.endswith("segments.bin") else np.dtype(entry.dtype)
        if 0 in entry.shape:  # an empty file cannot be mapped
            return np.empty(entry.shape, dtype)
        return np.memmap(self.folder / name, dtype, "r", shape=entry.shape)


def _length(entry: FileEntry) -> int:
    assert entry.shape is not None, f"{entry.path} is no array"
    return entry.shape[0]


def _check_size(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.path
    found = path.stat().st_size if path.is_file() else None
    if found != entry.bytes:
        raise InputError(
            "token file is missing" if found is None else "size differs",
            file=path,
            value=None if found is None else f"expected {entry.bytes} bytes, found {found}",
            remedy="run the same command to make it again",
        )
