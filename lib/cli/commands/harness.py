"""`kumiki harness`: lm-evaluation-harness on one model, its figures beside ours (section 7)."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.cli.console import note
from lib.core.errors import UserError
from lib.eval import bundle as bundles
from lib.eval import cloze, core
from lib.eval.bundle import Task
from lib.export import saved

CLOZE_ITEMS, CLOZE_SEED = 400, 0


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Take local tasks by their labels, any other name from the harness itself."""
    from lib.cli.harness import PREFIX, Subject, adapt, run_harness, write_tasks
    from lib.eval.scorer import Rules
    from lib.nn.stream import for_reading
    from lib.train.precision import pick_device

    device, streamer = pick_device(arguments.device), for_reading("auto")
    opened = saved.open_model(arguments.model, root, device=device, streamer=streamer)
    boundary = opened.boundary or ("none" if opened.tokenizer.bos_id is None else "bos")
    rules = Rules.of(opened.tokenizer, boundary, opened.model.max_context or 1024)
    subject = Subject(model=opened.model, tokenizer=opened.tokenizer, rules=rules, device=device)
    adapt(subject)  # the extra is missing: said before anything else happens
    note(saved.describe(opened))
    wanted = [name for name in arguments.tasks.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="kumiki_") as place:
        tasks = _local_tasks(arguments, wanted, Path(place))
        labels = {task.label for task in tasks}
        names = write_tasks(Path(place) / "tasks", tasks, arguments.limit or 0)
        theirs = [n for n in wanted if n != "cloze" and n not in labels]
        found = run_harness(subject, Path(place) / "tasks", names + theirs, arguments.limit)
        table: dict[str, Any] = {name: _figures(found["results"][name]) for name in theirs}
        for task in tasks:
            name = PREFIX + task.label
            ours = _beside(subject, task, arguments.limit or 0, found["samples"][name])
            table[task.label] = {**_figures(found["results"][name]), **ours}
    if arguments.json:
        sys.stdout.write(json.dumps(table, sort_keys=True) + "\n")
        return
    for name, figures in table.items():
        told = ", ".join(f"{k} {v:.6g}" for k, v in figures.items() if v is not None)
        sys.stdout.write(f"{name}: {told}\n")


def _local_tasks(arguments: argparse.Namespace, wanted: Sequence[str], place: Path) -> list[Task]:
    """Those of `wanted` that a bundle or the validation documents hold."""
    tasks: list[Task] = []
    if "cloze" in wanted:
        from lib.data.documents import read_documents

        if not arguments.documents:
            remedy = "give --documents with a recipe's folder, such as data/documents/en"
            raise UserError("cloze is made from validation text", remedy=remedy)
        documents = read_documents(Path(arguments.documents), "val")
        cloze.write_bundle(place / "cloze", documents, CLOZE_ITEMS, CLOZE_SEED)
        if not (place / "cloze" / cloze.INDEX).is_file():
            raise UserError(
                "too little validation text for cloze", file=arguments.documents,
                remedy="name other documents",
            )  # fmt: skip
        tasks += bundles.read_bundle(place / "cloze", cloze.INDEX).tasks
    if arguments.bundle:
        found = bundles.read_bundle(Path(arguments.bundle)).tasks
        tasks += [task for task in found if task.label in wanted]
    return tasks


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of one task, by their names there."""
    return {
        name.removesuffix(",none"): value
        for name, value in result.items()
        if "," in name and isinstance(value, float | int) and "stderr" not in name
    }


def _beside(subject: Any, task: Task, cap: int, samples: Sequence[Any]) -> dict[str, float]:
    """Our accuracies on the same rows, and how far log-likelihoods differ on the same ids."""
    from lib.cli.harness import compare
    from lib.eval.prompts import make_examples

    rows = bundles.read_rows(task, cap)
    examples = list(
        make_examples(
            task, rows, subject.tokenizer.encode_batch,
            start_id=subject.rules.boundary_id, max_context=subject.rules.context,
        )
    )  # fmt: skip
    records = [core.record_of(task, one) for one in subject.answerer(task, examples)]
    found = compare(subject, examples, samples)
    by_mean = core.mean([one["correct"] for one in records])
    is_text = task.kind == "language_modeling"
    return {
        "kumiki_by_mean": by_mean,
        "kumiki_by_sum": by_mean if is_text else core.mean([core.by_sum(r) for r in records]),
        "kumiki_same_ids": found.right / max(1, found.decided),
        "same_split_share": found.same_split / found.choices,
        "largest_difference": found.largest_difference,
    }
