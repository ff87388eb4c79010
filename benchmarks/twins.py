"""Phase 7 beside its twins, phase 8, a plain GPT: equal parameters, tokens, text; three seeds.

In:  the packed rows of an encoding, the same for all.   Out: one JSON line per finished run in
     `--out`; the table (mean and standard deviation over seeds) on stdout.
Law: every run takes the same number of training tokens and is scored on the same validation text;
     a difference counts where it is above two standard deviations.
Resumable: a run that has its line is not made again. Time is CPU seconds of a step, one thread.

    nice -n 19 python -m benchmarks.twins --out twins.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from benchmarks._work import work_folder
from lib.core.growing import AppendLog
from lib.core.run_settings import Runtime, Train
from lib.models.base import build, load_family
from lib.train.inputs import Data
from lib.train.job import Job
from lib.train.trainer import train

STEPS, BATCH_TOKENS, EVAL_BYTES, SEEDS = 300, 2048, 200_000, (1, 2, 3)
PHASE7: dict[str, Any] = {
    "width": 128, "depth": 2, "heads": 2, "d_ff": 384, "context": 256, "window": 32,
    "ssm_rank": 16, "curvature": {"warmup": 60},
}  # fmt: skip
PHASE8 = {"width": 128, "depth": 2, "heads": 2, "key_width": 32, "d_ff": 416, "context": 256}
OURS = {"lr": 2e-3, "warmup": 30, "schedule": "cosine", "final_lr": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, Config, Train
    "phase7": ("phase7", PHASE7, OURS),
    "phase7_euclid": ("phase7", {**PHASE7, "geometry": "euclid"}, OURS),
    "phase7_transformer": (
        "phase7",
        {**PHASE7, "geometry": "dot", "window": 256, "ssm": False, "d_ff": 419},
        OURS,
    ),
    "phase8": ("phase8", PHASE8, OURS),
    # Its tables are untied and dense: at this vocabulary they are three quarters of it.
    "gpt": ("gpt", {"width": 48, "depth": 4, "heads": 2, "context": 256}, {"schedule": "base"}),
}


def main() -> None:
    """Make what is missing, seed by seed over all models, then show the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.twins")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens/bpe.manifest.json"))
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tokenizers/bpe"))
    parser.add_argument("--table", action="store_true", help="of what is there, run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log = AppendLog(arguments.out)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    known = {(r["model"], r["seed"]) for r in done}
    for seed in SEEDS if not arguments.table else ():
        for name in MODELS:
            if (name, seed) in known:
                continue
            data = Data.open(arguments.tokens, arguments.tokenizer, seed, full=False)
            found = {"model": name, "seed": seed, **measure(data, name, seed)}
            log.append(found)
            log.sync()
            done.append(found)
            print(f"{name}, seed {seed}: BPB {found['bpb']:.4f}", flush=True)
    print("\n".join(table(done)))


def measure(data: Data, name: str, seed: int) -> dict[str, Any]:
    """One whole run through the trainer: its last BPB, its size, CPU seconds of a step."""
    cpu, (family, sizes, rates) = torch.device("cpu"), MODELS[name]
    settings = Train(
        steps=STEPS, batch_tokens=BATCH_TOKENS, eval_every=0, eval_bytes=EVAL_BYTES, **rates
    )
    module = load_family(family)
    model = build(module, module.Config(**sizes), data.store.vocab_size, seed=seed)
    began = time.process_time()
    with work_folder() as folder:
        outcome = train(
            Job(
                run=name, settings=settings, seed=seed, model=model, rows=data.rows,
                runtime=Runtime(device="cpu", threads=1, log_every=STEPS,
                                checkpoint_every_steps=STEPS),
                context=data.store.context, device=cpu, dtype=torch.float32, work=Path(folder),
                identity={}, validate=data.validator(settings, cpu, torch.float32),
                stop=cast(Any, SimpleNamespace(asked=False)), log=lambda line: None, warn=print,
            )
        )  # fmt: skip
    assert outcome.position.best is not None
    return {
        "tokens": outcome.plan.batch_tokens * outcome.plan.steps,
        "bpb": outcome.position.best["bpb"],
        "parameters": outcome.plan.parameters,
        "flops_per_token": outcome.plan.flops_per_token,
        "cpu_s": time.process_time() - began,
    }


def table(done: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: BPB over seeds, its distance to phase 7 and what the two-deviation rule says."""
    yield "| model | parameters | MFLOP a token | CPU s | seeds | BPB | sd | against phase7 |"
    yield "|---|---|---|---|---|---|---|---|"
    of = {name: [r for r in done if r["model"] == name] for name in MODELS}
    base = [r["bpb"] for r in of["phase7"]]
    for name, runs in of.items():
        if not runs:
            continue
        scores = [r["bpb"] for r in runs]
        sd = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        said = "-"
        if name != "phase7" and len(scores) > 1 and len(base) > 1:
            gap, spread = (
                statistics.mean(scores) - statistics.mean(base),
                2 * max(sd, statistics.stdev(base)),
            )
            said = f"{gap:+.4f}: " + ("counts" if abs(gap) > spread else "no difference measured")
        seconds = statistics.median(r["cpu_s"] for r in runs)
        yield (
            f"| {name} | {runs[0]['parameters']:,} | {runs[0]['flops_per_token'] / 1e6:.2f} "
            f"| {seconds:.0f} | {len(runs)} | {statistics.mean(scores):.4f} | {sd:.4f} | {said} |"
        )


if __name__ == "__main__":
    main()
