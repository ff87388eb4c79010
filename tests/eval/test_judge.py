"""The evaluate stage as a process: its nine numbers, its record, equal bytes, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from lib.data.documents import read_documents, val_sha256
from lib.data.tokenizer import load_tokenizer
from lib.eval import judge
from lib.export.samples import PROMPTS, language_of
from tests.project import add_model, make_project, run_module

KEYS = ["bpb", "cloze", "core", "core_partial", "core_v2"]
KEYS += ["params", "train_flops", "train_tokens", "val_bytes"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    add_model(folder)
    done = run_module(folder, "stages.evaluate", "--run", "gpt")
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return folder


def read(project: Path, name: str):
    return json.loads((project / "metrics/gpt" / name).read_text())


def test_metrics_have_exactly_nine_keys(project):
    metrics = read(project, "eval.json")
    assert list(metrics) == KEYS
    assert [k for k in KEYS if metrics[k] is None] == ["cloze", "core", "core_partial", "core_v2"]
    texts = [text for _, text in read_documents(project / "data/documents/en", "val")]
    assert metrics["val_bytes"] == sum(len(text.encode()) for text in texts)
    assert metrics["train_tokens"] == 1280
    assert metrics["params"] == 2 * 300 * 16 + 2 * 12 * 16 * 16


def test_record_holds_what_the_number_was_made_of(project):
    record, metrics = read(project, "eval_record.json"), read(project, "eval.json")
    nats = math.fsum(record["document_nats"])
    assert record["bpb"] == nats / (math.log(2) * metrics["val_bytes"])
    assert metrics["bpb"] == pytest.approx(record["bpb"], rel=1e-9)
    assert sum(record["document_bytes"]) == record["total_bytes"] == metrics["val_bytes"]
    documents = list(read_documents(project / "data/documents/en", "val"))
    assert record["val_sha256"] == val_sha256(documents)
    assert (record["context"], record["stride"], record["boundary"]) == (32, 16, "bos")
    assert record["dtype"] == "float32"
    tokenizer = load_tokenizer(project / "data/tokenizers/bpe")
    assert record["tokenizer"] == tokenizer.fingerprint
    assert record["tokens"] == sum(len(tokenizer.encode(text)) for _, text in documents)
    assert record["params"]["embedding"] == 2 * 300 * 16
    found = record["baselines"]["bpb"]
    assert found["xz"] > 0 and found["gzip"] > 0
    assert found["bigram"] < record["bpb"], "weights at random lose against a bigram"


def test_samples_are_the_projects_prompts(project):
    samples = read(project, "samples.json")
    assert samples["language"] == "en"
    assert [one["prompt"] for one in samples["greedy"]] == list(PROMPTS["en"])
    assert len(samples["free"]) == 8
    tokenizer = load_tokenizer(project / "data/tokenizers/bpe")
    for one in samples["greedy"] + samples["free"]:
        assert one["text"] == tokenizer.decode(one["ids"])
        assert one["stop"] in ("eos", "length")


def test_outputs_name_no_place_and_no_time(project):
    for name in ("eval.json", "eval_record.json", "samples.json"):
        text = (project / "metrics/gpt" / name).read_text()
        assert str(project) not in text and "seconds" not in text


def test_again_does_nothing_and_anew_gives_the_same_bytes(project):
    names = ("eval.json", "eval_record.json", "samples.json")
    before = {name: (project / "metrics/gpt" / name).read_bytes() for name in names}
    again = run_module(project, "stages.evaluate", "--run", "gpt")
    assert again.returncode == 0 and b"up to date" in again.stderr
    shutil.rmtree(project / "data/work")
    anew = run_module(project, "stages.evaluate", "--run", "gpt")
    assert anew.returncode == 0, anew.stderr.decode()
    assert {name: (project / "metrics/gpt" / name).read_bytes() for name in names} == before


def test_changed_text_is_refused_with_both_hashes(project, tmp_path):
    other = make_project(tmp_path, texts=61)
    done = run_module(
        project, "stages.evaluate", "--run", "gpt", "--documents", str(other / "data/documents")
    )
    assert done.returncode == 2
    assert b"validation text has changed" in done.stderr and b"found en " in done.stderr


def test_another_models_tokens_are_refused(project, tmp_path):
    other = make_project(tmp_path, texts=61)
    options = ("--tokens", str(other / "data/tokens/bpe.manifest.json"))
    options += ("--documents", str(other / "data/documents"))
    scratch = {"KUMIKI_SCRATCH": str(other / "scratch")}
    done = run_module(project, "stages.evaluate", "--run", "gpt", *options, environment=scratch)
    assert done.returncode == 2
    assert b"tokenizer does not match" in done.stderr or b"other tokens" in done.stderr


def test_a_flipped_bit_in_the_model_is_named(project, tmp_path):
    shutil.copytree(project / "checkpoints", tmp_path / "checkpoints")
    weights = tmp_path / "checkpoints/gpt/final/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.unlink()
    weights.write_bytes(data)
    done = run_module(
        project,
        "stages.evaluate",
        "--run",
        "gpt",
        "--model",
        str(weights.parent),
        "--set",
        "eval.samples=false",
    )
    assert done.returncode == 3
    assert b"sha256 differs" in done.stderr and b"model.safetensors" in done.stderr


def test_a_text_of_a_few_bytes_means_nothing(tmp_path):
    project = make_project(tmp_path, validation=["short"])
    add_model(project)
    done = run_module(project, "stages.evaluate", "--run", "gpt")
    assert done.returncode == 2
    assert b"too short" in done.stderr


def test_language_is_read_from_the_text():
    assert language_of(["plain English"]) == "en"
    assert language_of(["吾輩は猫である。", "ABC"]) == "ja"
    assert language_of([]) == "en"


@pytest.mark.parametrize("value", [None, 5, 560_988_160, 0.123456789012345, 3.9e19])
def test_metrics_have_ten_digits(value):
    found = judge.ten_digits(value)
    assert found == value or np.isclose(found, value, rtol=1e-9)
    if isinstance(value, float) and value < 1:
        assert len(repr(found)) <= 12
