"""Phase 7, phase 8 and the transformer twin by length of row: step, decoding, state, crossover.

In:  the sizes of a profile, seeded random ids, equally many of a batch at every length.
Out: a row a model and length on stdout; phase7_vs_phase8.{csv,json,svg} in benchmarks/out/. Where a
     number comes from a CPU its device says so; the interpreter is refused.

    python -m benchmarks.lengths --max 1024 --tokens 1024      (kumiki bench lengths)
    python -m benchmarks.lengths --cpu-time      one thread's CPU time, for a machine that is busy
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lib.cli.bench_trials import trial_of
from lib.cli.commands.config import load_profile
from lib.cli.measure import Stepper, Trial, timed
from lib.core import files
from lib.core.errors import UserError
from lib.core.kernel_choice import interpreting

RUNS = ("phase7", "phase8", "phase7_transformer")
OUT = Path("benchmarks/out")
COLOURS = ("#0b6e99", "#c4541a", "#5a5a5a")


def at_length(trial: Trial, length: int, tokens: int) -> Trial:
    """The same model for rows of `length`; a window over the whole row stays one."""
    config = trial.config
    sizes: dict[str, int] = {"context": length + 1}  # one more for the decoded token
    if hasattr(config, "window"):
        full = config.window == config.context
        sizes["window"] = length if full else min(config.window, length)
    config = replace(config, **sizes)
    return replace(trial, config=config, context=length, rows=max(1, tokens // length))


def cpu_timed(call: Callable[[], Any], repeat: int, _device: torch.device) -> list[float]:
    """As `timed`, in CPU seconds of this process."""
    found = []
    for n in range(repeat + 1):
        start = time.process_time()
        call()
        found += [time.process_time() - start] if n else []
    return found


def measure(name: str, trial: Trial, repeat: int, clock: Any = timed) -> dict[str, Any]:
    """Milliseconds of a step (median, p20, p80) and of a decoded token; bytes of a row's state."""
    stepper = Stepper(trial)
    batch = stepper.batch(0)
    times = [1e3 * s for s in clock(lambda: stepper.step(batch), repeat, stepper.device)]
    low, _, _, high = statistics.quantiles(times, n=5)
    with torch.no_grad():
        _, state = stepper.model.eval()(batch.tokens[:1])
        last = batch.tokens[:1, -1:]
        decode = clock(lambda: stepper.model(last, state), repeat, stepper.device)
    return {
        "model": name, "length": trial.context, "rows": trial.rows,
        "step_ms": statistics.median(times), "step_p20": low, "step_p80": high,
        "decode_ms": 1e3 * statistics.median(decode),
        "state_bytes": sum(x.nbytes for layer in state.layers for x in layer),
        "device": device_name(stepper.device),
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """As the maker calls it; a CPU's carries the word."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def crossover(rows: list[dict[str, Any]], fast: str, slow: str) -> int | None:
    """Smallest length from which on `fast` takes less time a step than `slow`; None in range."""
    of = {(r["model"], r["length"]): r["step_ms"] for r in rows}
    every = sorted({r["length"] for r in rows})
    wins = [n for n in every if of[fast, n] < of[slow, n]]
    return next((n for n in wins if all(m in wins for m in every if m >= n)), None)


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table as Markdown, then where each linear model overtakes the twin."""
    yield "| model | length | rows | step ms (p20 to p80) | decoded token ms | state bytes |"
    yield "|---|---|---|---|---|---|"
    for r in rows:
        yield (
            f"| {r['model']} | {r['length']:,} | {r['rows']} | {r['step_ms']:.0f} "
            f"({r['step_p20']:.0f} to {r['step_p80']:.0f}) | {r['decode_ms']:.2f} "
            f"| {r['state_bytes']:,} |"
        )
    yield rows[0]["device"]
    for name in RUNS[:2]:
        first = crossover(rows, name, RUNS[2]) or "none in range"
        yield f"{name} is faster than {RUNS[2]} from length: {first}"


def write(rows: list[dict[str, Any]], folder: Path = OUT) -> None:
    """phase7_vs_phase8.csv, .json, .svg."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_bytes(folder / "phase7_vs_phase8.csv", text.getvalue().encode())
    files.write_json(folder / "phase7_vs_phase8.json", rows)
    files.write_bytes(folder / "phase7_vs_phase8.svg", plot(rows).encode())


def plot(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a step against length, both logarithmic, as SVG."""
    W, H, margin = 560, 340, 50
    xs, ys = ([math.log(r[key]) for r in rows] for key in ("length", "step_ms"))

    def place(x: float, y: float) -> str:
        across = (math.log(x) - min(xs)) / (max(xs) - min(xs) or 1)
        up = (math.log(y) - min(ys)) / (max(ys) - min(ys) or 1)
        return f"{margin + across * (W - 2 * margin):.1f},{H - margin - up * (H - 2 * margin):.1f}"

    drawn = []
    for i, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
        points = " ".join(place(r["length"], r["step_ms"]) for r in rows if r["model"] == name)
        colour = COLOURS[i % len(COLOURS)]
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        drawn.append(f'<text x="60" y="{30 + 16 * i}" fill="{colour}">{name}</text>')
    title = f"ms of a step by length, {rows[0]['device']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{W}" height="{H}" font-size="12">'
        f'{"".join(drawn)}<text x="{margin}" y="{H - 15}">{title}</text></svg>\n'
    )


def main() -> None:
    """Measure every model at 256, 512, ... up to the longest row asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths")
    parser.add_argument("--profile", default="small")
    parser.add_argument("--max", type=int, default=1024, help="longest row")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, on a CPU")
    given = parser.parse_args()
    if given.cpu_time and torch.cuda.is_available():
        raise UserError("a GPU's work is no CPU time", remedy="leave --cpu-time out")
    if interpreting():
        raise UserError("the interpreter's times mean nothing", remedy="unset TRITON_INTERPRET")
    settings = load_profile(given.profile)
    torch.set_num_threads(1 if given.cpu_time else settings.runtime.threads)
    wanted = [256 * 2**i for i in range(8) if 256 * 2**i <= given.max]
    rows, clock = [], cpu_timed if given.cpu_time else timed
    for n in wanted:  # length by length: what else the machine does meets all models alike
        for name in RUNS:
            trial = at_length(trial_of(settings, name), n, given.tokens)
            rows.append(measure(name, trial, given.repeat, clock))
    write(rows)
    print("\n".join(lines(rows)))


if __name__ == "__main__":
    main()
