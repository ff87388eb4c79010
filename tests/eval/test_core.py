"""The fast path against the reference, on every family; records, ranks, kills, memory, NaN."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.core.errors import EnvError, InputError
from lib.eval import core, reference
from lib.eval.batched import Answerer
from lib.eval.bpb import Ranks
from lib.eval.bundle import Task, read_bundle, read_rows
from lib.eval.core import Exam
from lib.eval.prompts import make_examples
from lib.models import families, load_family
from lib.models.base import Family, build
from tests.conftest import HANG_S
from tests.data.texts import english
from tests.standins import ByteTokenizer, Causal
from tests.test_family_contract import TINY

TOKENIZER = ByteTokenizer()
T = 48  # shorter than most prompts below


def encode(texts):
    return [TOKENIZER.encode(text) for text in texts]


def make_task(folder: Path, kind: str, shots: int = 2, rows: int = 12) -> Task:
    """A task of random English; every third choice is a beginning of another (an empty span)."""
    words = " ".join(english(rows * 12, 4)).split()
    take = iter(words * 3)
    phrase = lambda n: " ".join(next(take) for _ in range(n))  # noqa: E731
    lines = []
    for i in range(rows):
        if kind == "multiple_choice":
            choices = [phrase(1 + (i + j) % 3) for j in range(3)]
            choices = [c if choices.count(c) == 1 else c + str(j) for j, c in enumerate(choices)]
            if i % 3 == 0:
                choices = ["a", "ab", "abc"]
            lines.append({"query": phrase(4), "choices": choices, "gold": i % 3})
        elif kind == "schema":
            options = [phrase(3), phrase(2)]
            lines.append({"context_options": options, "continuation": phrase(2), "gold": i % 2})
        else:
            lines.append({"context": phrase(5), "continuation": phrase(1)})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Task(
        label=kind, kind=kind, shots=shots, delimiter=" ", baseline=25.0, path=path, sha256=kind,
    )  # fmt: skip


KINDS = ("multiple_choice", "schema", "language_modeling")


def make_model(name: str) -> Family:
    family = load_family(name)
    sizes = {**TINY.get(name, [{}])[0], **({"context": 512} if name == "gpt" else {})}
    model = build(family, family.Config(**sizes), TOKENIZER.vocab_size, seed=1).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return model


def examples_of(task, limit, tokenizer=encode):
    return list(make_examples(task, read_rows(task), tokenizer, start_id=256, max_context=limit))


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("kind", KINDS)
def test_fast_decides_as_the_reference_on_every_family(name, kind, tmp_path):
    """With and without sharing, whatever the budget, prompts cropped or not."""
    model, task = make_model(name), make_task(tmp_path, kind, rows=7)
    longest = model.max_context or 4 * T
    for limit in {min(T, longest), min(longest, 256)}:
        examples = examples_of(task, limit)
        wanted = [reference.answer(model, kind, e, vocab_size=258) for e in examples]
        for share, budget in ((True, 50), (True, 4096), (False, 300)):
            found = Answerer(model=model, vocab_size=258, share=share, budget_tokens=budget)(
                task, examples
            )
            for one, want in zip(found, wanted, strict=True):
                assert one.answer.pred == want.pred, (one.example.i, share, budget)
                assert one.answer.correct == want.correct
                for ours, theirs in zip(one.answer.scores, want.scores, strict=True):
                    assert np.allclose(ours.nats, theirs.nats, atol=1e-4)


@pytest.mark.parametrize("name", families())
def test_fast_decides_as_the_reference_on_real_tasks(name, shared):
    """All tasks of the bundle, the first rows of a pool of 40: real lengths, crops, empty spans."""
    model = make_model(name)
    limit = min(model.max_context or 256, 256)
    tasks = read_bundle(shared / "data/eval_bundle").tasks
    assert len(tasks) == 21
    for task in tasks:
        examples = list(
            make_examples(
                task, read_rows(task, 40), encode,
                start_id=256, max_context=limit, wanted=range(3),
            )
        )  # fmt: skip
        wanted = [reference.answer(model, task.kind, e, vocab_size=258).pred for e in examples]
        for share in (True, False):
            found = Answerer(model=model, vocab_size=258, share=share)(task, examples)
            assert [one.answer.pred for one in found] == wanted, (task.label, share)


def test_what_choices_share_is_run_once(tmp_path):
    task = make_task(tmp_path, "multiple_choice", shots=4)
    examples = examples_of(task, None)
    model = Counting()
    Answerer(model=model, vocab_size=258)(task, examples)
    shared = model.ids
    model = Counting()
    Answerer(model=model, vocab_size=258, share=False)(task, examples)
    assert shared < model.ids / 2


class Counting(Family):
    """The causal stand-in, which counts the ids it is given and refuses batches above a limit."""

    def __init__(self, most: int = 10**9, poison: int | None = None) -> None:
        super().__init__()
        self.inner, self.most, self.poison = Causal(258, dtype=torch.float32), most, poison
        self.ids = self.largest = self.calls = 0

    def forward(self, tokens, state=None):
        self.calls += 1
        self.ids += tokens.numel()
        if tokens.numel() > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.largest = max(self.largest, tokens.numel())
        logits, state = self.inner(tokens, state)
        if self.poison is not None and (tokens == self.poison).any():
            logits = logits.clone()
            logits[tokens == self.poison] = float("nan")
        return logits, state

    def repeat_state(self, state, n):
        return self.inner.repeat_state(state, n)


@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_is_above_the_budget(kind, tmp_path):
    """One row is the least; a shared beginning goes through in pieces."""
    task = make_task(tmp_path, kind)
    examples = examples_of(task, None)
    for budget in (40, 300, 1000):
        model = Counting()
        Answerer(model=model, vocab_size=258, budget_tokens=budget)(task, examples)
        longest = max(e.longest for e in examples)
        # the reference, asked on near ties, takes one row
        assert model.largest <= max(budget, longest)


def test_out_of_memory_halves_the_batch_and_then_names_the_length(tmp_path):
    task, said = make_task(tmp_path, "language_modeling"), []
    examples = examples_of(task, None)
    whole = Answerer(model=Counting(), vocab_size=258, budget_tokens=4000)(task, examples)
    longest = max(e.longest for e in examples)
    tight = Answerer(
        model=Counting(most=2 * longest), vocab_size=258, budget_tokens=4000, warn=said.append
    )(task, examples)
    assert [one.answer.pred for one in tight] == [one.answer.pred for one in whole]
    assert said and "out of memory, going on with" in said[0]
    with pytest.raises(EnvError, match="one row of") as caught:
        Answerer(model=Counting(most=3), vocab_size=258)(task, examples)
    assert caught.value.code == 4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_not_finite_name_task_and_row(kind, tmp_path):
    """Never an accuracy of 0."""
    task = make_task(tmp_path, kind, shots=0)
    with pytest.raises(InputError, match=f"task {kind}, line ") as caught:
        model = Counting(poison=ord("e"))
        Answerer(model=model, vocab_size=258)(task, examples_of(task, None))
    assert caught.value.code == 3


def test_near_ties_are_asked_again(tmp_path):
    """A model without an opinion: every decision is the reference's, the first choice."""

    class Flat(Counting):
        def forward(self, tokens, state=None):
            return torch.zeros(*tokens.shape, 258), state

        def repeat_state(self, state, n):
            return state

    task = make_task(tmp_path, "multiple_choice", shots=0)
    found = Answerer(model=Flat(), vocab_size=258)(task, examples_of(task, None))
    assert {one.answer.pred for one in found} == {0}
    plain = [one for one in found if "empty_span" not in one.example.flags]
    assert plain and all(one.rescored for one in plain)


def test_nan_keeps_what_it_meets():
    nan = float("nan")
    assert reference.least([nan, 1.0]) == 0
    assert reference.least([1.0, nan]) == 0
    assert reference.least([2.0, nan, 1.0]) == 2
    assert reference.least([1.0, 1.0]) == 0


# ---------------------------------------------------------------- prompts at the edges


def test_a_span_before_the_first_id_is_cut_and_counted(tmp_path):
    task = make_task(tmp_path, "language_modeling", shots=0)
    (example,) = [e for e in examples_of(task, 3) if e.i == 0]
    assert example.spans == ((1, 3),) and example.cropped and "span_cut" in example.flags


def test_a_continuation_that_joins_the_context_is_counted(tmp_path):
    """A tokenizer may merge across the border; then the span begins at the first different id."""

    def joined(texts):
        return [np.array([len(word) for word in text.split("_")], np.int32) for text in texts]

    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"context": "ab_cd", "continuation": "ef_g"}) + "\n")
    task = replace(make_task(tmp_path, "language_modeling", shots=0), path=path, delimiter="")
    (example,) = make_examples(task, read_rows(task), joined, start_id=9, max_context=None)
    assert example.ids(0).tolist() == [9, 2, 4, 1]
    assert example.spans == ((2, 4),) and example.flags == ("prefix_mismatch",)


# ---------------------------------------------------------------- exams


def make_exam(model, units=None, **more) -> Exam:
    answerer = Answerer(model=model, vocab_size=258, budget_tokens=500)
    options = {"start_id": 256, "max_context": T, "identity": {"model": "m", "tokenizer": "t"}}
    return Exam(answerer=answerer, encode=encode, units=units, **options, **more)


def test_numbers_follow_from_the_records_alone(tmp_path):
    task = make_task(tmp_path, "multiple_choice")
    records = make_exam(Counting()).take([task])[task.label]
    for one in records:
        means = [float("nan") if m is None else m for m in one["mean_nll"]]
        assert one["pred"] == reference.least(means)
        assert one["correct"] == (one["pred"] == one["gold"])
        assert len(one["n_ids"]) == len(one["span"]) == 3
    found = core.summarise(task, records)
    assert found["accuracy"] == sum(one["correct"] for one in records) / 12
    assert found["centered"] == (found["accuracy"] - 0.25) / 0.75
    assert found["empty_spans"] == 4 and found["cropped"] == 12
    path = tmp_path / "x.jsonl.zst"
    core.write_records(path, records)
    assert core.read_records(path) == records
    assert dict(core.each_file(tmp_path)) == {"x": records}


def test_a_damaged_record_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    core.write_records(path, [{"i": 0}])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data[:-2])
    with pytest.raises(InputError, match="damaged records"):
        core.read_records(path)


def test_finished_tasks_are_not_run_again(tmp_path):
    tasks = [make_task(tmp_path, kind) for kind in KINDS]
    units = tmp_path / "units"
    whole = make_exam(Counting(), units).take(tasks)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in units.iterdir()}
    assert len(before) == 3
    again = Counting()
    assert make_exam(again, units).take(tasks) == whole
    assert again.calls == 0
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in units.iterdir()} == before
    for change in ({"cap": 5}, {"max_context": 20}, {"identity": {"model": "other"}}):
        other = Counting()
        replace(make_exam(other, units), **change).take(tasks[:1])
        assert other.calls, change


def test_a_kill_within_a_task_costs_that_task_alone(tmp_path):
    """The second task raises half way; the first one's records lie there, the second's do not."""
    tasks = [make_task(tmp_path, kind) for kind in (KINDS[1], KINDS[0], KINDS[2])]
    whole = make_exam(Counting(), tmp_path / "whole").take(tasks)

    class Killed(Exception):
        pass

    class Dying(Counting):
        def forward(self, tokens, state=None):
            if self.calls > first:
                raise Killed
            return super().forward(tokens, state)

    counted = Counting()
    make_exam(counted, None).take(tasks[:1])
    first = counted.calls + 2
    with pytest.raises(Killed):
        make_exam(Dying(), tmp_path / "units").take(tasks)
    assert [p.name.split("_")[0] for p in (tmp_path / "units").iterdir()] == ["schema"]
    assert make_exam(Counting(), tmp_path / "units").take(tasks) == whole
    ours, theirs = (sorted((tmp_path / n).iterdir()) for n in ("units", "whole"))
    assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_decide_the_same(world, tmp_path):
    tasks = [make_task(tmp_path, kind) for kind in KINDS]
    whole = make_exam(Counting()).take(tasks)
    adder = Adder(world)
    found, models = {}, [Counting() for _ in range(world)]

    def run(rank: int) -> None:
        ranks = Ranks(rank, world, lambda part: adder.add(rank, part))
        found[rank] = make_exam(models[rank], ranks=ranks).take(tasks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    for label, records in whole.items():
        for one, want in zip(found[0][label], records, strict=True):
            assert {k: one[k] for k in ("i", "row", "gold", "pred", "correct", "span")} == {
                k: want[k] for k in ("i", "row", "gold", "pred", "correct", "span")
            }
    assert max(m.ids for m in models) < 0.8 * make_and_count(tasks)


def make_and_count(tasks) -> int:
    model = Counting()
    make_exam(model).take(tasks)
    return model.ids


class Adder:
    """Sums what the threads of all ranks bring, as all_reduce does."""

    def __init__(self, world: int) -> None:
        self.parts: list = [None] * world
        self.barrier = threading.Barrier(world)

    def add(self, rank: int, part: np.ndarray) -> np.ndarray:
        self.parts[rank] = part
        self.barrier.wait(HANG_S)
        total = np.sum(self.parts, axis=0)
        self.barrier.wait(HANG_S)
        return total
