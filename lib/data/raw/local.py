"""Sources that lie on this machine: which files, in which split, in which order.

In:    a source with local files. Out: their names and paths in order, and what is missing.
Law:   order is the order written, then the sorted names of a glob or folder; nothing is guessed: a
       validation file that is not there is an error, never another file in its place.
Note:  files are linked into scratch, never copied. The manifest keeps names, not folders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.core import files
from lib.core.artifact import FileEntry
from lib.core.data_settings import ArchiveSource, JsonlSource, ParquetSource, Source, TextSource
from lib.core.errors import InputError, KumikiError, UserError, raise_all
from lib.data.raw.remote import read_checksums
from lib.data.raw.shards import ShardFolder, check_parquet

Split = Literal["train", "val", "both", "file"]


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """One file. `both`: its lines are divided between the splits when it is read."""

    split: Split
    index: int
    name: str
    path: Path
    sha256: str | None = None  # a pin
    column: str | None = None  # of text, when it is Parquet


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of a source, and the names of those that may be absent and are."""

    files: list[LocalFile]
    missing: tuple[str, ...] = ()


def is_local(source: Source) -> bool:
    """Whether the source is nothing but files of this machine."""
    if isinstance(source, ParquetSource):
        return bool(source.train)
    if isinstance(source, ArchiveSource):
        return source.path is not None and Path(source.path).is_dir()
    return isinstance(source, JsonlSource | TextSource)


def find(source: Source, name: str) -> Found:
    """The files of source `name`. UserError for each one that has to be there and is not."""
    if isinstance(source, ParquetSource):
        found = _find_parquet(source, name)
    elif isinstance(source, JsonlSource):
        found = _find_jsonl(source, name)
    elif isinstance(source, TextSource):
        found = _find_txt(source, name)
    else:
        assert isinstance(source, ArchiveSource) and source.path is not None
        found = _find_unpacked(Path(source.path), source.keep, name)
    _refuse_equal_names(found.files)
    return found


def existing(source: ArchiveSource, name: str) -> Path:
    """The local archive file of a source; UserError when it is not there."""
    path = Path(source.path or "")
    if not path.is_file():
        raise _required(name, "path", path.parent, path.name)
    return path


def take(file: LocalFile, folder: ShardFolder, sha256: str) -> FileEntry:
    """Check one file and link it into its source's folder; returns its entry.

    InputError when it is empty, unlike its pin, or no Parquet file with text.
    """
    size = file.path.stat().st_size
    if size == 0 and file.split != "file":
        raise InputError("empty file", file=file.path, value="0 bytes", remedy="replace it")
    if file.sha256 not in (None, sha256):
        raise InputError(
            "sha256 differs",
            file=file.path,
            value=f"pinned {file.sha256}, found {sha256}",
            remedy="put the right file there, or mend `checksums`",
        )
    origin = "pinned" if file.sha256 else "first_use"
    extra = {"split": file.split, "index": file.index, "origin": origin}
    if file.column is not None:
        extra |= vars(check_parquet(file.path, file.column, decode=file.sha256 is None))
    target = folder.path / file.name
    if not (target.is_symlink() and target.readlink() == file.path.absolute()):
        files.point(file.path, target)
    return FileEntry(path=file.name, bytes=size, sha256=sha256, extra=extra)


# ---------------------------------------------------------------- which files


def _required(name: str, key: str, folder: Path, wanted: str) -> UserError:
    return UserError(
        "required file missing",
        file=folder,
        value=wanted,
        remedy=f"add it, or change download_shards.sources.{name}.{key}",
    )


def _find_parquet(source: ParquetSource, name: str) -> Found:
    folder, errors = Path(source.folder), []
    pins = read_checksums(Path(source.checksums)) if source.checksums else {}
    paths: dict[Split, list[Path]] = {"val": [], "train": []}
    for wanted in source.val:
        paths["val"].append(folder / wanted)
        if not (folder / wanted).is_file():
            errors.append(_required(name, "val", folder, wanted))
    for pattern in source.train:
        hits = _glob(folder, pattern)
        if not hits:
            errors.append(_required(name, "train", folder, pattern))
        paths["train"] += hits
    raise_all(errors)
    if leaked := sorted(set(paths["train"]) & set(paths["val"])):
        raise InputError(
            "validation shard is also a train shard",
            file=folder,
            value=leaked[0].name,
            remedy=f"leave it out of download_shards.sources.{name}.train",
        )
    found = [
        LocalFile(
            split=split,
            index=index,
            name=path.relative_to(folder).as_posix(),
            path=path,
            sha256=pins.get(path.name),
            column=source.text_column,
        )
        for split, listed in paths.items()
        for index, path in enumerate(listed)
    ]
    return Found(files=found)


def _glob(folder: Path, pattern: str) -> list[Path]:
    if pattern.startswith("/") or ".." in Path(pattern).parts:
        raise UserError(
            "pattern leaves its folder", file=folder, value=pattern, remedy="set folder to it"
        )
    return sorted(p for p in folder.glob(pattern) if p.is_file())


def _find_jsonl(source: JsonlSource, name: str) -> Found:
    folder, missing = Path(source.folder), []
    errors: list[KumikiError] = []
    found: list[LocalFile] = []
    for split, names in (("val", source.val), ("train", source.train)):
        for index, wanted in enumerate(names):  # in the order written: train_10 after train_9
            path = folder / wanted
            if path.is_file():
                found.append(LocalFile(split=split, index=index, name=wanted, path=path))  # type: ignore[arg-type]  # the literals above
            elif split == "val" or source.required == "all":
                errors.append(_required(name, split, folder, wanted))
            else:
                missing.append(wanted)
    if not any(f.split == "train" for f in found) and source.required != "all":
        errors.append(_required(name, "train", folder, ", ".join(source.train)))
    raise_all(errors)
    return Found(files=found, missing=tuple(missing))


def _find_txt(source: TextSource, name: str) -> Found:
    train = _texts(source.paths, name, "paths")
    if source.val:
        val = _texts(source.val, name, "val")
        parts: list[tuple[Split, list[tuple[str, Path]]]] = [("val", val), ("train", train)]
    elif source.document == "line":
        parts = [("both", train)]
    else:  # whole files: equal ones fall on the same side
        assert source.val_fraction is not None
        is_val = {n: _draw(path) < source.val_fraction for n, path in train}
        parts = [
            ("val", [t for t in train if is_val[t[0]]]),
            ("train", [t for t in train if not is_val[t[0]]]),
        ]
        if not all(listed for _, listed in parts):
            raise UserError(
                "a split without a file",
                value=f"val_fraction {source.val_fraction} of {len(train)} files",
                remedy=f"name files in download_shards.sources.{name}.val",
            )
    return Found(
        files=[
            LocalFile(split=split, index=index, name=n, path=path)
            for split, listed in parts
            for index, (n, path) in enumerate(listed)
        ]
    )


def _draw(path: Path) -> float:
    return int(files.sha256_file(path)[:16], 16) / 2**64


def _texts(paths: Iterable[str], name: str, key: str) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for written in paths:
        path = Path(written)
        if path.is_file():
            found.append((path.name, path))
            continue
        inner = sorted(path.rglob("*.txt")) if path.is_dir() else []
        if not inner:
            raise _required(name, key, path.parent, path.name)
        found += [(p.relative_to(path).as_posix(), p) for p in inner if p.is_file()]
    return found


def _find_unpacked(root: Path, keep: Iterable[str], name: str) -> Found:
    hits = {p for pattern in keep for p in _glob(root, pattern + "/*" * pattern.endswith("**"))}
    if not hits:
        raise _required(name, "path", root, ", ".join(keep))
    return Found(
        files=[
            LocalFile(split="file", index=i, name=p.relative_to(root).as_posix(), path=p)
            for i, p in enumerate(sorted(hits))
        ]
    )


def _refuse_equal_names(found: list[LocalFile]) -> None:
    seen: dict[str, LocalFile] = {}
    for file in found:
        first = seen.setdefault(file.name, file)
        if first is not file:
            raise InputError(
                "two files of one name",
                value=f"{first.path} and {file.path}",
                remedy="rename one, or take it out of the source",
            )
