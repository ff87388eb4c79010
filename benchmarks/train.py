"""The trainer against a plain PyTorch loop, in one run: python -m benchmarks.train [--rows N].

kumiki: lib.train.trainer.train on a whole Job over the GPT family, with loader, log, checkpoint.
plain:  the same model class in the usual loop: whole logits (B, T, V), cross_entropy, autocast,
        clip_grad_norm_, fused AdamW for all parameters; its rows cost nothing, it writes nothing.
Each measurement is a fresh process, so that its peak memory is its own; they are interleaved
`--repeat` times. Speed is of the best and of the median step (a shared machine only ever slows a
step down), and by CPU time, which with one thread hardly feels other work. Memory is the peak above
what the imports took; ours has a checkpoint in it.
Note:  our optimizer is Muon for matrices, which costs more than AdamW: its share is shown, not
       taken out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks._work import work_folder
from lib.core.rng import numpy_generator
from lib.core.run_settings import Runtime, Train
from lib.data.loader import Loader
from lib.data.tokens import TokenStore
from lib.models import gpt
from lib.models.base import build
from lib.train import optim, trainer
from lib.train.job import Job
from lib.train.observe import Observer

T, SEED, WARM = 256, 1234, 1  # context, seed, steps left out of times
CONFIG = gpt.Config(variant="base", depth=4, width=256, heads=4, context=T)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LABELS = {"plain": "plain loop", "ours": "kumiki"}


def main() -> None:
    """Compare at two vocabularies: logits of a few times the activations, then of many times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--steps", type=int, default=5, help="of one measurement")
    parser.add_argument("--rows", type=int, default=32, help="of the micro-batch, one a step")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=1, help="more need idle cores")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="in both")
    parser.add_argument("--measure", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < WARM + 2:
        parser.error(f"--steps: use {WARM + 2} or more")
    if arguments.measure:
        measured = {"ours": ours, "plain": plain}[arguments.measure](arguments)
        print(json.dumps(measured), flush=True)
        return
    for vocab in arguments.vocab:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in LABELS}
        for _ in range(arguments.repeat):
            for name, results in found.items():
                results.append(in_own_process(name, vocab, arguments))
        tell(found, vocab, arguments)


def in_own_process(name: str, vocab: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `name` measures in a process that does nothing else."""
    kept = ("steps", "rows", "dtype", "threads")
    options = [f"--{key}={getattr(arguments, key)}" for key in kept]
    options += ["--compile"] if arguments.compile else []
    command = [sys.executable, "-m", "benchmarks.train", "--measure", name, f"--vocab={vocab}"]
    run = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def tell(found: dict[str, list[dict[str, Any]]], vocab: int, arguments: argparse.Namespace) -> None:
    """Speed, memory and shares of one setting, beside what they are meant to be."""
    tokens = arguments.rows * T
    how = f"{arguments.dtype}, {arguments.threads} threads"
    print(f"{arguments.rows} rows x {T}, V {vocab:,}, {how}", flush=True)
    times = {n: [s for r in results for s in r["seconds"]] for n, results in found.items()}
    cpu = {n: min(s for r in results for s in r["cpu"]) for n, results in found.items()}
    best, middle = ({n: tokens / f(t) for n, t in times.items()} for f in (min, statistics.median))
    rates = ", ".join(f"{LABELS[n]} {best[n]:,.0f} ({middle[n]:,.0f})" for n in found)
    print(
        f"  tokens/s: {rates}; ratio {best['ours'] / best['plain']:.2f} best, "
        f"{middle['ours'] / middle['plain']:.2f} median, {cpu['plain'] / cpu['ours']:.2f} by CPU "
        "time (at least 1.0)"
    )
    peak = {n: statistics.median(r["peak_mb"] for r in results) for n, results in found.items()}
    sizes = ", ".join(f"{LABELS[n]} {peak[n]:,.0f} MB" for n in found)
    print(f"  peak memory: {sizes}; ratio {peak['ours'] / peak['plain']:.2f} (at most 0.60)")
    total = sum(times["ours"])
    share = {
        k: sum(sum(r["parts"][k]) for r in found["ours"]) / total for k in found["ours"][0]["parts"]
    }
    adamw = sum(sum(r["parts"]["optimizer"]) for r in found["plain"]) / sum(times["plain"])
    print(
        f"  of a step: waiting for rows {share['wait']:.2%} + log {share['log']:.2%} = "
        f"{share['wait'] + share['log']:.2%} (below 2 %); rows made in their thread "
        f"{share['rows']:.2%}; optimizer {share['optimizer']:.1%}, of it Muon {share['muon']:.1%}; "
        f"plain loop's AdamW {adamw:.1%}",
        flush=True,
    )


# ---------------------------------------------------------------- one measurement, its own process


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole trainer; methods that it calls are timed from outside."""
    base = memory("VmRSS")
    (vocab,), rows, steps = arguments.vocab, arguments.rows, arguments.steps
    parts = {"log": timed(Observer, "step"), "optimizer": timed(optim.Optimizer, "step")}
    muon = timed(optim._MuonStack, "step")  # one call for every shape
    loader = TimedLoader(random_store(vocab, rows), rows * T, SEED)
    model = build(gpt, CONFIG, vocab, seed=SEED)
    with work_folder() as name:
        job = Job(
            run="benchmark",
            settings=Train(steps=steps, batch_tokens=rows * T, schedule="base", eval_every=0),
            runtime=Runtime(
                device="cpu", threads=arguments.threads, device_batch_size=rows, log_every=1,
                compile=arguments.compile,
            ),
            seed=SEED, model=model, rows=lambda plan: loader, context=T,
            device=torch.device("cpu"), dtype=DTYPES[arguments.dtype], work=Path(name),
            identity={}, stop=cast(Any, SimpleNamespace(asked=False)), log=print, warn=print,
        )  # fmt: skip
        torch.set_num_threads(arguments.threads)
        trainer.train(job)
    shapes = len(muon) // steps
    parts["muon"] = [sum(muon[i * shapes : (i + 1) * shapes]) for i in range(steps)]
    parts |= {"wait": loader.waits[-steps - 1 : -1], "rows": loader.made[-steps:]}
    asked = loader.asked[-steps - 1 : -1]  # by the loop: a dry step before it, an end after it
    return {
        "seconds": np.diff(asked)[WARM:].tolist(),  # the last step has the checkpoint in it
        "cpu": np.diff(loader.cpu[-steps - 1 : -1])[WARM:].tolist(),
        "parts": {name: seconds[WARM:-1] for name, seconds in parts.items()},
        "peak_mb": memory("VmHWM") - base,
    }


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """The usual loop."""
    base = memory("VmRSS")
    (vocab,), rows, dtype = arguments.vocab, arguments.rows, DTYPES[arguments.dtype]
    torch.set_num_threads(arguments.threads)
    batches = [torch.from_numpy(r) for r in np.split(random_rows(vocab, rows), ROWS_OF_STEPS)]
    model = build(gpt, CONFIG, vocab, seed=SEED)
    if arguments.compile:
        for name in model.compiled:
            setattr(model, name, torch.compile(getattr(model, name)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    updates = timed(optimizer, "step")
    ends, cpu = [time.perf_counter()], [time.process_time()]
    for step in range(arguments.steps):
        ids = batches[step % len(batches)].long()
        tokens, targets = ids[:, :-1], ids[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, _ = model(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f}")
        ends.append(time.perf_counter())
        cpu.append(time.process_time())
    return {
        "seconds": np.diff(ends)[WARM:].tolist(),
        "cpu": np.diff(cpu)[WARM:].tolist(),
        "parts": {"optimizer": updates[WARM:]},
        "peak_mb": memory("VmHWM") - base,
    }


ROWS_OF_STEPS = 4  # steps until rows repeat


def random_rows(vocab: int, rows: int) -> np.ndarray:
    """Rows of T + 1 random ids, for `ROWS_OF_STEPS` steps."""
    draw = numpy_generator(SEED, "rows of a benchmark")
    return draw.integers(0, vocab, (ROWS_OF_STEPS * rows, T + 1), dtype=np.int32)


def random_store(vocab: int, rows: int) -> TokenStore:
    """Random rows in the place of a token store's."""
    data = random_rows(vocab, rows)
    read = lambda number, out: np.copyto(out, data[number])  # noqa: E731
    store = SimpleNamespace(context=T, rows=len(data), folder=Path(), read_row=read)
    return cast(TokenStore, store)


class TimedLoader(Loader):
    """The loader with a clock: when the loop `asked` and `waits`; seconds that rows were `made`."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: list[float] = []
        self.cpu: list[float] = []
        self.waits: list[float] = []
        self.made: list[float] = timed(self, "batch")

    def prefetch(
        self, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[np.ndarray]:
        """As the loader's."""
        rows = super().prefetch(start, stop, rank, world)
        with closing(rows):  # type: ignore[type-var]  # a generator
            while True:
                self.asked.append(time.perf_counter())
                self.cpu.append(time.process_time())
                batch = next(rows, None)
                self.waits.append(time.perf_counter() - self.asked[-1])
                if batch is None:
                    return
                yield batch


def timed(owner: Any, name: str) -> list[float]:
    """Seconds of every call of a method from now on, in a list that grows."""
    call, seconds = getattr(owner, name), []

    def clocked(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = call(*given, **named)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(owner, name, clocked)
    return seconds


def memory(kind: str) -> float:
    """VmRSS (now) or VmHWM (peak) in MB; getrusage would carry the parent's peak over."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e6


if __name__ == "__main__":
    main()
