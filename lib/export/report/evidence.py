"""The page's lower half: tasks, the data ledger, samples, and the chain from shards to models."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from lib.core.artifact import plain
from lib.core.run_settings import Train
from lib.export import amounts
from lib.export.report.gather import Found, FoundRun
from lib.export.report.html import MISSING, Cell, anchor, linked, table

# ---------------------------------------------------------------- tasks


def tasks(found: Found) -> str:
    """cloze for each validation text, CORE for all: accuracy, and centred beside it."""
    parts = []
    for text, group in found.groups():
        runs = _with_tasks(group, "cloze") if text else []
        if runs:
            recipe = escape(found.recipes.get(runs[0].tokens, ""))
            parts.append(f"<h3>cloze, made from the validation text {recipe}</h3>")
            parts.append(table(*_task_table(runs, "cloze")))
    if runs := _with_tasks(found.runs, "core"):
        parts.append("<h3>CORE</h3>")
        parts.append('<p class="note">Fewer than 22 whole tasks are core_partial.</p>')
        parts.append(table(*_task_table(runs, "core")))
    if parts:
        parts.insert(0, '<p class="note">Accuracy, and in brackets centred: 0 is chance.</p>')
    without = [run for run in found.runs if run.metrics and not _task_records(run)]
    if without:
        names = ", ".join(escape(run.name) for run in without)
        parts.append(f'<p class="missing">Missing: no task was scored for {names}.</p>')
    return "".join(parts)


def _with_tasks(runs: Iterable[FoundRun], name: str) -> list[FoundRun]:
    return [run for run in runs if (run.record.get(name) or {}).get("tasks")]


def _task_records(run: FoundRun) -> list[Any]:
    return [t for name in ("cloze", "core") for t in (run.record.get(name) or {}).get("tasks", [])]


def _task_table(runs: list[FoundRun], name: str) -> tuple[list[str], list[list[Cell]]]:
    """A row a run, a column a task; what chance, and word overlap, would score beside them."""
    by_run = {run.name: {t["label"]: t for t in run.record[name]["tasks"]} for run in runs}
    some = {label: task for found in by_run.values() for label, task in found.items()}
    rows = [
        [escape(run), *(_score(found.get(label)) for label in some)]
        for run, found in by_run.items()
    ]
    rows.append(["chance", *map(_chance, some.values())])
    overlap = next((r.record[name].get("overlap") for r in runs), None) or {}
    if accuracy := overlap.get("accuracy"):
        told = (accuracy.get(label) for label in some)
        rows.append(["word overlap", *(MISSING if a is None else f"{a:.3f}" for a in told)])
    header = [f"{label.removeprefix('cloze_')}, {task['n']:,}" for label, task in some.items()]
    return ["run", *header], rows


def _score(task: dict[str, Any] | None) -> Cell:
    return MISSING if task is None else f"{task['accuracy']:.3f} ({task['centered']:+.3f})"


def _chance(task: dict[str, Any]) -> Cell:
    """From accuracy = b + centred x (1 - b), where the record does not give the baseline."""
    if task.get("baseline") is not None:
        base = task["baseline"]
        return f"{base / 100 if base > 1 else base:.3f}"
    accuracy, centred = task["accuracy"], task["centered"]
    return MISSING if centred == 1 else f"{(accuracy - centred) / (1 - centred):.3f}"


# ---------------------------------------------------------------- ledger


def ledger(found: Found) -> str:
    """In = kept + dropped by reason, documents and bytes; the page adds it up again."""
    parts = []
    for recipe, book in found.ledgers.items():
        rows = [
            _ledger_row(source, split, entry)
            for source, splits in book.get("sources", {}).items()
            for split, entry in splits.items()
        ]
        header = ("source", "split", "documents in", "kept", "dropped", "bytes in", "bytes kept",
                  "repaired", "balance")  # fmt: skip
        parts.append(f"<h3>{escape(recipe)}</h3>{table(header, rows)}")
        gone = {name: names for name, names in book.get("missing", {}).items() if names}
        for source, names in gone.items():
            told = escape(", ".join(map(str, names)))
            parts.append(f'<p class="missing">Missing files of {escape(source)}: {told}</p>')
    return "".join(parts) or '<p class="missing">Missing: no documents yet.</p>'


def _ledger_row(source: str, split: str, entry: dict[str, Any]) -> list[Cell]:
    dropped, repairs = entry["dropped"], entry["repairs"].values()
    reasons = ", ".join(f"{name} {d['documents']:,}" for name, d in dropped.items()) or "0"
    added = sum(r["bytes_added"] for r in repairs)
    removed = sum(r["bytes_removed"] for r in repairs)
    documents = entry["documents_in"] + entry["split"]
    balanced = documents == entry["documents_out"] + sum(
        d["documents"] for d in dropped.values()
    ) and entry["bytes_in"] + added == entry["bytes_out"] + removed + sum(
        d["bytes"] for d in dropped.values()
    )
    return [
        escape(source),
        escape(split),
        f"{entry['documents_in']:,}",
        f"{entry['documents_out']:,}",
        escape(reasons),
        f"{entry['bytes_in']:,}",
        f"{entry['bytes_out']:,}",
        f"{added - removed:+,} bytes",
        '<span class="ok">exact</span>' if balanced else '<span class="wrong">broken</span>',
    ]


# ---------------------------------------------------------------- samples


def samples(found: Found) -> str:
    """What each model says by itself."""
    parts = []
    for run in found.runs:
        if not run.samples:
            state = "none were asked for" if run.metrics else "missing"
            parts.append(f'<p class="missing">{escape(run.name)}: {state}.</p>')
            continue
        body = "".join(_sample(s) for kind in ("greedy", "free") for s in run.samples.get(kind, []))
        rest = [k for k in run.samples if k not in ("greedy", "free")]
        body += "".join(_sample(s) for k in rest for s in _listed(run.samples[k]))
        opened = " open" if not parts else ""
        name = escape(run.name)
        parts.append(f"<details{opened}><summary>{name}</summary><dl>{body}</dl></details>")
    return "".join(parts)


def _listed(value: Any) -> Iterable[dict[str, Any]]:
    return [s for s in value if isinstance(s, dict)] if isinstance(value, list) else []


def _sample(sample: dict[str, Any]) -> str:
    prompt, text = escape(sample.get("prompt", "")), escape(sample.get("text", ""))
    kind = "greedy" if prompt else "free"
    return (
        f"<dt>{kind}, ends by {escape(str(sample.get('stop')))}</dt><dd><b>{prompt}</b>{text}</dd>"
    )


# ---------------------------------------------------------------- provenance


def provenance(found: Found) -> str:
    """Each artefact with its hashes and what it was made from; then what each run was asked for."""
    rows = [
        [
            f'<span id="{anchor(one.name)}">{escape(one.name)}</span>',
            escape(one.kind),
            f"<code>{escape(one.key)}</code>",
            f'<code title="{escape(one.sha256)}">{escape(one.sha256[:16])}</code>',
            amounts.size(one.total_bytes),
            escape(one.facts),
            ", ".join(linked(name) for name in one.parents) or "sources",
        ]
        for one in found.artefacts
    ]
    header = ("artefact", "kind", "key", "sha256", "bytes", "holds", "made from")
    note = '<p class="note">key is the hash of what was asked for, sha256 the hash of the manifest '
    note += "that lists every file with its own. Each parent is a link.</p>"
    settings = "".join(_asked(run) for run in found.runs)
    return (
        note
        + table(header, rows)
        + f"<h3>Settings of each run, where not the default</h3>{settings}"
    )


def _asked(run: FoundRun) -> str:
    if run.provenance is None:
        return f'<p class="missing">{escape(run.name)}: not trained yet.</p>'
    default = plain(Train())
    asked = run.provenance.get("train") or {}
    changed = {name: value for name, value in asked.items() if value != default.get(name)}
    told = ", ".join(f"{name} {value}" for name, value in sorted(changed.items()))
    head = [f"{key} {run.provenance.get(key)}" for key in ("fingerprint", "seed", "steps")]
    if run.speed.get("code"):
        head.append(f"code {run.speed['code']}")
    changes = run.provenance.get("code_changes")
    head += [f"code changed while it ran: {changes}"] if changes else []
    text = escape("; ".join([*head, told]))
    return f"<details><summary>{escape(run.name)}</summary><dl><dd>{text}</dd></dl></details>"
