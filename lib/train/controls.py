"""Controls: small runs beside a run, to show that what it did earned anything.

In:    a finished run whose family names arms (`controls(config) -> {arm: Config}`), `Controls`.
Out:   rows for final/controls.json: what each arm scored, at equal tokens, order and rates.
State: `<work>/controls/<arm>_<seed>/`, each a run of its own that resumes; done is `result.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from lib.core import files
from lib.core.errors import UserError
from lib.train.job import Job
from lib.train.trainer import train

RESULT = "result.json"
SAMPLE_ROWS = 512  # rows of training tokens for a model's diagnostics
SHOWN = ("er", "rho", "r2_1", "r2_4")  # diagnostics that the table of controls has


def train_controls(job: Job, module: ModuleType) -> dict[str, Any]:
    """Every arm, every seed; {"rows": [...], "verdict": one sentence of the family's}."""
    settings = job.settings.controls
    assert settings is not None, "no controls are asked for"
    if not hasattr(module, "controls"):
        raise UserError("family has no controls", value=job.run, remedy="set controls: null")
    arms = module.controls(job.model.config)  # type: ignore[union-attr]  # a family with controls
    wanted = settings.arms or tuple(arms)
    unknown = [arm for arm in wanted if arm not in arms]
    if unknown:
        raise UserError("unknown control", value=unknown[0], remedy=f"choose of {', '.join(arms)}")
    found = [
        (arm, _one(job, module, arm, arms[arm], number))
        for number in range(settings.seeds)
        for arm in wanted
    ]
    rows = [_row(arm, [x for name, x in found if name == arm], job) for arm in wanted]
    return {"rows": rows, "verdict": module.verdict(rows)}


def _one(job: Job, module: ModuleType, arm: str, config: Any, number: int) -> dict[str, Any]:
    """Train one arm, or read what it gave."""
    folder = job.work / "controls" / f"{arm}_{number}"
    if kept := files.read_note(folder / RESULT):
        return kept
    assert job.settings.controls is not None
    model = job.build(config, job.seed + number, module.starts_from_weights(arm))
    batch = job.settings.batch_tokens
    if not isinstance(batch, int):
        raise UserError("controls need a batch", value=batch, remedy="set batch_tokens")
    steps = max(1, round(job.settings.controls.tokens / batch))
    own = replace(
        job,
        run=f"{job.run} {arm}",
        model=model,
        seed=job.seed,
        settings=replace(job.settings, steps=steps, eval_every=0, sample_every=0, controls=None),
        work=folder,
        identity={**job.identity, "arm": arm, "number": number},
        push=lambda step, weights, last: None,
    )
    outcome = train(own)
    best = outcome.position.best
    result = {
        "bpb": best["bpb"] if best else None,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": steps * batch,
        **look_inside(own, SHOWN),
    }
    files.write_note(folder / RESULT, result)
    model.finish()
    for path in [*folder.glob("step_*"), folder / "best"]:
        files.remove_tree(path)
    return result


def look_inside(job: Job, only: Sequence[str] = ()) -> dict[str, float]:
    """The family's diagnostics on the first training rows of the run; `only`: of these names."""
    rows, T = job.diagnostic_rows(SAMPLE_ROWS), job.context
    ids = torch.from_numpy(rows[:, :T]).to(job.device)
    training = job.model.training
    found = job.model.eval().diagnostics(ids, only)
    job.model.train(training)
    return found


def _row(arm: str, results: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """One line of the table: the mean over seeds, and the range of bits per byte."""
    scores = [r["bpb"] for r in results if r["bpb"] is not None]
    mean = sum(scores) / len(scores) if scores else None

    def average(name: str) -> float | None:
        values = [r[name] for r in results if r.get(name) is not None]
        return sum(values) / len(values) if values else None

    return {
        "arm": arm,
        "bpb": mean,
        "bpb_min": min(scores, default=None),
        "bpb_max": max(scores, default=None),
        "bpb_sd": _deviation(scores),
        "nats_per_token": mean and mean * math.log(2) * job.val_bytes_per_token,
        "trained": results[0]["trained"],
        "tokens": results[0]["tokens"],
        "seeds": len(results),
        **{name: average(name) for name in SHOWN},
    }


def _deviation(scores: list[float]) -> float | None:
    """Standard deviation over seeds, None for a single one."""
    if len(scores) < 2:
        return None
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((x - mean) ** 2 for x in scores) / (len(scores) - 1))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of a log."""
    names = ("arm", "bpb", "nats_per_token", "trained", "tokens", *SHOWN)
    lines = [" ".join(f"{n:>18}" for n in names)]
    for row in rows:
        cells = ("-" if row[n] is None else row[n] for n in names)
        lines.append(" ".join(f"{c:>18.4f}" if isinstance(c, float) else f"{c:>18}" for c in cells))
    return lines
