"""`kumiki bench`: what this machine does, beside a baseline (cli.md 3.7).

WHAT: a family (steps, --largest, --plan, --dry-run), two families (side by side), or one of the
suites of benchmarks/ (data, train, kernels, stream, generate, ...). The table goes to stdout, the
CSV to benchmarks/out/.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.core import artifact, files
from lib.core.errors import EnvError, UserError
from lib.core.heads import family_names
from lib.core.settings import Settings
from lib.export import estimate, machines, tables
from lib.export.commands.config import load_profile
from lib.export.console import note

OUT = Path("benchmarks/out")
SUITES = Path("benchmarks")
MOST_BLOCKS = 256
LENGTHS = (256, 512, 1024)  # contexts of two families side by side, at constant tokens


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Choose by what is named."""
    suites = sorted(p.stem for p in SUITES.glob("[a-z]*.py"))
    families = family_names()
    unknown = [w for w in arguments.what if w not in families and w not in suites]
    if unknown:
        names = ", ".join([*families, *suites])
        raise UserError("unknown benchmark", value=unknown[0], remedy=f"choose one of {names}")
    if len(arguments.what) == 1 and arguments.what[0] not in families:
        suite(arguments.what[0])
        return
    settings = load_profile(arguments.profile)
    for name in arguments.what:
        if name not in settings.train:
            raise UserError("no such run", value=name, remedy="add a line under `runs`")
    name = arguments.what[0]
    if arguments.plan:
        plan(settings, name, arguments.json)
    elif arguments.dry_run is not None:
        dry_run(settings, name, arguments.dry_run, arguments.json)
    elif arguments.largest:
        largest(settings, name, arguments.budget, arguments.json)
    elif len(arguments.what) > 2:
        raise UserError("too many families", value=len(arguments.what), remedy="name two at most")
    else:
        steps(settings, arguments.what, arguments.json)


def suite(name: str) -> None:
    """A benchmark of benchmarks/, in a process of its own; its output is the product."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False)
    if done.returncode:
        raise EnvError("benchmark failed", value=name, remedy="the lines above tell why")


def trial_of(settings: Settings, run_name: str, **changes: Any) -> Any:
    """A run's family at the sizes of the profile."""
    from lib.train.measure import Trial

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


# ---------------------------------------------------------------- steps


def steps(settings: Settings, names: Sequence[str], as_json: bool) -> None:
    """Forward, backward and step of each; of two, at several lengths and equal tokens."""
    import torch

    from lib.train.measure import rates

    torch.set_num_threads(settings.runtime.threads)
    rows: list[dict[str, Any]] = []
    for name in names:
        first = trial_of(settings, name)
        tokens = first.rows * first.context
        for trial in [first] if len(names) == 1 else _lengths(first, tokens):
            note(f"{name}: {trial.rows} rows of {trial.context}")
            rows.append({"run": name, "context": trial.context, **rates(trial)})
    path = write_csv("_vs_".join(names), rows)
    if as_json:
        tables.put_json({"machine": machine(), "rows": rows, "csv": str(path)})
        return
    cells = [
        (r["run"], r["context"], f"{r['parameters']:,}", f"{r['forward_s']:.4f} s",
         f"{r['backward_s']:.4f} s", f"{r['step_s']:.4f} s",
         f"{r['step_p20_s']:.4f} to {r['step_p80_s']:.4f}", f"{r['tokens_per_s']:,.0f}",
         tables.size(r["peak_bytes"]), r["device"].upper())
        for r in rows
    ]  # fmt: skip
    header = ("run", "context", "parameters", "forward", "forward + backward", "step",
              "step p20 to p80", "tokens/s", "peak", "on")  # fmt: skip
    tables.put([*tables.lines(cells, header), "", machine(), f"csv: {path}"])
    if len(names) == 2:
        tables.put(["", *crossover(rows, *names), *quality(names)])


def _lengths(trial: Any, tokens: int) -> Iterator[Any]:
    """The same family at every length that its Config takes."""
    for length in LENGTHS:
        config = trial.config
        if hasattr(config, "context"):
            config = replace(config, context=length)
        yield replace(trial, config=config, context=length, rows=max(1, tokens // length))


def crossover(rows: Sequence[dict[str, Any]], first: str, second: str) -> list[str]:
    """The length from which the second family's step is the faster one."""
    times = {(r["run"], r["context"]): r["step_s"] / r["tokens"] for r in rows}
    faster = [n for n in LENGTHS if times[second, n] < times[first, n]]
    where = f"from a context of {faster[0]:,}" if faster else "at no length in range"
    return [f"{second} is faster than {first} {where}"]


def quality(names: Sequence[str]) -> list[str]:
    """The two models' own numbers, where both were trained on equally many tokens."""
    found = {}
    for name in names:
        path = Path("metrics") / name / "eval.json"
        found[name] = files.read_json(path) if path.is_file() else {}
    tokens = {m.get("train_tokens") for m in found.values()}
    if len(tokens) != 1 or tokens == {None}:
        return ["not comparable: trained on different numbers of tokens, or not measured"]
    return [f"{name}: bpb {tables.number(m.get('bpb'))}, cloze {tables.number(m.get('cloze'), 3)}"
            for name, m in found.items()]  # fmt: skip


# ---------------------------------------------------------------- plan, dry run, largest


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
    tables.put(["", *tables.lines([(k, tables.size(v)) for k, v in held.items()],
                                  ("weights, gradients, moments", "bytes"))])  # fmt: skip
    need = cost.vram_bytes or cost.ram_bytes
    tables.put(["", f"{count:,} parameters; a step needs about {tables.size(need)}, counted"])


def dry_run(settings: Settings, name: str, count: int, as_json: bool) -> None:
    """Full shapes on random tokens, nothing written: is the training sound, does it fit?"""
    import torch

    from lib.train.measure import rehearse

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
            f"memory: {tables.size(found['peak_bytes'])} measured, "
            f"{tables.size(estimated)} estimated",
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
        tables.put_json(found) if as_json else tables.put([str(found)])
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
        size = tables.size(best["peak_bytes"])
        tables.put([f"{name}: depth {low}, {best['parameters']:,} parameters, peak {size}"])


def _trial(trial: Any, depth: int, budget: float | None) -> dict[str, Any]:
    config = {**artifact.plain(trial.config), "depth": depth}
    asked = {
        "family": trial.family, "config": config, "vocab_size": trial.vocab_size,
        "rows": 1, "context": trial.context, "device": trial.device, "budget_bytes": budget,
        "settings": {k: v for k, v in artifact.plain(trial.settings).items() if k != "model"},
    }  # fmt: skip
    command = [sys.executable, "-m", "lib.train.measure", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"fits": False, "reason": last[:120]}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- what stands beside every number


def machine() -> str:
    """Machine, versions, commit, in one line."""
    import torch

    from lib.export.commands.push import git_commit

    commit = (git_commit(Path()) or "none")[:10]
    threads = torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {threads} threads, {versions}, commit {commit}"


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
