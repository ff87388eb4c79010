"""Task bundles: `core.yaml`, its task files and their baselines, read and checked before use.

In:    a folder laid out as DCLM's evaluation bundle.   Out: tasks, and the rows of one.
Rule:  a listed file that is missing is told, never skipped in silence; the first bad line stops all
       (evaluation.md 5.3). Names from the bundle never leave its folder.
Note:  `core` may be reported for the 22 original tasks only: ORIGINALS holds their git blob ids.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from lib.core.errors import InputError, UserError
from lib.core.params import read_yaml

Kind = Literal["multiple_choice", "schema", "language_modeling"]
INDEX, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
ORDER_SEED = 1337  # of the rows, before the cap
_ANSWER = "\nAnswer: "

# DCLM's corrections of 2025-09, in percent; published nanochat numbers are without them (v1).
BASELINES_V2 = {
    "commonsense_qa": 40.3,
    "agi_eval_lsat_ar": 25.0,
    "bigbench_language_identification": 25.0,
}
# label: shots, kind, delimiter, baseline (percent, v1), git blob id of the task file
ORIGINALS: dict[str, tuple[int, str, str, float, str]] = {
    "hellaswag_zeroshot": (0, "M", " ", 25.0, "448321079fdc140bd8566b16b24eda9ceacd3501"),
    "jeopardy": (10, "L", _ANSWER, 0.0, "2f771918dbc8b68550df204171b14d2648b5d494"),
    "bigbench_qa_wikidata": (10, "L", " ", 0.0, "5e1be72797ba082fd4f6efa42f7d759d2d23339a"),
    "arc_easy": (10, "M", _ANSWER, 25.0, "b5fd1bf87a24246a6be67230b721541688f5c349"),
    "arc_challenge": (10, "M", _ANSWER, 25.0, "ce66b8dcfb4bac892a404a0dda8b4e8ed0f84b89"),
    "copa": (0, "M", " ", 50.0, "b22f96e08ae9d0e97e1ae58f67b6425c77ef200a"),
    "commonsense_qa": (10, "M", " ", 20.0, "f1cc16a88b05ab0934aab2ec2d02a6869e6e5520"),
    "piqa": (10, "M", _ANSWER, 50.0, "a9992adfdefde366fe7ccff871f5aa62449a09cf"),
    "openbook_qa": (0, "M", " ", 25.0, "a8aff255a64cbc72a85252acf00df25a315686c2"),
    "lambada_openai": (0, "L", " ", 0.0, "4da02dd53b9e7385871d06ab855471d77b2f7dda"),
    "hellaswag": (10, "M", " ", 25.0, "448321079fdc140bd8566b16b24eda9ceacd3501"),
    "winograd": (0, "S", " ", 50.0, "762fe030ac6938ecba438c47a04057247c6ab891"),
    "winogrande": (0, "S", " ", 50.0, "316e87ae4659f0c402b0f00551fdec83ab0a0986"),
    "bigbench_dyck_languages": (10, "L", " ", 0.0, "27a4ac2b3b18716add92f4ecd62475c4f8d77768"),
    "agi_eval_lsat_ar": (3, "M", " ", 20.0, "d663b427ba310d3f877f09a6830198ca7c856189"),
    "bigbench_cs_algorithms": (10, "L", " ", 0.0, "7ecee0f270f3de8b6558da14ae02181f3d950a40"),
    "bigbench_operators": (10, "L", " ", 0.0, "a982dc4f962725c9dc4abb07d3cc333c99959290"),
    "bigbench_repeat_copy_logic": (10, "L", " ", 0.0, "86621f10e7124ed6f3a61fb91493c1256c008f60"),
    "squad": (10, "L", " ", 0.0, "dc733b8f58ec666c53fd946198c434b819a00680"),
    "coqa": (0, "L", " ", 0.0, "028bd4e51326cc43f8394987ae47fbb271aeba9d"),
    "boolq": (10, "M", _ANSWER, 62.0, "f42083a58713d00ef4600118cfdf79618c269190"),
    "bigbench_language_identification": (
        10, "M", " ", 9.1, "1f132fbbb12a67ce267b7b92b458175632c265f3",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """One entry of the index, its file and what chance scores."""

    label: str
    kind: Kind
    shots: int
    delimiter: str  # between a context and its continuation
    baseline: float  # accuracy of chance in percent, v1
    path: Path
    sha256: str  # of the task file

    @property
    def baseline_v2(self) -> float:
        """The corrected baseline, in percent."""
        return BASELINES_V2.get(self.label, self.baseline)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Tasks in the order of the index; `missing` are labels whose file is not there."""

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]

    def is_original(self) -> bool:
        """Whether these are the 22 tasks of CORE, byte for byte and with their own settings."""
        found = {
            t.label: (t.shots, t.kind[0].upper(), t.delimiter, t.baseline, _git_blob(t.path))
            for t in self.tasks
        }
        return list(found.items()) == list(ORIGINALS.items())


@dataclass(frozen=True)
class Row:
    """One example as text: contexts x continuations, of which one side has a single member."""

    number: int  # line of the file, from 1
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int  # the right one; 0 for language modelling, which has no other


# ---------------------------------------------------------------- the index


def read_bundle(folder: Path, index: str = INDEX) -> Bundle:
    """The tasks of a bundle; their rows are read by `read_rows`.

    UserError for an index that does not say what to do; a missing task file is listed instead.
    """
    path = folder / index
    entries = read_yaml(path).get("icl_tasks")
    if not isinstance(entries, list) or not entries:
        raise _bad_index(path, "icl_tasks", "list the tasks")
    baselines = _read_baselines(folder / BASELINES)
    tasks, missing, seen = [], [], set()
    for number, entry in enumerate(entries, 1):
        label, uri, shots, kind, delimiter = _entry(path, number, entry)
        if label in seen:
            raise _bad_index(path, f"label {label} twice (entry {number})", "remove one")
        seen.add(label)
        if label not in baselines:
            raise UserError(
                "task without a baseline", file=folder / BASELINES, value=label, remedy="add a row"
            )
        file = folder / DATA / uri
        if not file.is_file():
            missing.append(label)
            continue
        tasks.append(
            Task(
                label=label, kind=kind, shots=shots, delimiter=delimiter,
                baseline=baselines[label], path=file, sha256=_sha256(file),
            )
        )  # fmt: skip
    return Bundle(tasks=tuple(tasks), missing=tuple(missing))


def _entry(path: Path, number: int, entry: Any) -> tuple[str, str, int, Kind, str]:
    """label, dataset_uri, shots, kind, delimiter of one entry."""
    here = f"entry {number}"
    if not isinstance(entry, dict):
        raise _bad_index(path, here, "write a mapping")
    label, uri, shots = (entry.get(k) for k in ("label", "dataset_uri", "num_fewshot"))
    kind: Any = entry.get("icl_task_type")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(label, str) or not re.fullmatch(r"\w[\w.-]{0,99}", label):
        raise _bad_index(path, f"label {label!r} ({here})", "use letters, digits, - and _")
    if not isinstance(uri, str) or not uri or _leaves(uri):
        raise _bad_index(path, f"dataset_uri {uri!r} ({here})", f"name a file below {DATA}")
    if kind not in get_args(Kind):
        kinds = ", ".join(get_args(Kind))
        raise _bad_index(path, f"icl_task_type {kind!r} ({here})", f"use {kinds}")
    one = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if not isinstance(one, int) or isinstance(one, bool) or one < 0:
        raise _bad_index(path, f"num_fewshot {shots!r} ({here})", "use one number, 0 or more")
    if not isinstance(delimiter, str):
        raise _bad_index(path, f"continuation_delimiter {delimiter!r} ({here})", "use text")
    return label, uri, one, kind, delimiter


def _leaves(uri: str) -> bool:
    path = PurePosixPath(uri)
    return path.is_absolute() or ".." in path.parts or "\\" in uri or "\0" in uri


def _bad_index(path: Path, value: str, remedy: str) -> UserError:
    return UserError("task index is not valid", file=path, value=value, remedy=remedy)


def _read_baselines(path: Path) -> dict[str, float]:
    """Eval Task -> Random baseline, percent."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
    except FileNotFoundError:
        raise UserError("no such file", file=path, remedy="get the whole bundle") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        remedy = "columns `Eval Task` and `Random baseline` (percent) are needed"
        raise UserError("baselines not readable", file=path, value=error, remedy=remedy) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_blob(path: Path) -> str:
    """What git calls a file of these bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------- rows


def read_rows(task: Task, cap: int = 0) -> list[Row]:
    """Rows in the order they are scored in: shuffled, then the first `cap` (0 = all).

    The cap comes before shots are drawn: a capped run has a small pool (evaluation.md 3.4).
    InputError with file and line for the first bad one.
    """
    lines = task.path.read_bytes().split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    rows = [_row(task, number, line) for number, line in enumerate(lines, 1)]
    random.Random(ORDER_SEED).shuffle(rows)  # noqa: S311  # the published order
    return rows[:cap] if cap else rows


def require_shots(tasks: Sequence[tuple[Task, int]]) -> None:
    """UserError listing every (task, rows) that has fewer other rows than shots."""
    short = [f"{t.label} {rows} rows for {t.shots} shots" for t, rows in tasks if t.shots >= rows]
    if short:
        raise UserError(
            "fewer examples than shots",
            value=", ".join(short),
            remedy=f"raise eval.core.max_per_task to {max(t.shots for t, _ in tasks) + 1} or more",
        )


def _row(task: Task, number: int, line: bytes) -> Row:
    def bad(what: str) -> InputError:
        return InputError(
            "bad task row", file=task.path, value=f"line {number}: {what}", remedy="get it again"
        )

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad(f"no JSON ({error})") from None
    if not isinstance(record, dict):
        raise bad("no object")
    name_in, name_out = _FIELDS[task.kind]
    contexts, continuations = (_texts(record.get(n)) for n in (name_in, name_out))
    wide = {"multiple_choice": continuations, "schema": contexts}.get(task.kind)
    for name, texts, several in (
        (name_in, contexts, wide is contexts),
        (name_out, continuations, wide is continuations),
    ):
        if texts is None or several != isinstance(record[name], list):
            raise bad(f"{name} is missing or of the wrong type")
        if several and len(texts) < 2:
            raise bad(f"{name} has {len(texts)} members, 2 are the least")
    assert contexts is not None and continuations is not None
    if not all(continuations):
        raise bad(f"{name_out} is empty")
    gold = 0 if wide is None else record.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(wide or [0]):
        raise bad(f"gold is {gold!r}, choices are 0 to {len(wide or [0]) - 1}")
    return Row(number, contexts, continuations, gold)


_FIELDS = {
    "multiple_choice": ("query", "choices"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("context", "continuation"),
}


def _texts(value: Any) -> tuple[str, ...] | None:
    """A text or a list of texts as a tuple; None for anything else, lone surrogates included."""
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in found):
        return None
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        return None
    return tuple(found)
