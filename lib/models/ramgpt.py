"""RamGPT: GPT-2 exactly, small enough on the device for its weights to wait in RAM.

In: ids (B, n).   Out: logits (B, n, V). Exports to transformers' GPT2LMHeadModel, equal logits.
Law: a streamed run (lib.nn.stream) has the numbers of the resident one; its masks come from
     (seed, step, application, row), so that no order of execution changes them.
Note: gelu is the tanh form (arXiv 1606.08415); the erf form is another model, 2.8e-4 away.
Letters: B batch, T context, n positions of this call, V vocabulary, L layers, d width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import UserError
from lib.core.refusal import refuse
from lib.core.rng import drawing
from lib.kernels.linear_cross_entropy import linear_cross_entropy
from lib.models.base import Batch, Defaults, Family, Group, Native, Optim
from lib.nn.attention import causal_attention
from lib.nn.linear import Table

EPS, STD = 1e-5, 0.02  # of the norms; of first weights (Radford et al. 2019)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.ramgpt`."""

    depth: int = 12  # L
    width: int = 768  # d
    heads: int = 12  # H
    context: int = 1024  # T, positions that it has
    dropout: float = 0.0  # one rate: embedding, attention weights, both outputs of a block
    tie: bool = True  # the head is the token table

    def __post_init__(self) -> None:
        sizes = ("depth", "width", "heads", "context")
        refuse(self, *((getattr(self, n) < 1, n, "use 1 or more") for n in sizes))
        low, high = self.width // self.heads * self.heads, -(-self.width // self.heads) * self.heads
        near = f"nearest: {high}" if low in (0, high) else f"nearest: {low}, {high}"
        refuse(
            self,
            (self.width % self.heads != 0, "width",
             f"must split into {self.heads} heads; {near}"),
            (not 0 <= self.dropout < 1, "dropout", "use 0 <= x < 1"),
        )  # fmt: skip


class State(NamedTuple):
    """Rows so far: their length, k and v (B, H, m, D) of each layer."""

    position: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Block(nn.Module):
    """h + attention(LN h), then h + MLP(LN h); every linear with bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(d, eps=EPS), nn.LayerNorm(d, eps=EPS)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(
        self, h: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, n, d) -> the same, and k, v of all positions so far."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, n, D)
            for part in self.qkv(self.ln_1(h)).chunk(3, dim=-1)
        )
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        p = self.dropout if self.training else 0.0
        if p and past is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        else:
            out = causal_attention(q, k, v, window=None, scale=q.shape[-1] ** -0.5)
        h = h + F.dropout(self.proj(out.transpose(1, 2).flatten(2)), p, bool(p))
        m = F.gelu(self.up(self.ln_2(h)), approximate="tanh")
        return h + F.dropout(self.down(m), p, bool(p)), k, v


class Model(Family):
    """wte + wpe -> L blocks -> LN -> head."""

    compiled = ("apply_unit",)
    seed = 0  # of the masks, the run's own

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_context = config, vocab_size, config.context
        self.rows_share_draws = config.dropout > 0
        self.wte = Table(vocab_size, config.width)
        self.wpe = Table(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.width, eps=EPS)
        self.head = None if config.tie else nn.Linear(config.width, vocab_size, bias=False)

    # ------------------------------------------------------------ in the units that are streamed

    @property
    def width(self) -> int:
        """d."""
        return self.config.width

    def stream_units(self) -> Sequence[nn.Module]:
        """The blocks, in order."""
        return list(self.blocks)

    def embed(self, tokens: Tensor, moment: tuple[int, int] = (0, 0), start: int = 0) -> Tensor:
        """tokens (B, n) at positions start .. -> h (B, n, d), in autocast's dtype inside of it."""
        stop = start + tokens.shape[1]
        if stop > self.config.context:
            raise UserError(
                "row is longer than the model's context",
                value=f"{stop} positions, the model has {self.config.context}",
                remedy="shorten the prompt or the rows",
            )
        h = self.wte(tokens) + self.wpe.weight[start:stop]
        with self._draws(moment, -1, tokens.device):
            h = F.dropout(h, self.config.dropout, self.training)
        device = tokens.device.type
        if torch.is_autocast_enabled(device):
            h = h.to(torch.get_autocast_dtype(device))  # boundaries of blocks take half the memory
        return h

    def apply_unit(self, application: int, x: Tensor, moment: tuple[int, int]) -> Tensor:
        """Block number `application`, (B, n, d) -> (B, n, d)."""
        with self._draws(moment, application, x.device):
            return self.blocks[application](x)[0]

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy from the last block's output."""
        return linear_cross_entropy(self.ln_f(x), self._head(), targets)

    def _head(self) -> Tensor:
        return self.wte.weight if self.head is None else self.head.weight

    def _draws(
        self, moment: tuple[int, int], place: int, device: torch.device
    ) -> AbstractContextManager[None]:
        """Masks of one application to the rows from `moment` on; nothing where none are drawn."""
        if not (self.training and self.config.dropout):
            return nullcontext()
        step, row = moment
        return drawing(self.seed, "dropout", step, place, row, device=device)

    # ------------------------------------------------------------ the contract

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, n) int64 -> logits (B, n, V), and the state that continues the rows."""
        with self.in_place() as unit:
            h, kept = self.hidden(tokens, state, unit)
            return F.linear(h, self._head()), kept

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: State | None = None, keep: bool = True
    ) -> tuple[Tensor, State]:
        """Logits (N, V) of the marked positions (B, n) alone, and the state."""
        with self.in_place() as unit:
            h, kept = self.hidden(tokens, state, unit)
            return F.linear(h[where], self._head()), kept

    def hidden(
        self, tokens: Tensor, state: State | None, unit: Callable[[int], AbstractContextManager]
    ) -> tuple[Tensor, State]:
        """tokens (B, n) -> the final normed h (B, n, d), and the state.

        unit(i): inside it block i has its weights.
        """
        start = state.position if state else 0
        keys, values = [], []
        h = self.embed(tokens, start=start)
        for i, block in enumerate(self.blocks):
            past = (state.keys[i], state.values[i]) if state else None
            with unit(i):
                h, k, v = block(h, past)
            keys.append(k)
            values.append(v)
        return self.ln_f(h), State(start + tokens.shape[1], tuple(keys), tuple(values))

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """One loss: mean cross-entropy of the batch's targets."""
        moment = (batch.step, batch.first_row)
        if self.engine is not None:
            yield self.engine.loss(batch.tokens, batch.targets, moment)
            return
        h = self.embed(batch.tokens, moment)
        for i in range(self.config.depth):
            h = self.run_block(self.apply_unit, i, h, moment)
        yield self.head_loss(h, batch.targets)

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy by position (B, T), without the logits of all positions."""
        with self.in_place() as unit:
            h = self.embed(tokens)
            for i in range(self.config.depth):
                with unit(i):
                    h = self.apply_unit(i, h, (0, 0))
            return linear_cross_entropy(self.ln_f(h), self._head(), targets, reduction="none")

    def init_weights(self, seed: int) -> None:
        """First weights; `seed` is that of the masks too."""
        self.seed = seed
        super().init_weights(seed)

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """N(0, 0.02), both outputs of a block over sqrt(2 L); biases 0, norms 1 (2.2)."""
        if len(shape) < 2:
            return super().initial(name, shape, draw)
        deep = name.endswith(("proj.weight", "down.weight"))
        std = STD / math.sqrt(2 * self.config.depth) if deep else STD
        return torch.empty(shape).normal_(0, std, generator=draw)

    # ------------------------------------------------------------ optimisation and accounts

    def defaults(self) -> Defaults:
        """Warm-up and cosine, clip 1."""
        return Defaults(schedule="cosine", grad_clip=1.0)

    def param_groups(self, optim: Optim) -> list[Group]:
        """Decay for the matrices of blocks only."""
        named = dict(self.named_parameters())
        decays = {n: p for n, p in named.items() if n.startswith("blocks.") and p.ndim >= 2}
        rest = {n: p for n, p in named.items() if n not in decays}
        common = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        return [
            Group(name="matrices", params=decays, weight_decay=optim.weight_decay,
                  rule=optim.optimizer, **common),
            Group(name="rest", params=rest, **common),
        ]  # fmt: skip

    def flops_per_token(self, T: int) -> int:
        """6 (12 L d^2 + V d) + 6 L T d: causal attention counted by half, recompute never."""
        L, d = self.config.depth, self.config.width
        return 6 * (12 * L * d * d + self.vocab_size * d) + 6 * L * T * d

    def notes(self) -> list[str]:
        """Parameters, honestly."""
        total = sum(p.numel() for p in self.parameters())
        tables = self.wte.weight.numel() + self.wpe.weight.numel()
        counted = f"embedding {tables:,}, non-embedding {total - tables:,}"
        return [f"GPT-2 of {total:,} parameters: {counted}"]

    # ------------------------------------------------------------ export

    def hf_native(self) -> Native:
        """transformers' GPT2LMHeadModel, whose matrices of blocks are stored (in, out)."""
        c = self.config
        config = {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "n_positions": c.context, "n_embd": c.width, "n_layer": c.depth, "n_head": c.heads,
            "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": EPS,
            "initializer_range": STD, "attn_pdrop": c.dropout, "embd_pdrop": c.dropout,
            "resid_pdrop": c.dropout, "scale_attn_weights": True, "tie_word_embeddings": c.tie,
        }  # fmt: skip
        theirs = {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "ln_1": "ln_1", "ln_2": "ln_2",
                  "qkv": "attn.c_attn", "proj": "attn.c_proj", "up": "mlp.c_fc",
                  "down": "mlp.c_proj"}  # fmt: skip
        names, transposed = {}, set()
        for ours, tensor in self.state_dict().items():
            *block, layer, kind = ours.split(".")
            if layer == "head":
                names["lm_head.weight"] = ours
                continue
            place = f"transformer.h.{block[1]}" if block else "transformer"
            names[f"{place}.{theirs[layer]}.{kind}"] = ours
            if block and tensor.ndim == 2:
                transposed.add(ours)
        return Native(config=config, names=names, transposed=frozenset(transposed))
