"""Phase 7: hyperbolic attention in a window beside a recurrence, ids by a tensor train.

    x = E[token]; per block: n = N(x), x = x + g A(n) + (1 - g) S(n), x = x + M(N(x));
    logits = N(x) E^T.  A: Lorentz attention, S: AR-SSM, M: SwiGLU, g: one gate per token

In: ids (B, n). Out: logits (B, n, V). Everything is causal; the state's size does not grow with the
context. The same file is its twins: `geometry: euclid | dot`, `ssm: false`, `embedding: dense`.
Letters: B batch, n positions, T context, V vocabulary, L layers, d width, H heads, D = d / H,
W window, r ranks of the recurrence, F d_ff.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.refusal import refuse
from lib.models._phase7_tied import State, Tied
from lib.models.base import Batch, Family, ReadWeights
from lib.nn.lorentz import LorentzAttention, bound_factor, curvature_at, facts, temperature
from lib.nn.norm import RmsNorm
from lib.nn.recurrence import CHANNELS, Recurrence, channel_gates, expected_share, staggered
from lib.nn.rope import Tables, rope_tables
from lib.nn.swiglu import SwiGlu

ROPE_THETA = 10_000.0
PROBE = 256  # positions of the one row that the log looks at


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """c_sched over the first steps; each head may learn its own within a factor 2 of it."""

    kind: Literal["linear", "cosine", "constant"] = "cosine"
    c_min: float = 1e-3
    c_max: float = 1.0
    warmup: int = 2000  # steps
    learned: bool = True


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Channels of the recurrence that stay; the rest is pruned at export."""

    target: float | None = 0.5  # share; null: all stay, nothing is learned
    weight: float = 1.0  # of the loss term
    min: int | None = None  # channels of a layer that always stay; null: max(2, r / 16)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.phase7`."""

    width: int = 2048  # d
    depth: int = 24  # L
    heads: int = 16  # H
    d_ff: int = 7168  # F, hidden width of SwiGLU
    context: int = 1024  # T
    window: int = 256  # W, positions that attention sees, its own included
    ssm_rank: int | tuple[int, ...] = 64  # r, of each layer where they differ
    conv_kernel: int = 3
    tt_rank: int = 32  # R
    tt_order: Literal["identity", "strided", "random"] = "identity"
    tt_phase: bool = False  # cos(theta_k) on each term: a gauge, folded at export
    tt_lr: float = 8.0  # rate of the cores over that of the rest
    embedding: Literal["tt", "lowrank", "dense"] = "tt"
    geometry: Literal["lorentz", "euclid", "dot"] = "lorentz"
    ssm: bool = True
    values: Literal["euclid", "centroid"] = "euclid"  # mean of values, or their centroid
    r_max: float = 4.0  # no point lies further from the origin
    beyond_context: bool = False  # rows may go on after T positions
    curvature: Curvature = field(default_factory=Curvature)
    rank: Rank = field(default_factory=Rank)

    def __post_init__(self) -> None:
        for name, kind in (("curvature", Curvature), ("rank", Rank)):  # as JSON gives them
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, kind(**value))
        if isinstance(self.ssm_rank, list):
            object.__setattr__(self, "ssm_rank", tuple(self.ssm_rank))
        d, H, c, rank = self.width, self.heads, self.curvature, self.rank
        sizes = ("width", "depth", "heads", "d_ff", "context", "tt_rank")
        near = [x for x in range(max(1, d - 2 * H), d + 2 * H + 1) if x % (2 * H) == 0]
        ranks, pruned = self.ranks, isinstance(self.ssm_rank, tuple)
        refuse(
            self,
            *((getattr(self, n) < 1, n, "use 1 or more") for n in sizes),
            (H > 0 and d % (2 * H) != 0, "width",
             f"must split into {H} heads of even width; nearest: {', '.join(map(str, near))}"),
            (not 1 <= self.window <= self.context, "window",
             f"use 1 to {self.context}, the context"),
            (self.conv_kernel < 1, "conv_kernel", "use 1 or more"),
            (len(ranks) != self.depth or min(ranks, default=1) < 1, "ssm_rank",
             f"use 1 or more, one number or {self.depth}"),
            (not self.tt_lr > 0, "tt_lr", "use a number above 0"),
            (not 0 < self.r_max <= 4, "r_max", "use 0 < r_max <= 4"),
            (c.c_min < 1e-3, "curvature.c_min", "use 0.001 or more"),
            (c.c_max < c.c_min, "curvature.c_max", f"use {c.c_min} or more"),
            (c.warmup < 0, "curvature.warmup", "use 0 or more"),
            (rank.target is not None and not 0 < rank.target < 1, "rank.target",
             "use 0 < target < 1, or null"),
            (rank.target is not None and pruned, "rank.target",
             "use null where ssm_rank is a list: its channels are pruned already"),
            (rank.weight < 0, "rank.weight", "use 0 or more"),
            (rank.min is not None and not 1 <= rank.min <= min(ranks, default=1), "rank.min",
             "use 1 to ssm_rank, or null"),
            (self.values == "centroid" and self.geometry != "lorentz", "values",
             "use euclid: only the geometry lorentz has a centroid"),
        )  # fmt: skip

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of every layer."""
        r = self.ssm_rank
        return tuple(r) if isinstance(r, tuple | list) else (r,) * self.depth

    @property
    def least_rank(self) -> int:
        """Channels of a layer that are never switched off."""
        r = min(self.ranks)
        return min(r, max(2, r // 16)) if self.rank.min is None else self.rank.min

    @property
    def gated(self) -> bool:
        """Whether channels have scores."""
        return self.ssm and self.rank.target is not None


# ---------------------------------------------------------------- layers


class LayerState(NamedTuple):
    """Of one layer: last inputs of the convolution, h (B, r) fp32, last W - 1 keys and values."""

    inputs: Tensor
    h: Tensor
    keys: Tensor
    values: Tensor


class Block(nn.Module):
    """x + (g A(n) + (1 - g) S(n)), then x + M(N(x)); without a recurrence x + A(n)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        d = config.width
        self.norm1, self.norm2 = RmsNorm(d), RmsNorm(d)
        self.attn = LorentzAttention(
            d, config.heads, config.window,
            kappa=bound_factor(d // config.heads, config.r_max, config.curvature.c_max),
            geometry=config.geometry, values=config.values,
        )  # fmt: skip
        self.ssm = Recurrence(d, config.ranks[layer], config.conv_kernel) if config.ssm else None
        self.mix = nn.Linear(d, 1) if config.ssm else None
        self.mlp = SwiGlu(d, config.d_ff)

    def forward(
        self, x: Tensor, rope: Tables, c: Tensor | None, beta: Tensor, z: Tensor | None,
        past: LayerState | None, engine: str,
    ) -> tuple[Tensor, LayerState]:  # fmt: skip
        """x (B, n, d) -> the same, and what the layer keeps."""
        n = self.norm1(x)
        attended, keys, values = self.attn(n, rope, c, beta, past and past[2:], engine)
        inputs = h = n[:, :0, :0]
        if self.ssm is not None and self.mix is not None:
            recurred, inputs, h = self.ssm(n, z, past and past[:2])
            g = torch.sigmoid(self.mix(n))  # (B, n, 1)
            attended = g * attended + (1 - g) * recurred
        x = x + attended
        return x + self.mlp(self.norm2(x)), LayerState(inputs, h, keys, values)


# ---------------------------------------------------------------- the model


class Model(Tied):
    """Tensor train -> L blocks -> norm -> the same tensor train."""

    c_sched: Tensor  # curvature of the schedule, of the geometry lorentz alone
    c_held: Tensor  # bool: the schedule is over, these weights are fine-tuned
    _row: Tensor | None = None  # the newest training row, for the log

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        L, H, lorentzian = config.depth, config.heads, config.geometry == "lorentz"
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.norm = RmsNorm(config.width)
        self.beta = nn.Parameter(torch.empty(L, H))  # b: beta = softplus(b)
        learned = lorentzian and config.curvature.learned
        self.eta = nn.Parameter(torch.empty(L, H)) if learned else None
        self.alpha = nn.Parameter(torch.empty(L, config.ranks[0])) if config.gated else None
        if lorentzian:
            self.register_buffer("c_sched", torch.empty(()))
            self.register_buffer("c_held", torch.empty((), dtype=torch.bool))

    def hidden(
        self, tokens: Tensor, state: State | None = None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """tokens (B, n) -> the final normed x (B, n, d), and what each layer keeps."""
        x, start = self.begin(tokens, state)
        rope, c, beta, z = self._shared(x, start)
        kept = []
        for i, block in enumerate(self.blocks):
            past = state.layers[i] if state else None
            own = (c[i] if c is not None else None, beta[i], z[i] if z is not None else None)
            x, layer = self.run_block(block, x, rope, *own, past, self.attention)
            kept.append(layer)
        return self.norm(x), tuple(kept)

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Mean cross-entropy; then the rank term as R - stopgrad(R): a gradient without a value."""
        self._follow_schedule(batch.step)
        self._row = batch.tokens[:1, :PROBE].detach()
        yield self.table.loss(self.hidden(batch.tokens)[0], batch.targets)
        if self.alpha is not None:
            term = self._rank_term(expected_share(self.alpha))
            yield term - term.detach()

    # ------------------------------------------------------------ curvature and rank

    def _shared(self, x: Tensor, start: int) -> tuple[Tables, Tensor | None, Tensor, Tensor | None]:
        """Rotation of these positions, c and beta (L, H), channel gates (L, r); fp32 at least."""
        wide, head_dim = (
            torch.promote_types(x.dtype, torch.float32),
            self.config.width // self.config.heads,
        )
        rope = rope_tables(start, x.shape[1], head_dim, ROPE_THETA, x.device, wide)
        return rope, self._curvatures(), self._betas(), self._channel_gates()

    def _curvatures(self) -> Tensor | None:
        """c_h = c_sched 2^tanh(eta_h) (L, H): the schedule writes no parameter, and the reverse."""
        if self.config.geometry != "lorentz":
            return None
        if self.eta is None:
            return self.c_sched.expand_as(self.beta)
        return self.c_sched * torch.exp2(torch.tanh(self.eta))

    def _betas(self) -> Tensor:
        """softplus(b), times what keeps sharpness equal while the curvature is raised."""
        beta = F.softplus(self.beta)
        if self.config.geometry != "lorentz":
            return beta
        return beta * temperature(self.c_sched, self.config.width // self.config.heads)

    @torch.no_grad()
    def _follow_schedule(self, step: int) -> None:
        """c_sched of this step, unless it is held; decided on the device: nobody waits."""
        if self.config.geometry == "lorentz":
            k = self.config.curvature
            c = curvature_at(k.kind, step, k.warmup, k.c_min, k.c_max)
            self.c_sched.copy_(torch.where(self.c_held, self.c_sched, c))

    def _channel_gates(self) -> Tensor | None:
        """z (L, r), 0 or 1 each."""
        return None if self.alpha is None else channel_gates(self.alpha, self.config.least_rank)

    def _rank_term(self, share: Tensor) -> Tensor:
        """weight max(0, rho - target)^2; of parameters only, equal for every micro-batch."""
        rank = self.config.rank
        assert rank.target is not None
        return rank.weight * (share - rank.target).clamp(min=0).square()

    @torch.no_grad()
    def exported(self, config: Config) -> tuple[Config, Family]:
        """Without channels that are off and without phases: equal logits, fewer parameters."""
        state = self.state_dict()
        if (z := self._channel_gates()) is not None:
            kept = [row.nonzero().squeeze(1) for row in z > 0.5]
            for i, index in enumerate(kept):
                for name, dim in CHANNELS.items():
                    key = f"blocks.{i}.ssm.{name}"
                    state[key] = state[key].index_select(dim, index)
            del state["alpha"]
            rank = replace(config.rank, target=None, min=None)
            config = replace(config, ssm_rank=tuple(len(index) for index in kept), rank=rank)
        return self.folded(config, state)

    # ------------------------------------------------------------ weights

    def take_weights(self, config: Config, read: ReadWeights) -> None:
        """Those of a model with the same settings; fine-tuning keeps the curvature they had."""
        super().take_weights(config, read)
        if self.config.geometry == "lorentz":
            self.c_held.fill_(True)

    def init_buffers(self) -> None:
        """The schedule's first curvature; the order of ids."""
        if self.config.geometry == "lorentz":
            self.c_held.fill_(False)
            self._follow_schedule(0)
        super().init_buffers()

    def first_value(self, kind: str, shape: torch.Size) -> Tensor | None:
        """phase7.md 3.4.5, 3.5.3, 3.6.6."""
        match kind:
            case "eta" | "mix" | "bias" | "decay_bias" | "hidden_bias" | "gate_bias":
                return torch.zeros(shape)
            case "beta":  # softplus(b) = 1 / (2 sqrt D)
                head_dim = self.config.width // self.config.heads
                return torch.full(shape, math.log(math.expm1(0.5 / math.sqrt(head_dim))))
            case "lam":  # exp(-8 softplus(lam)) evenly over [0.9, 0.999]
                a = torch.linspace(0.9, 0.999, shape[0], dtype=torch.float64)
                return torch.log(torch.expm1(-a.log() / 8)).float()
            case "alpha":
                return staggered(shape[1]).expand(shape)
        return None

    # ------------------------------------------------------------ accounts

    def flops_per_token(self, T: int) -> int:
        """6 (block matrices + V d) + 12 L H D w, w the mean number of visible keys."""
        W, matrices = min(self.config.window, T), self.matrix_weights()
        head = self.vocab_size * self.config.width
        pairs = self.config.depth * self.config.width * (W - W * (W - 1) / (2 * T))
        return round(6 * (matrices + head) + 12 * pairs)

    @torch.no_grad()
    def log_scalars(self) -> dict[str, float]:
        """Curvature, temperatures, ranks; of one row radius, clamped pairs, entropy, gates."""
        found = _spread("beta", F.softplus(self.beta))
        if (c := self._curvatures()) is not None:
            found |= {"curvature/sched": float(self.c_sched), **_spread("curvature", c)}
        if (z := self._channel_gates()) is not None:
            assert self.alpha is not None
            share = expected_share(self.alpha)
            found |= {"loss/rank": float(self._rank_term(share)), "rank/expected": float(share)}
            found |= {f"rank/hard/{i}": float(row.sum()) for i, row in enumerate(z)}
        whole = not any(hasattr(p, "full_tensor") for p in self.parameters())
        if self._row is not None and whole:  # cut over ranks, a forward pass needs all of them
            found |= self._probe(self._row)
        return found

    def _probe(self, row: Tensor) -> dict[str, float]:
        """What the blocks make of one row (1, n)."""
        x, each = self.table(row), []
        rope, c, beta, z = self._shared(x, 0)
        found: dict[str, float] = {}
        blocks: list[Any] = list(self.blocks)
        for i, block in enumerate(blocks):
            n = block.norm1(x)
            if c is not None:
                q, k, _ = block.attn.points(n, rope)
                each.append(facts(q, k, c[i], beta[i], self.config.window))
            if block.mix is not None:
                found[f"gate/{i}"] = float(torch.sigmoid(block.mix(n)).mean())
            own = (c[i] if c is not None else None, beta[i], z[i] if z is not None else None)
            x, _ = block(x, rope, *own, None, self.attention)
        if each:
            found["radius/max"] = max(f["radius"] for f in each)
            for name in ("clamped", "entropy"):
                found[f"attention/{name}"] = sum(f[name] for f in each) / len(each)
        return found


def _spread(name: str, values: Tensor) -> dict[str, float]:
    numbers = {"min": values.min(), "mean": values.mean(), "max": values.max()}
    return {f"{name}/{key}": float(value) for key, value in numbers.items()}
