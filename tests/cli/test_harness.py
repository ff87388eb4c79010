"""lm-evaluation-harness beside ours: the same log-likelihoods, the same decisions by sum."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import pytest
import torch

from lib.cli import harness
from lib.core.data_settings import SentencePieceTokenizer
from lib.core.errors import UserError
from lib.data.vocab import tokenizer as tokenizers
from lib.data.vocab.spm import train_sentencepiece
from lib.eval import cloze, core
from lib.eval.bundle import Task, read_bundle, read_rows
from lib.eval.prompts import make_examples
from lib.eval.scorer import Rules
from lib.models import gpt
from lib.models.base import build
from tests.data.texts import english
from tests.eval.test_cloze import documents
from tests.eval.test_core import Counting, make_task
from tests.standins import ByteTokenizer

has_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"lm-eval is not installed: {harness.EXTRA}"
)
CONTEXT = 400


class Tokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


@pytest.fixture
def subject() -> harness.Subject:
    model, tokenizer = Counting(), Tokenizer()
    model.vocab_size, model.max_context = 258, CONTEXT
    rules = Rules.of(tokenizer, "bos", CONTEXT)
    return harness.Subject(model=model, tokenizer=tokenizer, rules=rules)


def run(subject, folder, tasks: list[Task]):
    names = harness.write_tasks(folder, tasks)
    return harness.run_harness(subject, folder, names, None)


def examples_of(subject, task):
    rows, encode = read_rows(task), subject.tokenizer.encode_batch
    return list(make_examples(task, rows, encode, start_id=256, max_context=CONTEXT))


@has_harness
@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_the_harness_agrees_on_the_same_ids(kind, subject, tmp_path):
    task = make_task(tmp_path, kind, shots=2)
    result = run(subject, tmp_path / "tasks", [task])
    name = harness.PREFIX + kind
    examples = examples_of(subject, task)
    found = harness.compare(subject, examples, result["samples"][name])
    assert found.same_split == found.choices > 0
    assert found.largest_difference < 1e-4
    records = [core.record_of(task, one) for one in subject.answerer(task, examples)]
    acc = result["results"][name]["acc,none"]
    assert acc == found.right / found.decided and found.decided == len(examples)
    if kind == "multiple_choice":
        assert acc == core.mean([core.by_sum(one) for one in records])
    if kind == "language_modeling":
        assert acc == core.mean([one["correct"] for one in records])


@has_harness
def test_rolling_log_likelihood_is_our_bits_per_byte(subject, tmp_path):
    """A text of at most T ids: one window in both."""
    text = "A text that is scored as a whole, from its first byte on."
    (nats,) = subject.rolling([text])
    adapter = harness.adapt(subject)
    request = type("Request", (), {"args": (text,)})
    assert adapter.loglikelihood_rolling([request]) == [nats]
    ids = [256, *subject.tokenizer.encode(text).tolist()]
    ((by_pair, _),) = subject.likelihoods([(ids[:1], ids[1:])])
    assert by_pair == pytest.approx(nats, rel=1e-6) and math.isfinite(nats)


@has_harness
def test_generation_ends_at_the_stop_string(subject):
    whole = subject.continuation("Some words", {"max_gen_toks": 12})
    assert whole
    assert subject.continuation("Some words", {"max_gen_toks": 12, "until": [whole[3:5]]}) in (
        whole[:3], whole[: whole.find(whole[3:5])],
    )  # fmt: skip


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def real(request) -> harness.Subject:
    """A base GPT of two layers, weights at random, under a tokenizer of each sort."""
    made: Any = Tokenizer()
    if request.param == "sentencepiece":
        section = SentencePieceTokenizer(
            kind="sentencepiece", documents="en", vocab_size=420, character_coverage=1.0
        )
        made = tokenizers.Tokenizer(train_sentencepiece(iter(english(60)), section))
    config = gpt.Config(depth=2, width=32, heads=2, context=CONTEXT)
    model = build(gpt, config, made.vocab_size, seed=1).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    boundary = "eos" if made.bos_id is None else "bos"
    return harness.Subject(model=model, tokenizer=made, rules=Rules.of(made, boundary, CONTEXT))


def require_agreement(subject: harness.Subject, tasks: list[Task], folder, cap: int) -> None:
    result = harness.run_harness(subject, folder, harness.write_tasks(folder, tasks, cap), None)
    for task in tasks:
        rows, start = read_rows(task, cap), subject.rules.boundary_id
        examples = list(
            make_examples(
                task, rows, subject.tokenizer.encode_batch, start_id=start, max_context=CONTEXT
            )
        )
        name = harness.PREFIX + task.label
        found = harness.compare(subject, examples, result["samples"][name])
        assert found.same_split >= 0.99 * found.choices and found.largest_difference < 1e-4
        if found.decided == len(rows):
            assert result["results"][name]["acc,none"] == found.right / found.decided


@has_harness
def test_cloze_agrees_for_a_real_model(real, tmp_path):
    cloze.write_bundle(tmp_path / "cloze", documents(), 60, 0)
    tasks = read_bundle(tmp_path / "cloze", cloze.INDEX).tasks
    require_agreement(real, list(tasks), tmp_path / "tasks", 0)


@has_harness
def test_real_tasks_agree_for_a_real_model(shared, real, tmp_path):
    """copa, winograd and winogrande: first rows."""
    labels = ("copa", "winograd", "winogrande")
    tasks = [t for t in read_bundle(shared / "data/eval_bundle").tasks if t.label in labels]
    require_agreement(real, tasks, tmp_path, 25)


@has_harness
def test_a_schema_span_that_begins_in_the_context_is_what_parts_the_two_accuracies(
    subject, tmp_path
):
    """Contexts with a common ending: CORE scores it too, the harness does not."""
    task = make_task(tmp_path, "schema", shots=0, rows=40)
    rows = [json.loads(line) for line in task.path.read_text().splitlines()]
    for row in rows:
        row["context_options"] = [f"{option}'s" for option in row["context_options"]]
    task.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(subject, tmp_path / "tasks", [task])
    examples = examples_of(subject, task)
    for example in examples:
        start, stop = example.spans[0]
        assert stop - start >= len(" " + rows[example.row - 1]["continuation"]) + len("'s")
    found = harness.compare(subject, examples, result["samples"][harness.PREFIX + "schema"])
    acc = result["results"][harness.PREFIX + "schema"]["acc,none"]
    assert acc == found.right / 40
    records = [core.record_of(task, one) for one in subject.answerer(task, examples)]
    assert acc != core.mean([core.by_sum(one) for one in records])


def test_written_tasks_hold_the_shots(subject, tmp_path):
    task = make_task(tmp_path, "multiple_choice", shots=2)
    harness.write_tasks(tmp_path / "tasks", [task])
    lines = (tmp_path / "tasks/multiple_choice.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (example, *_) = examples_of(subject, task)
    whole = first["text"] + " " + first["choices"][0]
    assert example.ids(0).tolist() == [256, *subject.tokenizer.encode(whole).tolist()]


def test_without_the_extra_the_remedy_is_told(subject, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[harness\]'"):
        harness.adapt(subject)
