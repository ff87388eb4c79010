"""Context vectors of one long stream on disk, sweep by sweep (cvfp.md 7.3, 11).

Held:  chunk j of sweep k lies in slot(k, j). `double`: two files, read one, write the other.
       `slots`: one file of M + R slots; sweep k begins R slots before sweep k - 1, so a chunk is
       overwritten only after R more were committed.
Law:   rows -> fdatasync -> journal line -> optimizer step -> checkpoint. What a slot holds is read
       from the journal, never guessed; rows are compared with their crc32 when they are read.
Letters: N tokens, B tokens a chunk, M chunks, R spare slots, k sweep, j chunk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lib.core import growing
from lib.core.chunkstore import RowFile, StoreDtype, crc32, decode, encode, stored
from lib.core.errors import InputError

JOURNAL = "journal.jsonl"
Layout = Literal["double", "slots"]


class Sweeps:
    """The files of one run, opened or made."""

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        tokens: int,
        width: int,
        chunk_tokens: int,
        layout: Layout = "double",
        spare: int = 1,
        dtype: StoreDtype = "float16",
        work: Path | None = None,
    ) -> None:
        """work: the run's own folder, which goes with these files when they are lost."""
        self.folder, self.key, self.width = folder, key, width
        self.remedy = "remove the folder and run the same command"
        if work is not None:
            self.remedy = f"rm -r {work} {folder}, and the same command begins anew at sweep 0"
        self.dtype: StoreDtype = dtype
        self.tokens, self.chunk_tokens = tokens, chunk_tokens
        self.chunks = -(-tokens // chunk_tokens)  # M
        self.layout, self.spare = layout, spare
        self._journal = growing.AppendLog(folder / JOURNAL)
        self._files = [self._open(name, rows) for name, rows in self._sizes()]
        self.held: dict[int, tuple[int, int, int]] = {}  # slot -> (sweep, chunk, crc32)
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}  # (sweep, chunk) -> journal line
        for line in read_journal(folder / JOURNAL, self.remedy):
            self._take(line)

    def _sizes(self) -> list[tuple[str, int]]:
        if self.layout == "double":
            return [("context_a.npy", self.tokens), ("context_b.npy", self.tokens)]
        return [("context_slots.npy", (self.chunks + self.spare) * self.chunk_tokens)]

    def _open(self, name: str, rows: int) -> RowFile:
        kind, items = stored(self.dtype, self.width)
        note = {"kind": "contexts", "key": self.key, "dtype": self.dtype}
        path = self.folder / name
        if path.is_file():
            return RowFile.open(path, note, writable=True)
        return RowFile.create(path, kind, (rows, items), note)

    def _take(self, line: dict[str, Any]) -> None:
        sweep, chunk = line["sweep"], line["chunk"]
        self.held[self.slot(sweep, chunk)] = (sweep, chunk, line["crc32"])
        self.lines[sweep, chunk] = line

    # ------------------------------------------------------------ places

    def span(self, chunk: int) -> tuple[int, int]:
        """Tokens [start, stop) of a chunk."""
        start = chunk * self.chunk_tokens
        return start, min(self.tokens, start + self.chunk_tokens)

    def slot(self, sweep: int, chunk: int) -> int:
        """The number of the place that sweep `sweep` keeps `chunk` in."""
        if self.layout == "double":
            return sweep % 2 * self.chunks + chunk
        return (chunk - self.spare * sweep) % (self.chunks + self.spare)

    def _place(self, sweep: int, chunk: int) -> tuple[RowFile, int]:
        """(file, first row) of a slot."""
        slot = self.slot(sweep, chunk)
        if self.layout == "double":
            return self._files[slot // self.chunks], chunk * self.chunk_tokens
        return self._files[0], slot * self.chunk_tokens

    def require(self, sweep: int, chunk: int) -> int:
        """crc32 of the chunk; InputError unless its slot holds this very sweep."""
        found = self.held.get(self.slot(sweep, chunk))
        if found is None or found[:2] != (sweep, chunk):
            holds = "nothing" if found is None else f"sweep {found[0]} of chunk {found[1]}"
            raise InputError(
                "context vectors are of another generation",
                file=self._place(sweep, chunk)[0].path,
                value=f"needs sweep {sweep} of chunk {chunk}, holds {holds}",
                remedy=self.remedy,
            )
        return found[2]

    # ------------------------------------------------------------ rows

    def row(self, sweep: int, token: int) -> Tensor:
        """The stored vector (d,) of one token."""
        return self.rows(sweep, token, token + 1)[0]

    def rows(self, sweep: int, start: int, stop: int) -> Tensor:
        """The stored vectors of tokens [start, stop), (n, d)."""
        parts = [torch.empty(0, self.width)]
        while start < stop:
            chunk = start // self.chunk_tokens
            self.require(sweep, chunk)
            last = min(stop, self.span(chunk)[1])
            (file, first), before = self._place(sweep, chunk), self.span(chunk)[0]
            raw = file.read(first + start - before, first + last - before)
            parts.append(widen(raw, self.dtype))
            start = last
        return torch.cat(parts)

    def last_written(self, sweep: int, chunk: int) -> Tensor:
        """The row that this sweep wrote last before `chunk`."""
        return self.row(sweep, chunk * self.chunk_tokens - 1)

    def read(self, sweep: int, chunk: int, rows: int) -> Iterator[Tensor]:
        """The chunk in pieces of `rows`; after the last one its crc32 is compared."""
        wanted = self.require(sweep, chunk)
        file, first = self._place(sweep, chunk)
        start, stop = self.span(chunk)
        found = 0
        for raw in file.stream(first, first + stop - start, rows):
            found = crc32(raw, found)
            yield widen(raw, self.dtype)
        if found != wanted:
            raise InputError(
                "context vectors are damaged",
                file=file.path,
                value=f"chunk {chunk} of sweep {sweep}: crc32 {found:08x}, not {wanted:08x}",
                remedy=self.remedy,
            )

    def writer(self, sweep: int, chunk: int) -> Writer:
        """Takes the rows of a chunk in order."""
        return Writer(self, sweep, chunk)

    def commit(self, line: dict[str, Any]) -> None:
        """Journal one chunk; a chunk made again after a kill has its line already."""
        if self.held.get(self.slot(line["sweep"], line["chunk"])) == (
            line["sweep"], line["chunk"], line["crc32"],
        ):  # fmt: skip
            return
        self._journal.append(line)
        self._journal.sync()
        self._take(line)

    def moved_bytes(self) -> tuple[int, int]:
        """(read, written) by this process so far."""
        files = self._files
        return sum(f.read_bytes for f in files), sum(f.written_bytes for f in files)

    def forget(self, sweep: int, chunk: int) -> None:
        """The system need not keep the chunk's pages."""
        start, stop = self.span(chunk)
        file, first = self._place(sweep, chunk)
        file.forget(first, first + stop - start)

    def sync(self) -> None:
        """All rows durable."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._journal.close()

    def remove(self) -> None:
        """The vectors are not needed any more; the journal stays."""
        self.close()
        for name, _ in self._sizes():
            (self.folder / name).unlink(missing_ok=True)


def widen(raw: np.ndarray, dtype: StoreDtype) -> Tensor:
    """`chunkstore.decode` by torch where it has the type: 15 times as fast as numpy on fp16."""
    if dtype in ("float16", "float32", "float64"):
        wide = torch.float64 if dtype == "float64" else torch.float32
        return torch.from_numpy(raw).to(wide)
    return torch.from_numpy(decode(raw, dtype))


def narrow(rows: Tensor, dtype: StoreDtype) -> np.ndarray:
    """`chunkstore.encode` by torch where it has the type: 30 times as fast as numpy on fp16."""
    if dtype in ("float16", "float32", "float64"):
        return rows.to(getattr(torch, dtype)).numpy()
    return encode(rows.numpy(), dtype)


class Writer:
    """Rows of one chunk, rounded as stored, in order."""

    def __init__(self, sweeps: Sweeps, sweep: int, chunk: int) -> None:
        self._sweeps = sweeps
        self._file, self._at = sweeps._place(sweep, chunk)
        self.crc32 = 0

    def put(self, rows: Tensor) -> None:
        """Store rows (n, d)."""
        raw = narrow(rows.detach().cpu(), self._sweeps.dtype)
        self._file.write(self._at, raw)
        self._at += len(raw)
        self.crc32 = crc32(raw, self.crc32)
        self._raw = raw[-1:]

    @property
    def last(self) -> Tensor:
        """The row (d,) put last, as it can be read back."""
        return widen(self._raw, self._sweeps.dtype)[0]

    def finish(self) -> int:
        """Durable; returns the crc32 of the chunk."""
        self._file.sync()
        return self.crc32


def read_journal(
    path: Path, remedy: str = "remove the folder and run the same command"
) -> list[dict[str, Any]]:
    """All lines; InputError for one that is damaged (a torn last line was cut when opened)."""
    found = []
    data = path.read_bytes() if path.is_file() else b""
    for number, text in enumerate(data.splitlines(), 1):
        try:
            line = json.loads(text)
            numbers = {name: int(line[name]) for name in ("sweep", "chunk", "crc32")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                "journal is damaged",
                file=path,
                value=f"line {number}",
                remedy=remedy,
            ) from error
        found.append(line | numbers)
    return found


NOISE_BLOCK = 4096  # tokens of one generator


class Noise:
    """eps of a stream, N(0, 1), by blocks of 4,096 tokens: micro-batches do not matter."""

    def __init__(self, width: int, draw: Callable[[int, int], torch.Generator]) -> None:
        """draw(sweep, block) is the generator of a block."""
        self.width, self._draw = width, draw
        self._last: tuple[int, int] | None = None
        self._rows = torch.empty(0)

    def rows(self, sweep: int, start: int, stop: int) -> Tensor:
        """eps of tokens [start, stop), (n, width) fp32."""
        parts = []
        for block in range(start // NOISE_BLOCK, -(-stop // NOISE_BLOCK)):
            if self._last != (sweep, block):  # micro-batches of one block come one after another
                self._last, draw = (sweep, block), self._draw(sweep, block)
                self._rows = torch.randn(NOISE_BLOCK, self.width, generator=draw)
            first = block * NOISE_BLOCK
            parts.append(self._rows[max(0, start - first) : stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
