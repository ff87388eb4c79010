"""Tasks x model -> one record per example, accuracies, and CORE or core_partial (evaluation.md 3).

In:    tasks of a bundle, an `Answerer`, a tokenizer.   Out: records and numbers; every rank scores,
       rank 0 holds the records.
State: a finished task's records lie in `units` under a name that holds the hash of all that decides
       them; a rerun reads them and scores only what is missing.
Name:  `core` exists for the 22 original tasks, whole; anything else is `core_partial`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib.core import files
from lib.core.errors import InputError
from lib.eval.batched import TAU, Answerer, Scored
from lib.eval.bpb import Ranks
from lib.eval.bundle import Bundle, Row, Task, read_rows, require_shots
from lib.eval.prompts import Encode, make_examples

VERSION = 1  # of the scorer: raise it when an answer may change
SUFFIX = ".jsonl.zst"
FLAGS = ("empty_span", "prefix_mismatch", "span_cut")

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Exam:
    """How tasks are put to a model; all of it but `units`, `ranks` and voices decides records."""

    answerer: Answerer
    encode: Encode
    start_id: int | None  # stands before every prompt
    max_context: int | None  # ids of a prompt, at most
    identity: Mapping[str, str]  # fingerprints of model and tokenizer
    cap: int = 0  # rows of a task, 0 = all
    units: Path | None = None  # finished tasks, kept for a rerun
    ranks: Ranks = field(default_factory=Ranks)
    warn: Callable[[str], None] = lambda text: None
    advance: Callable[[float], None] = lambda examples: None

    def take(self, tasks: Sequence[Task]) -> dict[str, list[Record]]:
        """Label -> records of all its examples, in scoring order; on rank 0, others see their own.

        Nothing runs before every task is known to have enough rows for its shots.
        """
        rows = {task.label: read_rows(task, self.cap) for task in tasks}
        require_shots([(task, len(rows[task.label])) for task in tasks])
        return {task.label: self._one(task, rows[task.label]) for task in tasks}

    def _one(self, task: Task, rows: Sequence[Row]) -> list[Record]:
        path = self.units / f"{task.label}_{self._key(task)}.json" if self.units else None
        if path and (kept := files.read_note(path)) is not None:
            self.advance(len(range(self.ranks.rank, len(rows), self.ranks.world)))
            return kept
        examples = make_examples(
            task, rows, self.encode, start_id=self.start_id, max_context=self.max_context,
            wanted=range(self.ranks.rank, len(rows), self.ranks.world),
        )  # fmt: skip
        scored = self.answerer(task, list(examples), self.advance)
        self._look_at(task, scored)
        records = gather(self.ranks, [record_of(task, one) for one in scored])
        if path and self.ranks.rank == 0:
            files.write_note(path, records)
        return records

    def _key(self, task: Task) -> str:
        decides = {
            **self.identity,
            "file": task.sha256,
            "kind": task.kind,
            "shots": task.shots,
            "delimiter": task.delimiter,
            "cap": self.cap,
            "max_context": self.max_context,
            "start_id": self.start_id,
            "dtype": str(self.answerer.dtype),
            "version": VERSION,
        }
        return hashlib.sha256(files.canonical_json(decides)).hexdigest()[:16]

    def _look_at(self, task: Task, scored: Sequence[Scored]) -> None:
        worst = max((one.difference for one in scored), default=0.0)
        if worst > TAU[self.answerer.dtype] / 2:
            self.warn(
                f"{task.label}: batches move a mean by {worst:.1e} nats, decisions may follow"
            )


# ---------------------------------------------------------------- records


def record_of(task: Task, scored: Scored) -> Record:
    """One line of examples/<task>.jsonl.zst: every number of the task follows from them."""
    example, answer = scored.example, scored.answer
    is_text = task.kind == "language_modeling"
    start, stop = example.spans[0]
    return {
        "i": example.i,
        "row": example.row,
        "gold": example.ids(0)[start:stop].tolist() if is_text else example.gold,
        "pred": answer.pred,
        "correct": answer.correct,
        "n_ids": [example.length(j) for j in range(len(example.tails))],
        "span": [list(span) for span in example.spans],
        "mean_nll": [_nine(one.mean) for one in answer.scores],
        "sum_nll": [_nine(one.sum) for one in answer.scores],
        "cropped": example.cropped,
        "rescored": scored.rescored,
        "difference": _nine(scored.difference),
        "flags": list(example.flags),
    }


def _nine(value: float) -> float | None:
    """Nine digits hold an fp32 number; None for the mean of nothing."""
    return None if math.isnan(value) else float(f"{value:.9g}")


def write_records(path: Path, records: Sequence[Record]) -> None:
    """JSON lines, zstd; equal records give equal bytes."""
    data = b"".join(files.canonical_json(one) for one in records)
    files.write_bytes(path, pa.Codec("zstd", compression_level=3).compress(data, asbytes=True))


def read_records(path: Path) -> list[Record]:
    """What `write_records` wrote; InputError when it is damaged."""
    try:
        with pa.input_stream(str(path), compression="zstd") as stream:
            return [json.loads(line) for line in stream.read().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            "damaged records", file=path, value=error, remedy="remove it and run the same command"
        ) from None


def gather(ranks: Ranks, records: list[Record]) -> list[Record]:
    """The records of all ranks in order of i, on every rank."""
    if ranks.world == 1:
        return records
    data = files.canonical_json(records)
    sizes = np.zeros(ranks.world)
    sizes[ranks.rank] = len(data)
    ends = np.cumsum(ranks.add(sizes)).astype(np.int64)
    joined = np.zeros(ends[-1])  # bytes as numbers: the one collective there is
    joined[ends[ranks.rank] - len(data) : ends[ranks.rank]] = np.frombuffer(data, np.uint8)
    joined = ranks.add(joined).astype(np.uint8)
    parts = np.split(joined, ends[:-1])
    found = [record for part in parts for record in json.loads(part.tobytes())]
    return sorted(found, key=lambda record: record["i"])


# ---------------------------------------------------------------- numbers


def centre(accuracy: float, baseline_percent: float) -> float:
    """(a - b) / (1 - b): 0 is chance, 1 is perfect; below chance it is negative."""
    b = baseline_percent / 100
    return (accuracy - b) / (1 - b)


def mean(values: Sequence[float]) -> float:
    """Plain mean, fp64."""
    return math.fsum(values) / len(values)


def summarise(task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of a task, centred by both baselines, and what was counted on the way."""
    n, right = len(records), sum(one["correct"] for one in records)
    flags = {f"{f}s" if f == "empty_span" else f: _count(records, f) for f in FLAGS}
    return {
        "label": task.label,
        "n": n,
        "accuracy": right / n,
        "centered": centre(right / n, task.baseline),
        "centered_v2": centre(right / n, task.baseline_v2),
        "baseline": task.baseline,
        "shots": task.shots,
        "file": task.sha256,
        "cropped": sum(one["cropped"] for one in records),
        "rescored": sum(one["rescored"] for one in records),
        "largest_difference": max(one["difference"] for one in records),
        **flags,
    }


def _count(records: Sequence[Record], flag: str) -> int:
    return sum(flag in one["flags"] for one in records)


def by_sum(record: Record) -> bool:
    """Whether a choice would be right by the sum of its nats: lm-evaluation-harness's `acc`."""
    sums = record["sum_nll"]
    return isinstance(record["gold"], int) and sums.index(min(sums)) == record["gold"]


def core_numbers(
    bundle: Bundle, tasks: Sequence[dict[str, Any]], cap: int
) -> dict[str, float | None]:
    """`core`, `core_v2` of the 22 original tasks, whole; else `core_partial` (section 3.13)."""
    v1, v2 = (mean([task[name] for task in tasks]) for name in ("centered", "centered_v2"))
    if bundle.is_original() and not bundle.missing and not cap:
        return {"core": v1, "core_v2": v2, "core_partial": None}
    return {"core": None, "core_v2": None, "core_partial": v1}


def each_file(folder: Path) -> Iterator[tuple[str, list[Record]]]:
    """(task, records) of every file in an `examples` folder."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        yield path.name.removesuffix(SUFFIX), read_records(path)
