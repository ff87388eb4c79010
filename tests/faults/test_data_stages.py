"""Kill every data stage at every change of the file system: rows A1 to A7 of the fault catalogue.

A toy project (three small shards, vocabulary 300) runs each stage in a forked child that
dies at its Nth mutation; the same command must then end with the bytes of an undisturbed run.
KUMIKI_EVERY=7 takes every seventh point, as `.ci/run` does; 1 takes all.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.core import artifact, dag, stage
from lib.core.artifact import Manifest
from tests.conftest import ROOT
from tests.faults.crash import enumerate_crashes, in_child, tree

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
EVERY = int(os.environ.get("KUMIKI_EVERY", "7"))
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    """The toy project before each stage: what it finds when it starts."""
    project = tmp_path_factory.mktemp("toy") / "p"
    (project / "notes").mkdir(parents=True)
    (project / "params.yaml").write_text(PARAMS)
    for number, name in enumerate("abv"):
        words = ["川が流れる", "the river", "木組み\n", "joinery", "数は", "ﾊﾝｶｸ", "number ▁"]
        texts = [
            " ".join(words[(number + i * k) % 7] + str(i * k % 13) for k in range(1, 12))
            for i in range(20)
        ]
        lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        lines += '{"text": "x"}\n{"text": "' + texts[3].replace("\n", " ") + '"}\n'
        with gzip.GzipFile(project / "notes" / f"{name}.jsonl.gz", "wb", mtime=0) as out:
            out.write(lines.encode())
    for name in ("pandas", "lib.data.extract", "lib.data.encode", "lib.data.tokenizer"):
        importlib.import_module(name)  # once, not in every fork
    states = {}
    for title in ("download_shards", "extract_texts", "train_tokenizer", "encode_tokens"):
        dag.code_hash(f"stages.{title}", ROOT)
        states[title] = project.with_name(title)
        shutil.copytree(project, states[title], symlinks=True)
        item = ["--name", "bpe"] if title in ("train_tokenizer", "encode_tokens") else []
        assert in_child(lambda title=title, item=item: run(project, title, *item)) == 0
    return states


def run(project: Path, title: str, *arguments: str) -> None:
    """The stage in this (forked) process; anything but success raises."""
    os.chdir(project)
    os.environ["KUMIKI_SCRATCH"] = "scratch"
    module = importlib.import_module(f"stages.{title}")
    check = {"check": module.check} if hasattr(module, "check") else {}
    code = stage.main(module.STAGE, module.body, module.identity, argv=arguments, **check)
    assert code == 0, f"{title} ended with {code}"


def skip(name: str) -> bool:
    """What varies by moment: logs and receipts; stamps; parts that the next run sweeps."""
    varying = ("stage.log", "receipt.json", ".stamps.json", "done.json", ".pyc")
    return name.endswith(varying) or ".part" in name or "/units/" in name


def maker(start: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Fresh copies of a starting state, in folders of different names: bytes may not follow it."""

    def make(point: int) -> Path:
        folder = tmp_path / f"point_{point}"
        shutil.copytree(start, folder, symlinks=True)
        return folder

    return make


def manifests_hold(project: Path) -> None:
    """Whatever bears a manifest under its final name is whole."""
    for path in project.rglob("manifest.json"):
        if ".part" in path.as_posix():
            continue
        with contextlib.suppress(FileNotFoundError):
            manifest = Manifest.read(path)
            artifact.verify(path.parent, manifest)


@pytest.mark.parametrize(
    ("title", "arguments"),
    [
        ("download_shards", ()),
        ("extract_texts", ()),
        ("train_tokenizer", ("--name", "bpe")),
        ("train_tokenizer", ("--name", "spm")),
        ("encode_tokens", ("--name", "bpe")),
    ],
    ids=["a01_download", "a02_extract", "a03_bpe", "a03_spm", "a04_encode"],
)
def test_kill_anywhere_then_the_same_command_gives_the_same_bytes(
    prepared, tmp_path, title, arguments
):
    points = enumerate_crashes(
        lambda folder: run(folder, title, *arguments),
        maker(prepared[title], tmp_path),
        manifests_hold,
        skip,
        EVERY,
    )
    assert points * EVERY > 20, f"only {points} points"


@pytest.mark.parametrize("title", ["extract_texts", "encode_tokens"])
def test_workers_and_earlier_runs_change_no_byte(prepared, tmp_path, title):
    """data.md 1.2: same inputs + same parameters = same bytes."""
    item = ["--name", "bpe"] if title == "encode_tokens" else []
    trees = []
    for workers in (1, 2):
        folder = maker(prepared[title], tmp_path)(workers)
        text = (folder / "params.yaml").read_text().replace("workers: 1", f"workers: {workers}")
        (folder / "params.yaml").write_text(text)
        assert in_child(lambda folder=folder: run(folder, title, *item)) == 0
        trees.append({n: h for n, h in tree(folder, skip).items() if not n.endswith("params.yaml")})
    assert trees[0] == trees[1]
