"""TRM against the recursion written down directly, in one run: python -m benchmarks.trm [--rows N].

kumiki: lib.models.trm with its losses one by one, fused loss, fused AdamW, packed rows.
direct: the same recursion as one would write it: separate projections, fused attention, whole
        logits, one backward for all losses; same dtype, rows and first weights: equal losses.
guide:  fp32 as published: attention by explicit boolean masks, articles cut at T + 1 tokens and
        padded to the longest of their batch; only tokens that are no padding count.
Steps are interleaved; speed is by CPU time of one thread, which hardly feels other work on the
machine, and by the best wall clock step. `--generate N`: text with the cache and without.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.rng import numpy_generator
from lib.export.generate import Sampling, generate
from lib.models import trm
from lib.models.base import Optim, build
from lib.models.trm import Config
from lib.train.job import Batch
from lib.train.optim import build_optimizer
from lib.train.schedule import Multipliers

SEED, LR, BYTES_PER_TOKEN = 1234, 3e-4, 5.15  # the last: of a Japanese model of 16,000 pieces
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Tokens/s of a training step, ours and both others, at equal sizes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trm")
    parser.add_argument("--block", choices=("post_ln", "pre_norm"), default="post_ln")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of each, the first is not counted")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--documents", default="data/samples/ja", help="folder of *.jsonl.gz")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="tokens of text")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = recipe(arguments)
    said = f"{config.block}, d {config.width}, T {config.context}, V {arguments.vocab}"
    print(
        f"{said}, {arguments.rows} rows, {arguments.dtype}, {arguments.threads} threads", flush=True
    )
    if arguments.generate:
        compare_generation(config, arguments)
    else:
        compare_training(config, arguments)


def recipe(arguments: argparse.Namespace) -> Config:
    """The guide's recursion, or the recommended one."""
    size = {"width": arguments.width, "heads": 4, "context": arguments.context}
    if arguments.block == "pre_norm":
        return Config(**size)
    return Config(
        **size, depth=1, block="post_ln", join="concat", schedule="every", init="input",
        grad="last", latent_steps=2,
    )  # fmt: skip


def compare_training(config: Config, arguments: argparse.Namespace) -> None:
    """One line for each; the ratios beside what they are meant to be."""
    dtype, V = DTYPES[arguments.dtype], arguments.vocab
    ours = build(trm, config, V, seed=SEED)
    direct, guide = (Direct(config, V, ours.state_dict(), masked) for masked in (False, True))
    draw = numpy_generator(SEED, "rows of a benchmark")
    packed = draw.integers(4, V, (arguments.steps, arguments.rows, config.context + 1))
    padded = articles(arguments, draw)
    group = Optim(lr=LR, weight_decay=0.01)
    fused = build_optimizer(ours.param_groups(group))
    ordinary = [
        torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.01) for m in (direct, guide)
    ]

    def step_ours(ids: Tensor) -> float:
        total = 0.0
        losses = iter(ours.losses(Batch(tokens=ids[:, :-1], targets=ids[:, 1:], step=0)))
        while True:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = next(losses, None)
            if loss is None:
                break
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        fused.step(Multipliers())
        fused.zero_grad()
        return total

    def step_of(model: Direct, optimizer: torch.optim.Optimizer, kind: torch.dtype) -> Callable:
        def step(ids: Tensor) -> float:
            with torch.autocast("cpu", kind, enabled=kind != torch.float32):
                loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    steps = {
        "kumiki": (step_ours, packed),
        "direct": (step_of(direct, ordinary[0], dtype), packed),
        "guide": (step_of(guide, ordinary[1], torch.float32), padded),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.steps):
        for name, (step, rows) in steps.items():
            ids = torch.from_numpy(rows[number]).long()
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name].append(step(ids))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            tokens = int((ids[:, 1:] >= 0).sum())
            rates[name].append((tokens / cpu, tokens / wall))
    best = {n: [max(x) for x in zip(*found[1:], strict=True)] for n, found in rates.items()}
    for name, (by_cpu, by_wall) in best.items():
        told = ", ".join(f"{x:.4f}" for x in losses[name])
        print(f"  {name}: {by_cpu:,.0f} tokens a CPU second, best {by_wall:,.0f} a second")
        print(f"    losses {told}")
    gap = max(abs(a - b) for a, b in zip(losses["kumiki"], losses["direct"], strict=True))
    for name, goal in (("direct", 1.2), ("guide", 3.0)):
        ratios = [a / b for a, b in zip(best["kumiki"], best[name], strict=True)]
        said = f"{ratios[0]:.2f} by CPU time, {ratios[1]:.2f} best"
        print(f"  kumiki / {name}: {said} (at least {goal})")
    print(f"  largest difference of losses to direct: {gap:.1e}")


def articles(arguments: argparse.Namespace, draw: np.random.Generator) -> list[np.ndarray]:
    """Batches of random ids as long as real articles, cut at T + 1, padded with -1."""
    lines = [
        line
        for path in sorted(Path(arguments.documents).glob("train_*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]
    sizes = [len(json.loads(line)["text"].encode()) / BYTES_PER_TOKEN for line in lines]
    batches = []
    for _ in range(arguments.steps):
        chosen = draw.choice(sizes, arguments.rows)
        lengths = np.clip(chosen, 2, arguments.context + 1).astype(int)
        ids = draw.integers(4, arguments.vocab, (arguments.rows, lengths.max()))
        for row, length in zip(ids, lengths, strict=True):
            row[length:] = -1
        batches.append(ids)
    return batches


def compare_generation(config: Config, arguments: argparse.Namespace) -> None:
    """Greedy text of one prompt, with the state and by whole rows."""
    model = build(trm, replace(config, context=arguments.generate + 8), arguments.vocab, seed=SEED)
    seconds, made = {}, {}
    for cached in (True, False):
        began = time.process_time()
        (row,) = generate(
            model.eval(), [5, 6, 7], Sampling(temperature=0), max_new_tokens=arguments.generate,
            cached=cached,
        )  # fmt: skip
        seconds[cached], made[cached] = time.process_time() - began, row.ids
    told = f"{seconds[True]:.1f} s with the cache, {seconds[False]:.1f} s without"
    ratio = f"{seconds[False] / seconds[True]:.1f} times (at least 10)"
    print(f"  {arguments.generate} tokens: {told}; {ratio}, same ids: {made[True] == made[False]}")


# ---------------------------------------------------------------- the recursion, written directly


class Block(nn.Module):
    """One block of either style: separate projections; `masked`: scores, mask, softmax by hand."""

    def __init__(self, config: Config, masked: bool) -> None:
        super().__init__()
        d, post = config.width, config.block == "post_ln"
        self.heads, self.post, self.masked = config.heads, post, masked
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=post) for _ in range(4))
        self.w1, self.w2 = (
            nn.Linear(d, config.inner, bias=post),
            nn.Linear(config.inner, d, bias=post),
        )
        self.gate = None if post else nn.Linear(d, config.inner, bias=False)
        self.norm1, self.norm2 = (nn.LayerNorm(d) if post else nn.RMSNorm(d, trm_eps(), False)
                                  for _ in range(2))  # fmt: skip

    def attend(self, u: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            f(u).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if not self.post:
            size = (q.shape[-1],)
            q, k = (F.rms_norm(rotated(t), size, eps=trm_eps()) for t in (q, k))
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask, float("-inf"))
            out = scores.softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))

    def forward(self, u: Tensor, mask: Tensor | None) -> Tensor:
        if self.post:
            u = self.norm1(u + self.attend(u, mask))
            return self.norm2(u + self.w2(F.gelu(self.w1(u))))
        u = u + self.attend(self.norm1(u), mask)
        x = self.norm2(u)
        assert self.gate is not None
        return u + self.w2(F.silu(self.gate(x)) * self.w1(x))


def trm_eps() -> float:
    """RMSNorm's epsilon in lib.nn.norm."""
    return 2.0**-23


def rotated(x: Tensor) -> Tensor:
    """Rotary positions, tables made at every call."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]).float(), 1e4 ** (-torch.arange(half) / half))
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


class Direct(nn.Module):
    """The whole model with the weights of ours; forward gives the mean of the N losses."""

    def __init__(self, config: Config, V: int, state: dict[str, Tensor], masked: bool) -> None:
        super().__init__()
        self.config, self.masked, d, post = config, masked, config.width, config.block == "post_ln"
        self.table = nn.Embedding(V, d)
        self.place = nn.Embedding(config.context, d) if post else None
        self.blocks = nn.ModuleList(Block(config, masked) for _ in range(config.blocks))
        if config.join == "concat":
            self.join_z, self.join_y = (
                nn.Linear(3 * d, d, bias=post),
                nn.Linear(2 * d, d, bias=post),
            )
        self.y0, self.z0 = state.get("y0"), state.get("z0")
        self.load_state_dict(translated(state, config))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        c, n, (latent, deep, N) = self.config, tokens.shape[1], self.config.counts
        mask = None
        if self.masked:
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            mask = future | (tokens < 0)[:, None, None, :]
        x = self.table(tokens.clamp(min=0))
        x = (
            x + self.place.weight[:n]
            if self.place is not None
            else F.rms_norm(x, (c.width,), eps=trm_eps())
        )
        y = x if c.init == "input" else self.y0.expand_as(x)
        z = torch.zeros_like(x) if c.init == "input" else self.z0.expand_as(x)
        total = 0.0
        for _ in range(N):
            for t in range(deep):
                with torch.set_grad_enabled(c.grad == "all" or t == deep - 1):
                    for i in range(latent):
                        z = self.f(
                            self.join_z(torch.cat((x, y, z), -1))
                            if c.join == "concat"
                            else x + y + z,
                            mask,
                        )
                        if c.schedule == "every" or i == latent - 1:
                            y = self.f(
                                self.join_y(torch.cat((y, z), -1)) if c.join == "concat" else y + z,
                                mask,
                            )
            logits = F.linear(y, self.table.weight).float()
            total = total + F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-1
            )
            y, z = y.detach(), z.detach()
        return total / N

    def f(self, u: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            u = block(u, mask)
        return F.rms_norm(u, (self.config.width,), eps=trm_eps()) if self.config.normed else u


def translated(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our weights under the names above."""
    found = {}
    for name, tensor in state.items():
        tensor = tensor.clone()
        if name in ("y0", "z0"):
            continue
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("attn.qkv", part)] = rows.clone()
        elif ".up." in name and config.block == "pre_norm":
            gate, value = tensor.chunk(2)
            found[name.replace("up", "gate")], found[name.replace("up", "w1")] = (
                gate.clone(),
                value.clone(),
            )
        else:
            name = name.replace("attn.o", "o").replace("up", "w1").replace("down", "w2")
            found[name.replace("positions", "place")] = tensor
    return found


if __name__ == "__main__":
    main()
