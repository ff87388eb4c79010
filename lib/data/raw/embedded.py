"""The embedded corpus: English documentation that already lies in the Python environment.

In:   the names of installed packages. Out: documents (text, id), split into train and val by file.
Law:  a package is located and parsed, never imported; the same environment gives the same bytes.
Note: what is read: language-reference topics, docstrings, and the strings given to `add_docstr` and
      `add_newdoc`, which hold documentation outside the functions (data.md 4.1).
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.core.data_settings import EmbeddedSource
from lib.core.errors import EnvError
from lib.core.process import PoolMap
from lib.data.raw.shards import is_utf8

SKIPPED_FOLDERS = frozenset(
    (
        *("test", "tests", "testing", "_vendor", "vendor", "third_party", "site-packages"),
        *("idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"),
    )
)
TOPICS = "python/pydoc_data/topics.py"
ALWAYS_TRAIN = 100_000  # bytes of text: one such file would be most of the validation text
SHARD_DOCUMENTS, ROW_GROUP = 4096, 256
_UNIT_FILES = 48  # files a worker parses before it reports
_OUTSIDE = ("add_docstr", "add_newdoc")
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # where statements hold statements
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text; `file` is `<package>/<path>`, `id` adds the qualified name and the line."""

    id: str
    file: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Both splits in their final order, and what could not be read."""

    train: list[Document]
    val: list[Document]
    files: int  # files looked at
    unparsable: tuple[str, ...]  # files that neither parse nor decode
    unencodable: int  # texts with a lone surrogate, which is no UTF-8


def versions(source: EmbeddedSource) -> dict[str, dict[str, str]]:
    """Package -> version and licence as the package states it; they decide and describe the text.

    EnvError names every package that is not installed.
    """
    found = {}
    for package in source.packages:
        if package == "python":
            # Python is no distribution: its licence is the one of its LICENSE file, by SPDX name.
            found[package] = {"version": platform.python_version(), "licence": "PSF-2.0"}
            continue
        about = _distribution(package).metadata.json  # keys in lower case, `_` for `-`
        licence = str(about.get("license_expression") or about.get("license") or "not stated")
        first_line = licence.strip().splitlines()[0].strip()
        # without the local part: 2.13.0 and 2.13.0+cpu are wheels of the same source files
        found[package] = {"version": str(about["version"]).partition("+")[0], "licence": first_line}
    return found


def read(source: EmbeddedSource, seed: int, pool: PoolMap) -> Corpus:
    """Parse every file of `source`; about 8 s of one core for the default packages."""
    roots = {package: _root(package) for package in source.packages}
    paths = [(f"{p}/{name}", path) for p, root in roots.items() for name, path in _files(root)]
    units = [
        (source.min_chars, paths[i : i + _UNIT_FILES]) for i in range(0, len(paths), _UNIT_FILES)
    ]
    documents: list[Document] = []
    unparsable: list[str] = []
    unencodable = 0
    for found, bad, lost in pool(_read_unit, units):
        documents += found
        unparsable += bad
        unencodable += lost
    val_files = choose_val_files(documents, source.val_fraction)
    documents.sort(key=lambda d: _digest(f"{seed}{d.id}"))
    return Corpus(
        train=[d for d in documents if d.file not in val_files],
        val=[d for d in documents if d.file in val_files],
        files=len(paths),
        unparsable=tuple(sorted(unparsable)),
        unencodable=unencodable,
    )


def choose_val_files(documents: Iterable[Document], fraction: float) -> set[str]:
    """Files in ascending sha256 of their name until they hold `fraction` of the bytes of text.

    Whole files, since the docstrings of one file resemble each other; large files and the topics
    always train.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.file] = sizes.get(document.file, 0) + len(document.text.encode())
    wanted, held, chosen = fraction * sum(sizes.values()), 0, set()
    for file in sorted(sizes, key=_digest):
        if held >= wanted:
            break
        if file != TOPICS and sizes[file] <= ALWAYS_TRAIN:
            chosen.add(file)
            held += sizes[file]
    return chosen


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# ---------------------------------------------------------------- where the packages lie


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise EnvError(
            "package of the embedded corpus is not installed",
            value=package,
            remedy=f"pip install -c constraints.txt {package}, or leave it out of packages",
        ) from None


def _root(package: str) -> Path:
    if package == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        root = Path(str(_distribution(package).locate_file(package.replace("-", "_"))))
    if next(_files(root), None) is None:
        raise EnvError(
            "package without its .py files (zipped or compiled only)",
            value=package,
            remedy="reinstall it as source files, or leave it out of packages",
        )
    return root


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of the `*.py` files below `root`, by name in POSIX order."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith("test_"):
                path = Path(folder) / name
                found.append((path.relative_to(root).as_posix(), path))
    yield from sorted(found)


# ---------------------------------------------------------------- one file


def _read_unit(unit: tuple[int, list[tuple[str, Path]]]) -> tuple[list[Document], list[str], int]:
    min_chars, paths = unit
    documents: list[Document] = []
    unparsable: list[str] = []
    lost = 0
    with _no_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the sources of others
        for file, path in paths:
            try:
                found = list(_documents(file, path.read_bytes(), min_chars))
            except (SyntaxError, ValueError, RecursionError, OSError):
                unparsable.append(file)
                continue
            kept = [d for d in found if is_utf8(d.text)]
            lost += len(found) - len(kept)
            documents += kept
    return documents, unparsable, lost


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Syntax trees hold no cycles; without the cycle collector parsing takes a fifth less."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _documents(file: str, source: bytes, min_chars: int) -> Iterator[Document]:
    tree = ast.parse(source)
    if file == TOPICS:
        texts = _topics(tree)
    else:
        texts = _docstrings(tree)
        if any(name.encode() in source for name in _OUTSIDE):
            texts = [*texts, *_outside(tree)]
    for name, line, raw in texts:
        # cleandoc costs more than finding the string; it lengthens a text through tabs only
        if len(raw) < min_chars and "\t" not in raw:
            continue
        text = inspect.cleandoc(raw)
        if len(text) >= min_chars:
            yield Document(id=f"{file}#{name}:{line}", file=file, text=text)


def _docstrings(tree: ast.Module) -> list[tuple[str, int, str]]:
    """(qualified name, line, string) of every docstring; expressions are never descended into."""
    found = []
    todo: list[tuple[Any, str]] = [(tree, "")]
    while todo:
        node, name = todo.pop()
        if isinstance(node, _DOCUMENTED):
            name = f"{name}.{node.name}" if name else node.name
        if isinstance(node, (*_DOCUMENTED, ast.Module)) and (first := _first_string(node.body)):
            found.append((name, first.lineno, first.value))
        for block in _BLOCKS:
            todo.extend((inner, name) for inner in getattr(node, block, ()))
    return found


def _first_string(body: list[ast.stmt]) -> Any:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def _outside(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Strings in the arguments of `add_docstr(object, text)` and `add_newdoc(place, name, text)`.

    The text may stand in a tuple or be formatted afterwards; its template is taken as it is.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = node.func
        name = getattr(called, "id", None) or getattr(called, "attr", None)
        if name not in _OUTSIDE:
            continue
        about = ast.unparse(node.args[0]) if name == "add_docstr" else _names(node.args[:2])
        for argument in node.args:
            for inner in ast.walk(argument):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield about, inner.lineno, inner.value


def _names(arguments: list[ast.expr]) -> str:
    return ".".join(str(a.value) for a in arguments if isinstance(a, ast.Constant))


def _topics(tree: ast.Module) -> list[tuple[str, int, str]]:
    """The dict literal `topics = {...}` of the language reference."""
    found = []
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                assert key is not None
                found.append((ast.literal_eval(key), value.lineno, ast.literal_eval(value)))
    return found
