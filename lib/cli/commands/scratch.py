"""`kumiki scratch`: what lies in $KUMIKI_SCRATCH, who needs it, and copies by key (cli.md 3.12).

Rule:  gc removes only keys that no manifest of the workspace and no dvc.lock of any branch names;
       a branch whose manifest cannot be read keeps everything. Working state is never touched.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.cli import pipeline, tables
from lib.cli.console import note
from lib.cli.stores import Store
from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.errors import InputError, UserError, redact
from lib.export import amounts

LOCKED = re.compile(r"path: (\S+\.manifest\.json)\n\s+hash: md5\n\s+md5: (\w+)")
KINDS = ("shards", "tokens", "embeddings")  # what manifests name; the rest is state of runs


@dataclass(kw_only=True)
class Key:
    """One folder of scratch."""

    kind: str
    key: str
    total_bytes: int
    age_s: float
    needed_by: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return artifact.scratch_folder(self.kind, self.key)


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """One of the five actions."""
    if arguments.action in ("push", "pull"):
        copy(arguments)
        return
    if arguments.action == "verify":
        verify(arguments)
        return
    needed, unread = needs()
    found = listed(needed)
    require_known(arguments.key, {key.key for key in found}, artifact.scratch_root())
    keys = [key for key in found if not arguments.key or key.key in arguments.key]
    if arguments.action == "gc":
        collect(keys, unread, arguments)
    else:
        show(keys, arguments.json)


def require_known(asked: list[str], known: set[str], place: object) -> None:
    """UserError for a key that is not there: done with nothing would look like done."""
    for key in asked:
        if key not in known:
            raise UserError(f"no such key in {place}", value=key, remedy="see kumiki scratch list")


def show(keys: list[Key], as_json: bool) -> None:
    """The keys as a table or document."""
    if as_json:
        tables.put_json([vars(key) for key in keys])
        return
    rows = [
        (k.kind, k.key, amounts.size(k.total_bytes), amounts.duration(k.age_s),
         ", ".join(k.needed_by) or "nobody")
        for k in keys
    ]  # fmt: skip
    tables.put(tables.lines(rows, ("kind", "key", "bytes", "age", "needed by")))


def listed(needed: dict[str, list[str]]) -> list[Key]:
    """Every folder below scratch/<kind>/."""
    now, root = time.time(), artifact.scratch_root()
    found = []
    for folder in sorted(p for p in root.glob("*/*") if p.is_dir()):
        found.append(
            Key(
                kind=folder.parent.name,
                key=folder.name,
                total_bytes=pipeline.total_bytes(folder),
                age_s=max(0.0, now - folder.stat().st_mtime),
                needed_by=needed.get(folder.name, []),
            )
        )
    return found


def needs() -> tuple[dict[str, list[str]], list[str]]:
    """(key -> who names it, manifests that some dvc.lock names and nobody can read)."""
    found: dict[str, list[str]] = {}
    unread: list[str] = []
    for path in pipeline.manifests():
        for folder, _ in pipeline.folders_of(Manifest.read(path)):
            found.setdefault(folder.name, []).append(path.name)
    for branch, text in locks():
        for path, md5 in re.findall(
            r"path: (\S+\.manifest\.json)\n\s+hash: md5\n\s+md5: (\w+)", text
        ):
            cached = Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]
            own = Path(path)
            if own.is_file() and pipeline.md5(own) == md5:
                continue  # the workspace has it, it is counted above
            if not cached.is_file():
                unread.append(f"{path} of {branch}")
                continue
            for folder, _ in pipeline.folders_of(Manifest.read(cached)):
                if branch not in found.setdefault(folder.name, []):
                    found[folder.name].append(branch)
    return found, unread


def locks() -> Iterator[tuple[str, str]]:
    """(branch, its dvc.lock) of every branch of the repository."""
    listed = _git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes", "refs/tags")
    for name in listed.splitlines():
        if text := _git("show", f"{name}:dvc.lock"):
            yield name.split("/", 2)[-1], text


def _git(*words: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def collect(keys: list[Key], unread: list[str], arguments: argparse.Namespace) -> None:
    """Remove what nobody needs, after asking."""
    if unread:
        raise UserError(
            "manifest is in no cache, its keys are not known",
            value=unread[0],
            remedy="dvc fetch --all-branches --all-tags, or remove keys by hand",
        )
    gone = [key for key in keys if key.kind in KINDS and not key.needed_by]
    show(gone, arguments.json)
    total = sum(key.total_bytes for key in gone)
    what = f"{len(gone)} keys, {amounts.size(total)}"
    if not gone or not tables.ask(f"remove {what}?", arguments.yes):
        note("nothing removed")
        return
    for key in gone:
        files.remove_tree(key.folder)
    note(f"removed {what}")


def verify(arguments: argparse.Namespace) -> None:
    """Hash everything that the manifests name, or what they name of some keys."""
    named = {folder.name for path in pipeline.manifests()
             for folder, _ in pipeline.folders_of(Manifest.read(path))}  # fmt: skip
    require_known(arguments.key, named, "the manifests")
    problems = pipeline.scratch_problems(full=True, keys=arguments.key)
    if arguments.json:
        tables.put_json({"problems": problems})
    else:
        tables.put(problems or ["every file is as its manifest says"])
    if problems:
        raise InputError(
            "scratch differs from its manifests",
            value=f"{len(problems)} files",
            remedy="run the same `dvc repro` again: it makes what is missing",
        )


def copy(arguments: argparse.Namespace) -> None:
    """Copy keys to or from a store: whole, under their own names, those that are not there yet."""
    if arguments.place is None:
        raise UserError("no store", value=arguments.action, remedy="name a folder or a URL")
    store, pushing = Store(arguments.place), arguments.action == "push"
    if not pushing:
        store.require()
    root = artifact.scratch_root()
    here = sorted((p.parent.name, p.name) for p in root.glob("*/*") if p.is_dir())
    source, target = (here, store.keys()) if pushing else (store.keys(), here)
    source = [(kind, key) for kind, key in source if kind in KINDS]
    place = root if pushing else arguments.place
    require_known(arguments.key, {key for _, key in source}, place)
    copied: list[dict[str, Any]] = []
    for kind, key in source:
        if (kind, key) in target:
            continue
        if not arguments.key or key in arguments.key:
            total = store.push(kind, key) if pushing else store.pull(kind, key)
            copied.append({"kind": kind, "key": key, "bytes": total})
            note(f"{kind}/{key}: {amounts.size(total)}")
    if arguments.json:
        tables.put_json({"copied": copied})
    else:
        place = arguments.place if pushing else root
        tables.put([redact(f"{len(copied)} keys copied to {place}")])
