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
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.refusal import refuse
from lib.kernels.lorentz_attention import lorentz_attention
from lib.kernels.scan import scan
from lib.models.base import Batch, Defaults, Family, Group, Optim, ReadWeights, require_same
from lib.nn.attention import causal_attention
from lib.nn.conv import CausalConv
from lib.nn.linear import Linear
from lib.nn.lorentz import (
    bound,
    bound_factor,
    centroid,
    curvature_at,
    facts,
    lift,
    temperature,
)
from lib.nn.norm import RmsNorm
from lib.nn.rope import Tables, rope_tables, rotate
from lib.nn.swiglu import SwiGlu
from lib.nn.tt import Dense, TensorTrain, tied_table

ROPE_THETA = 10_000.0
RANK_TEMPERATURE, RANK_TRAVEL = 0.1, 3.0  # of the gate's slope; of a score over the whole run
LEAST_DECAY = 1e-6  # of -log a: bounds the gradient of sqrt(1 - a^2) by 710
PROBE = 256  # positions of the one row that the log looks at
CHANNELS = {  # what of a recurrence has a row or column for each channel: its name, its dimension
    "u.weight": 0, "v.weight": 0, "decay.weight": 0, "gate.weight": 0, "o.weight": 1,
    "decay_bias": 0, "gate_bias": 0, "lam": 0,
}  # fmt: skip


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
            *((getattr(self, n) < 1, n, getattr(self, n), "use 1 or more") for n in sizes),
            (H > 0 and d % (2 * H) != 0, "width", d,
             f"must split into {H} heads of even width; nearest: {', '.join(map(str, near))}"),
            (not 1 <= self.window <= self.context, "window", self.window,
             f"use 1 to {self.context}, the context"),
            (self.conv_kernel < 1, "conv_kernel", self.conv_kernel, "use 1 or more"),
            (len(ranks) != self.depth or min(ranks, default=1) < 1, "ssm_rank", self.ssm_rank,
             f"use 1 or more, one number or {self.depth}"),
            (not self.tt_lr > 0, "tt_lr", self.tt_lr, "use a number above 0"),
            (not 0 < self.r_max <= 4, "r_max", self.r_max, "use 0 < r_max <= 4"),
            (c.c_min < 1e-3, "curvature.c_min", c.c_min, "use 0.001 or more"),
            (c.c_max < c.c_min, "curvature.c_max", c.c_max, f"use {c.c_min} or more"),
            (c.warmup < 0, "curvature.warmup", c.warmup, "use 0 or more"),
            (rank.target is not None and not 0 < rank.target < 1, "rank.target", rank.target,
             "use 0 < target < 1, or null"),
            (rank.target is not None and pruned, "rank.target", rank.target,
             "use null where ssm_rank is a list: its channels are pruned already"),
            (rank.weight < 0, "rank.weight", rank.weight, "use 0 or more"),
            (rank.min is not None and not 1 <= rank.min <= min(ranks, default=1), "rank.min",
             rank.min, "use 1 to ssm_rank, or null"),
            (self.values == "centroid" and self.geometry != "lorentz", "values", self.values,
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


class State(NamedTuple):
    """Rows so far: their length, and what each layer keeps; its size is constant."""

    position: int
    layers: tuple[LayerState, ...]


class Attention(nn.Module):
    """Softmax of minus beta times a squared distance within the window (phase7.md 3.6)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, self.heads = config.width, config.heads
        self.geometry, self.window = config.geometry, config.window
        self.centroid = config.values == "centroid"
        c_max = config.curvature.c_max
        self.kappa = bound_factor(d // config.heads, config.r_max, c_max)
        self.q, self.k, self.v, self.o = (Linear(d, d) for _ in range(4))

    def points(self, n: Tensor, rope: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, bounded and rotated, and v: (B, H, n, D) each, rounded to the compute dtype."""
        q, k, v = (
            f(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        # A rotation of the space part fixes the origin: norms and times stay.
        q, k = (rotate(bound(x, self.kappa), rope).to(x.dtype) for x in (q, k))
        return q, k, v

    def forward(
        self, n: Tensor, rope: Tables, c: Tensor | None, beta: Tensor, past: LayerState | None,
        engine: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """normed n (B, n, d) -> output, and the keys and values that the next call may see."""
        q, k, v = self.points(n, rope)
        if past is not None:
            k, v = torch.cat((past.keys, k), dim=2), torch.cat((past.values, v), dim=2)
        seen = v
        if self.geometry == "dot":  # s = 2 beta q.k
            q = (q * (2 * beta[:, None, None])).to(k.dtype)
            out = causal_attention(q, k, v, window=self.window - 1, scale=1.0, engine=engine)
        else:
            if self.centroid:
                assert c is not None
                seen = lift(v if v.dtype == torch.float64 else v.float(), c)
            out = lorentz_attention(q, k, seen, c, beta, self.window)
            out = centroid(out, c).to(v.dtype) if self.centroid and c is not None else out
        first = max(0, k.shape[2] - self.window + 1)
        return self.o(out.transpose(1, 2).flatten(2)), k[:, :, first:], v[:, :, first:]


class Recurrence(nn.Module):
    """S: a short convolution plus r gated channels with input-dependent decay (phase7.md 3.4).

    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) w_t u_t (RG-LRU, arXiv 2402.19427 eq. 4): the root keeps the
    variance of h bounded.
    """

    def __init__(self, config: Config, rank: int) -> None:
        super().__init__()
        d, r, gate = config.width, rank, max(1, config.width // 4)
        self.conv = CausalConv(d, config.conv_kernel)
        self.u, self.v, self.decay = Linear(d, r), Linear(d, r), Linear(d, r)
        self.decay_bias = nn.Parameter(torch.empty(r))
        self.lam = nn.Parameter(torch.empty(r))  # Lambda
        self.hidden, self.gate = Linear(d, gate), Linear(gate, r)
        self.hidden_bias = nn.Parameter(torch.empty(gate))
        self.gate_bias = nn.Parameter(torch.empty(r))
        self.o = Linear(r, d)

    def forward(
        self, n: Tensor, z: Tensor | None, past: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """normed n (B, n, d), channel gate z (r,) -> S(n), last inputs, last h."""
        local, inputs = self.conv(n, None if past is None else past.inputs)
        opened = self.gate(F.relu(self.hidden(n) + self.hidden_bias)) + self.gate_bias
        w = torch.sigmoid(opened.to(self.lam.dtype))  # (B, n, r), fp32
        with torch.autocast(n.device.type, enabled=False):
            x = n.to(self.lam.dtype)
            strength = F.softplus(self.lam) * torch.sigmoid(self.decay(x) + self.decay_bias)
            log_a = -(8 * strength).clamp(min=LEAST_DECAY)
            b = torch.sqrt(-torch.expm1(2 * log_a)) * w * self.u(x)
            h0 = b.new_zeros(len(b), b.shape[2]) if past is None else past.h
            h, last = scan(log_a, b, h0)
        y = w * self.v(n) * h
        return local + self.o(y if z is None else y * z), inputs, last


class Block(nn.Module):
    """x + (g A(n) + (1 - g) S(n)), then x + M(N(x)); without a recurrence x + A(n)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        d = config.width
        self.norm1, self.norm2 = RmsNorm(d), RmsNorm(d)
        self.attn = Attention(config)
        self.ssm = Recurrence(config, config.ranks[layer]) if config.ssm else None
        self.mix = nn.Linear(d, 1) if config.ssm else None
        self.mlp = SwiGlu(d, config.d_ff)

    def forward(
        self, x: Tensor, rope: Tables, c: Tensor | None, beta: Tensor, z: Tensor | None,
        past: LayerState | None, engine: str,
    ) -> tuple[Tensor, LayerState]:  # fmt: skip
        """x (B, n, d) -> the same, and what the layer keeps."""
        n = self.norm1(x)
        attended, keys, values = self.attn(n, rope, c, beta, past, engine)
        inputs = h = n[:, :0, :0]
        if self.ssm is not None and self.mix is not None:
            recurred, inputs, h = self.ssm(n, z, past)
            g = torch.sigmoid(self.mix(n))  # (B, n, 1)
            attended = g * attended + (1 - g) * recurred
        x = x + attended
        return x + self.mlp(self.norm2(x)), LayerState(inputs, h, keys, values)


# ---------------------------------------------------------------- the model


class Model(Family):
    """Tensor train -> L blocks -> norm -> the same tensor train."""

    compiled = ("hidden",)
    c_sched: Tensor  # curvature of the schedule, of the geometry lorentz alone
    c_held: Tensor  # bool: the schedule is over, these weights are fine-tuned
    _row: Tensor | None = None  # the newest training row, for the log

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.max_context = None if config.beyond_context else config.context
        L, H, lorentzian = config.depth, config.heads, config.geometry == "lorentz"
        self.table = tied_table(
            config.embedding, vocab_size, config.width, config.tt_rank, config.tt_order,
            config.tt_phase,
        )  # fmt: skip
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
        start, n, T = state.position if state else 0, tokens.shape[1], self.max_context
        if T is not None and start + n > T:
            raise ValueError(f"{start + n} positions, the context is {T}: set beyond_context: true")
        x = self.table(tokens)
        rope, c, beta, z = self._shared(x, start)
        kept = []
        for i, block in enumerate(self.blocks):
            past = state.layers[i] if state else None
            own = (c[i] if c is not None else None, beta[i], z[i] if z is not None else None)
            x, layer = self.run_block(block, x, rope, *own, past, self.attention)
            kept.append(layer)
        return self.norm(x), tuple(kept)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, n) int64 -> logits (B, n, V) fp32, and the state that continues the rows."""
        x, layers = self.hidden(tokens, state)
        start = state.position if state else 0
        return self.table.logits(x), State(start + tokens.shape[1], layers)

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: State | None = None, keep: bool = True
    ) -> tuple[Tensor, State]:
        """Logits (N, V) of the marked positions (B, n) alone, and the state."""
        x, layers = self.hidden(tokens, state)
        start = state.position if state else 0
        return self.table.logits(x[where]), State(start + tokens.shape[1], layers)

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Mean cross-entropy; then the rank term as R - stopgrad(R): a gradient without a value."""
        self._follow_schedule(batch.step)
        self._row = batch.tokens[:1, :PROBE].detach()
        yield self.table.loss(self.hidden(batch.tokens)[0], batch.targets)
        if self.alpha is not None:
            term = self._rank_term()
            yield term - term.detach()

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy by position (B, T), without the logits of all positions."""
        return self.table.loss(self.hidden(tokens)[0], targets, "none")

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
        """z (L, r), exactly 0 or 1: score above 0, or among the layer's `least_rank` largest.

        Backward as if z were sigmoid(alpha / 0.1), so that a channel that is off may return.
        """
        if self.alpha is None:
            return None
        largest = self.alpha.topk(self.config.least_rank, dim=-1).indices
        hard = (self.alpha > 0).to(self.alpha.dtype).scatter(-1, largest, 1.0)
        soft = torch.sigmoid(self.alpha / RANK_TEMPERATURE)
        return hard + (soft - soft.detach())

    def _expected_share(self) -> Tensor:
        """rho: mean of sigmoid(alpha / 0.1) over layers and channels."""
        assert self.alpha is not None
        return torch.sigmoid(self.alpha / RANK_TEMPERATURE).mean()

    def _rank_term(self) -> Tensor:
        """weight max(0, rho - target)^2; of parameters only, equal for every micro-batch."""
        rank = self.config.rank
        assert rank.target is not None
        return rank.weight * (self._expected_share() - rank.target).clamp(min=0).square()

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
        if "table.theta" in state:
            state["table.C1"], _ = self.table.cores()  # type: ignore[union-attr]  # it has phases
            del state["table.theta"]
            config = replace(config, tt_phase=False)
        with torch.device("meta"):
            model = Model(config, self.vocab_size)
        model.to_empty(device="cpu")
        model.load_state_dict(state)
        return config, model.eval()

    # ------------------------------------------------------------ weights

    def take_weights(self, config: Config, read: ReadWeights) -> None:
        """Those of a model with the same settings; fine-tuning keeps the curvature they had."""
        require_same(asdict(self.config), asdict(config))
        super().take_weights(config, read)
        if self.config.geometry == "lorentz":
            self.c_held.fill_(True)

    def init_buffers(self) -> None:
        """The schedule's first curvature; the order of ids."""
        if self.config.geometry == "lorentz":
            self.c_held.fill_(False)
            self._follow_schedule(0)
        if isinstance(self.table, TensorTrain):
            self.table.init_buffers()

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """phase7.md 3.8.1: inputs N(0, 1/fan-in), outputs a factor 1/sqrt(2L) smaller."""
        kind = name.removesuffix(".weight").split(".")[-1]
        L, H, d = self.config.depth, self.config.heads, self.config.width
        if name.startswith("table."):
            return self.table.initial(kind, shape, draw)
        match kind:
            case "norm1" | "norm2" | "norm":
                return torch.ones(shape)
            case "eta" | "mix" | "bias" | "decay_bias" | "hidden_bias" | "gate_bias":
                return torch.zeros(shape)
            case "beta":  # softplus(b) = 1 / (2 sqrt D)
                return torch.full(shape, math.log(math.expm1(0.5 / math.sqrt(d // H))))
            case "lam":  # exp(-8 softplus(lam)) evenly over [0.9, 0.999]
                a = torch.linspace(0.9, 0.999, shape[0], dtype=torch.float64)
                return torch.log(torch.expm1(-a.log() / 8)).float()
            case "alpha":
                return staggered(shape[1]).expand(shape)
        std = 1 / math.sqrt(shape[-1])
        if kind in ("o", "down", "conv"):
            std /= math.sqrt(2 * L)
        return torch.empty(shape).normal_(0, std, generator=draw)

    # ------------------------------------------------------------ optimisation and accounts

    def defaults(self) -> Defaults:
        """Cosine to the run's `final_lr`, norm clipped at 1, 16 rows of the largest preset."""
        return Defaults(schedule="cosine", grad_clip=1.0, batch_tokens=16_384)

    def param_groups(self, optim: Optim) -> list[Group]:
        """Matrices with decay; table and scores of channels at rates of their own; the rest."""
        members: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            members.setdefault(_group_of(name, parameter), {})[name] = parameter
        common = {"betas": optim.betas, "eps": optim.eps}
        factor = 1.0 if isinstance(self.table, Dense) else self.config.tt_lr
        settings: dict[str, dict[str, Any]] = {
            "matrices": {
                "lr": optim.lr, "rule": optim.optimizer, "weight_decay": optim.weight_decay,
            },
            "table": {"lr": optim.lr * factor},
            # Channels cross 0 one by one whatever the base rate is: the travel is of the whole run.
            "scores": {"lr": RANK_TRAVEL / optim.steps, "scheduled": False},
            "rest": {"lr": optim.lr},
        }  # fmt: skip
        # The log shows the first group's rate: the matrices', which is the run's own `lr`.
        return [
            Group(name=n, params=members[n], **common, **settings[n])
            for n in settings
            if n in members
        ]

    def flops_per_token(self, T: int) -> int:
        """6 (block matrices + V d) + 12 L H D w, w the mean number of visible keys."""
        W, named = min(self.config.window, T), self.named_parameters()
        matrices = sum(p.numel() for n, p in named if _group_of(n, p) == "matrices")
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
            found["loss/rank"] = float(self._rank_term())
            found["rank/expected"] = float(self._expected_share())
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


def _group_of(name: str, parameter: Tensor) -> str:
    """The optimizer's group of a parameter."""
    if name.startswith("table."):
        return "table"
    if name == "alpha":
        return "scores"
    small = ("conv.weight", "mix.weight", "beta", "eta")
    return "matrices" if parameter.ndim == 2 and not name.endswith(small) else "rest"


def staggered(r: int) -> Tensor:
    """First scores (r,): 0.05 to 1, neither equal nor in the channels' order.

    Equal ones would cross 0 together; sorted ones would go by time constant (phase7.md 3.5.3).
    """
    stride = next(s for s in range(7, 7 + r + 1) if math.gcd(s, r) == 1)
    return 0.05 + 0.95 * (torch.arange(r) * stride % r) / max(1, r - 1)


def _spread(name: str, values: Tensor) -> dict[str, float]:
    numbers = {"min": values.min(), "mean": values.mean(), "max": values.max()}
    return {f"{name}/{key}": float(value) for key, value in numbers.items()}
