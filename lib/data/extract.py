"""extract_texts: shards of a recipe -> cleaned, deduplicated documents and their ledger.

Pass 1, per shard, in workers: read, clean, make keys -> a unit in the work folder.
Pass 2, serial: which documents are duplicates.
Pass 3, per shard, in workers: the unit without them -> a part of the output folder.
Law:   same shards and recipe = same bytes, whatever the workers, kills and earlier runs. A unit is
       named by what it is made from and committed whole, so a rerun takes those that verify.
Memory: one batch and one row group a worker, 8 bytes a document for keys (112 more for `near`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib.core import artifact, files
from lib.core.artifact import FileEntry, Manifest
from lib.core.data_settings import Recipe
from lib.core.errors import InputError, KumikiError
from lib.core.process import PoolMap
from lib.data import dedup
from lib.data.clean import Rules, clean_batch, clean_long
from lib.data.documents import (
    KIND,
    part_file,
    part_name,
    parts_of,
    read_documents,
    read_parts,
    row_groups,
    val_sha256,
)
from lib.data.ledger import DUPLICATES, Entry, Ledger
from lib.data.raw.readers import Batch, Shard, read_shard

__all__ = ["Shard", "build_units", "extract_texts", "read_documents"]

REV = 1  # of the rules: raised when the same input would give other documents
UNIT = "document_unit"
DOCUMENTS, PREKEYS, BANDS = "documents.parquet", "prekeys.bin", "bands.bin"
SHINGLES, SHINGLE_COUNTS = "shingles.bin", "shingle_counts.bin"


@dataclass(frozen=True)
class UnitJob:
    """One shard to clean, and where its unit goes."""

    shard: Shard
    rules: Rules
    exact: bool
    near: bool
    folder: Path

    @property
    def recipe(self) -> dict[str, Any]:
        """What the unit is made from."""
        return {
            "rev": REV,
            "shard": identity(self.shard),
            "split": self.shard.split if self.shard.val_fraction is not None else None,
            "rules": artifact.plain(self.rules),
            "exact": self.exact,
            "near": self.near,
        }


def identity(shard: Shard) -> dict[str, Any]:
    """What of a shard decides its documents: never its folder."""
    return {
        "name": shard.name,
        "sha256": shard.sha256,
        "kind": shard.kind,
        "field": shard.field,
        "document": shard.document,
        "val_fraction": shard.val_fraction,
    }


# ---------------------------------------------------------------- pass 1


def build_unit(job: UnitJob) -> Path:
    """Make the unit of one shard, unless a verified one lies there; its folder."""
    folder = job.folder / artifact.key_of(UNIT, job.recipe)
    if not _verified(folder):
        with files.atomic_folder(folder) as part:
            entry, entries = _fill_unit(job, part)
            entry.check(job.shard.name)
            counts = entry.to_counts()
            Manifest(kind=UNIT, recipe=job.recipe, files=entries, counts=counts).write(
                part / files.MANIFEST
            )
    return folder


def _verified(folder: Path) -> bool:
    try:
        artifact.verify(folder, Manifest.read(folder / files.MANIFEST, UNIT))
    except KumikiError:
        return False  # absent or damaged: it is made again
    return True


def _fill_unit(job: UnitJob, folder: Path) -> tuple[Entry, tuple[FileEntry, ...]]:
    entry = Entry(shards=1)
    names = [PREKEYS] * job.exact + [BANDS, SHINGLES, SHINGLE_COUNTS] * job.near
    with ExitStack() as stack:
        outs = {n: stack.enter_context(files.atomic_file(folder / n)) for n in names}
        writer = stack.enter_context(part_file(folder / DOCUMENTS))
        for texts, ids, array in _cleaned(job, entry):
            writer.add(array, pa.array(ids, pa.string()))
            if job.exact:
                outs[PREKEYS].write(dedup.prekeys(texts).astype("<u8"))
            if job.near:
                sets = [dedup.shingles(text) for text in texts]
                outs[BANDS].write(dedup.band_keys(sets).astype("<u8"))
                outs[SHINGLES].write(np.concatenate(sets))
                outs[SHINGLE_COUNTS].write(np.array([len(s) for s in sets], "<u4"))
    entry.documents_out, entry.bytes_out = writer.documents, writer.bytes
    entries = [FileEntry(path=n, bytes=o.total_bytes, sha256=o.sha256) for n, o in outs.items()]
    return entry, (writer.entry(DOCUMENTS), *entries)


def _cleaned(job: UnitJob, entry: Entry) -> Iterator[tuple[list[str], list[str], pa.Array]]:
    """Documents of a shard in order, in batches."""
    for item in read_shard(job.shard, entry.read):
        if isinstance(item, Batch):
            texts, ids, array = clean_batch(item.texts, item.ids, job.rules, entry.clean)
            if texts:
                yield texts, ids, array
            continue
        # The id of a single piece has no number, so the second piece is looked at first.
        pieces = clean_long(item.chunks, job.rules, entry.clean)
        held, number = next(pieces, None), 0
        for piece in pieces:
            yield [held], [f"{item.id}#{number}"], pa.array([held], pa.string())  # type: ignore[list-item]
            held, number = piece, number + 1
        if held is not None:
            yield [held], [f"{item.id}#{number}" if number else item.id], pa.array([held])


def build_units(
    shards: Sequence[Shard], recipe: Recipe, work: Path, pool_map: PoolMap = map
) -> list[Path]:
    """Pass 1 for `shards` (all of a recipe, or one task's share); the units in their order."""
    jobs = [
        UnitJob(shard, Rules.of(recipe), recipe.dedup.exact, recipe.dedup.near, work)
        for shard in shards
    ]
    files.make_folder(work)
    return list(pool_map(build_unit, jobs))


# ---------------------------------------------------------------- pass 2


@dataclass(frozen=True)
class Duplicates:
    """Per unit: rows to drop (ascending) with their reasons; and the report of data.md 7.3."""

    rows: list[np.ndarray]
    reasons: list[np.ndarray]  # uint8, numbers in DUPLICATES
    report: dict[str, Any]


def find_duplicates(
    units: Sequence[Path], val_units: int, recipe: Recipe, pool_map: PoolMap = map
) -> Duplicates:
    """Decide over all units, validation ones first; `val_units` of them are validation."""
    counts = [Manifest.read(u / files.MANIFEST, UNIT).counts["documents_out"] for u in units]
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    total, val_documents = int(starts[-1]), int(starts[val_units])

    def full_keys(documents: np.ndarray) -> Iterable[np.ndarray]:
        jobs = [(u, rows) for u, rows in zip(units, _per_unit(documents, starts), strict=True)]
        return pool_map(full_keys_of, [job for job in jobs if len(job[1])])

    pairs = np.empty((0, 2), np.int64)
    if recipe.dedup.exact:
        pairs = dedup.exact_pairs([_array(u / PREKEYS, "<u8") for u in units], full_keys)
    reasons = np.full(len(pairs), DUPLICATES.index("dup_exact"), np.uint8)
    if recipe.dedup.near:
        dedup.check_near(total)
        alive = np.ones(total, bool)
        alive[pairs[:, 0]] = False
        bands = [_array(u / BANDS, "<u8").reshape(-1, dedup.BANDS) for u in units]
        near = dedup.near_pairs(np.concatenate(bands), alive, _ShingleSets(units, starts))
        pairs = np.concatenate([pairs, near])
        more = np.full(len(near), DUPLICATES.index("dup_near"), np.uint8)
        reasons = np.concatenate([reasons, more])
        order = np.argsort(pairs[:, 0])
        pairs, reasons = pairs[order], reasons[order]
    of_val = (pairs[:, 0] >= val_documents) & (pairs[:, 1] < val_documents)
    reasons[of_val] = DUPLICATES.index("dup_of_val")
    rows = _per_unit(pairs[:, 0], starts)
    borders = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    number, largest = dedup.clusters(pairs)
    names = _ids(units, starts, [kept for kept, _ in largest])
    table = [{"id": n, "documents": size} for n, (_, size) in zip(names, largest, strict=True)]
    return Duplicates(
        rows,
        [reasons[a:b] for a, b in pairwise(borders)],
        {"clusters": number, "largest": table},
    )


def full_keys_of(job: tuple[Path, np.ndarray]) -> np.ndarray:
    """uint8 (n, 16): full keys of some rows of a unit."""
    unit, rows = job
    keys = np.empty((len(rows), dedup.KEY_BYTES), np.uint8)
    for at, text in enumerate(_rows(unit, rows, "text")):
        keys[at] = np.frombuffer(dedup.full_key(text), np.uint8)
    return keys


def _rows(unit: Path, rows: np.ndarray, column: str) -> Iterator[str]:
    """Values of ascending rows of a unit, a row group in memory at a time."""
    start = 0
    for table in row_groups(unit / DOCUMENTS):
        low, high = np.searchsorted(rows, [start, start + len(table)])
        if high > low:
            yield from table.column(column).take(pa.array(rows[low:high] - start)).to_pylist()
        start += len(table)


def _ids(units: Sequence[Path], starts: np.ndarray, documents: list[int]) -> list[str]:
    found: dict[int, str] = {}
    wanted = _per_unit(np.sort(documents), starts)
    for unit, start, rows in zip(units, starts, wanted, strict=False):
        if len(rows):
            found |= zip((rows + start).tolist(), _rows(unit, rows, "id"), strict=True)
    return [found[document] for document in documents]


def _per_unit(documents: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Ascending document numbers as row numbers, one array a unit."""
    borders = np.searchsorted(documents, starts)
    return [
        np.asarray(documents[a:b], np.int64) - start
        for (a, b), start in zip(pairwise(borders), starts, strict=False)
    ]


def _array(path: Path, dtype: str) -> np.ndarray:
    """A file of numbers as a read-only map; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


class _ShingleSets:
    """Shingles of a document, by its number, out of the units' files."""

    def __init__(self, units: Sequence[Path], starts: np.ndarray) -> None:
        self.starts = starts
        self.sets = [_array(u / SHINGLES, "<u4") for u in units]
        self.ends = [np.cumsum(_array(u / SHINGLE_COUNTS, "<u4"), dtype=np.int64) for u in units]

    def __call__(self, document: int) -> np.ndarray:
        unit = int(np.searchsorted(self.starts, document, side="right")) - 1
        row = document - int(self.starts[unit])
        ends = self.ends[unit]
        return self.sets[unit][ends[row - 1] if row else 0 : ends[row]]


# ---------------------------------------------------------------- pass 3


@dataclass(frozen=True)
class PartJob:
    """One unit to publish as a part, without some of its rows."""

    unit: Path
    target: Path
    rows: np.ndarray
    reasons: np.ndarray


def write_part(job: PartJob) -> tuple[Entry, FileEntry]:
    """Write the part; the unit's entry with the duplicates counted, and the file's.

    A unit that loses nothing is linked: its bytes are those that writing it again would give.
    """
    unit = Manifest.read(job.unit / files.MANIFEST, UNIT)
    entry = Entry.from_counts(unit.counts)
    if not len(job.rows):
        files.link_or_copy(job.unit / DOCUMENTS, job.target)
        return entry, replace(unit.files[0], path=job.target.name)
    start = 0
    with part_file(job.target) as writer:
        for table in row_groups(job.unit / DOCUMENTS):
            low, high = np.searchsorted(job.rows, [start, start + len(table)])
            keep = np.ones(len(table), bool)
            keep[job.rows[low:high] - start] = False
            texts, ids = (table.column(c).combine_chunks() for c in ("text", "id"))
            gone = texts.filter(pa.array(~keep)).to_pylist()
            for text, reason in zip(gone, job.reasons[low:high], strict=True):
                entry.clean.drop(DUPLICATES[reason], len(text.encode()))
            writer.add(texts.filter(pa.array(keep)), ids.filter(pa.array(keep)))
            start += len(table)
    entry.documents_out, entry.bytes_out = writer.documents, writer.bytes
    return entry, writer.entry(job.target.name)


# ---------------------------------------------------------------- the stage


def build_share(
    shards: Sequence[Shard], recipe: Recipe, work: Path, pool_map: PoolMap, task: int, of: int
) -> int:
    """The units of every `of`th shard from `task` on; `extract_texts` finds them. Their number."""
    return len(build_units([_with_sha256(s) for s in shards[task::of]], recipe, work, pool_map))


def extract_texts(
    shards: Sequence[Shard],
    recipe: Recipe,
    work: Path,
    folder: Path,
    pool_map: PoolMap = map,
    missing: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Fill `folder` (under construction, `files.atomic_folder`); the manifest is written last.

    shards: in recipe order. work: kept between runs. pool_map: like `map`, may use processes.
    missing: names of shards that were asked for and are not there, by source; they go into the
    ledger. Raises InputError: damaged or duplicate shards, too many records lost, an empty split.
    """
    shards = [_with_sha256(shard) for shard in shards]
    _refuse_twins(shards)
    shards = sorted(shards, key=lambda shard: shard.split != "val")  # stable: validation first
    val_units = sum(shard.split == "val" for shard in shards)
    units = build_units(shards, recipe, work, pool_map)
    duplicates = find_duplicates(units, val_units, recipe, pool_map)
    jobs = [
        PartJob(unit, folder / part_name(s.split, s.source, s.index), rows, reasons)
        for unit, s, rows, reasons in zip(
            units, shards, duplicates.rows, duplicates.reasons, strict=True
        )
    ]
    ledger, parts = Ledger(), []
    for shard, (entry, part) in zip(shards, pool_map(write_part, jobs), strict=True):
        ledger.add(shard.source, shard.split, entry)
        parts.append(part)
    ledger.check(recipe.max_drop_fraction)
    table = {
        "sources": ledger.to_json(),
        "duplicates": duplicates.report | {"removed_share": _removed_share(ledger)},
        "missing": {source: list(names) for source, names in (missing or {}).items()},
    }
    files.write_json(folder / "ledger.json", table)
    return _commit(shards, recipe, folder, ledger, parts)


def _commit(
    shards: Sequence[Shard],
    recipe: Recipe,
    folder: Path,
    ledger: Ledger,
    parts: Sequence[FileEntry],
) -> Manifest:
    """Plain text where it is wanted, then the manifest."""
    names = [part.path for part in parts]
    others = ["ledger.json"]
    if recipe.plain_text:
        for split in ("train", "val"):
            others.append(f"{split}.txt")
            _write_plain(folder, parts_of(names, split), folder / others[-1])
    entries = [*parts, *(_listed(folder / name) for name in others)]
    manifest = Manifest(
        kind=KIND,
        recipe={
            "stage": "extract_texts",
            "rev": REV,
            "params": artifact.plain(recipe),
            "inputs": _inputs(shards),
        },
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
        counts={
            "splits": _split_counts(ledger),
            "val_sha256": val_sha256(read_parts(folder, parts_of(names, "val"))),
        },
    )
    manifest.write(folder / files.MANIFEST)
    return manifest


def _listed(path: Path) -> FileEntry:
    return FileEntry(path=path.name, bytes=path.stat().st_size, sha256=files.sha256_file(path))


def _write_plain(folder: Path, names: Iterable[str], path: Path) -> None:
    """One document a line; newlines inside become spaces."""
    with files.atomic_file(path) as out:
        for _, text in read_parts(folder, names):
            out.write(text.replace("\n", " ").encode() + b"\n")


def _inputs(shards: Sequence[Shard]) -> dict[str, str]:
    """source -> sha256 of its list of shards."""
    lists: dict[str, list] = {}
    for shard in shards:
        line = identity(shard) | {"split": shard.split, "index": shard.index}
        lists.setdefault(shard.source, []).append(line)
    return {s: hashlib.sha256(files.canonical_json(x)).hexdigest() for s, x in lists.items()}


def _split_counts(ledger: Ledger) -> dict[str, dict[str, dict[str, int]]]:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for (source, split), entry in ledger.entries.items():
        size = {"documents": entry.documents_out, "bytes": entry.bytes_out}
        counts.setdefault(split, {})[source] = size
    return counts


def _removed_share(ledger: Ledger) -> float:
    """Bytes of duplicates over the bytes of all cleaned documents."""
    out = sum(entry.bytes_out for entry in ledger.entries.values())
    gone = sum(
        size
        for entry in ledger.entries.values()
        for reason, (_, size) in entry.clean.dropped.items()
        if reason.startswith("dup_")
    )
    return round(gone / (out + gone), 6) if out + gone else 0.0


def _with_sha256(shard: Shard) -> Shard:
    if shard.sha256:
        return shard
    if not shard.path.is_file():
        raise InputError("file is missing", file=shard.path, remedy="fetch it again")
    return replace(shard, sha256=files.sha256_file(shard.path))


def _refuse_twins(shards: Sequence[Shard]) -> None:
    """One shard under two names, or on both sides, is refused (data.md 12)."""
    seen: dict[tuple[str, str | None], Shard] = {}
    for shard in shards:
        side = shard.split if shard.val_fraction is not None else None
        twin = seen.setdefault((shard.sha256, side), shard)
        if twin is not shard:
            raise InputError(
                "one shard stands twice in the recipe",
                file=shard.path,
                value=f"{twin.split} {twin.name}, {shard.split} {shard.name}",
                remedy="take one of the two out of its source",
            )
