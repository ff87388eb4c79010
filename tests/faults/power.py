"""Power loss: record what a writer asks of the file system, build what a crash may leave of it.

What is certain: file data after fsync of the file, names after fsync of the folder. All else since
then may be there, torn or gone, in any combination (the crash states of ALICE, OSDI 2014). Data
that a library writes by itself is seen when its file is fsynced: before that none of it is certain.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class File:
    """`data` as the running system sees it, `sure` as it is after a loss of power."""

    data: bytes = b""
    sure: bytes = b""


@dataclass(eq=False)
class Folder:
    """`sure` entries, and changes since the last fsync: each is a list of (name, node or None)."""

    sure: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[list[tuple[str, File | Folder | None]]] = field(default_factory=list)

    def now(self) -> dict[str, File | Folder]:
        """Entries as the running system sees them."""
        found = dict(self.sure)
        for change in self.pending:
            _apply(found, change)
        return found


def _apply(entries: dict, change: list) -> None:
    for name, node in change:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Recorder:
    """A model of everything below `root`; `states` grows by a copy of it after every operation."""

    def __init__(self, root: Path) -> None:
        self.root, self.tree, self.states = root.resolve(), Folder(), list[Folder]()

    @contextlib.contextmanager
    def installed(self) -> Iterator[Recorder]:
        """`os` reports to this recorder within the block."""
        names = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rmdir")
        real = {name: getattr(os, name) for name in names}
        for name in names:
            setattr(os, name, self._reporting(name, real[name]))
        try:
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def _reporting(self, name, real):
        def call(*args, **kwargs):
            before = _path_of(args[0], kwargs)
            result = real(*args, **kwargs)
            if name == "open":
                before = _path_of(result, {}) if args[1] & (os.O_CREAT | os.O_TRUNC) else None
            if before is not None and before.is_relative_to(self.root) and before != self.root:
                getattr(self, f"_{name}")(before, args, kwargs)
                self.states.append(copy.deepcopy(self.tree))
            elif name == "fsync" and before == self.root:
                self._fsync(before, args, kwargs)
                self.states.append(copy.deepcopy(self.tree))
            return result

        return call

    def _folder(self, path: Path) -> Folder:
        node: File | Folder = self.tree
        for part in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            if part not in node.now():
                node.pending.append([(part, Folder())])
            node = node.now()[part]
        assert isinstance(node, Folder), path
        return node

    def _change(self, path: Path, node: File | Folder | None) -> None:
        self._folder(path.parent).pending.append([(path.name, node)])

    def _node(self, path: Path) -> File | Folder | None:
        return self._folder(path.parent).now().get(path.name)

    def _open(self, path: Path, args, kwargs) -> None:
        if self._node(path) is None:
            self._change(path, File())

    def _write(self, path: Path, args, kwargs) -> None:
        self._file(path).data = path.read_bytes()

    def _file(self, path: Path) -> File:
        self._open(path, (), {})
        node = self._node(path)
        assert isinstance(node, File), path
        return node

    def _fsync(self, path: Path, args, kwargs) -> None:
        if path.is_dir():
            folder = self._folder(path)
            folder.sure, folder.pending = folder.now(), []
            return
        node = self._file(path)
        node.data = node.sure = path.read_bytes()

    def _replace(self, path: Path, args, kwargs) -> None:
        target, node = Path(args[1]).absolute(), self._node(path)
        assert target.parent == path.parent, "a rename across folders"
        if node is None:  # a library has made it, and nobody has fsynced it
            node = File(data=target.read_bytes())
        self._folder(path.parent).pending.append([(path.name, None), (target.name, node)])

    def _link(self, path: Path, args, kwargs) -> None:
        self._change(Path(args[1]).absolute(), self._file(path))

    def _unlink(self, path: Path, args, kwargs) -> None:
        self._change(path, None)

    def _rmdir(self, path: Path, args, kwargs) -> None:
        self._change(path, None)

    def _mkdir(self, path: Path, args, kwargs) -> None:
        self._folder(path)


def _path_of(given, kwargs) -> Path | None:
    """The path of a descriptor or name, also relative to `dir_fd`; None for what is no file."""
    if isinstance(given, int):
        name = Path(f"/proc/self/fd/{given}").readlink()
        return name if name.is_absolute() else None
    path = Path(os.fsdecode(given))
    if kwargs.get("dir_fd") is not None and not path.is_absolute():
        path = Path(f"/proc/self/fd/{kwargs['dir_fd']}").readlink() / path
    return path.absolute()


def crash_states(state: Folder, draw: random.Random, several: int) -> Iterator[Folder]:
    """What may be left of `state`: nothing uncertain, all of it, and `several` mixtures."""
    yield _left(state, lambda: False)
    yield _left(state, lambda: True)
    for _ in range(several):
        yield _left(state, lambda: draw.random() < 0.5)


def _left(folder: Folder, kept) -> Folder:
    entries = dict(folder.sure)
    for change in folder.pending:
        if kept():
            _apply(entries, change)
    found = Folder()
    for name, node in entries.items():
        if isinstance(node, Folder):
            found.sure[name] = _left(node, kept)
        elif node.data == node.sure or not kept():
            found.sure[name] = File(sure=node.sure)
        else:  # torn: the end is there or is not
            size = len(node.data) if kept() else len(node.data) // 2
            found.sure[name] = File(sure=node.data[:size])
    return found


def write_out(folder: Folder, place: Path) -> None:
    """Make the files of a state without changes pending."""
    place.mkdir(parents=True)
    for name, node in folder.sure.items():
        if isinstance(node, Folder):
            write_out(node, place / name)
        else:
            (place / name).write_bytes(node.sure)
