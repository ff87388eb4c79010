"""What CVFP will write and how long it will take, before the first byte: `python -m` this module.

In:    params.yaml with its active profile, the token manifest where there is one.
Out:   lines: every file with its size, the disk they go to, memory, hours at this machine's rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.core import artifact, chunkstore
from lib.core.artifact import Manifest
from lib.core.errors import EnvError, KumikiError, UserError, report_lines
from lib.core.params import PARAMS, load, read_yaml, resolve
from lib.nn.contexts.budget import sweep_bytes

TOKENS = Path("data/tokens/bpe.manifest.json")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes that follow from a few numbers. Bytes unless said otherwise."""

    tokens: int
    vocab_size: int
    width: int  # of a token vector
    context_width: int
    depth: int
    memmap: bool
    sweeps: int  # 0: the exact solver, no files of context vectors
    chunk_tokens: int
    slots: bool = False
    spare: int = 1
    item_bytes: int = 2  # of a stored number
    activation_bytes: int = 2**30  # of graphs that a step may keep

    @property
    def chunks(self) -> int:
        """M."""
        return -(-self.tokens // self.chunk_tokens)

    @property
    def params(self) -> int:
        """Parameters of the context block."""
        d = self.context_width
        return self.depth * (d * (d + self.width) + 3 * d)

    def files(self) -> dict[str, float]:
        """Name -> bytes."""
        found: dict[str, float] = {
            "token_ids.npy": self.tokens * (2 if self.vocab_size <= 1 << 16 else 4),
            "table.npy": self.vocab_size * self.width * 2,
        }
        row = self.context_width * self.item_bytes
        if self.memmap:
            found["embeddings.npy"] = self.tokens * self.width * 2
        if self.sweeps and self.slots:
            found["context_slots.npy"] = (self.chunks + self.spare) * self.chunk_tokens * row
        elif self.sweeps:
            found |= {f"context_{x}.npy": self.tokens * row for x in "ab"}
        found["checkpoints"] = 2 * 12 * self.params + self.sweeps * 4 * self.params
        return found

    def memory(self) -> float:
        """Peak resident bytes of the first phase; the number of tokens has no part in it."""
        return sweep_bytes(
            vocab_size=self.vocab_size, width=self.width, context_width=self.context_width,
            depth=self.depth, chunk_tokens=min(self.chunk_tokens, self.tokens),
            memmap=self.memmap, activation_bytes=self.activation_bytes,
        )  # fmt: skip

    def flops(self) -> float:
        """Of the whole first phase: sweep 0, then two passes a sweep (cvfp.md 15.2)."""
        A, B = (self.depth * self.context_width * w for w in (self.context_width, self.width))
        B = B if self.memmap else 0  # by table it is not worth counting
        forward = 2 * (A + B)
        learning = 2 * forward + 4 * A + 2 * B - 2 * self.context_width**2  # the input is detached
        return self.tokens * (forward + max(0, self.sweeps - 1) * learning)


def plan_of(settings: Any) -> Plan:
    """The plan of the active profile."""
    section, config = settings.precompute_embeddings, settings.train["phase1_cvfp"].model
    encoding = settings.encode_tokens["bpe"]
    vocab_size = settings.train_tokenizer[encoding.tokenizer].vocab_size
    if TOKENS.is_file() and settings.profile == read_yaml(Path(PARAMS)).get("profile"):
        tokens = Manifest.read(TOKENS, kind="tokens").counts["train"]["tokens"]
    else:  # an upper bound: documents asked for, each cut
        recipe = settings.extract_texts.recipes[encoding.documents]
        sources = [settings.download_shards.sources[name] for name in recipe.sources]
        most = sum(getattr(source, "max_train_samples", 0) for source in sources)
        tokens = most * (encoding.truncate_tokens or encoding.context)
    jacobi = config.get("solver") == "jacobi"
    return Plan(
        tokens=tokens, vocab_size=vocab_size, width=config.width, context_width=config.d,
        depth=config.get("depth"), memmap=section.mode == "memmap",
        sweeps=config.get("sweeps") or 0, chunk_tokens=config.get("chunk_tokens"),
        slots=jacobi and config.get("buffers") == "slots", spare=config.spare_chunks,
        item_bytes=chunkstore.stored(config.store_dtype, 1)[0].itemsize,
        activation_bytes=settings.runtime.activation_bytes,
    )  # fmt: skip


def lines_of(plan: Plan, memory_limit: int) -> list[str]:
    """The block that is printed."""
    sizes = plan.files()
    lines = [f"{plan.tokens:,} tokens x {plan.width}, context vectors of {plan.context_width}"]
    lines += [f"  {name:<18}{size / 1e9:9.3f} GB" for name, size in sizes.items()]
    total = sum(sizes.values())
    memory = plan.memory()
    fits = (
        "ok" if memory <= memory_limit else f"above runtime.memory_limit {memory_limit / 1e9:.1f}"
    )
    return [
        *lines,
        f"  {'total':<18}{total / 1e9:9.2f} GB",
        f"  {'memory':<18}{memory / 1e9:9.2f} GB   {fits}",
    ]


def matrix_rate() -> float:
    """FLOP/s of fp32 matmuls of 1,024 x 768 on this machine, measured for a moment."""
    import torch

    a, b = torch.randn(1024, 768), torch.randn(768, 768)
    torch.mm(a, b)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.3:
        torch.mm(a, b)
        count += 1
    return count * 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)


def main() -> int:
    """Print the plan of the active profile; exit 4 where the disk or the memory will not do."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.data.embedding_plan", description=main.__doc__
    )
    parser.add_argument("--profile", help="another one than params.yaml has switched on")
    arguments = parser.parse_args()
    try:
        settings = load()
        if arguments.profile:
            found, _ = resolve(read_yaml(Path(PARAMS)), arguments.profile)
            if found is None:
                raise UserError("unknown profile", file=PARAMS, value=arguments.profile)
            settings = found
        plan = plan_of(settings)
        for line in lines_of(plan, settings.runtime.memory_limit):
            sys.stdout.write(line + "\n")
        rate = matrix_rate()
        hours = plan.flops() / rate / 0.6 / 3600
        sys.stdout.write(f"  about {hours:.1f} hours at {rate / 1e9:.0f} GFLOP/s\n")
        if plan.memory() > settings.runtime.memory_limit:
            raise EnvError(
                "plan takes too much memory",
                value=f"{plan.memory() / 1e9:.2f} GB, runtime.memory_limit "
                f"{settings.runtime.memory_limit / 1e9:.2f} GB",
                remedy="lower chunk_tokens or the width, or raise the limit",
            )
        scratch = artifact.scratch_root()
        sys.stdout.write(f"  {chunkstore.check_place(scratch, int(sum(plan.files().values())))}\n")
    except KumikiError as error:
        sys.stderr.write("\n".join(report_lines(error)) + "\n")
        return error.code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
