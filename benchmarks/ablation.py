"""Which switches of the GPT pay: base and modern, and each switch alone on base, by three seeds.

In:  the packed rows of an encoding, the same for all.   Out: one JSON line per finished run in
     `--out`; the table (mean and standard deviation over seeds) on stdout.
Law: every run takes the same number of training tokens and is scored on the same validation text.
Resumable: a run that has its line is not made again; stop it and start it as often as you like.
Not here: vocab_pad, which changes nothing where 64 divides the vocabulary, and fp8 (no CPU has it).
Time is CPU seconds of 2,048 tokens with one thread, which other work hardly changes: the median of
the steps, or their mean where steps differ from each other.

    python -m benchmarks.ablation --out ablation.jsonl           # what is missing, then a table
    python -m benchmarks.ablation --out ablation.jsonl --table   # the table alone
    python -m benchmarks.ablation --out ablation.jsonl --depth 8 # width by the dial, 64 a layer
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks._work import work_folder
from benchmarks.train import TimedLoader
from lib.core.growing import AppendLog
from lib.core.run_settings import Runtime, Train
from lib.models import gpt
from lib.models.base import build
from lib.train.inputs import Data
from lib.train.job import Job
from lib.train.precision import compute_dtype
from lib.train.trainer import train

SIZE = {"depth": 4, "width": 128, "heads": 2, "context": 256}
STEPS, BATCH_TOKENS, EVAL_BYTES = 300, 2048, 200_000
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One line of the table: what differs from base in the model and in the training settings."""

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "base": Row(),
    "modern": Row({"variant": "modern"}),
    "optim": Row({"optim": "modern"}),
    "init": Row({"init": "modern"}),
    "value_embedding": Row({"value_embedding": True}),
    "resid_mix": Row({"resid_mix": True}),
    "smear": Row({"smear": True}),
    "backout": Row({"backout": True}),
    "qk_scale 1.2": Row({"qk_scale": 1.2}),
    "rope_theta 100,000": Row({"rope_theta": 100_000.0}),
    "windows SSSL": Row({"windows": "SSSL"}),
    "softcap off": Row({"softcap": 0.0}),
    "bigram 20,480": Row({"bigram": 20_480}),
    "window_warmup 150": Row({"window_warmup": 150}),
    "batch_ramp 1/2, 1": Row(train={"batch_ramp": (0.5, 1.0), "steps": 400}),  # as many tokens
    "context_ramp 1/4, 1/2, 1, 1": Row(train={"context_ramp": (0.25, 0.5, 1.0, 1.0)}),
    "adamw_every 2": Row(train={"adamw_every": 2}),
}


def main() -> None:
    """Make what is missing, seed by seed within a row, then show the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens/bpe.manifest.json"))
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tokenizers/bpe"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--depth", type=int, help="a size of the dial, not the small one")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="of what is there, run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if (
        arguments.out.exists()
    ) else []  # fmt: skip
    depth, steps = arguments.depth, arguments.steps
    done = [r for r in done if (r.get("depth"), r["steps"]) == (depth, steps)]
    if not arguments.table:
        size = SIZE if depth is None else {"depth": depth, "context": SIZE["context"]}
        known = {(r["row"], r["seed"]) for r in done}
        log = AppendLog(arguments.out)
        for name, seed in missing(arguments.rows, arguments.seeds, known):
            data = Data.open(arguments.tokens, arguments.tokenizer, seed, full=False)
            found = {"row": name, "seed": seed, **measure(data, ROWS[name], seed, steps, size)}
            found |= {} if depth is None else {"depth": depth}
            log.append(found)
            log.sync()
            done.append(found)
            print(f"{name}, seed {seed}: BPB {found['bpb']:.4f}", flush=True)
    print("\n".join(table(done)))


def missing(
    rows: list[str], seeds: list[int], known: set[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """(row, seed) of every run without a line, row by row."""
    return ((n, s) for n in rows for s in seeds if (n, s) not in known)


def measure(data: Data, row: Row, seed: int, steps: int, size: dict[str, int]) -> dict[str, Any]:
    """One whole run through the trainer: its last BPB, its size, CPU seconds of a step."""
    cpu = torch.device("cpu")
    dtype = compute_dtype("auto", cpu)
    settings = Train(
        **{"steps": steps, "batch_tokens": BATCH_TOKENS, "eval_every": 0,
           "eval_bytes": EVAL_BYTES, **row.train}
    )  # fmt: skip
    model = build(gpt, gpt.Config(**(size | row.model)), data.store.vocab_size, seed=seed)
    loaders: list[TimedLoader] = []

    def rows(plan: Any) -> TimedLoader:
        loaders.append(TimedLoader(data.store, plan.batch_tokens, seed, plan.rows_by_step))
        return loaders[-1]

    with work_folder() as folder:
        outcome = train(
            Job(
                run="ablation", settings=settings, seed=seed, model=model, rows=rows,
                runtime=Runtime(device="cpu", threads=1, log_every=steps,
                                checkpoint_every_steps=steps),
                context=data.store.context, device=cpu, dtype=dtype, work=Path(folder),
                identity={}, validate=data.validator(settings, cpu, dtype),
                stop=cast(Any, SimpleNamespace(asked=False)), log=lambda line: None, warn=print,
            )
        )  # fmt: skip
    assert outcome.position.best is not None
    seconds, tokens = np.diff(loaders[0].cpu[1:]), outcome.plan.tokens(outcome.plan.steps)
    uneven = settings.batch_ramp or settings.context_ramp or settings.adamw_every > 1
    uneven = uneven or row.model.get("window_warmup")
    a_step = seconds.sum() * BATCH_TOKENS / tokens if uneven else statistics.median(seconds)
    return {
        "steps": steps,
        "tokens": tokens,
        "bpb": outcome.position.best["bpb"],
        "parameters": outcome.plan.parameters,
        "cpu_s_per_step": float(a_step),
        "dtype": str(dtype),
    }


def table(done: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: BPB, its deviation over seeds, the mean difference to base at equal seeds, in the
    larger deviation of both, step time.
    """
    yield "| row | seeds | BPB | sd | against base | in sd | CPU s a step | parameters |"
    yield "|---|---|---|---|---|---|---|---|"
    of = {name: {r["seed"]: r for r in done if r["row"] == name} for name in ROWS}
    base = {seed: r["bpb"] for seed, r in of["base"].items()}
    for name, runs in of.items():
        if not runs:
            continue
        scores = [r["bpb"] for r in runs.values()]
        gaps = [r["bpb"] - base[seed] for seed, r in runs.items() if seed in base]
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        told = f"{deviation:.4f}" if deviation is not None else "-"
        against = inside = ""
        if gaps and name != "base":
            against = f"{statistics.mean(gaps):+.4f}"
            if deviation is not None and len(base) > 1:
                spread = max(deviation, statistics.stdev(base.values()))
                inside = f"{statistics.mean(gaps) / spread:+.1f}"
        seconds = statistics.median(r["cpu_s_per_step"] for r in runs.values())
        yield (
            f"| {name} | {len(runs)} | {statistics.mean(scores):.4f} | {told} | {against} | "
            f"{inside} | {seconds:.3f} | {next(iter(runs.values()))['parameters']:,} |"
        )


if __name__ == "__main__":
    main()
