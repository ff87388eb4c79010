"""Phase 7 and 8 measured: what fits, what a full step takes, how time grows with the length.

    python -m benchmarks.phase7 plan --profile phase7_1p5b     memory by arithmetic, cards
    python -m benchmarks.phase7 dry-run 100 --profile small    steps on dummy tokens, checked
    python -m benchmarks.phase7 largest --budget-gib 2         the largest full step that fits
    python -m benchmarks.phase7 lengths --max 1024             time of a step by length

Entry points: `memory_plan`, `dry_run`, `largest`, `lengths`; all return plain data, printing is
here. Nothing is written below checkpoints/. Times of the Triton interpreter are refused.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lib.core import artifact, files
from lib.core.errors import UserError
from lib.core.params import read_yaml, resolve
from lib.core.rng import torch_generator
from lib.models.base import Family, Optim, build, load_family
from lib.train.optim import build_optimizer
from lib.train.schedule import make_schedule

GIB = 2**30
RULES = {"A": 16.0, "B": 10.03, "C": 6.03}  # bytes a parameter: adamw, adamw8bit, bf16 beside it
CARDS_GIB = {"8 GB": 8, "10 GB": 10, "12 GB": 12, "24 GB": 24}
CONTEXT_GIB, RESERVED_GIB, FRAGMENTS = 0.6, 0.4, 1.05
OUT = Path("benchmarks/out")


# ---------------------------------------------------------------- which model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A family's Config and the vocabulary it is built for."""

    family: str
    config: Any
    vocab_size: int

    def model(self, device: torch.device, seed: int = 1) -> Family:
        """With first weights, on `device`."""
        return build(
            load_family(self.family), self.config, self.vocab_size, seed=seed, device=device
        )

    def parameters(self) -> int:
        """Counted on the meta device."""
        with torch.device("meta"):
            model = load_family(self.family).Model(self.config, self.vocab_size)
        return sum(p.numel() for p in model.parameters())


def subject(profile: str, run: str, root: Path = Path()) -> Subject:
    """The model of a run in a profile of params.yaml, without its data."""
    settings, problems = resolve(read_yaml(root / "params.yaml"), profile)
    if settings is None or problems or run not in settings.train:
        raise UserError("no such run in a valid profile", value=f"{profile}: {run}")
    train = settings.train[run]
    tokenizer = settings.train_tokenizer[settings.encode_tokens[train.tokens or "bpe"].tokenizer]
    family = train.family or run
    config = load_family(family).Config(**artifact.plain(train.model))
    return Subject(
        family=family, config=config, vocab_size=getattr(tokenizer, "vocab_size", 50_257)
    )


def pick() -> torch.device:
    """The accelerator, else the CPU; UserError under the interpreter, whose times mean nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("the interpreter's times mean nothing", remedy="unset TRITON_INTERPRET")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """As the maker calls it; a CPU's carries the word."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------- memory by arithmetic


def memory_plan(what: Subject, rows: int = 1) -> dict[str, Any]:
    """GiB of a training step with block checkpointing, by rule, and the cards that hold it.

    states + L T d fp32 + one block's inner activations + the loss block + a bf16 copy of one block
    (A, B) + the device's context, and 5 % for fragments (phase7.md 5).
    """
    c, count = what.config, what.parameters()
    table = replace(c, depth=1)
    block = (
        count - Subject(family=what.family, config=table, vocab_size=what.vocab_size).parameters()
    )
    block = block // max(1, c.depth - 1)
    active = rows * c.context * (4 * c.depth * c.width + 8 * c.d_ff) + 2**26
    found: dict[str, Any] = {"parameters": count, "block": block, "gib": {}, "fits": {}}
    for rule, each in RULES.items():
        copy = 2 * block if rule != "C" else 0
        gib = ((count * each + active + copy) / GIB + CONTEXT_GIB) * FRAGMENTS
        found["gib"][rule] = round(gib, 2)
        found["fits"][rule] = [n for n, size in CARDS_GIB.items() if gib <= size - RESERVED_GIB]
    return found


# ---------------------------------------------------------------- full steps


def dummy_batch(what: Subject, rows: int, context: int, device: torch.device, step: int = 0) -> Any:
    """Seeded ids that stand for nothing."""
    draw = torch_generator(1, "dummy tokens", step)
    ids = torch.randint(what.vocab_size, (rows, context + 1), generator=draw).to(device)
    return SimpleNamespace(tokens=ids[:, :-1], targets=ids[:, 1:], step=step)


def stepper(model: Family, optim: Optim) -> Callable[[Any], float]:
    """One full step: losses, backward, clip, update. Returns the loss."""
    optimizer, schedule = build_optimizer(model.param_groups(optim)), make_schedule("constant", 1)

    def step(batch: Any) -> float:
        total = 0.0
        for loss in model.losses(batch):
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(schedule.at(0))
        optimizer.zero_grad()
        return total

    return step


def dry_run(what: Subject, steps: int, *, rows: int = 1, lr: float = 1e-3) -> dict[str, Any]:
    """`steps` on one repeated dummy batch, checked; each check is True or says what is wrong."""
    device = pick()
    model = what.model(device)
    batch = dummy_batch(what, rows, what.config.context, device)
    losses = list(model.losses(batch))
    first = sum(loss.item() for loss in losses)
    sum(losses).backward()  # type: ignore[union-attr]  # tensors
    silent = [
        name for name, p in model.named_parameters()
        if p.grad is None or not bool(torch.isfinite(p.grad).all()) or not bool(p.grad.any())
    ]  # fmt: skip
    model.zero_grad(set_to_none=True)
    step = stepper(model, Optim(lr=lr, steps=steps))
    curve = [step(batch) for _ in range(steps)]
    expected = math.log(what.vocab_size)
    checks: dict[str, bool | str] = {
        "finite": all(map(math.isfinite, curve)) or "a loss is not finite",
        "first loss": abs(first - expected) < 0.25 or f"{first:.3f}, ln V is {expected:.3f}",
        "loss falls": curve[-1] < first - 0.1 or f"from {first:.3f} to {curve[-1]:.3f}",
        "gradients": not silent or f"none or not finite: {', '.join(silent[:5])}",
    }
    found = {"losses": curve, "checks": checks, "parameters": what.parameters()}
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device) / GIB
        found["gib"] = {"measured": measured, "planned": memory_plan(what, rows)["gib"]["A"]}
    return found


def largest(
    what: Subject, *, vary: str = "depth", context: int | None = None, optimizer: str = "adamw",
    budget_bytes: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Largest `depth` (or `width`, by 64) of which a full step and a second one fit.

    Limit: the device's memory, or budget_bytes of resident memory on a CPU; a fresh process a
    trial. Without a limit on a CPU the plan answers alone, `measured` is False.
    """
    device, unit = pick(), {"depth": 1, "width": 64}[vary]
    context = context or what.config.context

    def changed(n: int) -> Subject:
        sizes = {"context": context, vary: n * unit}
        if what.family == "phase7":
            sizes["window"] = min(what.config.window, context)
        if vary == "width":
            sizes["heads"] = max(1, n * unit // (what.config.width // what.config.heads))
        return replace(what, config=replace(what.config, **sizes))

    measured = device.type == "cuda" or budget_bytes is not None
    trials: list[dict[str, Any]] = []

    def fits(n: int) -> bool:
        if not measured:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
            return memory_plan(changed(n))["gib"]["A"] < total
        trials.append(trial(changed(n), optimizer, budget_bytes))
        return trials[-1]["fits"]

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    best = next((t for t in trials if t["fits"] and t["value"] == low * unit), None)
    return {
        "vary": vary, "value": low * unit, "measured": measured, "device": device_name(device),
        "parameters": changed(low).parameters() if low else 0, "trial": best,
    }  # fmt: skip


def trial(what: Subject, optimizer: str, budget_bytes: int | None) -> dict[str, Any]:
    """Two full steps in a process of their own: whether they fit, peak bytes, tokens a second."""
    told = {
        "family": what.family, "config": artifact.plain(what.config), "vocab_size": what.vocab_size,
        "optimizer": optimizer, "budget": budget_bytes,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.phase7", "trial", json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True)
    value = {"value": what.config.depth}
    if done.returncode != 0:
        return {"fits": False, **value, "said": done.stderr.strip()[-300:]}
    return {**json.loads(done.stdout.splitlines()[-1]), **value}


def run_trial(told: dict[str, Any]) -> dict[str, Any]:
    """The child of `trial`."""
    config = load_family(told["family"]).Config(**told["config"])
    what = Subject(family=told["family"], config=config, vocab_size=told["vocab_size"])
    device, budget = pick(), told["budget"]
    model = what.model(device)
    model.activation_checkpointing = True
    step = stepper(model, Optim(optimizer=told["optimizer"]))
    batch = dummy_batch(what, 1, config.context, device)
    step(batch)
    began = time.monotonic()
    step(batch)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    fits = budget is None or peak <= budget
    return {"fits": fits, "peak_bytes": peak, "tokens_per_s": round(config.context / seconds, 1)}


# ---------------------------------------------------------------- time against length


def lengths(
    subjects: dict[str, Subject], wanted: list[int], tokens: int, repeat: int = 5
) -> list[dict[str, Any]]:
    """A row for each model and length: milliseconds of a step and of a decoded token, state bytes.

    `tokens` of a batch are the same at every length. Median, p20 and p80 of `repeat` steps after
    two that warm up.
    """
    device, rows = pick(), []
    for name, one in subjects.items():
        for n in wanted:
            sizes = {"context": n + 1}
            if one.family == "phase7":
                full = one.config.window == one.config.context
                sizes["window"] = n if full else min(one.config.window, n)
            what = replace(one, config=replace(one.config, **sizes))
            model = what.model(device)
            step, batch = stepper(model, Optim()), dummy_batch(what, max(1, tokens // n), n, device)
            times = timed(lambda s=step, b=batch: s(b), repeat, device)
            with torch.no_grad():
                _, state = model.eval()(batch.tokens[:1])
                last = batch.tokens[:1, -1:]
                decode = timed(lambda m=model, t=last, s=state: m(t, s), repeat, device)
            held = sum(x.nbytes for layer in state.layers for x in layer)
            quantiles = statistics.quantiles(times, n=5)
            rows.append(
                {
                    "model": name, "length": n, "rows": max(1, tokens // n),
                    "step_ms": statistics.median(times), "step_p20": quantiles[0],
                    "step_p80": quantiles[3], "decode_ms": statistics.median(decode),
                    "state_bytes": held, "device": device_name(device),
                }
            )  # fmt: skip
    return rows


def timed(call: Callable[[], Any], repeat: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `repeat` calls after two others."""
    found = []
    for i in range(repeat + 2):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            found.append(1e3 * (time.perf_counter() - began))
    return found


def crossover(rows: list[dict[str, Any]], fast: str, slow: str) -> int | None:
    """Smallest length from which on `fast` takes less time a step than `slow`; None in range."""
    of = {(r["model"], r["length"]): r["step_ms"] for r in rows}
    every = sorted({r["length"] for r in rows})
    wins = [n for n in every if of[fast, n] < of[slow, n]]
    return next((n for n in wins if all(m in wins for m in every if m >= n)), None)


def write_lengths(rows: list[dict[str, Any]], folder: Path = OUT) -> None:
    """phase7_vs_phase8.csv, .json, .svg."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / "phase7_vs_phase8.csv", text.getvalue().encode())
    files.write_json(folder / "phase7_vs_phase8.json", rows)
    files.write_bytes(folder / "phase7_vs_phase8.svg", plot(rows).encode())


def plot(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a step against length, both logarithmic, as SVG."""
    W, H, margin, colours = 560, 340, 50, ("#0b6e99", "#c4541a", "#5a5a5a")
    xs, ys = ([math.log(r[key]) for r in rows] for key in ("length", "step_ms"))

    def place(x: float, y: float) -> str:
        across = (math.log(x) - min(xs)) / (max(xs) - min(xs) or 1)
        up = (math.log(y) - min(ys)) / (max(ys) - min(ys) or 1)
        return f"{margin + across * (W - 2 * margin):.1f},{H - margin - up * (H - 2 * margin):.1f}"

    lines = []
    for i, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
        points = " ".join(place(r["length"], r["step_ms"]) for r in rows if r["model"] == name)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colours[i % 3]}"/>')
        lines.append(f'<text x="60" y="{30 + 16 * i}" fill="{colours[i % 3]}">{name}</text>')
    title = f"ms of a step by length, {rows[0]['device']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{W}" height="{H}" font-size="12">'
        f'{"".join(lines)}<text x="{margin}" y="{H - 15}">{title}</text></svg>\n'
    )


# ---------------------------------------------------------------- command


def main() -> None:
    """Run one of the four and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phase7")
    parser.add_argument("what", choices=("plan", "dry-run", "largest", "lengths", "trial"))
    parser.add_argument("value", nargs="?", default="100")
    parser.add_argument("--profile", default="small")
    parser.add_argument("--run", default="phase7")
    parser.add_argument("--vary", choices=("depth", "width"), default="depth")
    parser.add_argument("--seq", type=int, default=None)
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "muon"), default="adamw")
    parser.add_argument("--budget-gib", type=float, default=None)
    parser.add_argument("--max", type=int, default=1024, help="longest row of `lengths`")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch of `lengths`")
    given = parser.parse_args()
    if given.what == "trial":
        print(json.dumps(run_trial(json.loads(given.value))))
        return
    if given.what == "lengths":
        names = ("phase7", "phase8", "phase7_transformer")
        every = {name: subject(given.profile, name) for name in names}
        wanted = [256 * 2**i for i in range(8) if 256 * 2**i <= given.max]
        rows = lengths(every, wanted, given.tokens)
        write_lengths(rows)
        for row in rows:
            print(
                " ".join(
                    f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
                )
            )
        for name in names[:2]:
            first = crossover(rows, name, names[2]) or "none in range"
            print(f"{name} is faster than {names[2]} from length: {first}")
        return
    what = subject(given.profile, given.run)
    budget = None if given.budget_gib is None else int(given.budget_gib * GIB)
    found = {
        "plan": lambda: memory_plan(what),
        "dry-run": lambda: dry_run(what, int(given.value)),
        "largest": lambda: largest(
            what, vary=given.vary, context=given.seq, optimizer=given.optimizer, budget_bytes=budget
        ),
    }[given.what]()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
