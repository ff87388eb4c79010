"""What a run is examined in: cloze, made from its own validation text, and CORE's bundle.

In:    a run, its inputs and model.   Out: the metrics `cloze`, `core`, `core_v2`, `core_partial`,
       what eval_record.json says of them, and the `examples` folder.
Rule:  a bundle that is not there is a line in the log and a null (`enabled: auto`) or an error with
       the two ways to get it (`enabled: true`); never a number from something else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib.core import files
from lib.core.errors import UserError
from lib.core.stage import Run
from lib.eval import bundle as bundles
from lib.eval import cloze, core
from lib.eval.batched import Answerer
from lib.eval.bpb import Ranks
from lib.eval.bundle import Bundle, Task
from lib.eval.core import Exam, Record
from lib.eval.inputs import Inputs, find_bundle
from lib.eval.scorer import Rules
from lib.train import parallel

EXAMPLES = "examples"


@dataclass
class Marks:
    """Metrics by name, their part of the record, seconds by part."""

    numbers: dict[str, float | None] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Examiner:
    """Puts tasks to one model; every rank does, rank 0 writes."""

    run: Run
    inputs: Inputs
    model: Any
    rules: Rules
    device: torch.device
    dtype: torch.dtype

    def examine(self) -> Marks:
        """Cloze, then CORE."""
        marks = Marks(numbers=dict.fromkeys(("cloze", "core", "core_v2", "core_partial")))
        files.make_folder(self.examples)
        for name, take in (("cloze", self._cloze), ("core", self._core)):
            start = time.perf_counter()
            take(marks)
            marks.seconds[name] = time.perf_counter() - start
        return marks

    @property
    def examples(self) -> Path:
        """One file a task; published beside eval.json."""
        return self.run.files_beside("records") / EXAMPLES

    # ------------------------------------------------------------ cloze

    def _cloze(self, marks: Marks) -> None:
        settings, run = self.run.settings.eval.cloze, self.run
        if not settings.items:
            return
        folder = run.units / "cloze"
        marks.record["cloze"] = record = {"seed": settings.seed, "cloze": None}
        if parallel.is_first():
            documents = list(self.inputs.texts())
            record["items"] = cloze.write_bundle(folder, documents, settings.items, settings.seed)
        parallel.barrier()
        if not (folder / cloze.INDEX).is_file():
            least = f"a task has fewer than {cloze.LEAST_ITEMS} items"
            record["reason"] = least
            run.log(f"cloze: null, {least}: {record.get('items')}")
            return
        tasks = bundles.read_bundle(folder, cloze.INDEX).tasks
        found = self._take(tasks, cap=0, max_context=self.inputs.context)
        if not parallel.is_first():
            return
        tables = [core.summarise(task, found[task.label]) for task in tasks]
        record["tasks"] = tables
        record["cloze"] = score = core.mean([table["centered"] for table in tables])
        record["standard_error"] = error = cloze.standard_error(tables)
        record["overlap"] = self._overlap(tasks)
        marks.numbers["cloze"] = score
        told = ", ".join(f"{t['label'][6:]} {t['accuracy']:.3f}" for t in tables)
        beside = record["overlap"]["cloze"]
        run.log(f"cloze {score:.4f} ± {error:.4f} ({told}); beside it word overlap {beside:.4f}")

    def _overlap(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What word overlap with the context scores on the same items."""
        documents = list(self.inputs.texts())
        found = {t.label: cloze.overlap_accuracy(cloze.read_items(t), documents) for t in tasks}
        centred = [core.centre(found[t.label], t.baseline) for t in tasks]
        return {"cloze": core.mean(centred), "accuracy": found}

    # ------------------------------------------------------------ CORE

    def _core(self, marks: Marks) -> None:
        settings, run = self.run.settings.eval.core, self.run
        folder = find_bundle(run)
        if folder is None:
            return
        bundle = bundles.read_bundle(folder)
        if bundle.missing:
            run.warn(f"tasks without a file, left out: {', '.join(bundle.missing)}")
        if not bundle.tasks:
            raise UserError("no task has a file", file=folder, remedy="get the whole bundle")
        limit = settings.max_context or self.inputs.context
        found = self._take(bundle.tasks, cap=settings.max_per_task, max_context=limit)
        if not parallel.is_first():
            return
        tables = [core.summarise(task, found[task.label]) for task in bundle.tasks]
        numbers = core.core_numbers(bundle, tables, settings.max_per_task)
        v2 = core.mean([table["centered_v2"] for table in tables])
        marks.numbers |= numbers
        marks.record["core"] = {
            **numbers,
            "centered_v2": v2,
            "max_per_task": settings.max_per_task,
            "max_context": limit,
            "missing": list(bundle.missing),
            "tasks": tables,
        }
        run.log(told_core(bundle, tables, numbers, v2, settings.max_per_task))

    def _take(
        self, tasks: Sequence[Task], *, cap: int, max_context: int
    ) -> dict[str, list[Record]]:
        """Records of every task, also as files in `examples`."""
        run, ranks = self.run, Ranks.current(self.device)
        answerer = Answerer(
            model=self.model,
            vocab_size=self.rules.vocab_size,
            device=self.device,
            dtype=self.dtype,
            budget_tokens=run.runtime.eval_tokens,
            warn=run.warn,
        )
        with _progress(run, tasks, cap, ranks) as advance:
            exam = Exam(
                answerer=answerer,
                encode=lambda texts: self.inputs.tokenizer.encode_batch(texts, run.runtime.threads),
                start_id=self.rules.boundary_id,
                max_context=max_context,
                identity={
                    "model": self.inputs.final.sha256,
                    "tokenizer": self.inputs.tokenizer.fingerprint,
                },
                cap=cap,
                units=run.units,
                ranks=ranks,
                warn=run.warn,
                advance=advance,
            )
            found = exam.take(tasks)
        if parallel.is_first():
            for label, records in found.items():
                core.write_records(self.examples / f"{label}{core.SUFFIX}", records)
        return found


@contextmanager
def _progress(
    run: Run, tasks: Sequence[Task], cap: int, ranks: Ranks
) -> Iterator[Callable[[float], None]]:
    sizes = [task.path.read_bytes().count(b"\n") for task in tasks]
    total = sum(min(size, cap) if cap else size for size in sizes)
    with run.progress(-(-total // ranks.world), "examples") as advance:
        yield advance


def told_core(
    bundle: Bundle, tables: Sequence[dict[str, Any]], numbers: dict[str, Any], v2: float, cap: int
) -> str:
    """The line for the log; a partial number never stands without its reason."""
    if numbers["core"] is not None:
        return f"CORE {numbers['core']:.4f}, with corrected baselines {v2:.4f}"
    reasons = [f"{len(tables)} tasks" + (f" of {cap} rows at most" if cap else "")]
    reasons += [f"without {', '.join(bundle.missing)}"] if bundle.missing else []
    return f"core_partial {numbers['core_partial']:.4f} ({'; '.join(reasons)}; not CORE)"
