"""GPT, the nanochat-style family: weightless RMSNorm, RoPE, QK-norm, relu^2, Muon; two eras.

`variant` chooses defaults: base = October 2025 (exports to transformers' nanochat class), modern =
July 2026. Every difference is a switch of its own. In: ids (B, n). Out: logits (B, n, V),
softcapped, fp32.
Invariant: any split of a sequence into chunks gives the full forward's logits.
Letters: B batch, T context, n positions of this call, V vocabulary (Vp padded), L layers, d width,
H heads, K kv heads, D = d / H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import UserError
from lib.core.refusal import refuse
from lib.kernels.linear_cross_entropy import linear_cross_entropy
from lib.kernels.relu2_mlp import relu2_mlp
from lib.models.base import (
    Batch,
    Defaults,
    Family,
    Group,
    Native,
    Optim,
    ReadWeights,
    require_same,
)
from lib.nn.attention import causal_attention, choose_engine
from lib.nn.linear import Linear, Table, require_fp8
from lib.nn.norm import EPS, rms_norm
from lib.nn.rope import Tables, rope_tables, rotate

GATE_INPUTS = 12  # channels of the normed input that a value gate reads
SMEAR_INPUTS = 24  # channels of the embedding that the smear gate reads


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What distinguishes the eras, resolved: no null left."""

    rope_theta: float
    qk_scale: float
    softcap: float
    windows: str
    resid_mix: bool
    smear: bool
    value_embedding: bool
    backout: bool
    vocab_pad: int
    init: Literal["base", "modern"]
    optim: Literal["base", "modern"]


_OFF = {"resid_mix": False, "smear": False, "value_embedding": False, "backout": False}
VARIANTS = {
    "base": Switches(
        rope_theta=10_000.0, qk_scale=1.0, softcap=15.0, windows="L", vocab_pad=1,
        init="base", optim="base", **_OFF,
    ),
    "modern": Switches(
        rope_theta=100_000.0, qk_scale=1.2, softcap=15.0, windows="SSSL", vocab_pad=64,
        init="modern", optim="modern", **dict.fromkeys(_OFF, True),
    ),
}  # fmt: skip


def _below(value: object, least: int) -> bool:
    return value is not None and (not isinstance(value, int) or value < least)


def _other_letters(windows: str) -> str:
    odd = sorted(set(windows) - {"S", "L"})
    return f", not {', '.join(odd)}" if odd else ""


def _fits(d: int, H: int) -> bool:
    return d % H == 0 and (d // H) % 2 == 0


def _near(config: Config, key: str) -> list[int]:
    """The nearest valid value of depth or width below, and the two nearest above."""

    def fits(x: int) -> bool:
        if key == "width":
            return _fits(x, config.heads or 1)
        d = config.aspect_ratio * x
        H = -(-d // config.head_dim)
        return _fits(config.head_dim * H if config.variant == "modern" else d, H)

    now = getattr(config, key)
    below = [x for x in range(now - 1, 0, -1) if fits(x)][:1]
    return below + [x for x in range(now + 1, now + 2 * now + 128) if fits(x)][:2]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.gpt`. A switch that is null has the value of its variant."""

    variant: Literal["base", "modern"] = "base"
    depth: int = 20  # L
    aspect_ratio: int = 64  # width per layer
    head_dim: int = 128  # D aimed at; base may end below it
    width: int | None = None  # d, instead of aspect_ratio * depth; together with heads
    heads: int | None = None  # H
    kv_heads: int | None = None  # K, null = H; below H: grouped-query attention
    context: int = 2048  # T, also the unit of windows
    mlp_ratio: int = 4  # hidden width of the MLP over d
    rope_theta: float | None = None
    qk_scale: float | None = None  # factor of q and of k after QK-norm
    softcap: float | None = None  # c tanh(z / c) on logits, 0 = off
    windows: str | None = None  # S and L tiled over layers, the last one is L
    resid_mix: bool | None = None  # x = r_i x + s_i x0 before each block
    smear: bool | None = None  # each embedding takes up some of the one before it
    value_embedding: bool | None = None  # every second layer adds a token table to v
    backout: bool | None = None  # the final norm sees x minus part of the middle x
    vocab_pad: int | None = None  # rows of the tables are a multiple of it
    init: Literal["base", "modern"] | None = None
    optim: Literal["base", "modern"] | None = None
    fp8: bool = False  # training matmuls in fp8
    loss_chunk: int | Literal["auto"] = "auto"  # rows whose logits exist at once in the loss
    embedding_dtype: Literal["float32", "bfloat16"] = "float32"  # of wte and value embeddings

    def __post_init__(self) -> None:
        s = self.switches
        sizes = ("depth", "aspect_ratio", "head_dim", "width", "heads", "kv_heads", "mlp_ratio")
        refuse(
            *((_below(getattr(self, n), 1), n, getattr(self, n), "use 1 or more") for n in sizes),
            (self.variant not in VARIANTS, "variant", self.variant, "use base or modern"),
            (self.context < 2, "context", self.context, "use 2 or more"),
            (s.vocab_pad < 1, "vocab_pad", s.vocab_pad, "use 1 or more"),
            ((self.width is None) != (self.heads is None), "width", self.width,
             "give both width and heads, or neither"),
            (bool(set(s.windows) - {"S", "L"}) or not s.windows, "windows", s.windows,
             f"use the letters S and L{_other_letters(s.windows)}"),
            (not s.rope_theta > 0, "rope_theta", s.rope_theta, "use a number above 0"),
            (s.softcap < 0, "softcap", s.softcap, "use 0 for off, or a number above 0"),
            (self.loss_chunk != "auto" and _below(self.loss_chunk, 1), "loss_chunk",
             self.loss_chunk, "use auto, or 1 or more"),
            (self.embedding_dtype not in ("float32", "bfloat16"), "embedding_dtype",
             self.embedding_dtype, "use float32 or bfloat16; no scaler could unscale float16"),
        )  # fmt: skip
        d, H, K = self.shape
        key = "width" if self.width else "depth"
        fix = f"nearest: {', '.join(map(str, _near(self, key)))}" if not _fits(d, H) else ""
        whole = [k for k in range(1, H + 1) if H % k == 0]
        refuse(
            (not _fits(d, H), key, getattr(self, key),
             f"width {d} must split into {H} heads of even width; {fix}"),
            (H % K != 0, "kv_heads", K, f"must divide {H} heads: {', '.join(map(str, whole))}"),
        )  # fmt: skip

    @property
    def switches(self) -> Switches:
        """Every switch with its value: its own, or its variant's."""
        own = {f.name: getattr(self, f.name) for f in fields(Switches)}
        start = VARIANTS.get(self.variant, VARIANTS["base"])
        return replace(start, **{name: x for name, x in own.items() if x is not None})

    @property
    def shape(self) -> tuple[int, int, int]:
        """(width d, heads H, kv heads K)."""
        if self.width and self.heads:
            d, H = self.width, self.heads
        else:
            d = self.aspect_ratio * self.depth
            H = -(-d // self.head_dim)
            if self.variant == "modern":
                d = H * self.head_dim
        return d, H, self.kv_heads or H

    def layer_windows(self) -> list[int | None]:
        """Keys before its own that each layer sees; None = all. 128 ceil(T / 512) for S."""
        short, pattern = 128 * -(-self.context // 512), self.switches.windows
        letters = [pattern[i % len(pattern)] for i in range(self.depth - 1)] + ["L"]
        return [short if letter == "S" else None for letter in letters]

    def value_layers(self) -> list[int]:
        """Layers that have a value table: every second one, the last always."""
        first = (self.depth - 1) % 2 if self.switches.value_embedding else self.depth
        return list(range(first, self.depth, 2))

    def padded(self, vocab_size: int) -> int:
        """Vp: rows of wte, head and value tables."""
        pad = self.switches.vocab_pad
        return -(-vocab_size // pad) * pad

    def resolved(self) -> dict[str, Any]:
        """Every size and switch with its value; not what only says them, or how it is trained."""
        sizes = dict(zip(("width", "heads", "kv_heads"), self.shape, strict=True))
        said = {"variant", "aspect_ratio", "head_dim"}
        training = {"context", "init", "optim", "fp8", "loss_chunk", "embedding_dtype"}
        found = {**asdict(self), **asdict(self.switches), **sizes}
        return {name: value for name, value in found.items() if name not in said | training}


# ---------------------------------------------------------------- scaling, pure


REFERENCE_BATCH = 2**19  # tokens of a step at which rates and decay were tuned, on depth 12


def scaling_params(config: Config, vocab_size: int) -> int:
    """P of tokens per parameter: all of base; block matrices, gates and head of modern."""
    (d, H, K), L, rows = config.shape, config.depth, config.padded(vocab_size)
    kv = K * d // H  # K D
    blocks = L * (2 * d * d + 2 * d * kv + 2 * config.mlp_ratio * d * d)
    tables, gates = len(config.value_layers()), min(GATE_INPUTS, d) * K
    if config.switches.optim == "modern":
        return blocks + tables * gates + rows * d
    s = config.switches
    scalars = 2 * L * s.resid_mix + s.smear * (min(SMEAR_INPUTS, d) + 1) + s.backout
    return blocks + tables * (gates + rows * kv) + 2 * rows * d + scalars


def reference_params(config: Config, vocab_size: int) -> int:
    """`scaling_params` of depth 12 with the same switches and vocabulary."""
    geometry = {f.name: f.default for f in fields(Config) if f.name in ("aspect_ratio", "head_dim")}
    d12 = replace(config, depth=12, width=None, heads=None, kv_heads=None, **geometry)
    return scaling_params(d12, vocab_size)


def batch_factor(batch_tokens: int) -> float:
    """eta = sqrt(batch / 2^19) in [0.25, 2]: rates follow the batch, yet a toy still learns."""
    return min(2.0, max(0.25, math.sqrt(batch_tokens / REFERENCE_BATCH)))


def muon_decay(batch_tokens: int, tokens: float, reference_tokens: float) -> float:
    """0.28 sqrt(batch / 2^19) D_ref / D in [0, 0.6] (arXiv 2405.13698); D tokens really trained."""
    return min(
        0.6, 0.28 * math.sqrt(batch_tokens / REFERENCE_BATCH) * reference_tokens / max(tokens, 1)
    )


# ---------------------------------------------------------------- the model


class State(NamedTuple):
    """Rows so far: length, last embedding (B, 1, d), k and v (B, K, m, D) of each layer."""

    position: int
    last: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Attention(nn.Module):
    """RoPE, then QK-norm, then causal softmax within the layer's window; no biases."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = config.shape
        kv = self.kv_heads * d // self.heads
        self.window = config.layer_windows()[layer]
        # g q . g k / sqrt(D): the factor of both after their norm is one factor of the scores.
        self.scale = config.switches.qk_scale**2 / math.sqrt(d // self.heads)
        self.q, self.k = Linear(d, d, fp8=config.fp8), Linear(d, kv, fp8=config.fp8)
        self.v, self.o = Linear(d, kv, fp8=config.fp8), Linear(d, d, fp8=config.fp8)
        gated = layer in config.value_layers()
        self.gate = Linear(min(GATE_INPUTS, d), self.kv_heads) if gated else None

    def forward(
        self,
        x: Tensor,
        rope: Tables,
        table: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        engine: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """normed x (B, n, d), value embeddings (B, n, K D) -> output, and all k, v so far."""
        K = self.kv_heads
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, n, D)
        k = self.k(x).unflatten(-1, (K, -1)).transpose(1, 2)  # (B, K, n, D)
        v = self.v(x).unflatten(-1, (K, -1)).transpose(1, 2)
        if self.gate is not None and table is not None:
            gates = 3 * torch.sigmoid(self.gate(x[..., : self.gate.weight.shape[1]]))  # (B, n, K)
            extra = gates[..., None] * table.unflatten(-1, (K, -1))
            v = (v + extra.transpose(1, 2)).to(v.dtype)
        q, k = rms_norm(rotate(q, rope)), rms_norm(rotate(k, rope))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = causal_attention(q, k, v, window=self.window, scale=self.scale, engine=engine)
        return self.o(out.transpose(1, 2).flatten(2)), k, v


class Block(nn.Module):
    """x + attention, then x + MLP with relu^2, each on the normed x."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        d = config.shape[0]
        self.attn = Attention(config, layer)
        self.up = Linear(d, config.mlp_ratio * d, fp8=config.fp8)
        self.down = Linear(config.mlp_ratio * d, d, fp8=config.fp8)

    def forward(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, d) -> the same, and k, v; context: the other arguments of Attention."""
        out, k, v = self.attn(rms_norm(x), *context)
        x = x + out
        h = rms_norm(x)
        if self.up.fp8 or self.down.fp8:
            return x + self.down(F.relu(self.up(h)).square()), k, v
        return x + relu2_mlp(h, self.up.weight, self.down.weight), k, v


class Model(Family):
    """wte -> L blocks -> norm -> untied head; switches as in `Config`."""

    compiled = ("hidden",)
    _engine = "auto"  # of windowed layers, known once placed

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_context = config, vocab_size, config.context
        self.switches = s = config.switches
        (d, H, K), rows = config.shape, config.padded(vocab_size)
        self.windows, self.head_dim = config.layer_windows(), d // H
        dtype = getattr(torch, config.embedding_dtype)
        self.wte = Table(rows, d, dtype)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.head = Linear(d, rows)
        tables = {str(i): Table(rows, K * d // H, dtype) for i in config.value_layers()}
        self.value_tables = nn.ModuleDict(tables)
        if s.smear:
            self.smear = Linear(min(SMEAR_INPUTS, d), 1)
            self.smear_scale = nn.Parameter(torch.empty(()))  # lambda
        if s.resid_mix:
            self.resid = nn.Parameter(torch.empty(config.depth))  # r
            self.skip = nn.Parameter(torch.empty(config.depth))  # s
        if s.backout:
            self.backout = nn.Parameter(torch.empty(()))  # beta

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        keep: bool = False,
        unit: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> tuple[Tensor, State | None]:
        """tokens (B, n) -> the final normed x (B, n, d), and the state where `keep` asks for it.

        unit(i): inside it block i has its weights.
        """
        s, n, start = self.switches, tokens.shape[1], state.position if state else 0
        dtype, wide = self._dtypes(tokens.device)
        e = rms_norm(self.wte(tokens).to(wide))
        x = x0 = self._smeared(e, state) if s.smear else e
        rope = rope_tables(start, n, self.head_dim, s.rope_theta, x.device, dtype)
        middle, keys, values = x, [], []
        for i, block in enumerate(self.blocks):
            if s.resid_mix:
                x = self.resid[i] * x + self.skip[i] * x0
            table = self.value_tables[str(i)](tokens) if str(i) in self.value_tables else None
            past = (state.keys[i], state.values[i]) if state else None
            with unit(i):
                x, k, v = self.run_block(block, x, rope, table, past, self.attention)
            if keep:  # a windowed layer never looks back further than its window
                reach = self.windows[i] or k.shape[2]
                keys.append(k[:, :, -reach:])
                values.append(v[:, :, -reach:])
            if i == self.config.depth // 2:
                middle = x
        x = rms_norm(x - self.backout * middle if s.backout else x)
        kept = State(start + n, e[:, -1:], tuple(keys), tuple(values)) if keep else None
        return x, kept

    def _smeared(self, e: Tensor, state: State | None) -> Tensor:
        """e_t + lambda sigma(w . e_t[:c]) e_(t-1); before the first position there is nothing."""
        first = torch.zeros_like(e[:, :1]) if state is None else state.last
        before = torch.cat((first, e[:, :-1]), dim=1)
        gate = torch.sigmoid(self.smear(e[..., : self.smear.weight.shape[1]]))
        return e + (self.smear_scale * gate * before).to(e.dtype)

    def _dtypes(self, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
        """Of the matmuls and of the residual stream, which under autocast keeps the table's."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type), self.wte.weight.dtype
        return self.head.weight.dtype, self.head.weight.dtype

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """tokens (B, n) int64 -> logits (B, n, V) fp32, and the state that continues the rows."""
        with self.in_place() as unit:
            x, kept = self.hidden(tokens, state, keep=True, unit=unit)
            return self._logits(x), kept

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Logits (N, V) of the marked positions (B, n) alone, and the state."""
        with self.in_place() as unit:
            x, kept = self.hidden(tokens, state, keep=True, unit=unit)
            return self._logits(x[where]), kept

    def repeat_state(self, state: State, n: int) -> State:
        """Views of row 0: nothing here writes into a state."""
        repeat = lambda x: x[:1].expand(n, *x.shape[1:])  # noqa: E731
        return State(
            state.position, repeat(state.last),
            tuple(map(repeat, state.keys)), tuple(map(repeat, state.values)),
        )  # fmt: skip

    def _logits(self, x: Tensor) -> Tensor:
        """The final normed x (..., d) -> (..., V) fp32, softcapped."""
        z = F.linear(x, self.head.weight[: self.vocab_size])
        z = z.float() if z.dtype != torch.float64 else z  # near 15 a bf16 step is 0.06
        c = self.switches.softcap
        return c * torch.tanh(z / c) if c else z

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """One loss: mean cross-entropy of the batch's targets."""
        if self.engine is not None:
            moment = (batch.step, batch.first_row)
            yield self.engine.loss(batch.tokens, batch.targets, moment)
            return
        yield self._cross_entropy(batch.tokens, batch.targets, "mean")

    # ------------------------------------------------------------ in the units that are streamed

    @property
    def width(self) -> int:
        """d."""
        return self.config.shape[0]

    def stream_units(self) -> Sequence[nn.Module]:
        """The blocks; UserError where more than x goes from one to the next."""
        s = self.switches
        for name in ("resid_mix", "value_embedding", "backout", "smear"):
            if getattr(s, name):
                raise UserError(
                    "blocks cannot be streamed", value=name, remedy="set runtime.stream: off"
                )
        return list(self.blocks)

    def embed(self, tokens: Tensor, moment: tuple[int, int]) -> Tensor:
        """tokens (b, T) -> x (b, T, d)."""
        return rms_norm(self.wte(tokens).to(self._dtypes(tokens.device)[1]))

    def apply_unit(self, application: int, x: Tensor, moment: tuple[int, int]) -> Tensor:
        """Block number `application`."""
        dtype, _ = self._dtypes(x.device)
        theta = self.switches.rope_theta
        rope = rope_tables(0, x.shape[1], self.head_dim, theta, x.device, dtype)
        return self.blocks[application](x, rope, None, None, self.attention)[0]

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy from the last block's output."""
        return self._from_hidden(rms_norm(x), targets, "mean")

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy by position (B, T), without the logits of all positions."""
        return self._cross_entropy(tokens, targets, "none")

    def _cross_entropy(self, tokens: Tensor, targets: Tensor, reduction: Any) -> Tensor:
        with self.in_place() as unit:
            x, _ = self.hidden(tokens, unit=unit)
            return self._from_hidden(x, targets, reduction)

    def _from_hidden(self, x: Tensor, targets: Tensor, reduction: Any) -> Tensor:
        return linear_cross_entropy(
            x, self.head.weight, targets, vocab_size=self.vocab_size, reduction=reduction,
            softcap=self.switches.softcap, chunk=self.config.loss_chunk,
        )  # fmt: skip

    # ------------------------------------------------------------ weights and place

    def take_weights(self, config: Config, read: ReadWeights) -> None:
        """Those of a model with equal sizes and switches; a longer context may follow."""
        require_same(self.config.resolved(), config.resolved())
        super().take_weights(config, read)

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """Section 4 of the family's page: the table of first values, by parameter name."""

        def normal(std: float) -> Tensor:
            return torch.empty(shape).normal_(0, std, generator=draw)

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(shape).uniform_(low, high, generator=draw)

        modern, L = self.switches.init == "modern", self.config.depth
        slope = torch.arange(L) / max(L - 1, 1)
        a = math.sqrt(3 / self.config.shape[0])
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind in ("o", "down") or (kind == "head" and not modern):
            return torch.zeros(shape)
        if name.startswith("value_tables"):
            return uniform(-a, a)
        match kind:
            case "resid":
                return 1.15 - 0.10 * slope
            case "skip":
                return 0.20 - 0.15 * slope
            case "smear_scale":
                return torch.zeros(shape)
            case "backout":
                return torch.full(shape, 0.2)
            case "gate" | "smear":
                return uniform(0, 0.02)
            case "wte":
                return normal(0.8 if modern else 1.0)
            case "head":
                return normal(0.001)
        if modern:
            return uniform(-0.4 * a, 0.4 * a) if kind == "up" else uniform(-a, a)
        out, inputs = shape
        return normal(min(1.0, math.sqrt(out / inputs)) / math.sqrt(inputs))

    def place(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move; UserError where fp8 or the attention engine asked for is not to be had there."""
        device = torch.device(device)
        if self.config.fp8:
            require_fp8(device)
        self._engine = choose_engine(self.attention, device, dtype)
        super().place(device, dtype)

    def notes(self) -> list[str]:
        """The attention engine in use."""
        short = [w for w in self.windows if w and w < self.config.context - 1]
        full = f"sdpa in {self.config.depth - len(short)} full layers"
        windowed = f"{self._engine} in {len(short)} layers of window {short[0]}, " if short else ""
        return [f"attention: {windowed}{full}"]

    # ------------------------------------------------------------ optimisation and accounts

    def defaults(self) -> Defaults:
        """The era's schedule, clipping and horizon."""
        if self.switches.optim == "base":
            return Defaults(schedule="base", grad_clip=1.0, param_data_ratio=20.0)
        return Defaults(
            schedule="modern", grad_clip=0.0, param_data_ratio=12.0, batch_tokens="auto"
        )

    def scaling_params(self) -> int:
        """Parameters that the horizon counts, `scaling_params` of this module."""
        return scaling_params(self.config, self.vocab_size)

    def reference_params(self) -> int:
        """The same at depth 12."""
        return reference_params(self.config, self.vocab_size)

    def param_groups(self, optim: Optim) -> list[Group]:
        """The era's table; `lr`, `betas`, `eps`, `weight_decay` of `optim` have no part in it."""
        modern = self.switches.optim == "modern"
        eta = batch_factor(optim.batch_tokens) if modern else 1.0
        m = (self.config.shape[0] / 768) ** -0.5
        members: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            members.setdefault(_group_of(name), {})[name] = parameter
        # name: (lr, betas, weight decay); epsilon 1e-10 in all of them
        table = {
            "head": (0.004 * m, (0.8, 0.95), 0.0),
            "wte": (0.2 * m, (0.8, 0.95), 0.0),
            "value_tables": (0.15 * m * eta, (0.8, 0.995), 0.01),
            "resid": (0.005 * eta, (0.8, 0.95), 0.05),
            "skip": (0.5 * eta, (0.96, 0.95), 0.0),
            "scalars": (0.2, (0.8, 0.95), 0.0),
        }
        if modern:
            table["head"] = (0.008 * m * eta, (0.8, 0.96), 0.01)
            table["wte"] = (0.3 * m * eta, (0.8, 0.995), 0.001)
        groups = [
            Group(
                name=name, params=members[name], lr=lr, betas=betas, eps=1e-10, weight_decay=decay
            )
            for name, (lr, betas, decay) in table.items()
            if name in members
        ]
        rule = self._normuon(optim, 0.02 * eta) if modern else {"rule": "muon", "lr": 0.02}
        # The reference iterates in bf16, for its devices are fast at it; an fp32 run's is not.
        bf16 = optim.compute_dtype == torch.bfloat16
        dtype = torch.bfloat16 if bf16 else torch.float32
        matrices = members["matrices"]
        return [*groups, Group(name="matrices", params=matrices, iteration_dtype=dtype, **rule)]

    def _normuon(self, optim: Optim, lr: float) -> dict[str, Any]:
        ratio = optim.param_data_ratio or self.defaults().param_data_ratio
        tokens = float(optim.steps * optim.batch_tokens)
        decay = muon_decay(optim.batch_tokens, tokens, ratio * self.reference_params())
        return {"rule": "normuon", "lr": lr, "betas": (0.0, 0.9), "weight_decay": decay}

    def _matmul_weights(self) -> int:
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))

    def _visible(self, T: int) -> int:
        """Sum over layers of H D min(w, T)."""
        d = self.config.shape[0]
        return sum(d * min(w or T, T) for w in self.windows)

    def flops_per_token(self, T: int) -> int:
        """6 a weight, 12 a visible key channel; causality is not halved (arXiv 2204.02311)."""
        return 6 * self._matmul_weights() + 12 * self._visible(T)

    def decode_flops(self, n: int) -> int:
        """FLOPs of one new token after n others."""
        return 2 * self._matmul_weights() + 4 * self._visible(n)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes that one position adds to the state of a row (windowed layers stop growing)."""
        d, H, K = self.config.shape
        return 2 * self.config.depth * K * d // H * element_bytes

    # ------------------------------------------------------------ export

    def hf_native(self) -> Native:
        """transformers' nanochat class; UserError names the first switch that it has not."""
        base, free = VARIANTS["base"], {"init", "optim", "vocab_pad"}  # no part of the forward
        for name in (f.name for f in fields(Switches) if f.name not in free):
            if (value := getattr(self.switches, name)) != getattr(base, name):
                raise UserError(f"transformers' nanochat class has no {name}", value=value)
        (d, H, K), V = self.config.shape, self.vocab_size
        config = {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "hidden_size": d,
            "num_hidden_layers": self.config.depth,
            "num_attention_heads": H,
            "num_key_value_heads": K,
            "intermediate_size": self.config.mlp_ratio * d,
            "hidden_act": "relu2",
            "max_position_embeddings": self.config.context,
            "rms_norm_eps": EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": base.rope_theta},
            "final_logit_softcapping": base.softcap,
            "attention_bias": False,
            "tie_word_embeddings": False,
        }
        theirs = {"wte.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
        for i in range(self.config.depth):
            ours, layer = f"blocks.{i}", f"model.layers.{i}"
            for part in "qkvo":
                theirs[f"{ours}.attn.{part}.weight"] = f"{layer}.self_attn.{part}_proj.weight"
            theirs[f"{ours}.up.weight"] = f"{layer}.mlp.fc1.weight"
            theirs[f"{ours}.down.weight"] = f"{layer}.mlp.fc2.weight"
        names = {theirs[name]: name for name in self.state_dict()}
        return Native(config=config, names=names, rows={"wte.weight": V, "head.weight": V})


def _group_of(name: str) -> str:
    """The row of the optimizer table that a parameter belongs to."""
    if name.startswith("blocks."):
        return "matrices"
    if name in ("smear.weight", "smear_scale", "backout"):
        return "scalars"
    return name.split(".")[0]
