"""CVFP against what it must beat: the matrix rate, a direct implementation, plain reads, a ceiling.

`python -m benchmarks.cvfp [rates|start|reading|memory]`: ratios of both sides in one process, each
the best of several turns taken in turn, so that a busy machine strikes both. Six layers, width 768,
every side with matmuls in --dtype: auto is the faster one here, bf16 or fp32.
With one thread the clock is the process's own CPU time, which hardly feels other work.
Memory runs in children of its own: peak resident bytes of sweeps over 1 M and 4 M tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.core.chunkstore import RowFile, stored
from lib.models import cvfp
from lib.models.base import build
from lib.nn.contexts.chunk import Chunk
from lib.nn.contexts.first_sweep import HALO_ROWS
from lib.nn.contexts.halo import Repairs, halo, warm_tokens
from lib.nn.contexts.sweeps import Sweeps

D, DEPTH, VOCAB = 768, 6, 50_257
FORWARD_FLOPS = 7.1e6  # a token, of the state side (cvfp.md 15.2)
FLOPS = {"no learning": FORWARD_FLOPS, "kept": 20.1e6, "two passes": 27.2e6}


class Ids:
    """A Zipf stream of a fixed length, its vectors in the model's table."""

    has_rows, reset_id, hidden = False, None, None

    def __init__(self, tokens: int, vocab: int = VOCAB) -> None:
        self.tokens, self.vocab = tokens, vocab

    def table(self) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        return nn.functional.layer_norm(torch.randn(self.vocab, D, generator=draw), (D,))

    def ids(self, start: int, stop: int) -> torch.Tensor:
        draw = np.random.default_rng(start)
        return torch.from_numpy(np.minimum(draw.zipf(1.2, stop - start) - 1, self.vocab - 1))

    def starts(self, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, dtype=torch.bool)


def model_of(tokens: int, chunk: int, folder: Path, kept: int) -> cvfp.Model:
    config = cvfp.Config(
        phase="fixed_point", width=D, seed_compat=True, chunk_tokens=chunk, sweeps=2, depth=DEPTH,
        keep_contexts=True,
    )  # fmt: skip
    model = build(cvfp, config, VOCAB, seed=1)
    assert isinstance(model, cvfp.Model)
    model.activation_bytes = kept
    model.read_from(Ids(tokens))
    model.attach(folder)
    return model


def step(model: cvfp.Model, number: int) -> None:
    """One chunk: losses, gradients."""
    batch: Any = SimpleNamespace(tokens=None, targets=None, step=number, rows=None)
    for loss in model.losses(batch):
        backward(loss)
    model.zero_grad(set_to_none=True)


def backward(loss: torch.Tensor) -> None:
    """As the trainer does: outside autocast."""
    with torch.autocast("cpu", enabled=False):
        loss.backward()


class Direct(nn.Module):
    """The algorithm written down as it reads: concatenation, linear, relu, norm, autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(DEPTH))

    def forward(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for linear, norm in zip(self.layers, self.norms, strict=True):
            z = norm(z + torch.relu(linear(torch.cat((z, e), -1))))
        return z

    def learn(self, c: torch.Tensor, e: torch.Tensor) -> None:
        """One step over the whole chunk, one graph."""
        new = self(c + 0.1 * torch.randn_like(c), e)
        diversity = -(new - new.mean(0)).norm() / len(new)
        backward(0.5 * (new - c).square().mean() + 0.5 * diversity)
        self.zero_grad(set_to_none=True)


def clock() -> float:
    """Seconds: of this process's CPU where it has one thread, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def matmul(dtype: torch.dtype | None = None, n: int = 1024) -> float:
    """FLOP/s of one turn of the matmuls that a micro-batch is made of."""
    dtype = dtype or compute_dtype()
    a, w = torch.randn(n, D).to(dtype), torch.randn(D, D).to(dtype)
    start = clock()
    for _ in range(10):
        torch.mm(a, w)
        torch.mm(a.t(), a)
    return 20 * 2 * n * D * D / (clock() - start)


def compute_dtype() -> torch.dtype:
    """Of matmuls on either side: that of autocast where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def pick_dtype(name: str) -> torch.dtype:
    """auto: whichever type multiplies faster here."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    return max((torch.float32, torch.bfloat16), key=matmul)


def best(sides: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The best rate of each side, measured in turn."""
    found = dict.fromkeys(sides, 0.0)
    for _ in range(turns):
        for name, side in sides.items():
            found[name] = max(found[name], side())
    return found


def timed(work: Callable[[], object], tokens: int) -> float:
    start = clock()
    work()
    return tokens / (clock() - start)


def rates(folder: Path, tokens: int, turns: int) -> dict[str, float]:
    """A sweep without learning, learning with kept graphs and in two passes, against the matrix

    rate (shares of the bound, by name) and the direct implementation.
    """
    os.environ["KUMIKI_SCRATCH"] = str(folder)
    few = min(tokens, 32_768)  # graphs of more would take too much memory
    kept = model_of(few, few, folder / "kept", 2**40)
    twice = model_of(tokens, tokens, folder / "twice", 0)
    for model in (kept, twice):
        step(model, 0)
    direct, e = Direct(), kept.embed(kept.source.ids(0, few)).detach()
    c = torch.randn(few, D)

    @torch.no_grad()
    def without_learning() -> None:
        solver: Any = twice.solver
        for _ in Chunk(twice, solver.state.open(), 1, 0, 1, solver._noise).terms():
            pass

    found = best(
        {
            "matmul": matmul,
            "no learning": lambda: timed(without_learning, tokens),
            "kept": lambda: timed(lambda: step(kept, 1), few),
            "two passes": lambda: timed(lambda: step(twice, 1), tokens),
            "direct": lambda: timed(lambda: direct.learn(c, e), few),
        },
        turns,
    )
    rate = found["matmul"]
    say(f"matmul {rate / 1e9:.0f} GFLOP/s, {compute_dtype()}, {torch.get_num_threads()} threads")
    shares = {}
    for name, flops in FLOPS.items():
        shares[name], times = found[name] * flops / rate, found[name] / found["direct"]
        say(f"{name}: {found[name]:,.0f} tokens/s, {shares[name]:.2f} of the bound, "
            f"{times:.2f} x direct")  # fmt: skip
    say(f"direct: {found['direct']:,.0f} tokens/s")
    return shares


def require_floor(shares: dict[str, float], floor: float) -> None:
    """SystemExit, naming them, where rates lie below `floor` of the matmul bound."""
    if low := [f"{name} {share:.2f}" for name, share in shares.items() if share < floor]:
        raise SystemExit(f"below {floor} of the matmul bound: {', '.join(low)}")


def start(folder: Path, tokens: int, turns: int) -> None:
    """Sweep 0 by segments against one token at a time, the same weights."""
    os.environ["KUMIKI_SCRATCH"] = str(folder)
    model, few = model_of(tokens, tokens, folder / "start", 0), 256
    weights = model.weights()
    P = weights.token_side(model.embed(model.source.ids(0, tokens)).detach())
    direct, zero = Direct(), torch.zeros(D)
    e = model.embed(model.source.ids(0, few)).detach()
    tol = max(1e-6, torch.finfo(compute_dtype()).eps)
    warm = 2 * warm_tokens(0.46, tol, 512)  # the contraction of an untrained block (cvfp.md 1.3)
    segment, repairs = max(64, -(-tokens // HALO_ROWS)), Repairs()

    @torch.no_grad()
    def segments() -> None:
        halo(
            zero, lambda at: [p[at.clamp(min=0)] for p in P], tokens, weights, segment=segment,
            warm=warm, tol=tol, repairs=repairs,
        )  # fmt: skip

    @torch.no_grad()
    def one_by_one() -> None:
        z = zero
        for row in e:
            z = direct(z, row)

    found = best(
        {
            "matmul": matmul,
            "segments": lambda: timed(segments, tokens),
            "token by token": lambda: timed(one_by_one, few),
        },
        turns,
    )
    times = found["segments"] / found["token by token"]
    bound = found["segments"] * FORWARD_FLOPS / found["matmul"]
    say(f"segments: {found['segments']:,.0f} tokens/s, {bound:.2f} of the bound, "
        f"{repairs.segments} repaired")  # fmt: skip
    say(f"token by token: {found['token by token']:,.0f} tokens/s, segments {times:.0f} x")


def reading(folder: Path, tokens: int, turns: int) -> None:
    """Rows through the store against plain sequential reads of the same file."""
    kind, items = stored("float16", D)
    path = folder / "rows.npy"
    file = RowFile.create(path, kind, (tokens, items), {})
    block = np.ones((8192, items), kind)
    for first in range(0, tokens, 8192):
        file.write(first, block[: min(8192, tokens - first)])
    file.sync()

    def plain() -> None:
        buffer = bytearray(16 << 20)
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    def ours() -> None:
        for _ in file.stream(0, tokens, 1024):
            pass

    size = path.stat().st_size
    found = best({"plain": lambda: timed(plain, size), "store": lambda: timed(ours, size)}, turns)
    say(f"reading: {found['store'] / 1e6:,.0f} MB/s, plain {found['plain'] / 1e6:,.0f} MB/s, "
        f"{found['store'] / found['plain']:.2f}")  # fmt: skip


def memory(folder: Path, tokens: int, chunk: int) -> None:
    """Sweep 0 of a chunk, then pass 1 of its learning step and a part of pass 2.

    The other chunks are as large but hold zeros: what is done to them takes the same memory again.
    """
    os.environ["KUMIKI_SCRATCH"] = str(folder)
    chunk = min(tokens, chunk)
    model, began = model_of(tokens, chunk, folder / "memory", 2**30), time.process_time()
    chunks = -(-tokens // chunk)
    step(model, 0)
    solver: Any = model.solver
    disk: Sweeps = solver.state.open()
    for j in range(1, chunks):  # a reserved file holds zeros
        start, stop = disk.span(j)
        found = zlib.crc32(bytes((stop - start) * D * 2))
        disk.commit({"sweep": 0, "chunk": j, "crc32": found})
    say(f"sweep 0: {tokens:,} tokens, peak {peak_bytes() / 1e9:.2f} GB")
    batch: Any = SimpleNamespace(tokens=None, targets=None, step=chunks, rows=None)
    for number, loss in enumerate(model.losses(batch)):
        if number % 64 == 0:
            say(f"micro-batch {number}: peak {peak_bytes() / 1e9:.2f} GB")
        if number == 128:
            break
        backward(loss)
    seconds, planned = time.process_time() - began, model.planned_bytes() / 1e9
    say(f"memory: {tokens:,} tokens in chunks of {chunk:,}, peak {peak_bytes() / 1e9:.2f} GB, "
        f"planned {planned:.2f} GB, {seconds:.0f} s of CPU")  # fmt: skip


def peak_bytes() -> int:
    """Most resident bytes of this process so far; ru_maxrss would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) * 1024


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("rates", "start", "reading", "memory"))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--chunk", type=int, default=1_000_000, help="tokens, of memory")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--floor", type=float, default=0.0, help="share of the bound, of rates")
    parser.add_argument("--folder", type=Path, help="where the files go, default a new folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = pick_dtype(arguments.dtype)
    wide = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place, wide:
        folder, turns = Path(place), arguments.turns
        if arguments.part in (None, "rates"):
            require_floor(rates(folder, arguments.tokens or 131_072, turns), arguments.floor)
        if arguments.part in (None, "start"):
            start(folder, arguments.tokens or 131_072, turns)
        if arguments.part in (None, "reading"):
            reading(folder, arguments.tokens or 400_000, turns)
        if arguments.part == "memory":
            memory(folder, arguments.tokens or 1_000_000, arguments.chunk)
        if arguments.part is None:
            for tokens in (1_000_000, 4_000_000):
                words = ["memory", "--tokens", str(tokens), "--threads", str(arguments.threads)]
                subprocess.run([sys.executable, "-m", "benchmarks.cvfp", *words], check=True)


if __name__ == "__main__":
    main()
