"""TRM, its twins and ablations on one text: python -m benchmarks.trm_twins --source D --out FILE.

In:    `train_*.jsonl.gz` and `validation_0.jsonl.gz` of a folder. The project's own stages make
       documents, a lossless tokenizer of 4,096 pieces and rows of 128 of them, once. Each run is
       trained by lib.train's loop on the same rows and scored as `evaluate` scores, on the first
       `--val-bytes` of validation text.
Out:   a JSON line for each run; the tables come from the file, so a killed command goes on.
Rates: the first seed is trained with all of `--lr`, the other seeds with the best of them.
Runs:  trm, plain_params (equal parameters and tokens), plain_flops and looped (equal training
       FLOPs). `--ladder`: plain models of 1, 2, 3, 4, 6, 8 blocks give the effective depth, phi =
       ln(b_eff / k) / ln(A / k), b_eff the blocks of a plain model of equal bits per byte.
       `--ablations`: the recursion with one thing changed (trm.md 9.6).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from benchmarks._work import work_folder
from lib.core.run_settings import Runtime, Train
from lib.eval.depth import ExitScorer, exit_bpb
from lib.eval.scorer import Rules
from lib.models import trm
from lib.models._trm_sizes import inference_flops
from lib.models.base import build
from lib.models.trm import Config
from lib.train import trainer
from lib.train.final import write_final
from lib.train.inputs import Data
from lib.train.job import Job
from lib.train.session import describe_model

# Of 4,096 pieces, characters are half at this coverage; the rarer ones are spelt in bytes.
PIECES, COVERAGE, CONTEXT = 4096, 0.99, 128
TWINS: dict[str, dict[str, Any]] = {
    "trm": {},
    "plain_params": {"variant": "plain", "match": "trm", "equal": "params"},
    "plain_flops": {"variant": "plain", "match": "trm"},
    "looped": {"variant": "looped", "match": "trm"},
}
LADDER = (1, 2, 3, 4, 6, 8)
# name -> fields of the model, of the training. With n = 1 both schedules are the same calls.
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "init input": ({"init": "input"}, {}),
    "grad last": ({"grad": "last"}, {}),
    "n 2": ({"latent_steps": 2}, {}),
    "n 2, schedule every": ({"latent_steps": 2, "schedule": "every"}, {}),
    "join concat": ({"join": "concat"}, {}),
    "N 1": ({"supervision_steps": 1}, {}),
    "N 4": ({"supervision_steps": 4}, {}),
    "out_norm off": ({"out_norm": False}, {}),
    "weights linear": ({"supervision_weights": "linear"}, {}),
    "update step": ({"supervision_update": "step"}, {}),
    "EMA off": ({}, {"ema_decay": 0.0}),
    "EMA 0.999": ({}, {"ema_decay": 0.999}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the matrix products


def main() -> None:
    """Train what is missing in the file, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trm_twins")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, continued")
    parser.add_argument("--source", type=Path, help="folder of *.jsonl.gz")
    parser.add_argument("--work", type=Path, default=Path("scratch/trm_twins"))
    parser.add_argument("--model", default="{}", help="JSON: fields of the Config of the recursion")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3], help="a grid: all are shown")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", nargs="*", default=list(TWINS))
    parser.add_argument("--ladder", action="store_true", help="also the plain models by depth")
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, help="these, or all of them")
    parser.add_argument("--val-bytes", type=int, default=100_000)
    parser.add_argument("--models", type=Path, help="folder for the finished models")
    parser.add_argument("--table", action="store_true", help="no training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        if arguments.source is None:
            parser.error("--source: where is the text?")
        data = Data.open(*prepare(arguments.source, arguments.work), 1234, full=False)
        arms = configs(arguments)
        for seed, name in itertools.product(arguments.seeds, arms):
            own = [r for r in read(arguments.out) if r["run"] == name]
            tuned = own and own[0]["seed"] != seed
            for lr in [best_rate(own)] if tuned else arguments.lr:
                if (lr, seed) not in {(r["lr"], r["seed"]) for r in own}:
                    record = train_one(name, *arms[name], lr, seed, data, arguments)
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    tell(read(arguments.out))


def prepare(source: Path, work: Path) -> tuple[Path, Path]:
    """Token manifest and tokenizer folder of the text, by the stages; what is there is taken."""
    shards, documents = work / "shards.manifest.json", work / "documents"
    tokenizer, tokens = work / "tokenizer", work / "tokens.manifest.json"
    names = [path.name for path in source.glob("train_*.jsonl.gz")]
    names.sort(key=lambda name: (len(name), name))  # 10 after 9
    kept = {
        "download_shards.sources.ja_sample.folder": source.resolve(),
        "download_shards.sources.ja_sample.train": f"[{', '.join(names)}]",
        "train_tokenizer.spm.vocab_size": PIECES,
        "train_tokenizer.spm.character_coverage": COVERAGE,
        "encode_tokens.spm.context": CONTEXT,
    }
    settings = [word for key, value in kept.items() for word in ("--set", f"{key}={value}")]
    steps: dict[str, Sequence[str | Path]] = {
        "download_shards": ("--out", shards),
        "extract_texts": ("--shards", shards, "--out", documents),
        "train_tokenizer": ("--name", "spm", "--documents", documents, "--shards", shards,
                            "--out", tokenizer),
        "encode_tokens": ("--name", "spm", "--documents", documents, "--tokenizer", tokenizer,
                          "--out", tokens),
    }  # fmt: skip
    for name, words in steps.items():
        subprocess.run([sys.executable, "-m", f"stages.{name}", *words, *settings], check=True)
    return tokens, tokenizer


def read(out: Path) -> list[dict[str, Any]]:
    """The runs that are there."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def best_rate(records: Sequence[dict[str, Any]]) -> float:
    """Of one run: the rate of its lowest bits per byte with the first seed of the file."""
    first = [r for r in records if r["seed"] == records[0]["seed"]]
    return min(first, key=lambda r: r["bpb"])["lr"]


def configs(arguments: argparse.Namespace) -> dict[str, tuple[Config, dict[str, Any]]]:
    """Name -> network of each run, and what differs in its training."""
    recursion = Config(**{"context": CONTEXT, **json.loads(arguments.model)})
    found = {name: (replace(recursion, **TWINS[name]), {}) for name in arguments.runs}
    if arguments.ladder:
        alien = dict.fromkeys(("latent_steps", "deep_steps", "supervision_steps"))
        plain = replace(recursion, variant="plain", halt="off", **alien)
        found |= {f"plain_{k}": (replace(plain, depth=k), {}) for k in LADDER}
    if arguments.ablations is not None:
        chosen = {name: ABLATIONS[name] for name in arguments.ablations or ABLATIONS}
        found |= {n: (replace(recursion, **model), train) for n, (model, train) in chosen.items()}
    return found


def train_one(
    name: str, config: Config, changed: dict[str, Any], lr: float, seed: int, data: Data,
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One run from its first weights to its score; its rows do not depend on the seed."""
    device, context = torch.device("cpu"), data.store.context
    settings = Train(
        **{"steps": arguments.steps, "batch_tokens": arguments.batch_tokens, "lr": lr,
           "ema_decay": 0.99, "ema_ramp": True, "warmup": arguments.steps // 10,
           "schedule": "linear", "grad_clip": 1.0, "eval_every": 0, "eval_bytes": 1, **changed}
    )  # fmt: skip
    model = build(trm, config, data.store.vocab_size, seed=seed)
    began = time.process_time()
    with work_folder() as work:
        job = Job(
            run=name, settings=settings, runtime=Runtime(device="cpu", threads=1, log_every=50),
            seed=seed, model=model, rows=data.rows, context=context, device=device,
            dtype=DTYPES[arguments.precision], work=Path(work), identity={}, log=print, warn=print,
            stop=cast(Any, SimpleNamespace(asked=False)),
        )  # fmt: skip
        outcome = trainer.train(job)
    seconds = time.process_time() - began
    best = build(trm, config, data.store.vocab_size, weights=outcome.weights).eval()
    if arguments.models:
        identity = {"model": asdict(config), "tokenizer": data.tokenizer.fingerprint}
        described = describe_model("trm", identity, data.store.vocab_size, context)
        about = {"boundary": data.store.boundary, "steps": settings.steps, "seed": seed}
        place = arguments.models / f"{name}_{lr:g}_{seed}"
        write_final(place, outcome.weights, described, about, arguments.work / "tokenizer")
    rules = Rules.of(data.tokenizer, data.store.boundary, context)
    scorer = ExitScorer(model=best, rules=rules, token_bytes=data.tokenizer.token_bytes)
    taken, size = [], 0
    for document in data.documents:
        if size < arguments.val_bytes:
            taken.append(document)
            size += len(document[1].encode())
    exits = exit_bpb(scorer, taken, data.tokenizer)
    tables = model.table.weight.numel()
    plan = outcome.plan
    record = {
        "run": name, "lr": lr, "seed": seed, "bpb": exits[best.trained_depth - 1], "exits": exits,
        "val_bytes": size, "params": plan.parameters - tables, "tables": tables,
        "tokens": plan.steps * plan.batch_tokens,
        "train_flops": plan.steps * plan.batch_tokens * plan.flops_per_token,
        "inference_flops": inference_flops(config, context, data.store.vocab_size),
        "applications": config.applications, "blocks": config.blocks,
        "tokens_per_cpu_s": plan.steps * plan.batch_tokens / seconds,
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def tell(records: list[dict[str, Any]]) -> None:
    """Each run at its best rate, then the rest of the grid; then depths."""
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["run"], record["lr"]), []).append(record)
    mean = {key: statistics.mean(r["bpb"] for r in found) for key, found in runs.items()}
    names = list(dict.fromkeys(name for name, _ in runs))
    best = {n: (n, best_rate([r for r in records if r["run"] == n])) for n in names}
    print("| run | parameters | tokens | train FLOPs | inference FLOPs a token | lr | BPB | s.d. | "
          "seeds | tokens a CPU second |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for key in [*best.values(), *(k for k in runs if k not in best.values())]:
        found, first = runs[key], runs[key][0]
        spread = statistics.stdev(r["bpb"] for r in found) if len(found) > 1 else math.nan
        rate = statistics.mean(r["tokens_per_cpu_s"] for r in found)
        print(
            f"| {key[0]} | {first['params']:,} + {first['tables']:,} | {first['tokens']:,} | "
            f"{first['train_flops']:.2e} | {first['inference_flops'] / 1e6:.2f} M | {key[1]:g} | "
            f"{mean[key]:.4f} | {spread:.4f} | {len(found)} | {rate:,.0f} |"
        )
    for name in ("trm", "looped"):
        if name in best:
            columns = zip(*(r["exits"] for r in runs[best[name]]), strict=True)
            told = ", ".join(f"{statistics.mean(column):.4f}" for column in columns)
            print(f"{name}, bits per byte by depth 1, 2, ...: {told}")
    ladder = {r["blocks"]: mean[best[n]] for n in names for r in runs[best[n]][:1]
              if n.startswith("plain_") and n[6:].isdigit()}  # fmt: skip
    for name in ("trm", "looped"):
        if name in best and len(ladder) > 1:
            r = runs[best[name]][0]
            print(f"{name}: {effective_depth(mean[best[name]], ladder, r)}")


def effective_depth(bpb: float, ladder: dict[int, float], run: dict[str, Any]) -> str:
    """b_eff by interpolation in ln(blocks), and phi beside the exponents of arXiv 2604.21106."""
    depths = sorted(ladder)
    k, A = run["blocks"], run["applications"]
    for a, b in itertools.pairwise(depths):
        high, low = ladder[a], ladder[b]
        if low <= bpb <= high and high > low:
            share = (high - bpb) / (high - low)
            blocks = math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
            phi = math.log(blocks / k) / math.log(A / k)
            return f"b_eff {blocks:.2f} of {A} applications, phi {phi:.2f} (published: 0.46, 0.38)"
    told = ", ".join(f"{ladder[depth]:.4f}" for depth in depths)
    return f"no effective depth: deeper plain models do not fall past {bpb:.4f} ({told})"


if __name__ == "__main__":
    main()
