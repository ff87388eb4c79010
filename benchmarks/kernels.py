"""Kernels against their peers on a GPU: python -m benchmarks.kernels [--op ...] [--dtype ...].

Every row stands behind a correctness gate of the same operator, shape and dtype in the same
process; red is no row. Each provider is a process of its own. Interpreted kernels and kernels on
CPU tensors are refused (exit 2): their times say nothing. `--cpu` times eager and compiled
references only, and those rows carry the word CPU. Results: benchmarks/results/<device>/<op>.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import kernels
from lib.core.kernel_choice import OPERATORS, interpreting
from lib.kernels.check import Case, Draw, compare

COLUMNS = (
    "date", "commit", "device", "capability", "driver", "cuda", "torch", "triton", "op", "provider",
    "version", "pass", "dtype", "shape", "p50_ms", "p20_ms", "p80_ms", "gb_s", "tflop_s",
    "roofline_pct", "peak_mb", "err",
)  # fmt: skip
PASSES = ("forward", "backward", "full")
RESULTS = Path(__file__).parent / "results"
SWEEP = {  # operator -> the size that grows, and its values
    "lorentz_attention": ("T", (1_024, 4_096, 16_384, 32_768)),
    "gla": ("T", (1_024, 4_096, 16_384, 65_536)),
    "scan": ("T", (1_024, 4_096, 16_384)),
    "linear_cross_entropy": ("n", (2_048, 8_192, 32_768)),
}


# ---------------------------------------------------------------- providers: a Case -> a call


def eager(op: str, case: Case) -> Callable[[], Any]:
    return partial(_forced, "reference", kernels.operator(op).function, case)


def ours(op: str, case: Case) -> Callable[[], Any]:
    return partial(_forced, "triton", kernels.operator(op).function, case)


def compiled(op: str, case: Case) -> Callable[[], Any]:
    return partial(_forced, "reference", torch.compile(kernels.operator(op).function), case)


def _forced(choice: str, function: Callable, case: Case) -> Any:
    with kernels.forced(choice):
        return function(**case.tensors, **case.options)


def liger(op: str, case: Case) -> Callable[[], Any]:
    x = case.tensors
    if op == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda: LigerRMSNormFunction.apply(x["x"], x["weight"], case.options["eps"])
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, V = LigerFusedLinearCrossEntropyLoss(ignore_index=-1), case.options["vocab_size"]
    return lambda: loss(x["weight"][:V], x["h"], x["targets"])


def fla(op: str, case: Case) -> Callable[[], Any]:
    x = case.tensors
    if op == "scan":
        from fla.ops.hgrn import chunk_hgrn

        return lambda: chunk_hgrn(x["b"], x["log_a"], x["h0"], output_final_state=True)
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    g = x["log_a"].transpose(1, 2)
    return lambda: chunk_simple_gla(
        q, k, v, g=g, scale=1.0, initial_state=x["s0"], output_final_state=True
    )


def sdpa(op: str, case: Case) -> Callable[[], Any]:
    """Dot-product attention with the same window: flash by blocks of the window where it runs."""
    from lib.nn.attention import causal_attention

    q, k, v = (case.tensors[n] for n in "qkv")
    window = case.options["window"] - 1  # there: keys before one's own
    return lambda: causal_attention(q, k, v, window=window, scale=q.shape[-1] ** -0.5)


def library(op: str, case: Case) -> Callable[[], Any]:
    x = case.tensors
    if op == "xxt":
        return lambda: torch.bmm(x["X"], x["X"].mT)
    return lambda: F.linear(F.linear(x["x"], x["W1"]), x["W2"])  # products alone, no activation


def embedding(op: str, case: Case) -> Callable[[], Any]:
    cell, C1 = case.tensors["cell"], case.tensors["C1"]
    rows = int(case.tensors["C1"].shape[0] * case.tensors["C2"].shape[0])
    table = torch.zeros(
        rows, case.options["width"], dtype=C1.dtype, device=C1.device, requires_grad=True
    )
    return lambda: F.embedding(cell, table)


COMMON = {"triton": ours, "eager": eager, "compile": compiled}
PEERS: dict[str, dict[str, tuple[Callable, str]]] = {  # provider -> (call, its package)
    "rms_norm": {"liger": (liger, "liger_kernel")},
    "linear_cross_entropy": {"liger": (liger, "liger_kernel")},
    "gla": {"fla": (fla, "fla")},
    "scan": {"fla": (fla, "fla")},
    "lorentz_attention": {"sdpa": (sdpa, "torch")},
    "xxt": {"library": (library, "torch")},
    "relu2_mlp": {"library": (library, "torch")},
    "tt_gather": {"embedding": (embedding, "torch")},
}


# ---------------------------------------------------------------- bounds


def work(op: str, case: Case) -> tuple[float, float]:
    """Bytes and FLOP of the forward pass that no implementation can avoid (kernels.md 5)."""
    x, o = case.tensors, case.options

    def size(*names: str) -> float:
        return float(sum(x[n].nbytes for n in names if x[n] is not None))

    match op:
        case "rms_norm":
            return 2 * size("x"), 0
        case "linear_cross_entropy":
            n, d = x["h"].shape
            return size("h", "weight"), 2.0 * n * d * o["vocab_size"]
        case "tt_linear_cross_entropy":
            n, d = x["h"].shape
            return size("h", "C1", "C2"), 2.0 * n * d * o["vocab_size"]
        case "relu2_mlp":
            (n, d), hidden = x["x"].shape, x["W1"].shape[0]
            return size("x", "W1", "W2") + size("x"), 4.0 * n * d * hidden
        case "lorentz_attention":
            B, H, T, D = x["q"].shape
            W = min(o["window"], T)
            pairs = B * H * (T * W - W * (W - 1) / 2)
            return size("q", "k", "v") + size("v"), 4.0 * D * pairs
        case "scan":
            return 3 * size("b"), 0
        case "gla":
            (B, H, T, Dk), Dv = x["q"].shape, x["v"].shape[3]
            return size("q", "k", "v") + size("v"), T * B * H * (128.0 * (Dk + Dv) + 4 * Dk * Dv)
        case "tt_gather":
            n, d, R = x["cell"].numel(), o["width"], x["C1"].shape[1]
            return float(n * d * x["C1"].element_size()), 2.0 * n * R * d
        case "xxt":
            b, n, m = x["X"].shape
            return size("X") + b * n * n * x["X"].element_size(), float(b * n * n * m)
        case _:
            return 3 * size("z"), 0


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Measured bytes/s of a copy and FLOP/s of a square product, on this device."""
    a = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    m = torch.randn(8192, 8192, device="cuda").to(dtype)
    copy, product = _median(lambda: b.copy_(a)), _median(lambda: m @ m)
    return 2 * a.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def _median(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=100, return_mode="median"))


# ---------------------------------------------------------------- one provider, one process


def measure(op: str, provider: str, sizes: dict[str, Any], dtype: torch.dtype) -> list[dict]:
    """Rows of the three passes. The gate stands first; SystemExit where it is red."""
    from triton.testing import do_bench

    operator = kernels.operator(op)
    case = operator.make(Draw("cuda", dtype), **sizes)
    error = 0.0
    if provider == "triton":
        small = operator.make(Draw("cuda", dtype), **operator.small[0])
        error = max(
            *compare(operator, small, dtype).values(), *compare(operator, case, dtype).values()
        )
        if not error <= 1:
            raise SystemExit(f"{op} is off by {error:.1e} tolerances: no row")
    call = (COMMON.get(provider) or PEERS[op][provider][0])(op, case)
    inputs = [x for x in case.tensors.values() if x is not None and x.requires_grad]
    (moved, flop), (bandwidth, speed) = work(op, case), rates(dtype)
    rows = []
    for name in PASSES if inputs else ("forward",):
        run = _pass(name, call)
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        quantiles = [0.5, 0.2, 0.8]
        p50, p20, p80 = do_bench(
            run, warmup=25, rep=100, quantiles=quantiles, grad_to_none=inputs or None
        )
        factor = {"forward": 1.0, "backward": 2.0, "full": 3.0}[name]
        bound = max(moved / bandwidth, flop / speed) * factor * 1e3
        rows.append({
            "pass": name, "p50_ms": p50, "p20_ms": p20, "p80_ms": p80,
            "gb_s": moved * factor / p50 / 1e6, "tflop_s": flop * factor / p50 / 1e9,
            "roofline_pct": 100 * bound / p50, "peak_mb": peak, "err": error,
        })  # fmt: skip
    return rows


def _pass(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    if name == "forward":
        return call

    def outputs(found: Any) -> list[Tensor]:
        found = found if isinstance(found, tuple | list) else (found,)
        return [x for x in found if isinstance(x, Tensor) and x.requires_grad]

    if name == "full":

        def full() -> None:
            found = outputs(call())
            torch.autograd.backward(found, [torch.ones_like(x) for x in found])

        return full
    kept = outputs(call())
    up = [torch.ones_like(x) for x in kept]
    return lambda: torch.autograd.backward(kept, up, retain_graph=True)


# ---------------------------------------------------------------- the command


def main() -> int:
    """Every provider of every operator asked for, one process each; CSV beside this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shapes", choices=("production", "sweep"), default="production")
    parser.add_argument("--cpu", action="store_true", help="references only, marked CPU")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # op, provider, sizes
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if interpreting():
        print("error: interpreted kernels are not timed; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    if arguments.cpu:
        return on_cpu(arguments.op)
    if reason := kernels.unusable(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        instead = "time the references by `python -m benchmarks.kernels --cpu`"
        print(f"error: no kernel can be timed here: {reason}; {instead}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.measure:
        op, provider, sizes = arguments.measure
        print(json.dumps(measure(op, provider, json.loads(sizes), dtype)))
        return 0
    for op in arguments.op:
        used = kernels.operator(op).dtype(dtype)
        rows = [
            r for sizes in shapes(op, arguments.shapes) for r in compare_providers(op, sizes, used)
        ]
        write(op, rows)
    return 0


def shapes(op: str, kind: str) -> list[dict[str, Any]]:
    """Sizes of production, or these with one of them growing."""
    production = dict(kernels.operator(op).production)
    if kind == "production" or op not in SWEEP:
        return [production]
    name, values = SWEEP[op]
    return [{**production, name: value} for value in values]


def compare_providers(op: str, sizes: dict[str, Any], dtype: torch.dtype) -> list[dict]:
    """Rows of all providers; a library that is absent is a row that says so."""
    rows = []
    for provider in [*COMMON, *PEERS.get(op, {})]:
        package = PEERS.get(op, {}).get(provider, (None, "torch"))[1]
        row = {**stamp(), "op": op, "provider": provider, "dtype": str(dtype).split(".")[1],
               "version": version_of(package), "shape": json.dumps(sizes)}  # fmt: skip
        if importlib.util.find_spec(package) is None:
            rows.append({**row, "pass": "not installed"})
            continue
        command = [sys.executable, "-m", "benchmarks.kernels", "--dtype", row["dtype"], "--measure"]
        run = subprocess.run(
            [*command, op, provider, json.dumps(sizes)], capture_output=True, text=True
        )
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit {run.returncode}"]
            rows.append({**row, "pass": f"failed: {lines[-1][:120]}"})
            continue
        rows += [{**row, **found} for found in json.loads(run.stdout.strip().splitlines()[-1])]
    return rows


def on_cpu(ops: list[str]) -> int:
    """Eager and compiled references on the self-test's sizes: which form is slow."""
    from torch.utils.benchmark import Timer

    for op in ops:
        operator = kernels.operator(op)
        case = operator.make(Draw("cpu", torch.float32), **operator.small[0])
        for name, provider in (("eager", eager), ("compile", compiled)):
            timer = Timer("run()", globals={"run": provider(op, case)}, num_threads=1)
            median = timer.blocked_autorange(min_run_time=0.2).median
            print(f"CPU {op} {name} forward {median * 1e3:.3f} ms {operator.small[0]}")
    return 0


def version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version({"fla": "flash-linear-attention"}.get(package, package))
    except PackageNotFoundError:
        return ""


def stamp() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = platform.release()
    return {
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(),
        "device": found.name, "capability": f"{found.major}.{found.minor}", "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip, "torch": torch.__version__,
        "triton": version_of("triton"),
    }  # fmt: skip


def write(op: str, rows: list[dict]) -> None:
    """The operator's CSV of this device, and its bars."""
    folder = RESULTS / torch.cuda.get_device_name(0).replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{op}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{op}.svg").write_text(bars(op, rows))
    for row in rows:
        print(op, row["provider"], row["pass"], row["shape"], row.get("p50_ms", ""))


def bars(op: str, rows: list[dict]) -> str:
    """One bar a row, its length the median time; device and date in the title."""
    timed = [r for r in rows if "p50_ms" in r]
    longest = max((r["p50_ms"] for r in timed), default=1.0)
    title = f"{op}, {rows[0]['device']}, {rows[0]['date']}: ms, shorter is better"
    lines = [f'<text x="8" y="20">{title}</text>']
    for i, row in enumerate(timed):
        y, width = 34 + 20 * i, 400 * row["p50_ms"] / longest
        name = f"{row['provider']} {row['pass']} {row['p50_ms']:.3f}"
        lines.append(f'<rect x="8" y="{y}" width="{width:.0f}" height="14" fill="#9bc"/>')
        lines.append(f'<text x="12" y="{y + 12}">{name}</text>')
    size = f'width="640" height="{44 + 20 * len(timed)}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
