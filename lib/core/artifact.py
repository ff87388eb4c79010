"""Manifests: what an artefact is made from (recipe, key) and what it holds (files, hashes, counts).

A manifest is written last; a folder or a scratch generation without one that verifies does not
exist. `key` hashes what was asked for, `sha256` what is there. No time, host, absolute path or
version enters either. A manifest carries a checksum of itself: all else that is read is believed
because a manifest says so, hence one flipped bit in it must be seen too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from lib.core import files
from lib.core.errors import InputError, UserError

FORMAT, VERSION = "kumiki/manifest", 2
STAMPS = ".stamps.json"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of an artefact; `dtype` (numpy notation) and `shape` where it is an array.

    extra: what a kind of artefact tells about each of its files (JSON values).
    """

    path: str
    bytes: int
    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of one artefact, canonical JSON on disk."""

    kind: str
    recipe: dict[str, Any]
    files: tuple[FileEntry, ...] = ()
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hex digits over kind and recipe: the name of the artefact's folder in scratch."""
        return key_of(self.kind, self.recipe)

    @property
    def sha256(self) -> str:
        """Hash of the manifest's bytes: the identity of everything it lists."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "key": self.key,
            "recipe": self.recipe,
            "files": [entry_plain(e) for e in self.files],
            "counts": self.counts,
        }
        return files.canonical_json({**content, "check": _checksum(content)})

    def write(self, path: Path) -> None:
        """Write the manifest, whole or not at all."""
        files.write_bytes(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path, kind: str | None = None) -> Manifest:
        """Read a manifest; UserError when missing or of another kind, InputError when damaged."""
        raw, data = files.read_json_and_bytes(Path(path))
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise InputError(
                "not a manifest", file=path, remedy="run the stage that makes it again"
            )
        if raw.get("version") != VERSION:
            raise UserError(
                "manifest of another format version",
                file=path,
                value=f"{raw.get('version')}, this is {VERSION}",
                remedy="run the stage that makes it again",
            )
        # Its file is an input by its bytes, so a change that JSON does not see counts as well.
        if not _is_as_written(raw) or data != files.canonical_json(raw):
            raise InputError(
                "manifest differs from what was written",
                file=path,
                remedy="run the stage that makes it again",
            )
        if kind is not None and raw.get("kind") != kind:
            raise UserError("wrong kind of artefact", file=path, value=f"{raw['kind']}, not {kind}")
        try:
            entries = tuple(entry_from(e) for e in raw["files"])
            manifest = cls(
                kind=raw["kind"], recipe=raw["recipe"], files=entries, counts=raw["counts"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "damaged manifest", file=path, value=error, remedy="run its stage again"
            ) from error
        if manifest.key != raw.get("key"):
            raise InputError(
                "manifest does not match its key", file=path, remedy="run its stage again"
            )
        return manifest


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(files.canonical_json(content)).hexdigest()[:16]


def _is_as_written(raw: dict[str, Any]) -> bool:
    content = {name: value for name, value in raw.items() if name != "check"}
    try:
        return raw.get("check") == _checksum(content)
    except ValueError:  # a number or character that canonical JSON has not
        return False


def entry_from(raw: dict[str, Any]) -> FileEntry:
    """A FileEntry as a manifest writes it; KeyError, TypeError or ValueError when it is none."""
    name = raw["path"]
    if not isinstance(name, str) or name.startswith("/") or ".." in Path(name).parts:
        raise ValueError(f"path outside the artefact: {name!r}")
    shape = tuple(int(n) for n in raw["shape"]) if "shape" in raw else None
    return FileEntry(
        path=name,
        bytes=int(raw["bytes"]),
        sha256=str(raw["sha256"]),
        dtype=raw.get("dtype"),
        shape=shape,
        extra=raw.get("extra"),
    )


def entry_plain(entry: FileEntry) -> dict[str, Any]:
    """What a manifest writes for `entry`: its fields, without the absent ones."""
    return {k: v for k, v in asdict(entry).items() if v is not None}


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON knows; for recipes and fingerprints."""
    if is_dataclass(value) and not isinstance(value, type):
        return {k: plain(v) for k, v in vars(value).items()}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def key_of(kind: str, recipe: Any) -> str:
    """sha256 of canonical {kind, recipe}, the first 16 hex digits (pipeline.md 6.2)."""
    text = files.canonical_json({"kind": kind, "recipe": plain(recipe)})
    return hashlib.sha256(text).hexdigest()[:16]


def describe(folder: Path, arrays: dict[str, tuple[str, tuple[int, ...]]] | None = None) -> tuple:
    """A FileEntry for every file below `folder` but its manifest, sorted by name.

    arrays: name -> (dtype, shape) for files that hold one.
    """
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == files.MANIFEST or path.name.startswith("."):
            continue
        dtype, shape = (arrays or {}).get(name, (None, None))
        entries.append(
            FileEntry(
                path=name,
                bytes=path.stat().st_size,
                sha256=files.sha256_file(path),
                dtype=dtype,
                shape=shape,
            )
        )
    return tuple(entries)


def scratch_root() -> Path:
    """Where the bytes of large artefacts lie: $KUMIKI_SCRATCH, default ./scratch."""
    return Path(os.environ.get("KUMIKI_SCRATCH") or "scratch")


def scratch_folder(kind: str, key: str) -> Path:
    """The folder of one artefact in scratch."""
    return scratch_root() / kind / key


def damage(folder: Path, entry: FileEntry, stamps: dict[str, list] | None = None) -> str | None:
    """What is wrong with one file: None, or `missing`, or expected against found.

    stamps: name -> [size, mtime_ns, ctime_ns, inode, sha256] of the last full hash; an equal stamp
    saves hashing again.
    """
    path = folder / entry.path
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    if stat.st_size != entry.bytes:
        return f"expected {entry.bytes} bytes, found {stat.st_size}"
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if stamps is not None and stamps.get(entry.path) == [*stamp, entry.sha256]:
        return None
    found = files.sha256_file(path)
    if found != entry.sha256:
        return f"expected {entry.sha256[:8]}…, found {found[:8]}…"
    if stamps is not None:
        stamps[entry.path] = [*stamp, entry.sha256]
    return None


def verify(folder: Path, manifest: Manifest) -> None:
    """Hash every file of a small artefact; InputError names the first one that differs."""
    for entry in manifest.files:
        if found := damage(folder, entry):
            raise _different(folder / entry.path, found, "run the stage that makes it again")


def ensure(
    folder: Path,
    entries: Iterable[FileEntry],
    rebuild: Callable[[list[FileEntry]], None] | None,
    *,
    full: bool = False,
) -> None:
    """Make the files of an artefact in scratch right, or say which one is not (pipeline.md 6.3).

    Sizes are compared always, hashes when the stamp of the last full hash is gone or `full` is set.
    rebuild: given the damaged entries, makes them again from the recipe. A rebuilt file whose
    sha256 is not the manifest's is an InputError, as is a damaged file without a `rebuild`.
    """
    entries = list(entries)
    bad = damaged(folder, entries, full=full)
    if bad and rebuild is not None:
        again = [e for e in entries if e.path in bad]
        rebuild(again)
        bad = damaged(folder, again)
        remedy = "its source has changed"
    else:
        stage = {"tokens": "encode_tokens", "shards": "download_shards"}.get(folder.parent.name)
        remedy = f"run `dvc repro -f {stage}`" if stage else "run the stage that makes it again"
    for name, found in bad.items():
        raise _different(folder / name, found, remedy)


def damaged(folder: Path, entries: Iterable[FileEntry], *, full: bool = False) -> dict[str, str]:
    """Name -> what is wrong, for every file that is not what its entry says; cheap by stamps."""
    path = folder / STAMPS
    stamps = {} if full or not path.is_file() else _read_stamps(path)
    before = dict(stamps)
    bad = {e.path: found for e in entries if (found := damage(folder, e, stamps))}
    if stamps != before:
        # Ranks and stages side by side verify the same files: each writes under a name of its own.
        own = folder / f".{os.uname().nodename}_{os.getpid()}{STAMPS}"
        files.write_json(own, stamps)
        files.rename(own, path)
    return bad


def _read_stamps(path: Path) -> dict:
    try:
        raw = files.read_json(path)
    except InputError:
        return {}  # a stamp only saves a hash; without it the hash is made
    return raw if isinstance(raw, dict) else {}


def _different(path: Path, found: str, remedy: str) -> InputError:
    if found == "missing":
        return InputError("file is missing", file=path.parent, value=path.name, remedy=remedy)
    what = "size differs" if "bytes" in found else "sha256 differs"
    return InputError(what, file=path, value=found, remedy=remedy)
