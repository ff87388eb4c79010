"""Shards over HTTP: which files a source means, and bringing them verified into its folder.

In:    a `parquet` source with a host, or a `files` source. Out: entries by split, in index order.
Law:   the validation shard is known by name and always fetched; train is 0 .. shards-1 without it.
       A file that was whole once has to come back with the same sha256, whatever the host says now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from lib.core import fetch, files, transfer
from lib.core.artifact import FileEntry
from lib.core.data_settings import ArchiveSource, FilesSource, ParquetSource
from lib.core.errors import InputError, Interrupted, KumikiError, UserError
from lib.core.hosts import Policy, bare
from lib.core.progress import progress
from lib.core.run_settings import Runtime
from lib.data.raw.shards import ShardFolder, check_parquet

Log = Callable[[str], None]
Split = Literal["train", "val", "file"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHARS_PER_SHARD, _CHARS_PER_TOKEN = 250_000_000, 4.8  # of the FineWeb shards, data.md 4.2


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One file to have. sha256: what it must be, by a pin, a manifest or an earlier run."""

    split: Split
    index: int
    name: str
    url: str
    revision: str | None = None
    size: int | None = None
    sha256: str | None = None
    origin: str | None = None  # who vouches for sha256
    column: str | None = None  # of text, when it is a Parquet shard
    max_bytes: int = transfer.MAX_BYTES


def policy_for(urls: Iterable[str], runtime: Runtime) -> Policy:
    """The hosts written in a source, what `runtime` allows, and the hub's token if there is one."""
    from huggingface_hub import get_token

    return Policy(
        allowed_hosts=tuple(sorted({urlsplit(url).hostname or "" for url in urls})),
        private_hosts=runtime.allow_private_hosts,
        token=get_token(),  # HF_TOKEN or the login file; the policy gives it to the hub only
        max_rate=runtime.max_rate,
    )


# ---------------------------------------------------------------- which files


def shard_url(source: ParquetSource, index: int, revision: str) -> str:
    """Address of shard `index`."""
    try:
        return source.pattern.format(repo=source.repo, revision=revision, i=index)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            "not a pattern",
            file="params.yaml",
            value=f"{source.pattern} ({error})",
            remedy="use {repo}, {revision} and {i:05d}",
        ) from error


def shard_name(source: ParquetSource, index: int) -> str:
    """File name of shard `index`: the last part of its address."""
    return PurePosixPath(urlsplit(shard_url(source, index, source.revision)).path).name


def wanted_shards(source: ParquetSource) -> list[Wanted]:
    """The validation shard, then the train shards; UserError when the host has no `val_name`."""
    assert source.count is not None and source.shards is not None  # refused in settings
    names = {shard_name(source, i): i for i in range(source.count)}
    if source.val_name not in names:
        raise UserError(
            "no such shard",
            value=f"val_name {source.val_name}",
            remedy=f"the host's shards are {min(names)} to {max(names)}",
        )
    val = names[source.val_name]
    train = [i for i in range(source.shards) if i != val]
    pins = read_checksums(Path(source.checksums)) if source.checksums else {}

    def wanted(split: Split, index: int) -> Wanted:
        name = shard_name(source, index)
        return Wanted(
            split=split,
            index=index,
            name=name,
            url=shard_url(source, index, source.revision),
            sha256=pins.get(name),
            origin="pinned" if name in pins else None,
            column=source.text_column,
            max_bytes=source.max_bytes,
        )

    return [wanted("val", val), *(wanted("train", i) for i in train)]


def wanted_again(entry: FileEntry, identity: Mapping[str, Any]) -> Wanted:
    """A shard as its manifest knows it: the same commit, the same bytes."""
    assert entry.extra is not None
    revision = entry.extra.get("revision")
    url = identity["pattern"].format(
        repo=identity["repo"], revision=revision, i=entry.extra["index"]
    )
    return Wanted(
        split=entry.extra["split"],
        index=entry.extra["index"],
        name=entry.path,
        url=url,
        revision=revision,
        size=entry.bytes,
        sha256=entry.sha256,
        origin=entry.extra["origin"],
        column=identity["text_column"],
    )


def wanted_archive(source: ArchiveSource) -> Wanted:
    """The one file of an archive source."""
    assert source.url is not None
    return Wanted(
        split="file",
        index=0,
        name=PurePosixPath(urlsplit(source.url).path).name or "archive",
        url=source.url,
        sha256=source.sha256,
        origin="pinned" if source.sha256 else None,
    )


def wanted_files(source: FilesSource) -> list[Wanted]:
    """The named files, in the order of their names; each is pinned."""
    return [
        Wanted(
            split="file",
            index=index,
            name=name,
            url=pinned.url,
            sha256=pinned.sha256,
            origin="pinned",
            size=pinned.bytes,
        )
        for index, (name, pinned) in enumerate(sorted(source.files.items()))
    ]


def read_checksums(path: Path) -> dict[str, str]:
    """Name -> sha256 from lines `<sha256>  <name>`, as sha256sum writes them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError("no such file", file=path, remedy="mend `checksums`") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-f]{64})\s+\*?(\S+)", line.strip())
        if match is None:
            raise UserError(
                "not `<sha256>  <name>`", file=path, value=f"line {number}", remedy="mend the line"
            )
        found[PurePosixPath(match[2]).name] = match[1]
    return found


def rule_of_thumb(source: ParquetSource) -> str:
    """How far the chosen shards reach, for the log."""
    tokens = (source.shards or 0) * _CHARS_PER_SHARD / _CHARS_PER_TOKEN
    return f"{source.shards} shards of the FineWeb size are about {tokens / 1e9:.1f} billion tokens"


# ---------------------------------------------------------------- bringing them


def bring(
    wanted: list[Wanted],
    folder: ShardFolder,
    source: ParquetSource | None,
    runtime: Runtime,
    log: Log,
) -> list[FileEntry]:
    """Have every file of `wanted` in `folder`, verified; entries in the same order.

    What is there and right is not asked for. One failing does not stop the others; at the end all
    failures are raised together (exit 3; 4 when the host is unreachable, 2 when it refuses).
    source: whose revision the addresses follow, None for plain ones. The caller holds the lock.
    """
    known = {w.name: folder.remembered(w.name) for w in wanted}
    bad = folder.damaged(e for e in known.values() if e is not None)
    todo = []
    for one in (_with_memory(w, known[w.name]) for w in wanted):
        entry = known[one.name]
        if entry is None or entry.path in bad or entry.sha256 != one.sha256:
            if bad.get(one.name, "missing") != "missing":
                log(f"warning: {one.name} is damaged ({bad[one.name]}), it is fetched again")
            todo.append(one)
    if todo:
        policy = policy_for((w.url for w in todo), runtime)
        if source is not None:
            todo = _at_commit(todo, source, folder, policy, log)
        _fetch(todo, folder, policy, runtime, log)
    entries = [folder.remembered(w.name) for w in wanted]
    assert all(entries), "every fetched file has its note"
    return [e for e in entries if e is not None]


def _with_memory(wanted: Wanted, entry: FileEntry | None) -> Wanted:
    """A pin goes first; else an earlier run's sha256 is what the file has to be."""
    if entry is None or wanted.sha256 is not None:
        return wanted
    assert entry.extra is not None
    return replace(wanted, sha256=entry.sha256, size=entry.bytes, origin=entry.extra["origin"])


def _at_commit(
    todo: list[Wanted], source: ParquetSource, folder: ShardFolder, policy: Policy, log: Log
) -> list[Wanted]:
    """The same files at the commit that the revision meant when the folder was begun.

    One question, about the first file: an unreachable host is known before the other hundreds.
    """
    if "{revision}" not in source.pattern:
        return todo
    commit, path = source.revision, folder.path / "notes" / "revision.json"
    if not _COMMIT.fullmatch(commit):
        note = files.read_note(path)
        if note is None:
            note = {"commit": _head(todo[0], policy, log).commit or source.revision}
            files.write_note(path, note)
        commit = note["commit"]
    return [
        replace(w, url=shard_url(source, w.index, commit), revision=commit)
        if w.revision is None
        else w
        for w in todo
    ]


def _head(wanted: Wanted, policy: Policy, log: Log) -> fetch.Remote:
    try:
        return fetch.head(wanted.url, policy, log=log)
    except UserError as error:
        if wanted.split != "val" or not re.search(r"\b(404|410)\b", str(error.value)):
            raise
        # never another shard in its place
        raise InputError(
            "the validation shard is absent",
            file=bare(wanted.url),
            value=error.value,
            remedy="check val_name and revision",
        ) from error


def _fetch(
    todo: list[Wanted], folder: ShardFolder, policy: Policy, runtime: Runtime, log: Log
) -> None:
    remotes = _sizes(todo, policy, runtime, log)
    sizes = [w.size or (r.size if r else None) or 0 for w, r in zip(todo, remotes, strict=True)]
    files.check_space(folder.path, sum(sizes))
    log(f"fetching {len(todo)} files, {sum(sizes) / 1e6:.1f} MB")
    total = float(sum(sizes)) if all(sizes) else None
    with progress(total, "B", "download", every_s=runtime.log_every_s) as received:
        _fetch_all(todo, remotes, folder, policy, runtime, log, received)


def _fetch_all(
    todo: list[Wanted],
    remotes: list[fetch.Remote | None],
    folder: ShardFolder,
    policy: Policy,
    runtime: Runtime,
    log: Log,
    received: Callable[[float], None],
) -> None:
    jobs, by_target = [], {}
    for one, remote in zip(todo, remotes, strict=True):
        target = folder.path / one.name
        vouched = one.sha256 is not None or (remote is not None and remote.sha256 is not None)
        jobs.append(
            transfer.Job(
                url=one.url,
                target=target,
                size=one.size,
                sha256=one.sha256,
                max_bytes=one.max_bytes,
                verify=_verifier(one, decode=not vouched),
                received=received,
            )
        )
        by_target[target] = one

    def done(job: transfer.Job, fetched: transfer.Fetched) -> None:
        folder.remember(_entry(by_target[job.target], job.target, fetched))

    fetch.fetch_all(jobs, policy, workers=runtime.download_workers, log=log, done=done)


def _sizes(
    todo: list[Wanted], policy: Policy, runtime: Runtime, log: Log
) -> list[fetch.Remote | None]:
    """What the host says of each file whose size is not known; its refusal is told by the fetch."""

    def ask(one: Wanted) -> fetch.Remote | None:
        if one.size is not None:
            return None
        try:
            return _head(one, policy, log)
        except (Interrupted, InputError):
            raise
        except KumikiError as error:
            log(f"size unknown: {error}")
            return None

    with ThreadPoolExecutor(runtime.download_workers) as pool:
        return list(pool.map(ask, todo))


def _verifier(wanted: Wanted, decode: bool) -> Callable[[Path], None] | None:
    column = wanted.column
    if column is None:
        return None

    def verify(path: Path) -> None:
        check_parquet(path, column, decode=decode, name=wanted.name)

    return verify


def _entry(wanted: Wanted, path: Path, fetched: transfer.Fetched) -> FileEntry:
    extra = {
        "split": wanted.split,
        "index": wanted.index,
        "origin": wanted.origin or fetched.origin,
        "url": bare(wanted.url),
        "revision": wanted.revision,
        "etag": fetched.etag,
    }
    if wanted.column is not None:
        extra |= vars(check_parquet(path, wanted.column, decode=False))
    return FileEntry(path=wanted.name, bytes=fetched.bytes, sha256=fetched.sha256, extra=extra)
