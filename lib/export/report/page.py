"""The report page: one HTML file with style, data and charts inside; no script, nothing fetched.

In:    what `gather` found.   Out: the page's text; the same findings give the same bytes.
Rule:  every text from data is escaped; what is missing is written as missing, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from lib.export import amounts
from lib.export.report import evidence
from lib.export.report.charts import Series, line_chart
from lib.export.report.gather import DECIDED, Found, FoundRun, against
from lib.export.report.html import MISSING, Cell, linked, table
from lib.export.report.style import STYLE

Section = tuple[str, str, Callable[[Found], str]]  # anchor, heading, content


def render(found: Found) -> str:
    """The whole page."""
    sections = [(anchor, title, make(found)) for anchor, title, make in SECTIONS]
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in shown)
    bodies = "".join(
        f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>\n'
        for anchor, title, body in shown
    )
    done = sum(run.is_measured for run in found.runs)
    about = f"profile {found.profile}, {done} of {len(found.runs)} runs measured"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Kumiki report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>Kumiki report</h1><p>{escape(about)}</p><nav>{links}</nav></header>\n"
        f"{bodies}<footer>Written by the stage <code>report</code> from files that "
        "<code>dvc.lock</code> names.</footer>\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- 1 leaderboard


def leaderboard(found: Found) -> str:
    """One table per validation text: numbers on different texts are not compared."""
    parts = [
        '<p class="note">Bits per byte (bpb) of the whole validation text, lower is better; every '
        "tokenizer is charged for the same bytes. cloze and CORE are centred: 0 is chance, 1 is "
        "perfect. Sizes and budgets differ from family to family: only a twin, which is its family "
        "with one idea taken out, compares with it. Each run has one seed: a twin "
        f"within {DECIDED:.3f} bpb of its family, two standard deviations between seeds, is not "
        "decided.</p>"
    ]
    for text, runs in found.groups():
        if text is None:
            parts.append(_missing(runs))
            continue
        recipe = found.recipes.get(runs[0].tokens, "")
        size = next((run.metrics or {}).get("val_bytes") for run in runs)
        title = f"Validation text {recipe}: {size:,} bytes" if size else f"Text {recipe}"
        parts.append(f"<h3>{escape(title)} <code>{escape(text[:12])}</code></h3>")
        parts.append(_board(runs))
        if not any(map(_has_core, runs)):
            parts.append('<p class="note">CORE: not measured, no task bundle (eval.core).</p>')
    return "".join(parts)


def _board(runs: Sequence[FoundRun]) -> str:
    rows: list[tuple[float, str, list[Cell]]] = []
    with_core = any(map(_has_core, runs))
    lowest = min((r.metrics["bpb"] for r in runs if r.metrics and r.metrics["bpb"]), default=None)
    for run in runs:
        m = run.metrics or {}
        tag = f'<span class="tag">twin of {escape(run.family)}</span>' if run.twin else ""
        cells = [
            linked(f"checkpoints/{run.name}/final", run.name) + tag,
            _or_missing(m.get("bpb"), 4, run.record.get("reason")),
            _difference(run, runs),
            _with_error(m.get("cloze"), (run.record.get("cloze") or {}).get("standard_error")),
            *(_core(m, run) if with_core else []),
            f"{m['params']:,}" if m.get("params") is not None else MISSING,
            amounts.count(m.get("train_tokens")),
            f"{m['train_flops']:.3g}" if m.get("train_flops") is not None else MISSING,
        ]
        kind = "best" if m.get("bpb") is not None and m["bpb"] == lowest else ""
        rows.append((m["bpb"] if m.get("bpb") is not None else 1e9, kind, cells))
    beside = next((run.record.get("baselines") for run in runs if run.record.get("baselines")), {})
    for name, bpb in ((beside or {}).get("bpb") or {}).items():
        if bpb is not None:
            label = escape(name) + '<span class="tag">baseline</span>'
            rows.append((bpb, "beside", [label, f"{bpb:.4f}", *[""] * (5 + with_core)]))
    rows.sort(key=lambda row: row[0])
    core = ["CORE"] if with_core else []
    header = ["run", "bpb", "to its family", "cloze", *core, "parameters", "tokens", "FLOPs"]
    return table(header, [cells for _, _, cells in rows], [kind for _, kind, _ in rows])


def _difference(run: FoundRun, runs: Sequence[FoundRun]) -> Cell:
    found = against(run, runs)
    if found is None:
        return ""
    return f"{found[0]:+.4f}" + ("" if found[1] else '<span class="tag">not decided</span>')


def _has_core(run: FoundRun) -> bool:
    return any((run.metrics or {}).get(name) is not None for name in ("core", "core_partial"))


def _or_missing(value: float | None, digits: int, reason: str | None = None) -> Cell:
    if value is None:
        return f'<span class="missing" title="{escape(reason or "not measured")}">none</span>'
    return f"{value:.{digits}f}"


def _with_error(value: float | None, error: float | None) -> Cell:
    if value is None:
        return MISSING
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _core(metrics: dict[str, Any], run: FoundRun) -> list[Cell]:
    if metrics.get("core") is not None:
        return [f"{metrics['core']:.4f}"]
    if metrics.get("core_partial") is not None:
        tasks = len((run.record.get("core") or {}).get("tasks") or [])
        return [f'{metrics["core_partial"]:.4f} <span class="tag">partial, {tasks} tasks</span>']
    return [MISSING]


def _missing(runs: Sequence[FoundRun]) -> str:
    names = ", ".join(escape(run.name) for run in runs)
    first = escape(runs[0].name)
    return (
        f'<p class="missing">Missing, not measured yet: {names}. '
        f"<code>dvc repro evaluate@{first}</code> makes the first of them.</p>"
    )


# ---------------------------------------------------------------- 2 curves


def curves(found: Found) -> str:
    """Bits per byte by tokens and by FLOPs, then the training loss."""
    colour = {run.name: n for n, run in enumerate(r for r in found.runs if not r.twin)}
    parts = []
    for text, runs in found.groups():
        if text is None:
            continue
        recipe = found.recipes.get(runs[0].tokens, "")
        for x, label in (("tokens", "training tokens"), ("flops", "training FLOPs")):
            lines = [_series(run, colour, "curve", x, "bpb") for run in runs]
            title = f"{recipe}: bits per byte by {label}"
            parts.append(_figure(lines, title, label, "bits per byte", log_x=True))
        lines = [_series(run, colour, "loss", "tokens", "loss", smooth=True) for run in runs]
        title = f"{recipe}: training loss, mean of 1/50 of the run"
        parts.append(_figure(lines, title, "training tokens", "nats per token"))
    note = '<p class="note">A point stands for a validation during training, on the first part of '
    note += "the validation text; a dashed line is a twin, in its family's colour.</p>"
    body = "".join(parts)
    return f'{note}<div class="charts">{body}</div>' if body else ""


def _figure(series: Sequence[Series], title: str, x: str, y: str, log_x: bool = False) -> str:
    chart = line_chart(series, title=title, x_label=x, y_label=y, log_x=log_x)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" if chart else ""


def _series(
    run: FoundRun, colour: dict[str, int], table: str, x: str, y: str, smooth: bool = False
) -> Series:
    points = [(float(row[x]), float(row[y])) for row in run.tables[table] if row.get(y)]
    if smooth:
        points = _means(points, 50)
    own = colour.get(run.name, colour.get(run.family, 0))
    return Series(name=run.name, colour=own, points=points, dashed=run.twin)


def _means(points: list[tuple[float, float]], parts: int) -> list[tuple[float, float]]:
    """The mean of each of `parts` equal stretches: single steps are too noisy to read."""
    size = -(-len(points) // parts) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(c[-1][0], sum(y for _, y in c) / len(c)) for c in chunks]


# ---------------------------------------------------------------- 3 depth, controls


def depth(found: Found) -> str:
    """What more steps of thought are worth, for families that can be stopped early."""
    return _csv_tables(
        [run for run in found.runs if len(run.tables["depth"]) > 1],
        "depth",
        "Bits per byte of one pass, read out after every supervision step; runs with one step only "
        "are left out. How many blocks of a plain model a loop is worth (phi) was not done: that "
        "needs plain models of several depths.",
    )


def controls(found: Found) -> str:
    """What the context vectors are worth against simpler inputs."""
    return _csv_tables(
        [run for run in found.runs if run.tables["controls"]],
        "controls",
        "The same token model with other inputs in place of the learned context vectors.",
    )


def _csv_tables(runs: Sequence[FoundRun], name: str, note: str) -> str:
    parts = [f'<p class="note">{escape(note)}</p>'] if runs else []
    for run in runs:
        rows = run.tables[name]
        parts.append(f"<h3>{escape(run.name)}</h3>")
        cells = [[_number(value) for value in row.values()] for row in rows]
        parts.append(table(list(rows[0]), cells))
    return "".join(parts)


def _number(text: str | None) -> Cell:
    try:
        value = float(text or "")
    except ValueError:
        return escape(text) if text else MISSING
    return f"{value:,.0f}" if value.is_integer() else f"{value:.5g}"


# ---------------------------------------------------------------- 4 throughput


def throughput(found: Found) -> str:
    """Measured on this machine, so it stands in no tracked file: `kumiki report` only."""
    if not found.measured:
        return ""
    rows: list[Iterable[Cell]] = []
    for run in found.runs:
        s = run.speed
        if not s:
            rows.append([escape(run.name), *[MISSING] * 5])
            continue
        evaluation = s.get("evaluation") or {}
        rate = s.get("tokens_per_s")
        rows.append(
            [
                escape(run.name),
                f"{rate:,.0f}" if rate else MISSING,
                f"{s['step_s']:.3f} s" if s.get("step_s") else MISSING,
                amounts.duration(s.get("seconds")),
                amounts.size(s.get("peak_memory_bytes")),
                escape(str(evaluation.get("device") or s.get("machine", ""))),
            ]
        )
    header = ("run", "tokens/s", "step", "training", "peak memory", "device")
    return table(header, rows)


SECTIONS: tuple[Section, ...] = (
    ("leaderboard", "Leaderboard", leaderboard),
    ("curves", "Learning curves", curves),
    ("tasks", "Tasks", evidence.tasks),
    ("depth", "Depth of thought", depth),
    ("controls", "Controls", controls),
    ("throughput", "Throughput on this machine", throughput),
    ("data", "Data ledger", evidence.ledger),
    ("samples", "Samples", evidence.samples),
    ("provenance", "Provenance", evidence.provenance),
)
