"""A toy project whose stages are killed everywhere, in a process of its own.

`python -m tests.faults.toy FOLDER EVERY STAGE [ARGUMENT...]` prints the number of points killed.
A fresh interpreter, because forks of a process in which Rust or OpenMP has started threads hang.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from lib.core import artifact, dag, stage
from lib.core.artifact import Manifest
from tests.conftest import ROOT
from tests.faults.crash import enumerate_crashes, in_child, tree

ORDER = ("download_shards", "extract_texts", "train_tokenizer", "encode_tokens")
PARAMS = """
profile: small
seed: 7
download_shards:
  sources:
    notes: {kind: jsonl_gz, folder: notes, train: [a.jsonl.gz, b.jsonl.gz], val: [v.jsonl.gz]}
extract_texts:
  recipes:
    notes: {sources: {notes: 1.0}, min_chars: 5, dedup: {exact: true, near: true}}
train_tokenizer:
  bpe: {kind: bpe, documents: notes, vocab_size: 300}
  spm: {kind: sentencepiece, documents: notes, vocab_size: 340, sample_bytes: 100000}
encode_tokens:
  bpe: {documents: notes, tokenizer: bpe, context: 16, crop: requeue}
profiles:
  small: {}
runtime: {workers: 1, threads: 1}
"""


def write_project(project: Path) -> None:
    """Three small shards with repeats, short lines and awkward characters."""
    (project / "notes").mkdir(parents=True)
    (project / "params.yaml").write_text(PARAMS)
    words = ["川が流れる", "the river", "木組み\n", "joinery", "数は", "ﾊﾝｶｸ", "number ▁"]
    for number, name in enumerate("abv"):
        texts = [
            " ".join(words[(number + i * k) % 7] + str(i * k % 13) for k in range(1, 12))
            for i in range(20)
        ]
        lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        lines += '{"text": "x"}\n{"text": "' + texts[3].replace("\n", " ") + '"}\n'
        with gzip.GzipFile(project / "notes" / f"{name}.jsonl.gz", "wb", mtime=0) as out:
            out.write(lines.encode())


def run(project: Path, title: str, *arguments: str) -> None:
    """The stage in this (forked) process; anything but success raises."""
    os.chdir(project)
    os.environ["KUMIKI_SCRATCH"] = "scratch"
    module = importlib.import_module(f"stages.{title}")
    check = {"check": module.check} if hasattr(module, "check") else {}
    code = stage.main(module.STAGE, module.body, module.identity, argv=arguments, **check)
    assert code == 0, f"{title} ended with {code}"


def item_of(title: str) -> list[str]:
    """The arguments with which the toy project runs a stage on the way."""
    return ["--name", "bpe"] if title in ("train_tokenizer", "encode_tokens") else []


def prepare(folder: Path, title: str) -> Path:
    """The toy project as stage `title` finds it: all stages before it have run."""
    for name in ("pandas", "lib.data.extract", "lib.data.encode", "lib.data.tokenizer"):
        importlib.import_module(name)  # once, not in every fork
    dag.code_hash(f"stages.{title}", ROOT)
    project = folder / "prepared"
    write_project(project)
    for earlier in ORDER[: ORDER.index(title)]:
        done = in_child(lambda name=earlier: run(project, name, *item_of(name)))
        assert done == 0, f"{earlier} fails"
    return project


def skip(name: str) -> bool:
    """What varies by moment: logs and receipts; stamps; parts that the next run sweeps."""
    varying = ("stage.log", "receipt.json", ".stamps.json", "done.json", ".pyc")
    return name.endswith(varying) or ".part" in name or "/units/" in name


def copies(start: Path, folder: Path) -> Callable[[int], Path]:
    """Fresh copies of a starting state, in folders of different names: bytes may not follow it."""

    def make(point: int) -> Path:
        path = folder / f"point_{point}"
        shutil.copytree(start, path, symlinks=True)
        return path

    return make


def manifests_hold(project: Path) -> None:
    """Whatever bears a manifest under its final name is whole."""
    for path in project.rglob("manifest.json"):
        if ".part" not in path.as_posix():
            artifact.verify(path.parent, Manifest.read(path))


def bytes_of(start: Path, folder: Path, title: str, workers: int) -> dict[str, str]:
    """The tree that a stage leaves with so many workers."""
    path = copies(start, folder)(workers)
    text = (path / "params.yaml").read_text().replace("workers: 1", f"workers: {workers}")
    (path / "params.yaml").write_text(text)
    assert in_child(lambda: run(path, title, *item_of(title))) == 0
    return {n: h for n, h in tree(path, skip).items() if n != "params.yaml"}


def main(folder: str, every: str, title: str, *arguments: str) -> None:
    """Enumerate the crash points of one stage; or, with EVERY 0, compare worker counts."""
    start = prepare(Path(folder), title)
    if every == "0":
        one, two = (bytes_of(start, Path(folder), title, n) for n in (1, 2))
        assert one == two, sorted(n for n in one | two if one.get(n) != two.get(n))
        sys.stdout.write(f"{len(one)}\n")
        return
    points = enumerate_crashes(
        lambda path: run(path, title, *arguments),
        copies(start, Path(folder)),
        manifests_hold,
        skip,
        int(every),
    )
    sys.stdout.write(f"{points}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
