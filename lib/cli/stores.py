"""Keys of scratch in a store: a folder, or a URL that fsspec knows (s3://, gs://, sftp://, ...).

Form:  <store>/<kind>/<key>/<files>, and beside them `whole.json`, written last: bytes and sha256 of
       each file. A key without it is not there; what comes back is compared with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lib.core import artifact, files
from lib.core.errors import EnvError, InputError, UserError
from lib.core.progress import progress

WHOLE = "whole.json"
BLOCK = 1 << 20


class Store:
    """Where keys are kept. UserError: a place that nobody knows; EnvError: out of reach."""

    def __init__(self, place: str) -> None:
        from fsspec.core import url_to_fs

        self.place = place
        try:
            self.fs, self.root = url_to_fs(place)
        except (ImportError, ValueError) as error:  # the protocol's package, or the protocol
            remedy = "install what it names, or name a folder"
            raise UserError("no such store", value=f"{place} ({error})", remedy=remedy) from error

    def require(self) -> None:
        """UserError where nothing lies at the place: an empty store and a misspelt one differ."""
        with self._reached():
            there = self.fs.exists(self.root)
        if not there:
            raise UserError("no such store", value=self.place, remedy="name where keys were pushed")

    def keys(self) -> list[tuple[str, str]]:
        """(kind, key) of everything that is whole."""
        with self._reached():
            found = [PurePosixPath(str(p)) for p in self.fs.glob(f"{self.root}/*/*/{WHOLE}")]
        return sorted((path.parts[-3], path.parts[-2]) for path in found)

    def push(self, kind: str, key: str) -> int:
        """Copy a key from scratch, its note last; returns its bytes."""
        folder = artifact.scratch_folder(kind, key)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in held(folder)}
        note: dict[str, Any] = {}
        with progress(sum(sizes.values()), "B", f"push {kind}/{key}") as advance:
            for name, size in sizes.items():
                there = f"{self._at(kind, key)}/{name}"
                with self._reached(), (folder / name).open("rb") as data:
                    self.fs.makedirs(there.rpartition("/")[0], exist_ok=True)
                    with self.fs.open(there, "wb") as out:
                        note[name] = {"bytes": size, "sha256": copy(data, out.write, advance)}
        with self._reached():
            self.fs.pipe_file(f"{self._at(kind, key)}/{WHOLE}", files.canonical_json(note))
        return sum(sizes.values())

    def pull(self, kind: str, key: str) -> int:
        """Bring a key to scratch, whole and compared, or not at all; returns its bytes."""
        with self._reached():
            note = json.loads(self.fs.cat_file(f"{self._at(kind, key)}/{WHOLE}"))
        total = sum(entry["bytes"] for entry in note.values())
        target = artifact.scratch_folder(kind, key)
        files.check_space(target.parent, total)
        with (
            progress(total, "B", f"pull {kind}/{key}") as advance,
            files.atomic_folder(target) as part,
        ):
            for name, entry in note.items():
                self._bring(f"{self._at(kind, key)}/{name}", inside(part, name), entry, advance)
        return total

    def _bring(
        self, there: str, here: Path, entry: dict[str, Any], advance: Callable[[float], None]
    ) -> None:
        with self._reached(), files.atomic_file(here) as out, self.fs.open(there, "rb") as data:
            found = copy(data, out.write, advance)
        if found != entry["sha256"]:
            value = f"expected {entry['sha256'][:8]}, found {found[:8]}"
            remedy = "push the key again from where it is whole"
            raise InputError("sha256 differs", file=there, value=value, remedy=remedy)

    def _at(self, kind: str, key: str) -> str:
        return f"{self.root}/{kind}/{key}"

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "check the store and its login, then run the same command"
            raise EnvError("store refuses", value=error, remedy=remedy) from error


def held(folder: Path) -> list[Path]:
    """The files of a key, without what belongs to this disk and process."""
    own = (artifact.STAMPS, ".lock")
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(own))


def copy(data: BinaryIO, write: Callable[[bytes], object], advance: Callable[[float], None]) -> str:
    """All of `data`, block by block; the sha256 of what went by."""
    digest = hashlib.sha256()
    while block := data.read(BLOCK):
        write(block)
        digest.update(block)
        advance(len(block))
    return digest.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The file `name` below `folder`; a store's note may not lead elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError("name leaves its folder", value=name, remedy="do not use this store")
    return folder / name
