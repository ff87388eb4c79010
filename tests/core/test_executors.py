"""One process, several, a job array, a Ray cluster: the same bytes (pipeline.md 14.5)."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from lib.core import files
from lib.core.errors import InputError
from tests.data.texts import english
from tests.project import run_module

PARAMS = """
profile: small
seed: 7
download_shards:
  sources: {own: {kind: jsonl_gz, train: [a.jsonl.gz, b.jsonl.gz, c.jsonl.gz], val: [v.jsonl.gz]}}
extract_texts:
  recipes: {en: {sources: {own: 1.0}}}
  n_tasks: 2
train_tokenizer:
  bpe: {kind: bpe, documents: en, vocab_size: 300}
encode_tokens:
  bpe: {documents: en, tokenizer: bpe, context: 32, n_tasks: 2}
profiles:
  small: {}
"""
STAGES = (
    ("stages.extract_texts",),
    ("stages.train_tokenizer", "--name", "bpe"),
    ("stages.encode_tokens", "--name", "bpe"),
)
ENCODE = ("stages.encode_tokens", "--name", "bpe")


def run(project: Path, *words: str, code: int = 0) -> str:
    done = run_module(project, *words)
    assert done.returncode == code, done.stderr.decode()
    return done.stderr.decode()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(("a", "b", "c", "v")):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in english(25, number))
        files.write_bytes(folder / f"data/local/{name}.jsonl.gz", gzip.compress(lines.encode()))
    files.write_bytes(folder / "params.yaml", PARAMS.encode())
    run(folder, "stages.download_shards")
    return folder


@pytest.fixture(scope="module")
def local(shards, tmp_path_factory) -> Path:
    return made(shards, tmp_path_factory.mktemp("local"), "runtime: {workers: 1}\n")


def made(shards: Path, folder: Path, runtime: str) -> Path:
    shutil.copytree(shards, folder, dirs_exist_ok=True)
    (folder / ".kumiki.yaml").write_text(runtime)
    for words in STAGES:
        run(folder, *words)
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """Every output but the notes of this machine."""
    places = (folder / "data/documents", folder / "data/tokens", folder / "scratch/tokens")
    every = [p for place in places for p in place.rglob("*") if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in every
        if not p.name.startswith(".")
    }


def test_a_job_array_gives_the_bytes_of_one_process(shards, local, tmp_path):
    shutil.copytree(shards, tmp_path / "p")
    project = tmp_path / "p"
    for task in ("1", "0"):
        told = run(project, "stages.extract_texts", "--task", task, "--of", "2")
        assert "2 shards of task" in told and not (project / "data/documents").exists()
    run(project, "stages.extract_texts")
    run(project, "stages.train_tokenizer", "--name", "bpe")
    assert "n_tasks is 2" in run(project, *ENCODE, "--task", "0", "--of", "3", code=2)
    for task in ("1", "0"):
        run(project, *ENCODE, "--task", task, "--of", "2")
    assert not (project / "data/tokens").exists()
    run(project, *ENCODE)
    assert results(project) == results(local)
    assert "0 <= task" in run(project, *ENCODE, "--task", "2", "--of", "2", code=2)


@pytest.fixture
def ray():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install -e '.[ray]'")
    return importlib.import_module("ray")


def test_a_local_ray_cluster_gives_the_bytes_of_one_process(ray, shards, local, tmp_path):
    project = made(shards, tmp_path / "p", "runtime: {workers: 2, executor: ray}\n")
    assert results(project) == results(local)


def test_an_error_of_a_unit_on_ray_comes_out_as_itself(ray, shards, local, tmp_path):
    shutil.copytree(local, tmp_path / "p")
    project = tmp_path / "p"
    (project / ".kumiki.yaml").write_text("runtime: {workers: 2, executor: ray}\n")
    for place in ("scratch/tokens", "data/tokens", "data/work"):
        shutil.rmtree(project / place)
    part = next((project / "data/documents/en").glob("train_*.parquet"))
    part.chmod(0o644)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.unlink()
    part.write_bytes(data)
    told = run(project, *ENCODE, code=InputError.code)
    assert "documents differ from their manifest" in told and "Traceback" not in told
