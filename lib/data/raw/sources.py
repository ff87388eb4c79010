"""From the sources of params.yaml to verified shards in scratch, and the manifest that names them.

In:    section `download_shards`. Out: a manifest of kind `shards`: one entry a shard, named
       `<source>/<name>`, with split, index, origin of the sha256, rows and address in `extra`.
Law:   a source's folder in scratch is the key of its identity, which knows neither counts nor
       folders: more shards extend it, and moved local files change nothing.
Note:  local files are linked, never copied; their sha256 is part of the identity, so an edit shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.core import artifact, files, lock
from lib.core.artifact import FileEntry, Manifest
from lib.core.data_settings import (
    ArchiveSource,
    DownloadShards,
    EmbeddedSource,
    FilesSource,
    HubDatasetSource,
    ParquetSource,
    PinnedFile,
    SampleShuffle,
    Source,
)
from lib.core.errors import InputError, KumikiError, SeveralErrors, UserError, raise_all
from lib.core.process import PoolMap, worker_pool
from lib.core.run_settings import Runtime
from lib.data.raw import embedded, hub, local, remote
from lib.data.raw.shards import ShardFolder, write_parquet

if TYPE_CHECKING:
    from lib.data.raw.readers import Shard

REVISION = 1  # of the layout of what is materialised here: part of every identity
Log = Callable[[str], None]
_COUNTS = {  # keys of a source that say how much or where, not what
    "parquet": ("shards", "count", "max_bytes", "checksums", "folder", "train", "val"),
    "hf_dataset": ("max_train_samples", "max_eval_samples"),
    "archive": ("path",),
}
_READING = {  # of local files: how they are read
    "parquet": ("text_column",),
    "jsonl_gz": ("text_field",),
    "txt": ("document", "val_fraction"),
    "archive": (),
}


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one source gave: entries named without the source, and what the manifest tells of it."""

    entries: list[FileEntry]
    about: dict[str, Any] = field(default_factory=dict)


def identity_of(source: Source, name: str, seed: int) -> dict[str, Any]:
    """What decides the bytes of a source's shards, without counts and folders (data.md 3.1).

    Hashes local files; raises what `local.find` raises when one is missing.
    """
    plain = artifact.plain(source)
    kept = {k: v for k, v in plain.items() if k not in _COUNTS.get(source.kind, ())}
    if isinstance(source, EmbeddedSource):
        return {**kept, "seed": seed, "rev": REVISION, "about": embedded.versions(source)}
    if isinstance(source, HubDatasetSource):
        if source.eval_from_train:  # then the number of eval samples decides where train begins
            kept["max_eval_samples"] = source.max_eval_samples
        if found := hub.local_files(source):
            by_split = {s: [[p.name, _hash(p)] for p in paths] for s, paths in found[1].items()}
            kept |= {"repo": None, "files": by_split}
        return {**kept, "rev": REVISION}
    if local.is_local(source):
        found = local.find(source, name).files
        reading = {key: plain[key] for key in _READING[source.kind]}
        listed = sorted([f.name, _hash(f.path)] for f in found)
        return {"kind": source.kind, **reading, "files": listed}
    if isinstance(source, ArchiveSource) and source.path is not None:
        return {**kept, "files": [[Path(source.path).name, _hash(local.existing(source, name))]]}
    return kept


def identities(section: DownloadShards, seed: int) -> dict[str, dict[str, Any]]:
    """`identity_of` every source by name; all errors at once."""
    found: dict[str, dict[str, Any]] = {}
    errors: list[KumikiError] = []
    for name, source in sorted(section.sources.items()):
        try:
            found[name] = identity_of(source, name, seed)
        except KumikiError as error:
            errors += _each(error)
    raise_all(errors)
    return found


def _each(error: KumikiError) -> list[KumikiError]:
    return error.errors if isinstance(error, SeveralErrors) else [error]


def _hash(path: Path) -> str:
    stat = path.stat()
    return _hash_once(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache  # the frame asks for the identity, then the body does: one reading
def _hash_once(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    return files.sha256_file(path)


# ---------------------------------------------------------------- collecting


def collect(
    section: DownloadShards, seed: int, runtime: Runtime, pool: PoolMap, log: Log
) -> Manifest:
    """Have every shard of every source verified in scratch; returns the manifest.

    One source failing does not stop the others; all failures are raised at the end.
    """
    recipe, entries, counts = {}, [], {}
    errors: list[KumikiError] = []
    for name, identity in identities(section, seed).items():
        folder = ShardFolder(identity)
        try:
            with lock.exclusive_lock(folder.path, waiting=log):
                got = _collect_one(name, section.sources[name], folder, runtime, pool, log)
            _refuse_duplicates(name, got.entries)
        except (InputError, UserError, SeveralErrors) as error:  # not a full disk, not a stop
            log(f"source {name} failed, the others go on")
            errors += _each(error)
            continue
        recipe[name] = identity
        entries += [replace(e, path=f"{name}/{e.path}") for e in got.entries]
        counts[name] = {**got.about, "splits": _totals(got.entries)}
        log(f"{name}: {_told(counts[name]['splits'])}")
    raise_all(errors)
    return Manifest(
        kind="shards",
        recipe={"stage": "download_shards", "rev": REVISION, "sources": recipe},
        files=tuple(sorted(entries, key=lambda e: e.path)),
        counts={"sources": counts},
    )


def _collect_one(
    name: str,
    source: Source,
    folder: ShardFolder,
    runtime: Runtime,
    pool: PoolMap,
    log: Log,
) -> Collected:
    if isinstance(source, EmbeddedSource):
        return _embedded(source, folder, pool)
    if isinstance(source, HubDatasetSource):
        samples = hub.materialise(source, folder, log)
        parts = samples.entries.items()
        entries = [_placed(e, s, i) for s, listed in parts for i, e in enumerate(listed)]
        return Collected(entries=entries, about={"short": samples.short} if samples.short else {})
    if isinstance(source, FilesSource):
        wanted = remote.wanted_files(source)
        return Collected(entries=remote.bring(wanted, folder, None, runtime, log))
    if local.is_local(source):
        found = local.find(source, name)
        for missing in found.missing:
            log(f"warning: file is missing: {missing}; {name} goes on without it")
        entries = [local.take(f, folder, _hash(f.path)) for f in found.files]
        return Collected(
            entries=entries, about={"missing": list(found.missing)} if found.missing else {}
        )
    if isinstance(source, ArchiveSource):
        return Collected(entries=_archive(name, source, folder, runtime, log))
    assert isinstance(source, ParquetSource)
    log(remote.rule_of_thumb(source))
    wanted = remote.wanted_shards(source)
    return Collected(entries=remote.bring(wanted, folder, source, runtime, log))


def _embedded(source: EmbeddedSource, folder: ShardFolder, pool: PoolMap) -> Collected:
    """All shards at once: the split and the order need every document."""
    note = folder.note("corpus")
    remembered = [folder.remembered(name) for name in note["names"]] if note else []
    entries = [e for e in remembered if e is not None]
    if note is not None and len(entries) == len(note["names"]) and not folder.damaged(entries):
        return Collected(entries=entries, about=note["about"])
    corpus = embedded.read(source, folder.identity["seed"], pool)
    if not corpus.train or not corpus.val:
        raise InputError(
            "no documents",
            value=f"{len(corpus.train)} train, {len(corpus.val)} val in {corpus.files} files",
            remedy="name more packages",
        )
    entries = []
    for split, prefix, documents in (("train", "shard", corpus.train), ("val", "val", corpus.val)):
        for index, start in enumerate(range(0, len(documents), embedded.SHARD_DOCUMENTS)):
            part = documents[start : start + embedded.SHARD_DOCUMENTS]
            columns = {"text": [d.text for d in part], "id": [d.id for d in part]}
            path = folder.path / f"{prefix}_{index:05d}.parquet"
            entry, _ = write_parquet(path, columns, embedded.ROW_GROUP)
            entries.append(folder.remember(_placed(entry, split, index)))
    about = {
        "files": corpus.files,
        "unparsable": list(corpus.unparsable),
        "unencodable": corpus.unencodable,
    }
    folder.write_note("corpus", {"names": [e.path for e in entries], "about": about})
    return Collected(entries=entries, about=about)


def _placed(entry: FileEntry, split: str, index: int) -> FileEntry:
    return replace(
        entry, extra={**(entry.extra or {}), "split": split, "index": index, "origin": "first_use"}
    )


def _archive(
    name: str, source: ArchiveSource, folder: ShardFolder, runtime: Runtime, log: Log
) -> list[FileEntry]:
    """The kept members, each an entry. The archive itself stays beside them."""
    from lib.core import archive

    if source.url is not None:
        wanted = remote.wanted_archive(source)
        packed = folder.path / remote.bring([wanted], folder, None, runtime, log)[0].path
    else:
        packed = local.existing(source, name)
    note = folder.note("members")
    entries = [artifact.entry_from(e) for e in note["entries"]] if note else []
    if not entries or folder.damaged(entries):
        members = folder.path / "members"
        with files.atomic_folder(members) as part:
            archive.unpack(packed, part, source.keep)
        described = artifact.describe(members)
        entries = [
            _placed(replace(e, path=f"members/{e.path}"), "file", i)
            for i, e in enumerate(described)
        ]
        folder.write_note("members", {"entries": [artifact.entry_plain(e) for e in entries]})
    return entries


def _refuse_duplicates(source: str, entries: list[FileEntry]) -> None:
    """A shard twice, or a train shard that is the validation shard, would be trained on or leak."""
    seen: dict[str, FileEntry] = {}
    for entry in sorted(entries, key=lambda e: (_extra(e)["split"] != "val", e.path)):
        if _extra(entry)["split"] == "file":
            continue
        first = seen.setdefault(entry.sha256, entry)
        if first is not entry:
            splits = {_extra(first)["split"], _extra(entry)["split"]}
            leak = len(splits) == 2
            raise InputError(
                "validation shard is also a train shard" if leak else "duplicate shard",
                file=source,
                value=f"{first.path} and {entry.path}",
                remedy="keep one of them",
            )


def _extra(entry: FileEntry) -> dict[str, Any]:
    assert entry.extra is not None, "every shard's entry tells its split"
    return entry.extra


def _totals(entries: list[FileEntry]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for entry in entries:
        extra = _extra(entry)
        total = totals.setdefault(extra["split"], {"shards": 0, "bytes": 0})
        total["shards"] += 1
        total["bytes"] += entry.bytes
        if "rows" in extra:
            total["rows"] = total.get("rows", 0) + extra["rows"]
    return totals


def _told(totals: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(
        f"{split} {t['shards']} files, {t['bytes'] / 1e6:.1f} MB" for split, t in totals.items()
    )


# ---------------------------------------------------------------- ensuring


def damaged(manifest: Manifest, full: bool = False) -> dict[str, str]:
    """Shard -> what is wrong with its bytes in scratch; empty when all are right."""
    found = {}
    for name, folder, entries in _by_source(manifest):
        bad = folder.damaged(entries, full)
        found |= {f"{name}/{file}": what for file, what in bad.items()}
    return found


def ensure_shards(
    manifest: Manifest, section: DownloadShards | None, runtime: Runtime, log: Log
) -> list[Shard]:
    """The text shards of a manifest, verified; what scratch lost is made again from its recipe.

    section: where local files lie; None: a lost link to one is an InputError. A shard whose bytes
    come back different is an InputError that names it. Order: source, val before train, index.
    """
    shards: list[Shard] = []
    for name, folder, entries in _by_source(manifest):
        if folder.identity["kind"] not in ("files", "archive"):
            _ensure(name, folder, entries, section, runtime, log)
            for entry in entries:
                shards += _shards_of(name, folder, entry)
    return sorted(shards, key=lambda s: (s.source, s.split != "val", s.index))


def _shards_of(name: str, folder: ShardFolder, entry: FileEntry) -> list[Shard]:
    """How one file is read: once, or once for each split when its lines are divided."""
    from lib.data.raw.readers import Shard

    identity, extra = folder.identity, _extra(entry)
    kind = {"jsonl_gz": "jsonl", "txt": "txt"}.get(identity["kind"], "parquet")
    # materialised shards have the column `text`, whatever the field of the source was called
    key = {"jsonl_gz": "text_field", "parquet": "text_column"}.get(identity["kind"])
    both = extra["split"] == "both"
    return [
        Shard(
            source=name,
            split=split,
            index=extra["index"],
            path=folder.path / entry.path,
            kind=kind,  # type: ignore[arg-type]  # one of the three above
            field=identity[key] if key else "text",
            document=identity.get("document", "line"),
            val_fraction=identity["val_fraction"] if both else None,
            sha256=entry.sha256,
        )
        for split in (("val", "train") if both else (extra["split"],))
    ]


def ensure_files(
    manifest: Manifest, source: str, section: DownloadShards | None, runtime: Runtime, log: Log
) -> dict[str, Path]:
    """Name -> path of the verified files of a `files` or `archive` source."""
    for name, folder, entries in _by_source(manifest):
        if name == source:
            _ensure(name, folder, entries, section, runtime, log)
            return {e.path.removeprefix("members/"): folder.path / e.path for e in entries}
    raise UserError(
        "no such source in the shard manifest", value=source, remedy="`dvc repro download_shards`"
    )


def _by_source(manifest: Manifest) -> Iterator[tuple[str, ShardFolder, list[FileEntry]]]:
    for name, identity in sorted(manifest.recipe["sources"].items()):
        inside = [e for e in manifest.files if e.path.startswith(f"{name}/")]
        entries = [replace(e, path=e.path.removeprefix(f"{name}/")) for e in inside]
        yield name, ShardFolder(identity), entries


def _ensure(
    name: str,
    folder: ShardFolder,
    entries: list[FileEntry],
    section: DownloadShards | None,
    runtime: Runtime,
    log: Log,
) -> None:
    def rebuild(lost: list[FileEntry]) -> None:
        for entry in lost:
            log(f"warning: {name}/{entry.path} is missing or damaged in scratch, it is made again")
        with lock.exclusive_lock(folder.path, waiting=log):
            if folder.identity["kind"] == "parquet" and "files" not in folder.identity:
                wanted = [remote.wanted_again(e, folder.identity) for e in lost]
                remote.bring(wanted, folder, None, runtime, log)
                return
            declared = section.sources.get(name) if section else None
            source = _source_again(name, folder.identity, entries, declared)
            with worker_pool(runtime.workers) as pool:
                _collect_one(name, source, folder, runtime, pool, log)

    artifact.ensure(folder.path, entries, rebuild, full=runtime.verify == "full")


def _source_again(
    name: str, identity: Mapping[str, Any], entries: list[FileEntry], declared: Source | None
) -> Source:
    """The source that an identity and the counts of its shards stand for."""
    kind = identity["kind"]
    if kind == "embedded":
        keys = ("kind", "min_chars", "val_fraction")
        again = EmbeddedSource(
            **{k: identity[k] for k in keys}, packages=tuple(identity["packages"])
        )
        if (now := embedded.versions(again)) != identity["about"]:
            changed = [p for p in now if now[p] != identity["about"].get(p)]
            raise InputError(
                "the embedded corpus came from other packages",
                file=name,
                value=", ".join(f"{p} {identity['about'][p]['version']}" for p in changed),
                remedy="install these versions, or `dvc repro -f download_shards`",
            )
        return again
    if kind == "files":
        return FilesSource(
            kind=kind, files={n: PinnedFile(**f) for n, f in identity["files"].items()}
        )
    if kind == "hf_dataset" and "files" not in identity:
        totals = _totals(entries)
        known = {k: v for k, v in identity.items() if k != "rev"}
        known |= {
            f"max_{n}_samples": totals[s]["rows"] for n, s in (("train", "train"), ("eval", "val"))
        }
        field, shuffle = known["text_field"], known["shuffle"]
        known["text_field"] = tuple(field) if isinstance(field, list) else field
        known["shuffle"] = SampleShuffle(**shuffle) if shuffle else None
        return HubDatasetSource(**known)
    if kind == "archive" and identity.get("url"):
        return ArchiveSource(**{**identity, "keep": tuple(identity["keep"])})
    if declared is None:
        raise InputError(
            "file of a local source is missing",
            file=name,
            value=", ".join(e.path for e in entries[:3]),
            remedy="`dvc repro -f download_shards` finds it again",
        )
    return declared
