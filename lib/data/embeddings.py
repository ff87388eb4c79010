"""Token vectors for CVFP: a table of normalised rows, and one row per training token on disk.

In:    token files, a source of vectors (GPT-2's table, a table of a model of ours, its hidden
       states, random rows).
Out:   `$KUMIKI_SCRATCH/embeddings/<key>/`: token_ids.npy, offsets.npy, table.npy, and in mode
       `memmap` embeddings.npy, row i of token i; of hidden states blocks.safetensors; a manifest.
Rule:  a vector is the norm of its table row, computed in fp32 and rounded once to the stored type.
       A chunk is durable before its journal line; a killed run goes on with the first missing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.core import artifact, chunkstore, files, growing
from lib.core import data_settings as settings
from lib.core.artifact import FileEntry, Manifest, plain
from lib.core.chunkstore import RowFile, crc32, decode, encode, stored
from lib.core.errors import InputError, UserError
from lib.core.progress import watched
from lib.core.run_settings import Runtime
from lib.data.hidden import About, hidden_rows, open_hidden
from lib.data.tokens import TokenStore, id_dtype
from lib.data.vector_source import Log, gpt2_file, source_hash, source_table, width_of
from lib.nn.contexts.frozen import Frozen

KIND, REVISION = "embeddings", 1
ROWS, TABLE, IDS, OFFSETS, ABOUT = (
    "embeddings.npy", "table.npy", "token_ids.npy", "offsets.npy", "metadata.json",
)  # fmt: skip
BLOCKS = "blocks.safetensors"  # what hidden states were made by
JOURNAL = "journal.jsonl"
LARGEST = 6e4  # fp16 ends at 65,504
WRITE_ROWS = 8192  # rows computed and written at once


# ---------------------------------------------------------------- making them


def recipe_of(section: settings.Embeddings, tokens: Path) -> dict[str, Any]:
    """What decides every byte."""
    return {
        "stage": "precompute_embeddings",
        "rev": REVISION,
        "params": {"source": section.source, "mode": section.mode, "dtype": section.dtype},
        "inputs": {"tokens": files.sha256_file(tokens), "source": source_hash(section)},
    }


@dataclass(frozen=True)
class Making:
    """One artefact in the making."""

    folder: Path
    key: str
    store: TokenStore
    table: np.ndarray  # (V, e) as stored
    section: settings.Embeddings
    frozen: Frozen | None = None  # rows are its hidden states, not the table's

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of training tokens [start, stop) as stored."""
        if self.frozen is None:
            return self.table[self.store.tokens("train", start, stop - start)]
        found = hidden_rows(self.frozen, self.store, start, stop)
        return _rounded(torch.from_numpy(found), self.section.dtype)

    @property
    def note(self) -> dict[str, Any]:
        """What the headers tell."""
        return {"kind": KIND, "key": self.key, "dtype": self.section.dtype}


def open_store(tokens: Path, *, full: bool = False) -> TokenStore:
    """The token files behind a manifest, verified."""
    manifest = Manifest.read(tokens, kind="tokens")
    folder = artifact.scratch_folder("tokens", manifest.key)
    artifact.ensure(folder, manifest.files, None, full=full)
    return TokenStore(folder, manifest)


def precompute(
    section: settings.Embeddings,
    tokens: Path,
    runtime: Runtime,
    log: Log,
    should_stop: Callable[[], None] = lambda: None,
) -> Manifest:
    """Make, or finish, the artefact. EnvError before the first byte where the disk will not do."""
    store = open_store(tokens)
    N, V = store.length("train"), store.vocab_size
    if N < 2:
        raise UserError("train split is too small", value=f"{N} tokens", remedy="add documents")
    if section.source == "gpt2" and store.fingerprint != section.gpt2.tokenizer:
        raise UserError(
            "tokenizer is not that of the table",
            value=f"tokens by {store.fingerprint[:8]}, GPT-2's {section.gpt2.tokenizer[:8]}",
            remedy="encode with kind: gpt2, or use source: checkpoint",
        )
    width = width_of(section)
    recipe = recipe_of(section, tokens)
    key = artifact.key_of(KIND, recipe)
    folder = artifact.scratch_folder(KIND, key)
    for line in preflight(section, store, width, folder):
        log(line)
    table, about, frozen = source_table(section, V, runtime, log), None, None
    if section.source == "hidden":
        about, frozen = open_hidden(Path(section.checkpoint.path), section.hidden)
        if store.bos_id is not None:  # rows that begin in mid-document begin with one of its own
            table[store.bos_id] = frozen.windows([torch.tensor([store.bos_id])])[0][0]
    made = Making(folder, key, store, _rounded(table, section.dtype), section, frozen)
    files.make_folder(folder)
    _write_small(made)
    if section.mode == "memmap":
        write_rows(made, should_stop)
    if section.source == "gpt2" and not section.keep_source:
        files.remove_tree(gpt2_file(section.gpt2, runtime, log).parent)
    counts = {
        "tokens": N, "documents": len(store.documents("train")), "width": table.shape[1],
        "dtype": section.dtype, "vocab_size": V, "tokenizer": store.fingerprint,
        "source": section.source, "function_of_token": frozen is None,
        "hidden": about and plain(about),
        "chunk_tokens": section.chunk_tokens, "mode": section.mode,
    }  # fmt: skip
    files.write_json(folder / ABOUT, counts)
    names = [ABOUT, IDS, OFFSETS, TABLE, *([ROWS] if section.mode == "memmap" else [])]
    names += [BLOCKS] if frozen is not None else []
    return Manifest(
        kind=KIND, recipe=recipe, files=tuple(_entry(folder, n) for n in names), counts=counts
    )


def preflight(
    section: settings.Embeddings, store: TokenStore, width: int, folder: Path
) -> list[str]:
    """What will be written, as lines; EnvError where the disk below `folder` has no room for it."""
    N, V = store.length("train"), store.vocab_size
    sizes = {IDS: N * id_dtype(V).itemsize, TABLE: V * width * 2}
    if section.mode == "memmap":
        sizes[ROWS] = N * width * 2
    need = sum(sizes.values())
    held = sum(p.stat().st_size for p in folder.glob("*.npy*")) if folder.is_dir() else 0
    told = chunkstore.check_place(folder, max(0, need - held))
    lines = [f"{section.source} vectors, {N:,} tokens x {width}, {section.dtype}, {section.mode}"]
    lines += [f"  {name:<16} {size / 1e6:12,.1f} MB" for name, size in sizes.items()]
    if section.mode == "memmap":
        lines.append(f"  (mode: gather would write {sizes[TABLE] / 1e6:,.1f} MB, the same numbers)")
    return [*lines, f"  {'total':<16} {need / 1e6:12,.1f} MB   {told}"]


def _rounded(table: Tensor, dtype: Any) -> np.ndarray:
    """The table as stored, (V, items)."""
    largest = float(table.abs().max())
    if not largest < LARGEST:
        raise InputError(
            "token vectors are not finite or too large", value=f"largest {largest}",
            remedy=f"values must stay below {LARGEST:.0e}",
        )  # fmt: skip
    return encode(table.numpy(), dtype)


def _write_small(made: Making) -> None:
    """Table, ids and offsets: whole or not at all."""
    offsets = np.asarray(made.store.documents("train").offsets)
    _write_array(made.folder / TABLE, made.table, made.note)
    _write_array(made.folder / OFFSETS, offsets, made.note)
    N, dtype = made.store.length("train"), id_dtype(made.store.vocab_size)
    with files.atomic_file(made.folder / IDS, N * dtype.itemsize) as out:
        out.write(chunkstore.header(dtype, (N,), made.note))
        for start in range(0, N, 1 << 22):
            ids = made.store.tokens("train", start, min(1 << 22, N - start))
            if int(ids.max()) >= made.store.vocab_size:
                raise InputError(
                    "id outside the vocabulary", file=made.store.folder, value=int(ids.max()),
                    remedy="run encode_tokens again",
                )  # fmt: skip
            out.write(np.ascontiguousarray(ids))

    if made.frozen is not None:
        from safetensors.torch import save_file

        with files.library_file(made.folder / BLOCKS) as temp:
            save_file(made.frozen.state_dict(), temp)


def _write_array(path: Path, array: np.ndarray, note: dict[str, Any]) -> None:
    with files.atomic_file(path, array.nbytes) as out:
        out.write(chunkstore.header(array.dtype, array.shape, note))
        out.write(np.ascontiguousarray(array))


def write_rows(
    made: Making, should_stop: Callable[[], None] = lambda: None, *, verify_all: bool = False
) -> int:
    """embeddings.npy, chunk by chunk; returns the rows that were written by this call.

    Chunks that the journal names are taken as they are; the last one (verify_all: every one) is
    read and compared with its crc32 first.
    """
    N, size = made.store.length("train"), made.section.chunk_tokens
    final, part = made.folder / ROWS, made.folder / f"{ROWS}.part"
    if final.is_file() and not verify_all:
        return 0
    if final.is_file():
        files.rename(final, part)
    log_file = growing.AppendLog(made.folder / JOURNAL)
    kind, items = stored(made.section.dtype, made.table.shape[1])
    try:
        rows, done = _open_rows(part, kind, (N, items), made, log_file)
        chunks = range(-(-N // size))
        for chunk in watched(chunks, len(chunks), "chunks", "precompute_embeddings"):
            start, stop = chunk * size, min(N, (chunk + 1) * size)
            is_last = chunk + 1 not in done
            if chunk in done and (
                not (verify_all or is_last) or crc32(rows.read(start, stop)) == done[chunk]
            ):
                continue
            should_stop()
            crc = _write_chunk(rows, made, start, stop)
            log_file.append({"chunk": chunk, "crc32": crc})
            log_file.sync()
        written = rows.written_bytes // rows.row_bytes
        rows.close()
        files.rename(part, final)
    finally:
        log_file.close()
    return written


def _open_rows(
    part: Path, kind: np.dtype, shape: tuple[int, int], made: Making, journal: growing.AppendLog
) -> tuple[RowFile, dict[int, int]]:
    """The file of a killed run with its finished chunks, or a new one and an empty journal."""
    if part.is_file():
        done = {}
        for number, line in enumerate(journal.path.read_bytes().splitlines(), 1):
            try:
                record = files.json.loads(line)
                done[int(record["chunk"])] = int(record["crc32"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    "journal is damaged", file=journal.path, value=f"line {number}",
                    remedy="remove the folder and run the same command",
                ) from error  # fmt: skip
        return RowFile.open(part, made.note, writable=True), done
    journal.truncate(0)
    return RowFile.create(part, kind, shape, made.note), {}


def _write_chunk(rows: RowFile, made: Making, start: int, stop: int) -> int:
    crc = 0
    for first in range(start, stop, WRITE_ROWS):
        last = min(stop, first + WRITE_ROWS)
        block = made.rows(first, last)
        rows.write(first, block)
        crc = crc32(block, crc)
    rows.sync()
    rows.forget(start, stop)
    return crc


def _entry(folder: Path, name: str) -> FileEntry:
    path = folder / name
    return FileEntry(path=name, bytes=path.stat().st_size, sha256=files.sha256_file(path))


# ---------------------------------------------------------------- reading them


class Embeddings:
    """What a family reads: the table, the stream of training ids, vectors by token (base.py).

    Positions are those of the train split; the vectors of ids that packing added, boundaries, come
    from the table.
    """

    def __init__(self, folder: Path, manifest: Manifest, store: TokenStore) -> None:
        self.store, self.manifest = store, manifest
        about = manifest.counts
        self.key, self.hidden = manifest.key, about.get("hidden")
        self._folder = folder
        self.tokens, self.width, self.dtype = about["tokens"], about["width"], about["dtype"]
        self.reset_id = store.bos_id if store.boundary in ("bos", "both") else None
        self.has_rows = about["mode"] == "memmap"
        note = {"kind": KIND, "key": manifest.key, "dtype": self.dtype}
        held = RowFile.open(folder / TABLE, note)
        self._table = torch.from_numpy(decode(held.read(0, held.shape[0]), self.dtype))
        held.close()
        self._rows = RowFile.open(folder / ROWS, note) if self.has_rows else None
        self._starts = np.asarray(store.documents("train").offsets)[:-1]

    @classmethod
    def open(cls, path: Path, tokens: Path, store: TokenStore, *, full: bool = False) -> Embeddings:
        """Verify and open; rows that are damaged or gone are made again from the table.

        UserError where they were made from other token files.
        """
        manifest = Manifest.read(path, kind=KIND)
        found, wanted = manifest.recipe["inputs"]["tokens"], files.sha256_file(tokens)
        if found != wanted:
            raise UserError(
                "embeddings are of other token files", file=path,
                value=f"made from {found[:8]}, given {wanted[:8]}",
                remedy="run `dvc repro precompute_embeddings`",
            )  # fmt: skip
        folder = artifact.scratch_folder(KIND, manifest.key)

        def rebuild(bad: list[FileEntry]) -> None:
            names = {entry.path for entry in bad}
            if not names <= {ROWS, IDS, OFFSETS}:  # the table itself: its source is the stage's
                raise InputError(
                    "token vectors are gone or damaged",
                    file=folder,
                    value=", ".join(sorted(names)),
                    remedy="run `dvc repro -f precompute_embeddings`",
                )
            held = RowFile.open(folder / TABLE)
            params = manifest.recipe["params"]
            section = settings.Embeddings(mode=params["mode"], dtype=params["dtype"],
                                          chunk_tokens=manifest.counts["chunk_tokens"])  # fmt: skip
            table = held.read(0, held.shape[0])
            made = Making(folder, manifest.key, store, table, section, _blocks(folder, manifest))
            held.close()
            _write_small(made)
            if ROWS in names:
                write_rows(made, verify_all=True)

        artifact.ensure(folder, manifest.files, rebuild, full=full)
        return cls(folder, manifest, store)

    def blocks(self) -> dict[str, Tensor]:
        """Weights of the blocks that hidden states were made by."""
        from safetensors.torch import load_file

        return load_file(self._folder / BLOCKS)

    def table(self) -> Tensor:
        """(V, e) fp32."""
        return self._table

    def ids(self, start: int, stop: int) -> Tensor:
        """Training ids [start, stop), int64."""
        return torch.from_numpy(self.store.tokens("train", start, stop - start).astype(np.int64))

    def starts(self, start: int, stop: int) -> Tensor:
        """Whether a document begins at each token of [start, stop)."""
        first, last = np.searchsorted(self._starts, (start, stop))
        found = torch.zeros(stop - start, dtype=torch.bool)
        found[torch.from_numpy(self._starts[first:last] - start)] = True
        return found

    def rows(self, start: int, stop: int) -> Tensor:
        """Vectors of tokens [start, stop), (n, e) fp32."""
        if self._rows is None:
            return self._table[self.ids(start, stop)]
        return torch.from_numpy(decode(self._rows.read(start, stop), self.dtype))

    def stream(self, start: int, stop: int, rows: int) -> Iterator[Tensor]:
        """The same in pieces, read ahead."""
        assert self._rows is not None
        for raw in self._rows.stream(start, stop, rows):
            yield torch.from_numpy(decode(raw, self.dtype))

    def positions(self, numbers: Any) -> np.ndarray:
        """Where the inputs of packed rows `numbers` lie in the train split, (B, T); -1: nowhere."""
        return np.stack([self.store.row_positions(n)[:-1] for n in np.asarray(numbers).tolist()])

    def packed(self, numbers: Any) -> Tensor:
        """Vectors of the inputs of packed rows `numbers` (B,): (B, T, e) fp32."""
        found = torch.empty(len(numbers), self.store.context, self.width)
        for row, at in zip(found, self.positions(numbers), strict=True):
            cuts = np.flatnonzero(np.diff(at) != 1) + 1
            for piece in np.split(np.arange(len(at)), cuts):
                first = int(at[piece[0]])
                place = slice(int(piece[0]), int(piece[-1]) + 1)
                if first < 0:
                    assert self.reset_id is not None
                    row[place] = self._table[self.reset_id]
                else:
                    row[place] = self.rows(first, first + len(piece))
        return found


def _blocks(folder: Path, manifest: Manifest) -> Frozen | None:
    about: Any = manifest.counts.get("hidden")
    if about is None:
        return None
    from safetensors.torch import load_file

    return About(**about).build(load_file(folder / BLOCKS))
