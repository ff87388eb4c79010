"""Encoding: documents x tokenizer -> token files, and the row index over them (data.md 9, 10).

In:    a documents folder with its manifest, a tokenizer folder, the settings of one encoding.
Out:   `<scratch>/tokens/<key>/`: ids part by part, offsets and text bytes by document,
       `rows/<key>/`, and the manifest that lists them all, which is the stage's output.
Laws:  documents and bytes encoded = extracted, L5 in sum, packing laws; a violation is a bug.
Pure:  bytes depend neither on workers nor on threads; a killed run goes on after finished parts.
Note:  the key leaves the packing out, so that another context packs anew and encodes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.core import files, lock
from lib.core.artifact import FileEntry, Manifest, key_of, plain
from lib.core.data_settings import Encoding
from lib.core.errors import InputError, UserError
from lib.core.process import PoolMap
from lib.core.rng import derive_seed
from lib.data.pack import Documents, PackCounts, RowBlock, pack_bestfit, pack_stream
from lib.data.parts import Part, PartCounts, Unit, encode_part, open_cached
from lib.data.recipe import MixtureReport, Visits, hash_order, mix
from lib.data.tokens import INT64, SPLITS, Split, id_dtype, rows_folder
from lib.data.vocab import chat
from lib.data.vocab.tokenizer import Tokenizer, load_tokenizer

REVISION = 1  # of the token files' meaning: raise it when the same settings give other bytes
CROP_WARNING = 0.40  # share of tokens lost to cropping that is worth a warning

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An encoding laid out: its units in document order and what the token files are keyed by."""

    settings: Encoding
    documents: Manifest
    recipe: dict[str, Any]  # of the token files
    lossless: bool
    folder: Path
    units: tuple[Unit, ...]


def plan_encoding(
    settings: Encoding,
    documents_folder: Path,
    tokenizer_folder: Path,
    scratch: Path,
    *,
    threads: int = 1,
    open_tokenizer: Callable[[Path], Tokenizer] = load_tokenizer,
) -> Plan:
    """Read the manifests, lay out the units; UserError when the tokenizer lacks a boundary id."""
    documents = Manifest.read(documents_folder / files.MANIFEST)
    tokenizer = open_cached(open_tokenizer, tokenizer_folder)
    for name in ("bos", "eos"):
        if settings.boundary in (name, "both") and getattr(tokenizer, f"{name}_id") is None:
            raise UserError(
                f"tokenizer has no {name} id",
                file=tokenizer_folder,
                value=f"boundary: {settings.boundary}",
                remedy="choose another boundary for this encoding",
            )
    if framed := settings.template == chat.JOIN:
        chat.require_ids(tokenizer)
    recipe = {
        "stage": "encode_tokens",
        "rev": REVISION,
        "params": {
            "boundary": settings.boundary,
            "truncate_tokens": settings.truncate_tokens,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            **({"template": settings.template} if framed else {}),
        },
        "inputs": {"documents": documents.sha256, "tokenizer": tokenizer.fingerprint},
    }
    folder = scratch / "tokens" / key_of("tokens", recipe)
    numbers: dict[str, int] = dict.fromkeys(SPLITS, 0)
    units = []
    for entry in documents.files:
        if not entry.path.endswith(".parquet"):
            continue
        split, source = _split_and_source(entry.path, documents)
        units.append(
            Unit(
                part=documents_folder / entry.path,
                sha256=entry.sha256,
                split=split,
                number=numbers[split],
                source=source,
                folder=folder,
                tokenizer_folder=tokenizer_folder,
                open_tokenizer=open_tokenizer,
                boundary=settings.boundary,
                truncate_tokens=settings.truncate_tokens,
                threads=threads,
                framed=framed,
            )
        )
        numbers[split] += 1
    return Plan(
        settings=settings,
        documents=documents,
        recipe=recipe,
        lossless=tokenizer.lossless,
        folder=folder,
        units=tuple(units),
    )


def _split_and_source(name: str, documents: Manifest) -> tuple[Split, str]:
    """`<split>_<source>_<shard>.parquet` taken apart; source and shard may hold underscores."""
    prefix, _, rest = name.partition("_")
    sources = documents.recipe["params"]["sources"]
    fitting = [source for source in sources if rest.startswith(f"{source}_")]
    split: Split | None = next((split for split in SPLITS if split == prefix), None)
    if split is None or not fitting:
        raise InputError(
            "documents part of no declared source", value=name, remedy="run extract_texts again"
        )
    return split, max(fitting, key=len)


def encode(plan: Plan, pool_map: PoolMap, log: Log, task: int | None = None) -> Manifest | None:
    """Encode what is not encoded yet, merge, pack; returns the manifest, which the stage writes.

    `task` i encodes units i, i + n_tasks, ... alone and returns None: a job array does that first,
    and the run without a task then finds every unit finished. Memory: one batch of text a worker,
    about 50 bytes a training document while packing. UserError when not one row can be packed.
    """
    mine = plan.units if task is None else plan.units[task :: plan.settings.n_tasks]
    with lock.exclusive_lock(plan.folder if task is None else plan.folder / f"task_{task}"):
        if task is None:
            for folder in (plan.folder, plan.folder / "units"):
                files.sweep_parts(folder)
        files.check_space(plan.folder, _estimate_bytes(plan, mine))
        parts = list(pool_map(encode_part, mine))
        if task is not None:
            return None
        totals = _count(plan, parts)
        for split, total in totals.items():
            log(
                f"{split}: {total.documents:,} documents, {total.bytes:,} bytes, "
                f"{total.tokens:,} tokens"
            )
        entries = [_ids_entry(plan, unit, part) for unit, part in zip(mine, parts, strict=True)]
        for split in SPLITS:
            entries += _merge_documents(plan, split)
        row_entries, about_rows = _write_rows(plan, log)
        return Manifest(
            kind="tokens",
            recipe=plan.recipe,
            files=(*entries, *row_entries),
            counts={**{s: t.plain() for s, t in totals.items()}, **about_rows},
        )


def _estimate_bytes(plan: Plan, units: tuple[Unit, ...]) -> int:
    """Bytes of the id files still to be written: 0.7 ids a byte of zstd Parquet (seen: 0.6)."""
    sizes = {entry.path: entry.bytes for entry in plan.documents.files}
    left = sum(sizes[unit.part.name] for unit in units if not unit.ids_path.is_file())
    return int(0.7 * left) * id_dtype(plan.recipe["params"]["vocab_size"]).itemsize


def _count(plan: Plan, parts: list[Part]) -> dict[Split, PartCounts]:
    """Sums per split; asserts that every document and byte extracted was encoded (L5)."""
    by_source: dict[tuple[Split, str], PartCounts] = {}
    totals: dict[Split, PartCounts] = {split: PartCounts() for split in SPLITS}
    for unit, part in zip(plan.units, parts, strict=True):
        by_source.setdefault((unit.split, unit.source), PartCounts()).add(part.counts)
        totals[unit.split].add(part.counts)
    for split in SPLITS:
        for source, wanted in plan.documents.counts["splits"].get(split, {}).items():
            found = by_source.get((split, source), PartCounts())
            for name in ("documents", "bytes"):
                given, got = wanted[name], getattr(found, name)
                if name == "bytes" and plan.settings.template == chat.JOIN:
                    got += found.frame_bytes
                assert given == got, f"{split} {source}: {given} {name} extracted, {got} encoded"
        held = totals[split].content_bytes
        assert not plan.lossless or held == totals[split].bytes, (
            f"L5 broken in {split}: {totals[split]}"
        )
    return totals


def _ids_entry(plan: Plan, unit: Unit, part: Part) -> FileEntry:
    dtype = id_dtype(plan.recipe["params"]["vocab_size"])
    return FileEntry(
        path=unit.ids_path.name,
        bytes=part.counts.tokens * dtype.itemsize,
        sha256=part.ids_sha256,
        dtype=dtype.str,
        shape=(part.counts.tokens,),
    )


def _entry(name: str, out: files.Output, dtype: str, count: int) -> FileEntry:
    return FileEntry(
        path=name, bytes=out.total_bytes, sha256=out.sha256, dtype=dtype, shape=(count,)
    )


def _merge_documents(plan: Plan, split: str) -> list[FileEntry]:
    """Write the offsets and text bytes of a split's documents, one part in memory at a time."""
    names = f"{split}_offsets.bin", f"{split}_bytes.bin"
    documents = end = 0
    with (
        files.atomic_file(plan.folder / names[0]) as offsets,
        files.atomic_file(plan.folder / names[1]) as text_bytes,
    ):
        offsets.write(np.zeros(1, INT64).tobytes())
        for unit in plan.units:
            if unit.split != split:
                continue
            tokens, bytes_ = np.fromfile(unit.side("documents.bin"), INT64).reshape(-1, 2).T
            offsets.write((end + np.cumsum(tokens)).astype(INT64).tobytes())
            text_bytes.write(bytes_.astype(INT64).tobytes())
            documents, end = documents + len(tokens), end + int(tokens.sum())
    return [
        _entry(names[0], offsets, INT64.str, documents + 1),
        _entry(names[1], text_bytes, INT64.str, documents),
    ]


# ---------------------------------------------------------------- rows


def row_params(settings: Encoding) -> dict[str, Any]:
    """The settings that decide the rows, given the token files."""
    names = ["packing", "context", "order", "seed", "max_tokens"]
    names += ["crop", "buffer"] if settings.packing == "bestfit" else []
    return {name: plain(getattr(settings, name)) for name in names}


def _write_rows(plan: Plan, log: Log) -> tuple[list[FileEntry], dict[str, Any]]:
    """Pack the training documents; returns the files and, for the manifest, what they came to."""
    settings = plan.settings
    params = row_params(settings)
    key = key_of("rows", {"rev": REVISION, "params": params, "tokens": plan.folder.name})
    report, counts = MixtureReport.of(_sources(plan)), PackCounts()
    documents = _visit_documents(plan, report)
    name = rows_folder(key)
    files.sweep_parts(plan.folder / name)
    with (
        files.atomic_file(plan.folder / name / "segments.bin") as segments,
        files.atomic_file(plan.folder / name / "row_ptr.bin") as row_ptr,
    ):
        row_ptr.write(np.zeros(1, INT64).tobytes())
        for block in _pack(documents, counts, settings):
            ends = counts.segments - len(block.segments) + np.cumsum(block.row_segments)
            segments.write(block.segments.tobytes())
            row_ptr.write(ends.astype(INT64).tobytes())
        _log_rows(settings, report, counts, log)
        if not counts.rows:
            raise UserError(
                "no row can be packed",
                value=f"{counts.tokens} tokens of training text, context {settings.context}",
                remedy="choose a smaller context, or more documents",
            )
    entries = [
        _entry(f"{name}/segments.bin", segments, "<i8,<i4", counts.segments),
        _entry(f"{name}/row_ptr.bin", row_ptr, INT64.str, counts.rows + 1),
    ]
    return entries, {
        "rows": {"key": key, "params": params, **asdict(counts)},
        "sources": report.as_json(),
    }


def _pack(documents: Documents, counts: PackCounts, settings: Encoding) -> Iterator[RowBlock]:
    if settings.packing == "stream":
        return pack_stream(documents, counts, context=settings.context)
    return pack_bestfit(
        documents,
        counts,
        context=settings.context,
        buffer=settings.buffer,
        crop=settings.crop,
    )


def _visit_documents(plan: Plan, report: MixtureReport) -> Documents:
    """Starts and lengths of the training documents in recipe order, up to `max_tokens`."""
    settings, recipe = plan.settings, plan.documents.recipe["params"]
    members = _members(plan)
    offsets = np.fromfile(plan.folder / "train_offsets.bin", INT64)
    text_bytes = np.fromfile(plan.folder / "train_bytes.bin", INT64)
    lengths = np.diff(offsets)

    def order(source: int, epoch: int) -> np.ndarray | None:
        if epoch == 0 and settings.order == "as_is":
            return None
        seed = derive_seed(settings.seed, "document order", epoch) if epoch else settings.seed
        return hash_order(members[source], seed)

    left = settings.max_tokens
    for visits in mix(
        [recipe["sources"][share.name] for share in report.sources],
        [lengths[one] for one in members],
        recipe["on_exhausted"],
        recipe["max_epochs"],
        order,
    ):
        visited = _global_numbers(visits, members)
        if left is not None:  # the document that reaches the limit is the last
            reach = int(np.searchsorted(np.cumsum(lengths[visited]), left)) + 1
            visits, visited = visits.head(reach), visited[:reach]
            left -= int(lengths[visited].sum())
        report.add(visits, lengths[visited], text_bytes[visited])
        yield offsets[visited], lengths[visited]
        if left is not None and left <= 0:
            return


def _sources(plan: Plan) -> dict[str, float]:
    """Source -> weight in the order of the documents: canonical JSON has lost the written one."""
    weights = plan.documents.recipe["params"]["sources"]
    names = dict.fromkeys([u.source for u in plan.units if u.split == "train"] + sorted(weights))
    return {name: weights[name] for name in names}


def _members(plan: Plan) -> list[np.ndarray]:
    """For each source the numbers of its training documents, int64, ascending."""
    ranges: dict[str, list[np.ndarray]] = {name: [] for name in _sources(plan)}
    first = 0
    for unit in plan.units:
        if unit.split == "train":
            last = first + unit.side("documents.bin").stat().st_size // (2 * INT64.itemsize)
            ranges[unit.source].append(np.arange(first, last))
            first = last
    return [np.concatenate([np.empty(0, np.int64), *one]) for one in ranges.values()]


def _global_numbers(visits: Visits, members: list[np.ndarray]) -> np.ndarray:
    """The documents' numbers within the split."""
    numbers = np.empty(len(visits), np.int64)
    for source, one in enumerate(members):
        here = visits.source == source
        numbers[here] = one[visits.document[here]]
    return numbers


def _log_rows(settings: Encoding, report: MixtureReport, counts: PackCounts, log: Log) -> None:
    for line in report.lines():
        log(line)
    for line in report.warnings():
        log(f"warning: {line}")
    log(
        f"{counts.rows:,} rows of {settings.context} + 1 tokens from {counts.tokens:,}, "
        f"{100 * counts.crop_share:.1f} % cropped, {counts.tail} left over"
    )
    if counts.crop_share > CROP_WARNING:
        log(
            f"warning: packing loses tokens: {100 * counts.crop_share:.1f} % cropped; "
            "use a longer context, crop: requeue or packing: stream"
        )
