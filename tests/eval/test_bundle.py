"""Bundles as they come: what is read, what is refused and how it is named, what may be CORE."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lib.core.errors import InputError, UserError
from lib.eval import bundle as bundles
from lib.eval.bundle import ORIGINALS, Bundle, read_bundle, read_rows, require_shots
from lib.eval.core import core_numbers
from lib.eval.prompts import draw_shots

MC = {"query": "one", "choices": ["a", "b"], "gold": 1}
SCHEMA = {"context_options": ["x", "y"], "continuation": "z", "gold": 0}
LM = {"context": "c", "continuation": "d"}
KINDS = {"multiple_choice": MC, "schema": SCHEMA, "language_modeling": LM}


def entry(label="t", uri="a/t.jsonl", kind="multiple_choice", shots="[0]", more="") -> str:
    return (
        f"- label: {label}\n  dataset_uri: {uri}\n  num_fewshot: {shots}\n"
        f"  icl_task_type: {kind}\n{more}"
    )


def make(folder: Path, *entries: str, lines=None, baselines="t,25\nu,0\nv,50\n") -> Path:
    (folder / "eval_data/a").mkdir(parents=True)
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entries or [entry()]))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + baselines)
    text = lines if isinstance(lines, str) else "".join(json.dumps(x) + "\n" for x in lines or [MC])
    (folder / "eval_data/a/t.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_each_kind_is_read(kind, tmp_path):
    rows = [{**KINDS[kind], "category": "ignored"}] * 3
    (task,) = read_bundle(make(tmp_path, entry(kind=kind), lines=rows)).tasks
    found = read_rows(task)
    assert sorted(row.number for row in found) == [1, 2, 3]
    assert task.delimiter == " " and task.shots == 0 and task.baseline == 25


def test_the_cap_comes_after_the_shuffle_and_before_the_shots(tmp_path):
    """A capped run keeps the first rows of the whole order, not of the file."""
    rows = [{**MC, "query": str(n)} for n in range(50)]
    (task,) = read_bundle(make(tmp_path, lines=rows)).tasks
    whole = read_rows(task)
    assert [row.number for row in whole] != list(range(1, 51))
    assert read_rows(task, 12) == whole[:12]


def test_shots_are_drawn_from_all_others():
    import random

    for i in (0, 3, 11):
        others = [j for j in range(12) if j != i]
        assert draw_shots(12, i, 10) == random.Random(1234 + i).sample(others, 10)


BAD_ROWS = {
    "not json": "{'a': 1}\n",
    "an empty line": json.dumps(MC) + "\n\n" + json.dumps(MC) + "\n",
    "no object": "[1]\n",
    "field missing": json.dumps({"query": "q", "gold": 0}) + "\n",
    "choices no list": json.dumps({**MC, "choices": "ab"}) + "\n",
    "one choice": json.dumps({**MC, "choices": ["a"], "gold": 0}) + "\n",
    "an empty choice": json.dumps({**MC, "choices": ["a", ""]}) + "\n",
    "gold too large": json.dumps({**MC, "gold": 2}) + "\n",
    "gold negative": json.dumps({**MC, "gold": -1}) + "\n",
    "gold no number": json.dumps({**MC, "gold": True}) + "\n",
    "a lone surrogate": '{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}\n',
    "too deep": "[" * 100_000 + "\n",
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(name, tmp_path):
    text = json.dumps(MC) + "\n" + BAD_ROWS[name]
    (task,) = read_bundle(make(tmp_path, lines=text)).tasks
    with pytest.raises(InputError, match=r"t\.jsonl: line \d+") as caught:
        read_rows(task)
    assert caught.value.code == 3


def test_an_empty_continuation_is_refused(tmp_path):
    row = {**LM, "continuation": ""}
    (task,) = read_bundle(make(tmp_path, entry(kind="language_modeling"), lines=[row])).tasks
    with pytest.raises(InputError, match="line 1: continuation is empty"):
        read_rows(task)


BAD_INDEX = {
    "unknown kind": entry(kind="essay"),
    "label twice": entry() + entry(),
    "label is a path": entry(label="../t"),
    "uri leaves": entry(uri="../../etc/passwd"),
    "uri is absolute": entry(uri="/etc/passwd"),
    "shots are text": entry(shots="ten"),
    "several shots": entry(shots="[0, 10]"),
    "negative shots": entry(shots="[-1]"),
    "no mapping": "- t\n",
    "delimiter is a number": entry(more="  continuation_delimiter: 3\n"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_a_bad_index_is_a_user_error(name, tmp_path):
    with pytest.raises(UserError, match=r"core\.yaml"):
        read_bundle(make(tmp_path, BAD_INDEX[name]))


@pytest.mark.parametrize("text", ["u,25\n", "t,half\n"])
def test_a_label_without_a_baseline_is_a_user_error(text, tmp_path):
    with pytest.raises(UserError, match=r"eval_meta_data\.csv"):
        read_bundle(make(tmp_path, baselines=text))


def test_a_missing_task_file_is_listed(tmp_path):
    found = read_bundle(make(tmp_path, entry(), entry(label="u", uri="a/none.jsonl")))
    assert [task.label for task in found.tasks] == ["t"] and found.missing == ("u",)


def test_too_few_rows_for_the_shots_are_all_listed(tmp_path):
    (task,) = read_bundle(make(tmp_path, entry(shots="[10]"), lines=[MC] * 20)).tasks
    require_shots([(task, 11)])
    with pytest.raises(UserError, match=r"t 10 rows for 10 shots, x 2 rows.* 11 or more"):
        require_shots([(task, 10), (replace(task, label="x"), 2)])


# ---------------------------------------------------------------- what may be called CORE


@pytest.fixture
def original(tmp_path, monkeypatch) -> Bundle:
    """22 files whose git ids are taken for the originals'."""
    tasks, table = [], {}
    for label, (shots, kind, delimiter, baseline, _) in ORIGINALS.items():
        path = tmp_path / f"{label}.jsonl"
        path.write_text(label)
        names = {"M": "multiple_choice", "S": "schema", "L": "language_modeling"}
        tasks.append(
            bundles.Task(
                label=label, kind=names[kind], shots=shots, delimiter=delimiter,
                baseline=baseline, path=path, sha256="",
            )
        )  # fmt: skip
        table[label] = (shots, kind, delimiter, baseline, bundles._git_blob(path))
    monkeypatch.setattr(bundles, "ORIGINALS", table)
    return Bundle(tasks=tuple(tasks), missing=())


def numbers(bundle: Bundle, cap: int = 0):
    tables = [{"centered": 0.25, "centered_v2": 0.125} for _ in bundle.tasks]
    return core_numbers(bundle, tables, cap)


PARTIAL = {"core": None, "core_v2": None, "core_partial": 0.25}


def test_only_the_22_originals_whole_are_core(original):
    assert numbers(original) == {"core": 0.25, "core_v2": 0.125, "core_partial": None}


def test_a_capped_run_is_partial(original):
    assert numbers(original, 1000) == PARTIAL


def test_a_missing_task_makes_it_partial(original):
    assert numbers(Bundle(tasks=original.tasks[:-1], missing=("x",))) == PARTIAL
    assert numbers(replace(original, missing=("x",))) == PARTIAL


@pytest.mark.parametrize("change", [{"shots": 5}, {"baseline": 24.0}, {"delimiter": "\n"}])
def test_an_altered_task_makes_it_partial(original, change):
    tasks = (replace(original.tasks[0], **change), *original.tasks[1:])
    assert numbers(Bundle(tasks=tasks, missing=())) == PARTIAL


def test_an_altered_byte_makes_it_partial(original):
    original.tasks[3].path.write_text("other")
    assert numbers(original) == PARTIAL


def test_the_bundle_beside_the_project_is_never_core(shared):
    """Its hellaswag is rebuilt and coqa missing; a stand-in for coqa changes nothing."""
    found = read_bundle(shared / "data/eval_bundle")
    assert found.missing == ("coqa",) and len(found.tasks) == 21
    blobs = {task.label: bundles._git_blob(task.path) for task in found.tasks}
    altered = [label for label, blob in blobs.items() if blob != ORIGINALS[label][4]]
    assert altered == ["hellaswag_zeroshot", "hellaswag"]
    assert numbers(found) == PARTIAL
    fake = replace(found.tasks[1], label="coqa", shots=0, path=found.tasks[1].path)
    assert numbers(Bundle(tasks=(*found.tasks, fake), missing=())) == PARTIAL
