"""Rows of a task -> prompts as ids, each with the span that is scored (evaluation.md 3.5 to 3.10).

In:    rows in scoring order, a tokenizer.   Out: examples: what all prompts begin with, their ends.
Law:   the ids are those of the whole texts; nothing is encoded piecewise.
Note:  a prompt longer than the model takes keeps its last ids. Prompts of one example are held as
       one common beginning and their tails: ten choices share a context of thousands of ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.core.errors import InputError
from lib.eval.bundle import Kind, Row, Task

SHOT_SEED = 1234  # plus the example's index
_BATCH = 64  # examples whose texts are encoded at once

Encode = Callable[[Sequence[str]], list[Any]]  # texts -> ids of each


@dataclass(frozen=True, kw_only=True)
class Example:
    """One decision. Prompt j is shared + tails[j], ids int32; spans[j] = [start, stop) in it."""

    i: int  # place in the scoring order
    row: int  # line of the file, from 1
    gold: int
    shared: np.ndarray
    tails: tuple[np.ndarray, ...]
    spans: tuple[tuple[int, int], ...]
    cropped: bool = False
    flags: tuple[str, ...] = ()  # empty_span, prefix_mismatch, span_cut

    def ids(self, j: int) -> np.ndarray:
        """All ids of prompt j, int32."""
        return np.concatenate((self.shared, self.tails[j]))

    def length(self, j: int) -> int:
        """Ids of prompt j."""
        return len(self.shared) + len(self.tails[j])

    @property
    def longest(self) -> int:
        """Ids of the longest prompt."""
        return len(self.shared) + max(map(len, self.tails))


def make_examples(
    task: Task,
    rows: Sequence[Row],
    encode: Encode,
    *,
    start_id: int | None,
    max_context: int | None,
    wanted: Iterable[int] | None = None,
) -> Iterator[Example]:
    """Examples `wanted` (default all) of a task, in order.

    start_id stands before every prompt; max_context: ids that a prompt may have, None = any.
    """
    indices = list(range(len(rows)) if wanted is None else wanted)
    for at in range(0, len(indices), _BATCH):
        batch = indices[at : at + _BATCH]
        texts = [prompt_texts(task, rows, i) for i in batch]
        flat = encode([text for group in texts for text in group])
        found = iter(flat)
        for i, group in zip(batch, texts, strict=True):
            head = [] if start_id is None else [start_id]
            ids = [np.concatenate((head, next(found))).astype(np.int32) for _ in group]
            yield make_example(task.kind, i, rows[i], ids, max_context)


def draw_shots(total: int, i: int, shots: int) -> list[int]:
    """Indices of the examples shown before example i of `total`."""
    drawn = random.Random(SHOT_SEED + i).sample(range(total - 1), shots)  # noqa: S311  # as published
    return [j + (j >= i) for j in drawn]  # places among all but i, ascending


def prompt_texts(task: Task, rows: Sequence[Row], i: int) -> list[str]:
    """One text per choice; for language modelling without and with the continuation."""
    chosen = draw_shots(len(rows), i, task.shots)
    head = "".join(solved(task, rows[j]) + "\n\n" for j in chosen)
    row, between = rows[i], task.delimiter
    if task.kind == "language_modeling":
        before = head + row.contexts[0].strip() + between
        return [before.strip(), before + row.continuations[0]]
    return [head + c + between + a for c in row.contexts for a in row.continuations]


def solved(task: Task, row: Row) -> str:
    """A row with its right answer."""
    if task.kind == "multiple_choice":
        return row.contexts[0] + task.delimiter + row.continuations[row.gold]
    if task.kind == "schema":
        return row.contexts[row.gold] + task.delimiter + row.continuations[0]
    return row.contexts[0].strip() + task.delimiter + row.continuations[0]


def make_example(
    kind: Kind, i: int, row: Row, ids: Sequence[np.ndarray], max_context: int | None
) -> Example:
    """Spans, crop, and what the prompts have in common; ids: those of `prompt_texts`, start id in.

    InputError where a prompt has no id.
    """
    flags: list[str] = []
    if kind == "language_modeling":
        without, whole = ids
        start, prompts = len(without), [whole]
        if common_start(ids) < start:  # the tokenizer joins across the border
            start = common_start(ids)
            flags.append("prefix_mismatch")
        starts = [start]
    else:
        prompts = list(ids)
        start, end = common_start(prompts), common_end(prompts)
        is_schema = kind == "schema"
        starts = [len(p) - end if is_schema else start for p in prompts]
    if not all(len(p) for p in prompts):
        raise InputError("a prompt has no id", value=f"row {row.number}", remedy="mend the row")
    drops = [max(0, len(p) - max_context) if max_context else 0 for p in prompts]
    prompts = [p[drop:] for p, drop in zip(prompts, drops, strict=True)]
    moved = [s - drop for s, drop in zip(starts, drops, strict=True)]
    if min(moved) < 1:  # nothing stands before id 0 that could predict it
        flags.append("span_cut")
    spans = [(min(max(1, s), len(p)), len(p)) for s, p in zip(moved, prompts, strict=True)]
    if any(s == e for s, e in spans):
        flags.append("empty_span")
    n = min(common_start(prompts), *(s for s, _ in spans)) if len(prompts) > 1 else 0
    return Example(
        i=i,
        row=row.number,
        gold=row.gold,
        shared=prompts[0][:n],
        tails=tuple(p[n:] for p in prompts),
        spans=tuple(spans),
        cropped=any(drops),
        flags=tuple(flags),
    )


def common_start(ids: Sequence[np.ndarray]) -> int:
    """Ids that all begin with."""
    n = min(map(len, ids))
    same = np.all([one[:n] == ids[0][:n] for one in ids], axis=0)
    return n if same.all() else int(np.argmin(same))


def common_end(ids: Sequence[np.ndarray]) -> int:
    """Ids that all end with."""
    return common_start([one[::-1] for one in ids])
