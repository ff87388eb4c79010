"""Streamed weights against resident ones and against other engines: python -m benchmarks.stream.

Same GPT-2 shapes, data, precision, accumulation A, fused AdamW on every side; the head is untied,
since not every opponent sums tied gradients. Each measurement is a process of its own, interleaved
`--repeat` times: tokens/s (median, spread), peak memory of the device and of the process above its
imports, bytes copied, what the estimator said, and the losses beside those of the resident model:
ours at G = 1 must have them bit for bit. What cannot be installed or does not run gets a row with
the reason. Without a GPU everything runs on the CPU executor: a check that the benchmark
is whole, and of memory; its speeds say nothing about a bus.
Goals (ramgpt.md 8.1) stand beside the figures, met or not; `--sweep` runs the shapes and ablations.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from lib.core.run_settings import Runtime
from lib.models import ramgpt
from lib.models.base import Optim
from lib.nn.stream import Streaming, estimate, open_stream
from lib.nn.stream.decide import this_card
from lib.train.job import Batch
from lib.train.optim import build_optimizer
from lib.train.schedule import make_schedule

MODELS = {
    "1b": ({"depth": 36, "heads": 24, "width": 1536, "context": 1024}, 50257),
    "0p1b": ({"depth": 18, "heads": 12, "width": 768, "context": 768}, 50257),
    "100m": ({"depth": 12, "heads": 12, "width": 768, "context": 256}, 16384),
    "tiny": ({"depth": 4, "heads": 4, "width": 128, "context": 64}, 997),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ABLATIONS = {
    "pageable": {"stream_pinned": False}, "slots 2": {"stream_slots": 2},
    "slots 4": {"stream_slots": 4}, "no overlap": {"stream_overlap_optimizer": "off"},
    "host boundaries": {"stream_boundaries": "host"}, "half resident": {"stream_resident": 0.5},
}  # fmt: skip
GOALS = {
    "resident": 0.90, "ramtorch": 1.0, "fsdp2": 1.3, "torchao": 0.85, "deepspeed": 1.5,
}  # fmt: skip  # ours over theirs at A = 1; at A = 16: ramtorch and fsdp2 2.0


def main() -> None:
    """One setting, or the sweep of shapes and ablations."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="0p1b" if torch.cuda.is_available() else "100m")
    add("--rows", type=int, default=1, help="of a micro-batch")
    add("--accumulation", type=int, default=4)
    add("--steps", type=int, default=3, help="measured, after one that is not")
    add("--repeat", type=int, default=2)
    add("--dtype", choices=DTYPES, default="bf16")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cap-gb", type=float, default=None, help="most that the process may take of the device")
    add("--only", nargs="+", choices=SIDES, default=list(SIDES))
    add("--sweep", action="store_true", help="A 1, 4, 16; tokens a micro-batch; ablations")
    add("--runtime", type=json.loads, default={}, help=argparse.SUPPRESS)
    add("--measure", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(SIDES[arguments.measure](arguments)), flush=True)
        return
    settings = [(arguments.accumulation, arguments.rows)]
    if arguments.sweep:
        settings = [(A, rows) for A in (1, 4, 16) for rows in (1, 4, 16)]
    for accumulation, rows in settings:
        arguments.accumulation, arguments.rows = accumulation, rows
        compare(arguments, {name: (name, {}) for name in arguments.only})
    if arguments.sweep:
        compare(arguments, {name: ("ours_group", change) for name, change in ABLATIONS.items()})


def compare(arguments: argparse.Namespace, sides: dict[str, tuple[str, dict]]) -> None:
    """One table: every side `--repeat` times, in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(arguments.repeat):
        for label, (name, change) in sides.items():
            if not found[label] or "reason" not in found[label][-1]:
                found[label].append(in_own_process(name, change, arguments))
    config, _ = MODELS[arguments.model]
    tokens = arguments.rows * config["context"]
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU executor, rates by CPU time"
    print(
        f"\n{arguments.model}, A {arguments.accumulation}, {tokens:,} tokens a micro-batch, "
        f"{arguments.dtype}, {device}, {arguments.threads} threads", flush=True,
    )  # fmt: skip
    print("| side | tokens/s (spread) | ours / it | goal | VRAM MB | RSS MB | in, out GB/step "
          "| predicted s, VRAM MB | losses |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    mine = _rate(found.get("ours_group") or [])
    wanted = (found.get("resident") or [{}])[0].get("losses")
    for label, results in found.items():
        print(_row(label, results, mine, wanted), flush=True)


def _rate(results: list[dict[str, Any]]) -> float | None:
    rates = [r["tokens_per_s"] for r in results if "reason" not in r]
    return statistics.median(rates) if rates else None


def _row(
    label: str, results: list[dict[str, Any]], mine: float | None, wanted: list[float] | None
) -> str:
    good, rate = [r for r in results if "reason" not in r], _rate(results)
    if rate is None:
        return (
            f"| {label} | not run: {results[-1]['reason']} | | {GOALS.get(label, '')} | | | | | |"
        )
    all_rates = [r["tokens_per_s"] for r in good]
    ratio = f"{mine / rate:.2f}" if mine else ""
    first = good[0]
    spread = f"{rate:,.0f} ({min(all_rates):,.0f}-{max(all_rates):,.0f})"
    memory = f"{first['peak_vram'] / 1e6:,.0f} | {first['peak_rss'] / 1e6:,.0f}"
    copied = f"{first.get('in', 0) / 1e9:.2f}, {first.get('out', 0) / 1e9:.2f}"
    said = first.get("predicted_s")
    told = (
        ""
        if said is None
        else f"{said:.2f} of {first['seconds']:.2f}, {first['predicted_vram'] / 1e6:,.0f}"
    )
    goal, losses = GOALS.get(label, ""), _compared(first["losses"], wanted)
    return f"| {label} | {spread} | {ratio} | {goal} | {memory} | {copied} | {told} | {losses} |"


def _compared(losses: list[float], wanted: list[float] | None) -> str:
    """Whether every step's loss is the resident model's, or how far the worst is from it."""
    if not wanted or not losses:
        return ""
    gaps = [abs(a - b) / b for a, b in zip(losses, wanted, strict=True)]
    return "equal bits" if losses == wanted else f"{max(gaps):.0e} apart"


def in_own_process(name: str, change: dict, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one side measures by itself, or why it does not run."""
    kept = ("model", "rows", "accumulation", "steps", "dtype", "threads")
    options = [f"--{key}={getattr(arguments, key)}" for key in kept]
    options += [f"--cap-gb={arguments.cap_gb}"] if arguments.cap_gb else []
    command = [sys.executable, "-m", "benchmarks.stream", f"--measure={name}"]
    options.append(f"--runtime={json.dumps({**arguments.runtime, **change})}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"reason": last[:160].replace("|", "/")}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- one measurement, its own process


class Bench:
    """Device, data and clock of one side."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = DTYPES[arguments.dtype]
        sizes, self.vocab_size = MODELS[arguments.model]
        self.config = ramgpt.Config(**sizes, tie=False)
        self.base_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if arguments.cap_gb and self.device.type == "cuda":
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(arguments.cap_gb * 1e9 / total)

    def model(self) -> Any:
        """First weights on the CPU."""
        with torch.device("meta"):
            model = ramgpt.Model(self.config, self.vocab_size)
        model.vocab_size = self.vocab_size
        model.to_empty(device="cpu")
        model.init_weights(1)
        return model

    def micro_batches(self, rows: int) -> list[Batch]:
        """One step of rows on the device, `rows` at a time."""
        total = self.arguments.rows * self.arguments.accumulation
        draw = torch.Generator().manual_seed(2)
        ids = torch.randint(self.vocab_size, (total, self.config.context + 1), generator=draw)
        parts = ids.to(self.device).split(rows)
        return [Batch(tokens=p[:, :-1], targets=p[:, 1:], step=0) for p in parts]

    def autocast(self) -> Any:
        """As the trainer's."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, step: Callable[[], float | None]) -> dict[str, Any]:
        """The median step, its CPU time, peaks, the losses that `step` returns."""
        losses = [step()]
        self.wait()
        seconds, cpu = [], time.process_time()
        for _ in range(self.arguments.steps):
            began = time.perf_counter()
            losses.append(step())
            self.wait()
            seconds.append(time.perf_counter() - began)
        cpu = (time.process_time() - cpu) / self.arguments.steps
        middle = statistics.median(seconds)
        tokens = self.arguments.rows * self.arguments.accumulation * self.config.context
        vram = torch.cuda.max_memory_reserved() if self.device.type == "cuda" else 0
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.base_rss
        on_cpu = self.device.type == "cpu"  # whose wall clock belongs to whatever else runs there
        return {
            "seconds": middle, "tokens_per_s": tokens / (cpu if on_cpu else middle),
            "peak_vram": vram, "peak_rss": rss, "losses": [x for x in losses if x is not None],
        }  # fmt: skip


def accumulate(bench: Bench, parts: list[Batch], loss_of: Callable[[Batch], Any]) -> float:
    """Gradients of all micro-batches; their mean loss."""
    total = 0.0
    for part in parts:
        with bench.autocast():
            loss = loss_of(part)
        (loss / len(parts)).backward()
        total += loss.item() / len(parts)
    return total


def torch_step(bench: Bench, model: Any, optimizer: Any, loss_of: Callable[[Batch], Any]) -> float:
    """The plain loop: accumulate, clip, update."""
    total = accumulate(bench, bench.micro_batches(bench.arguments.rows), loss_of)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def our_step(bench: Bench, model: Any, rows: int) -> Callable[[], float]:
    """The same loop with the project's optimizer, which resident and streamed runs share."""
    optimizer = build_optimizer(model.param_groups(Optim(lr=1e-4)), model=model)
    schedule, parts = make_schedule("constant", 1), bench.micro_batches(rows)

    def step() -> float:
        total = accumulate(bench, parts, lambda part: next(model.losses(part)))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(schedule.at(0))
        optimizer.zero_grad()
        return total

    return step


def resident(arguments: argparse.Namespace) -> dict[str, Any]:
    """Weights on the device, blocks recomputed, fused AdamW there."""
    bench = Bench(arguments)
    model = bench.model().to(bench.device)
    model.activation_checkpointing = True
    return bench.time(our_step(bench, model, arguments.rows))


def ours(arguments: argparse.Namespace, *, group: bool) -> dict[str, Any]:
    """The engine with G = 1 or G = A, the project's optimizer, and the estimator's word."""
    bench = Bench(arguments)
    model, A, rows = bench.model(), arguments.accumulation, arguments.rows
    runtime = Runtime(
        **{"stream": "on", "stream_group": A if group else 1, "device_batch_size": rows,
           **arguments.runtime}
    )  # fmt: skip
    request = Streaming(runtime=runtime, context=bench.config.context)
    model.streamer = partial(open_stream, request=request)
    model.place(bench.device, bench.dtype)
    taken = model.group_rows(rows, rows * A)
    train = our_step(bench, model, taken)

    def step() -> float:
        model.engine.bytes_in = model.engine.bytes_out = 0
        return train()

    found = bench.time(step)
    engine, load = model.engine, model.engine.load
    found |= {"in": engine.bytes_in, "out": engine.bytes_out}
    if card := this_card(bench.device):
        overlap = runtime.stream_overlap_optimizer == "auto"
        said = estimate.step_seconds(load, card, overlap=overlap)
        found |= {"predicted_s": said.seconds, "predicted_vram": estimate.device_bytes(load)}
    model.close()
    return found


class _Embed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.wte, self.wpe = model.wte, model.wpe

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block(h)[0]


class _Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.ln_f, self.head = model.ln_f, model.head

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.head(self.ln_f(h))


def ramtorch(arguments: argparse.Namespace) -> dict[str, Any]:
    """RamTorch's OffloadModel: chunks through a window, gradients in its own accumulators."""
    from ramtorch import OffloadModel  # type: ignore[import-not-found]  # no dependency

    bench = Bench(arguments)
    model = bench.model()
    chunks = [_Embed(model), *(_Block(b) for b in model.blocks), _Head(model)]
    streamed = OffloadModel(chunks, device=bench.device, window=3)
    optimizer = torch.optim.AdamW(streamed.parameters(), lr=1e-4, fused=True)
    parts = bench.micro_batches(arguments.rows)

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return flat / len(parts)

    def step() -> None:
        for part in parts:
            with bench.autocast():
                streamed.step(part.tokens, targets=part.targets, loss_fn=loss_of)
        streamed.flush_grads()
        nn.utils.clip_grad_norm_(streamed.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found = bench.time(step)
    streamed.close()
    return found


def fsdp2(arguments: argparse.Namespace) -> dict[str, Any]:
    """torch's FSDP2 on one rank with CPUOffloadPolicy; the optimizer runs on the host."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    bench = Bench(arguments)
    backend = "cpu:gloo,cuda:nccl" if bench.device.type == "cuda" else "gloo"
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(bench.device.type, (1,))
    model, policy = bench.model(), MixedPrecisionPolicy(param_dtype=bench.dtype)
    model.activation_checkpointing = True
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, offload_policy=CPUOffloadPolicy(), **options)
    chunks = [_Embed(model), *(_Block(b) for b in model.blocks), _Head(model)]
    whole = nn.Sequential(*chunks)
    fully_shard(whole, offload_policy=CPUOffloadPolicy(), **options)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4, fused=True)

    def loss_of(part: Batch) -> torch.Tensor:
        logits = whole(part.tokens).float().flatten(0, 1)
        return nn.functional.cross_entropy(logits, part.targets.flatten())

    found = bench.time(lambda: torch_step(bench, whole, optimizer, loss_of))
    dist.destroy_process_group()
    return found


def torchao(arguments: argparse.Namespace) -> dict[str, Any]:
    """torchao's CPUOffloadOptimizer: weights resident, optimizer state on the host."""
    from torchao.optim import CPUOffloadOptimizer  # type: ignore[import-not-found]  # no dependency

    bench = Bench(arguments)
    model = bench.model().to(bench.device)
    model.activation_checkpointing = True
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW,
        offload_gradients=arguments.accumulation == 1, fused=True, lr=1e-4,
    )  # fmt: skip
    parts = bench.micro_batches(arguments.rows)

    def step() -> float:  # no clipping: offloaded gradients have left when it would look
        total = accumulate(bench, parts, lambda part: next(model.losses(part)))
        optimizer.step()
        optimizer.zero_grad()
        return total

    return bench.time(step)


def deepspeed(arguments: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed ZeRO-3 with parameters and optimizer on the host."""
    import deepspeed as engine_of  # type: ignore[import-not-found]  # no dependency

    bench = Bench(arguments)
    model = bench.model()
    model.activation_checkpointing = True
    host = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": arguments.rows,
        "gradient_accumulation_steps": arguments.accumulation, "gradient_clipping": 1.0,
        "bf16": {"enabled": bench.dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "offload_param": host, "offload_optimizer": host},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }  # fmt: skip
    whole = nn.Sequential(_Embed(model), *(_Block(b) for b in model.blocks), _Head(model))
    engine, *_ = engine_of.initialize(model=whole, config=config)
    parts = bench.micro_batches(arguments.rows)

    def step() -> None:
        for part in parts:
            logits = engine(part.tokens).float().flatten(0, 1)
            engine.backward(nn.functional.cross_entropy(logits, part.targets.flatten()))
            engine.step()

    return bench.time(step)


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "resident": resident,
    "ours_one": partial(ours, group=False),
    "ours_group": partial(ours, group=True),
    "ramtorch": ramtorch,
    "fsdp2": fsdp2,
    "torchao": torchao,
    "deepspeed": deepspeed,
}

if __name__ == "__main__":
    main()
