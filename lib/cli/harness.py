"""lm-evaluation-harness over any family: an independent check of our accuracies (evaluation.md 7).

In:    a model with its tokenizer, tasks of a bundle.   Out: the harness's results, and how far its
       log-likelihoods are from ours on the same ids.
Rule:  the package is an extra, imported here only; local tasks run offline, from files that are
       written for it. A task of its own is downloaded when the user names it.
Note:  CORE is not in the harness, and its `acc_norm` divides by characters, ours by ids: neither is
       ever quoted as the other. Its `acc` is our decision by the sum of nats (core.by_sum), except
       for schema: CORE's span there is all that both prompts end with, which may begin before the
       continuation ("Lily's silence", "Donna's silence": from "'s" on; 44 of winograd's 273 rows).
       `Agreement.right` decides by the harness's own ids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.core import files
from lib.core.errors import UserError
from lib.eval.batched import Answerer
from lib.eval.bundle import Row, Task, read_rows
from lib.eval.prompts import Example, draw_shots, solved
from lib.eval.scorer import Rules, Scorer
from lib.export.generate import Generation, Sampling, TextStream
from lib.export.hf import stop_ids

EXTRA = "pip install -e '.[harness]'"
PREFIX = "kumiki_"  # of our tasks' names there
NEW_TOKENS = 256  # where a task asks for text and names no length


@dataclass(kw_only=True)
class Subject:
    """What the harness asks: log-likelihoods and texts of one model."""

    model: Any
    tokenizer: Any
    rules: Rules
    device: torch.device | str = "cpu"
    answerer: Answerer = field(init=False)

    def __post_init__(self) -> None:
        self.answerer = Answerer(
            model=self.model, vocab_size=self.rules.vocab_size, device=self.device
        )

    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of the second ids of each pair after the first."""
        task = Task(
            label="harness", kind="language_modeling", shots=0, delimiter="", baseline=0.0,
            path=Path(), sha256="",
        )  # fmt: skip
        examples = [self._example(i, *pair) for i, pair in enumerate(pairs)]
        found = self.answerer(task, examples)
        return [(-one.answer.scores[0].sum, one.answer.correct) for one in found]

    def _example(self, i: int, before: Sequence[int], wanted: Sequence[int]) -> Example:
        start = self.rules.boundary_id
        head = [] if start is None or list(before[:1]) == [start] else [start]
        ids = np.array([*head, *before, *wanted][-self.rules.context :], np.int32)
        span = (max(1, len(ids) - len(wanted)), len(ids))
        none = np.empty(0, np.int32)
        return Example(i=i, row=i + 1, gold=0, shared=none, tails=(ids,), spans=(span,))

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of whole texts, under the windows of our BPB."""
        scorer = Scorer(
            model=self.model, rules=self.rules, token_bytes=self.tokenizer.token_bytes,
            device=self.device,
        )  # fmt: skip
        ids = [np.asarray(self.tokenizer.encode(text), np.int64) for text in texts]
        nats, _ = scorer(ids, [f"text {i}" for i in range(len(ids))])
        return [-float(one) for one in nats]

    def continuation(self, prompt: str, options: Mapping[str, Any]) -> str:
        """Text after `prompt`, up to the first of `until`."""
        until = options.get("until") or []
        warm = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        wanted = int(options.get("max_gen_toks") or NEW_TOKENS)
        start = [] if self.rules.boundary_id is None else [self.rules.boundary_id]
        ids = [*start, *(int(i) for i in self.tokenizer.encode(prompt))]
        wanted = min(wanted, self.rules.context - 1)
        generation = Generation(
            self.model, ids[-(self.rules.context - wanted) :], Sampling(temperature=warm, top_k=0),
            max_new_tokens=wanted, stop_ids=stop_ids(self.tokenizer), device=self.device,
        )  # fmt: skip
        stream = TextStream(
            self.tokenizer.decode_bytes, [until] if isinstance(until, str) else until
        )
        text = ""
        for (token,) in generation:
            if token is not None:
                text += stream.feed(token)
            if stream.stopped:
                generation.rows[0].stop = "stop"
        return text + stream.finish()


def adapt(subject: Subject) -> Any:
    """`subject` as a model of the harness. UserError where the extra is not installed."""
    try:
        from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed", remedy=EXTRA) from None

    class Adapter(TemplateLM):
        """The harness's view; all work is `Subject`'s."""

        @property
        def eot_token_id(self) -> int:
            found = (subject.rules.boundary_id, subject.tokenizer.eos_id, subject.tokenizer.bos_id)
            return next((i for i in found if i is not None), 0)

        @property
        def max_length(self) -> int:
            return subject.rules.context

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            return [int(i) for i in subject.tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return subject.likelihoods([(before, wanted) for _, before, wanted in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return subject.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [subject.continuation(*request.args) for request in requests]

    return Adapter()


# ---------------------------------------------------------------- our tasks as the harness's


def write_tasks(folder: Path, tasks: Sequence[Task], cap: int = 0) -> list[str]:
    """Write every task as a harness task file with its rows; returns their names there."""
    for task in tasks:
        rows = read_rows(task, cap)
        data = folder / f"{task.label}.jsonl"
        lines = [files.canonical_json(_document(task, rows, i)) for i in range(len(rows))]
        files.write_bytes(data, b"".join(lines))
        config = {
            "task": PREFIX + task.label,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data.absolute())},
                "cache_dir": str(folder.absolute() / "cache"),
            },
            "test_split": "test",
            "target_delimiter": task.delimiter,
            **_FORMS[task.kind],
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        files.write_json(folder / f"{task.label}.yaml", config)  # JSON is YAML
    return [PREFIX + task.label for task in tasks]


_FORMS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}", "doc_to_choice": "choices", "doc_to_target": "gold",
    },
    # contexts differ, the continuation is one: the harness takes the index as text
    "schema": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold", "doc_to_choice": "choices", "doc_to_target": "{{text}}",
    },
    "language_modeling": {
        "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{target}}",
    },
}  # fmt: skip


def _document(task: Task, rows: Sequence[Row], i: int) -> dict[str, Any]:
    """Row i with its shots written out: the harness draws none."""
    drawn = draw_shots(len(rows), i, task.shots)
    head = "".join(solved(task, rows[j]) + "\n\n" for j in drawn)
    row = rows[i]
    if task.kind == "multiple_choice":
        text, choices = head + row.contexts[0], list(row.continuations)
        return {"text": text, "choices": choices, "gold": row.gold}
    if task.kind == "schema":
        choices = [head + context for context in row.contexts]
        return {"text": row.continuations[0], "choices": choices, "gold": row.gold}
    # this form of request knows no delimiter
    target = task.delimiter + row.continuations[0]
    return {"text": head + row.contexts[0].strip(), "target": target}


def run_harness(subject: Subject, folder: Path, names: Sequence[str], limit: int | None) -> Any:
    """The harness's own result, samples included; offline where all of `names` are local."""
    adapter = adapt(subject)
    local = all(name.startswith(PREFIX) for name in names)
    if local:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval.evaluator import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager(include_path=str(folder), include_defaults=not local)
    return simple_evaluate(
        adapter, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0,
        num_fewshot=0 if local else None,
    )  # fmt: skip


# ---------------------------------------------------------------- agreement


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of the harness with our reference, on one task."""

    choices: int
    same_split: int  # choices that both cut at the same id
    largest_difference: float  # nats of a choice, where they did
    decided: int  # examples all of whose choices are cut so
    right: int  # of them, decided rightly by our sums over these ids


def compare(subject: Subject, examples: Sequence[Example], samples: Sequence[Any]) -> Agreement:
    """The harness's log-likelihoods against sums of our reference over the same ids."""
    from lib.eval import reference

    choices, decided, right = 0, 0, 0
    worst: list[float] = []
    by_place = {sample["doc_id"]: sample for sample in samples}
    for example in examples:
        requests, sums, greedy = _requests(by_place[example.i]), [], False
        for j, ((context, _), response) in enumerate(requests):
            span = _same_span(subject, example, j, context)
            if span is None:
                continue
            alone = replace(
                example, shared=example.ids(j)[:0], tails=(example.ids(j),), spans=(span,)
            )
            found = reference.answer(
                subject.model, "language_modeling", alone,
                vocab_size=subject.rules.vocab_size, device=subject.device,
            )  # fmt: skip
            sums.append(found.scores[0].sum)
            worst.append(abs(sums[-1] + response))
            greedy = found.correct
        choices += len(requests)
        if len(sums) == len(requests):
            decided += 1
            right += greedy if len(sums) == 1 else reference.least(sums) == example.gold
    return Agreement(
        choices=choices, same_split=len(worst), largest_difference=max(worst, default=0.0),
        decided=decided, right=right,
    )  # fmt: skip


def _same_span(subject: Subject, example: Example, j: int, context: str) -> tuple[int, int] | None:
    """The harness's continuation in the ids of prompt j; None where it is cut otherwise there."""
    start, ids = subject.rules.boundary_id, example.ids(j)
    before = [] if start is None else [start]
    before += [int(i) for i in subject.tokenizer.encode(context.rstrip(" "))]
    same = before and not example.cropped and ids[: len(before)].tolist() == before
    return (len(before), len(ids)) if same else None


def _requests(sample: Any) -> list[tuple[tuple[str, str], float]]:
    """(context, continuation), log-likelihood of each request of a logged sample."""
    given = sample["arguments"]
    listed = list(given.values()) if isinstance(given, dict) else list(given)
    pairs = [
        (one["arg_0"], one["arg_1"]) if isinstance(one, dict) else tuple(one) for one in listed
    ]
    answers = [one[0] if isinstance(one[0], tuple | list) else one for one in sample["resps"]]
    return [(pair, float(answer[0])) for pair, answer in zip(pairs, answers, strict=True)]
