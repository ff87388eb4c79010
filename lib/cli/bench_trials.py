"""Trials of one family at full size: what it takes, whether it is sound, how deep it may be."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.cli import estimate, machines, tables
from lib.cli.console import note
from lib.core import artifact, files
from lib.core.errors import EnvError, UserError
from lib.core.settings import Settings
from lib.export import amounts

OUT = Path("benchmarks/out")
MOST_BLOCKS = 256


def trial_of(settings: Settings, run_name: str, **changes: Any) -> Any:
    """A run's family at the sizes of the profile."""
    from lib.cli.measure import Trial

    section = settings.train[run_name]
    encoding = settings.encode_tokens[section.tokens or "bpe"]
    vocab_size = settings.train_tokenizer[encoding.tokenizer].vocab_size
    limit = settings.runtime.device_batch_size
    batch = section.batch_tokens if isinstance(section.batch_tokens, int) else 2**14
    rows = max(1, min(batch, 2**13) // encoding.context)
    found = Trial(
        family=section.family or run_name, config=section.model, vocab_size=vocab_size,
        rows=limit if isinstance(limit, int) else rows, context=encoding.context,
        settings=replace(section, model=None), device=settings.runtime.device,
    )  # fmt: skip
    return replace(found, **changes)


def plan(settings: Settings, name: str, as_json: bool) -> None:
    """Parameters by module and memory by kind of state, counted; nothing runs."""
    import torch

    from lib.models.base import load_family

    cost = estimate.train_cost(settings, name, machines.this_machine())
    trial = trial_of(settings, name)
    with torch.device("meta"):
        model = load_family(trial.family).Model(trial.config, trial.vocab_size)
    modules = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    count = dict(cost.facts)["parameters"]
    states = {"fp32 AdamW": 16.0, "8-bit AdamW": 10.03, "bf16, 8-bit AdamW": 6.03}
    held = {kind: per * count for kind, per in states.items()}
    if as_json:
        tables.put_json({"cost": cost.plain(), "modules": modules, "state_bytes": held})
        return
    tables.put(tables.lines([(n, f"{c:,}") for n, c in modules.items()], ("module", "parameters")))
    tables.put(["", *tables.lines([(k, amounts.size(v)) for k, v in held.items()],
                                  ("weights, gradients, moments", "bytes"))])  # fmt: skip
    need = cost.vram_bytes or cost.ram_bytes
    tables.put(["", f"{count:,} parameters; a step needs about {amounts.size(need)}, counted"])


def dry_run(settings: Settings, name: str, count: int, as_json: bool) -> None:
    """Full shapes on random tokens, nothing written: is the training sound, does it fit?"""
    import torch

    from lib.cli.measure import rehearse

    if count < 2:
        raise UserError("too few steps", value=count, remedy="--dry-run 2 or more")
    torch.set_num_threads(settings.runtime.threads)
    cost = estimate.train_cost(settings, name, machines.this_machine())
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=count, unit="step", disable=quiet, desc=f"{name}, dry run") as bar:
        found = rehearse(trial_of(settings, name), count, lambda step: bar.update(1))
    estimated = cost.vram_bytes or cost.ram_bytes
    if as_json:
        tables.put_json({**found, "estimated_bytes": estimated})
    else:
        losses = found["losses"]
        tables.put([
            f"{found['parameters']:,} parameters, first loss {found['first_loss']:.4f}, "
            f"ln V {found['ln_v']:.4f}",
            f"loss on one batch: {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps",
            f"memory: {amounts.size(found['peak_bytes'])} measured, "
            f"{amounts.size(estimated)} estimated",
        ])  # fmt: skip
    if found["problems"]:
        told = found["problems"]
        raise EnvError("training is not sound", value=f"{told[0]} ({len(told)} in all)",
                       remedy="see the family's file")  # fmt: skip


def largest(settings: Settings, name: str, budget_gb: float | None, as_json: bool) -> None:
    """The deepest model whose two whole steps fit, by bisection, a process a trial."""
    trial = trial_of(settings, name)
    budget = None if budget_gb is None else budget_gb * 1e9
    vram = machines.this_machine().vram_bytes
    if budget is None and vram is None:
        cost = dict(estimate.train_cost(settings, name, machines.this_machine()).facts)
        note("note: no GPU and no --budget: an estimate, nothing is measured")
        found: dict[str, Any] = {
            "measured": False,
            "parameters": cost["parameters"],
            "depth": None,
        }
        tables.put_json(found) if as_json else tables.put(largest_lines(name, found))
        return
    tried: dict[int, dict[str, Any]] = {}

    def fits(depth: int) -> bool:
        tried[depth] = _trial(trial, depth, budget)
        note(f"depth {depth}: {tried[depth]}")
        return bool(tried[depth].get("fits"))

    low, high = 0, 1
    while high <= MOST_BLOCKS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise EnvError("not even one block fits", value=name, remedy="a smaller context or width")
    best = {"measured": True, "depth": low, **tried[low]}
    write_csv(f"largest_{name}", [{"depth": d, **t} for d, t in sorted(tried.items())])
    if as_json:
        tables.put_json(best)
    else:
        tables.put(largest_lines(name, best))


def largest_lines(name: str, found: dict[str, Any]) -> list[str]:
    """The table: one row, whether it was measured or not."""
    how = "measured" if found["measured"] else "the profile's own size, not measured"
    row = (name, found["depth"], f"{found['parameters']:,}",
           amounts.size(found.get("peak_bytes")), how)  # fmt: skip
    return tables.lines([row], ("run", "depth", "parameters", "peak", ""))


def _trial(trial: Any, depth: int, budget: float | None) -> dict[str, Any]:
    config = {**artifact.plain(trial.config), "depth": depth}
    asked = {
        "family": trial.family, "config": config, "vocab_size": trial.vocab_size,
        "rows": 1, "context": trial.context, "device": trial.device, "budget_bytes": budget,
        "settings": {k: v for k, v in artifact.plain(trial.settings).items() if k != "model"},
    }  # fmt: skip
    command = [sys.executable, "-m", "lib.cli.measure", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"fits": False, "reason": last[:120]}
    return json.loads(done.stdout.splitlines()[-1])


def write_csv(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """The rows beside the table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = OUT / f"{name}.csv"
    files.write_bytes(path, text.getvalue().encode())
    return path
