"""CORE against the reference implementation's own decisions, spans and published numbers."""

from __future__ import annotations

import csv
import hashlib
import json

import numpy as np
import pytest
import torch

from lib.data.vocab.tokenizer import Tokenizer, take_gpt2
from lib.eval import core
from lib.eval.batched import Answerer
from lib.eval.bundle import BASELINES_V2, ORIGINALS, read_bundle, read_rows
from lib.eval.prompts import make_examples
from tests.eval.mock import Mock, V
from tests.golden import read

BOS = 50256
TIED = {("arc_easy", 32)}  # an exact tie: rounding decides
FILES = ("core_mock_mc", "core_mock_schema", "core_mock_lm")
# Every task in `make test`, its first examples; all examples are marked slow.
SOME = 4


@pytest.fixture(scope="module")
def tokenizer(shared):
    return Tokenizer(take_gpt2(shared / "data/gpt2_bpe", None))


@pytest.fixture(scope="module")
def tasks(shared):
    return {task.label: task for task in read_bundle(shared / "data/eval_bundle").tasks}


def examples_of(task, tokenizer, wanted, cap=40, max_context=None):
    rows = read_rows(task, cap)
    encode = lambda texts: tokenizer.encode_batch(texts)  # noqa: E731
    options = {"start_id": BOS, "max_context": max_context, "wanted": wanted}
    return list(make_examples(task, rows, encode, **options))


def require(task, tokenizer, golden, wanted, model, **options):
    """Spans, lengths, ids, means and decisions of the examples `wanted`."""
    found = Answerer(model=model, vocab_size=V, dtype=torch.float64)(
        task, examples_of(task, tokenizer, wanted, **options)
    )
    by_index = {one["i"]: one for one in golden["examples"]}
    for scored in found:
        example, answer, want = scored.example, scored.answer, by_index[scored.example.i]
        place = f"{task.label} i={example.i}"
        assert [list(span) for span in example.spans] == want["spans"], place
        assert [example.length(j) for j in range(len(example.tails))] == want["len"], place
        if "text_sha256" in want:
            text = " ".join(map(str, example.ids(0).tolist()))
            assert hashlib.sha256(text.encode()).hexdigest()[:16] == want["text_sha256"], place
        if "argmax" in want:
            assert answer.pred == want["argmax"], place
        elif (task.label, example.i) not in TIED:
            assert answer.pred == want["pred"], place
        if (task.label, example.i) not in TIED:
            assert answer.correct == want["correct"], place
        for one, mean in zip(answer.scores, want.get("mean_loss", []), strict=False):
            assert np.isnan(one.mean) if mean == "nan" else abs(one.mean - mean) < 2e-8, place


def names(file):
    kinds = {"core_mock_mc": "M", "core_mock_schema": "S", "core_mock_lm": "L"}
    return [n for n, original in ORIGINALS.items() if original[1] == kinds[file] and n != "coqa"]


@pytest.mark.parametrize(("file", "label"), [(f, n) for f in FILES for n in names(f)])
def test_first_examples_are_the_references(file, label, shared, tokenizer, tasks):
    golden = read(shared, f"{file}.json")["tasks"][label]
    require(tasks[label], tokenizer, golden, golden["indices"][:SOME], Mock())


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_example_is_the_references(file, shared, tokenizer, tasks):
    golden = read(shared, f"{file}.json")["tasks"]
    assert sorted(golden) == sorted(names(file))
    for label, one in golden.items():
        require(tasks[label], tokenizer, one, one["indices"], Mock())


def test_every_prompt_has_the_references_span(shared, tokenizer, tasks):
    """All 40 examples of all tasks; no model."""
    for file in FILES:
        for label, golden in read(shared, f"{file}.json")["tasks"].items():
            found = examples_of(tasks[label], tokenizer, golden["indices"])
            for example, want in zip(found, golden["examples"], strict=True):
                assert [list(s) for s in example.spans] == want["spans"], f"{label} {example.i}"


def test_truncated_prompts_keep_their_last_ids(shared, tokenizer, tasks):
    for label, golden in read(shared, "core_mock_truncated.json")["tasks"].items():
        listed = [one["i"] for one in golden["examples"]][:4]
        limit = golden["max_seq_len"]
        require(tasks[label], tokenizer, golden, listed, Mock(), max_context=limit)


def test_an_empty_span_is_decided_as_the_reference_does(shared, tokenizer, tasks):
    golden = read(shared, "core_mock_piqa_empty_span.json")
    wanted = [one["i"] for one in golden["examples"]]
    assert len(wanted) == 4
    require(tasks["piqa"], tokenizer, golden, wanted, Mock(), cap=0)


def test_lookahead_model_gives_the_references_decisions(shared, tokenizer, tasks):
    """Mock B: what the reference's own scorer hands its model, seen through the spans."""
    for label, golden in read(shared, "core_mock_lm_lookahead.json")["tasks"].items():
        said = ""
        for example in examples_of(tasks[label], tokenizer, golden["indices"]):
            ids, (start, stop) = example.ids(0).astype(np.int64), example.spans[0]
            p = np.arange(start - 1, stop - 1)
            slips = (31 * ids[p] + 17 * ids[p + 1] + 7 * p) % 11 == 0
            said += str(int(not slips.any()))
        assert said == golden["correct"], label


# ---------------------------------------------------------------- centring


def core_of(accuracies, baselines):
    return core.mean([core.centre(a, b) for a, b in zip(accuracies, baselines, strict=True)])


V1 = [original[3] for original in ORIGINALS.values()]
V2 = [BASELINES_V2.get(label, original[3]) for label, original in ORIGINALS.items()]
PUBLISHED = [
    .304023, .009920, .320407, .510522, .258532, .600000, .285012, .620239, .296000, .252086,
    .304621, .553114, .516180, .143000, .269565, .368939, .109524, 0, .035478, .078542, .542813,
    .252300,
]  # fmt: skip


def test_a_published_log_gives_its_published_core():
    assert round(core_of(PUBLISHED, V1), 6) == 0.119520
    assert round(core_of(PUBLISHED, V2), 5) == 0.09501


def test_all_models_of_dclm_are_centred_to_the_last_digit(shared):
    """156 models, both baseline tables."""
    results = json.loads((shared / "data/refs/dclm_core_results.json").read_text())["results"]
    assert len(results) == 156
    for one in results:
        accuracies = [one["accuracy"][label] for label in ORIGINALS]
        assert abs(core_of(accuracies, V1) - one["Core_v1"]) < 1e-12, one["file"]
        assert abs(core_of(accuracies, V2) - one["Core_v2"]) < 1e-12, one["file"]


def test_gpt2_tables_add_up_to_their_printed_core(shared):
    for size in ("", "-medium", "-large", "-xl"):
        path = shared / f"data/eval_bundle/openai-community-gpt2{size}.csv"
        lines = path.read_text().splitlines()
        table = [[cell.strip() for cell in row] for row in csv.reader(lines)][1:]
        found = {name: (accuracy, centred) for name, accuracy, centred in table}
        total = core_of([float(found[label][0]) for label in ORIGINALS], V1)
        assert abs(total - float(found["CORE"][1])) < 2e-6, size


def test_golden_centring(shared):
    golden = read(shared, "core_centering.json")
    assert golden["tasks"] == list(ORIGINALS)
    assert (golden["baseline_v1_percent"], golden["baseline_v2_percent"]) == (V1, V2)
    for case in golden["cases"]:
        if "core_v1" in case:
            assert abs(core_of(case["accuracy"], V1) - case["core_v1"]) < 1e-12
        for a, b, want in zip(case["accuracy"], V1, case.get("centered_v1", []), strict=False):
            assert abs(core.centre(a, b) - want) < 1e-11  # written to 12 digits
