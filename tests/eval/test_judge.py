"""The evaluate stage as a process: its nine numbers, its record, equal bytes, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.data.documents import read_documents, val_sha256
from lib.data.vocab.tokenizer import load_tokenizer
from lib.eval import core, judge
from lib.export.samples import PROMPTS, language_of
from tests.conftest import ROOT
from tests.eval.test_cloze import documents
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


def test_too_little_text_gives_no_cloze_and_says_so(project):
    record = read(project, "eval_record.json")
    assert record["cloze"]["cloze"] is None and "fewer than 50" in record["cloze"]["reason"]
    assert list((project / "metrics/gpt/examples").iterdir()) == []
    loss = math.fsum(record["document_nats"]) / record["tokens"]
    assert math.log(record["perplexity"]) == pytest.approx(loss)


def test_speed_is_told_beside_the_receipt_and_nowhere_else(project):
    (path,) = (project / "data/work").glob("*/*/speed.json")
    speed = json.loads(path.read_text())
    assert speed["prefill_tokens_per_s"] > 0 and speed["decode_tokens_per_s"] > 0
    assert set(speed["seconds"]) >= {"bpb", "cloze", "core", "samples"}


# ---------------------------------------------------------------- cloze and CORE in the stage

BUNDLE = """icl_tasks:
- label: copa
  dataset_uri: a/copa.jsonl
  num_fewshot: [1]
  icl_task_type: multiple_choice
- label: squad
  dataset_uri: a/squad.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
- label: coqa
  dataset_uri: a/coqa.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
"""
BASELINES = "Eval Task,Random baseline\ncopa,50\nsquad,0\ncoqa,0\n"


@pytest.fixture(scope="module")
def examined(tmp_path_factory) -> Path:
    """A project with enough validation text for cloze, and a bundle of two of three tasks."""
    texts = [text for _, text in documents(90)]
    folder = make_project(tmp_path_factory.mktemp("examined"), validation=texts)
    add_model(folder)
    data = folder / "bundle/eval_data/a"
    data.mkdir(parents=True)
    (folder / "bundle/core.yaml").write_text(BUNDLE)
    (folder / "bundle/eval_meta_data.csv").write_text(BASELINES)
    choices = [{"query": f"one {n}", "choices": ["yes", "no"], "gold": n % 2} for n in range(8)]
    said = [{"context": f"two {n}", "continuation": "yes"} for n in range(5)]
    for name, rows in (("copa", choices), ("squad", said)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(project: Path, *sets: str):
    given = [word for one in sets for word in ("--set", one)]
    return run_module(project, "stages.evaluate", "--run", "gpt", *given)


def test_cloze_and_core_partial_stand_in_the_metrics(examined):
    done = evaluate(examined, "eval.core.bundle=bundle", "eval.samples=false")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    said = done.stderr.decode()
    assert "left out: coqa" in said and "core_partial" in said and "not CORE" in said
    metrics, record = read(examined, "eval.json"), read(examined, "eval_record.json")
    assert list(metrics) == KEYS
    assert metrics["core"] is None and metrics["core_v2"] is None
    copa, squad = (task["accuracy"] for task in record["core"]["tasks"])
    assert metrics["core_partial"] == pytest.approx(((copa - 0.5) / 0.5 + squad) / 2)
    assert record["core"]["missing"] == ["coqa"]
    names = sorted(path.name for path in (examined / "metrics/gpt/examples").iterdir())
    kinds = ("cloze_continuation", "cloze_last_word", "cloze_order", "copa", "squad")
    assert names == [f"{kind}.jsonl.zst" for kind in kinds]
    assert metrics["cloze"] == pytest.approx(record["cloze"]["cloze"], rel=1e-9)
    tables = {t["label"]: t for t in record["cloze"]["tasks"] + record["core"]["tasks"]}
    for name, records in core.each_file(examined / "metrics/gpt/examples"):
        right = sum(one["correct"] for one in records)
        assert tables[name]["accuracy"] == right / len(records)


KILL = """
import os, signal, sys
from lib.core import files
real, count = files.write_note, [0]
def write(path, records):
    count[0] += path.name.startswith("cloze")
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, records)
files.write_note = write
from lib.core import stage
from stages import evaluate as e
sys.exit(stage.main(e.STAGE, e.body, e.identity, modules=e.modules))
"""


def test_again_after_a_kill_the_bytes_are_the_same(examined):
    """Killed while the second task's records are written: the first task keeps its file."""
    sets = ("eval.core.bundle=bundle", "eval.samples=false")
    shutil.rmtree(examined / "data/work", ignore_errors=True)  # two ranks may have finished it
    assert evaluate(examined, *sets).returncode == 0
    whole = published(examined)
    shutil.rmtree(examined / "data/work")
    words = ["--run", "gpt", *(word for one in sets for word in ("--set", one))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shot = subprocess.run(
        [sys.executable, "-c", KILL, *words], cwd=examined, env=environment, capture_output=True
    )
    assert shot.returncode == -9, shot.stderr.decode()
    (first,) = (examined / "data/work").glob("*/*/units/cloze_*.json")
    assert first.name.startswith("cloze_continuation_")
    done = evaluate(examined, *sets)
    assert done.returncode == 0, done.stderr.decode()
    again = published(examined)
    record, before = (json.loads(one["eval_record.json"]) for one in (again, whole))
    assert [key for key in before if record[key] != before[key]] == []
    assert again == whole


def test_two_processes_share_the_work_and_the_numbers_are_those_of_one(examined):
    """Real ranks over gloo: each scores every second document and example, rank 0 writes."""
    sets = ("eval.core.bundle=bundle", "eval.samples=false")
    assert evaluate(examined, *sets).returncode == 0
    one, alone = read(examined, "eval.json"), decisions(examined)
    shutil.rmtree(examined / "data/work")
    (examined / "metrics/gpt/eval.json").unlink()
    words = ["stages.evaluate", "--run", "gpt", *(w for each in sets for w in ("--set", each))]
    ranks = {"KUMIKI_LAUNCHER": "torchrun", "KUMIKI_NPROC": "2"}
    done = run_module(examined, "lib.core.launch", *words, environment=ranks)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    two = read(examined, "eval.json")
    assert decisions(examined) == alone
    assert two.pop("bpb") == pytest.approx(
        one.pop("bpb"), rel=1e-6
    )  # other batches round otherwise
    assert two == one
    record = read(examined, "eval_record.json")
    assert all(nats > 0 for nats in record["document_nats"]), "a document that no rank scored"


def decisions(project: Path) -> dict[str, list]:
    """What the model said, by task."""
    found = core.each_file(project / "metrics/gpt/examples")
    return {name: [(one["i"], one["pred"], one["correct"]) for one in each] for name, each in found}


def published(project: Path) -> dict[str, bytes]:
    folder = project / "metrics/gpt"
    found = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_missing_bundle_is_a_line_or_an_error(examined):
    done = evaluate(examined, "eval.core.bundle=nowhere", "eval.core.enabled=true")
    assert done.returncode == 2
    assert b"no task bundle: nowhere; name a folder with core.yaml, or a source" in done.stderr
    sets = ("eval.core.bundle=nowhere", "eval.cloze.items=0", "eval.samples=false")
    done = evaluate(examined, *sets)
    assert done.returncode == 0 and b"core: null, no task bundle (nowhere)" in done.stderr
    assert read(examined, "eval.json")["core_partial"] is None


def test_a_damaged_bundle_stops_with_file_and_line(examined, tmp_path):
    shutil.copytree(examined / "bundle", tmp_path / "bundle")
    path = tmp_path / "bundle/eval_data/a/copa.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"query": "x", "choices": ["a"], "gold": 0}\n')
    sets = (f"eval.core.bundle={tmp_path}/bundle", "eval.cloze.items=0", "eval.samples=false")
    done = evaluate(examined, *sets)
    assert done.returncode == 3 and b"copa.jsonl: line 9" in done.stderr


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
