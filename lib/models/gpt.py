"""GPT, the nanochat-style family: weightless RMSNorm, RoPE, QK-norm, relu^2, Muon; two eras.

`variant` chooses defaults: base = October 2025 (exports to transformers' nanochat class), modern =
July 2026. Every difference is a switch of its own. In: ids (B, n). Out: logits (B, n, V),
softcapped, fp32.
Invariant: any split of a sequence into chunks gives the full forward's logits.
Letters: B batch, T context, n positions of this call, V vocabulary (Vp padded), L layers, d width,
H heads, K kv heads, D = d / H head width.
"""

from __future__ import annotations

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
from lib.models._gpt_block import Block
from lib.models._gpt_native import native
from lib.models._gpt_sizes import (
    SMEAR_INPUTS,
    decode_flops,
    kv_bytes_per_token,
    reference_params,
    scaling_params,
    training_flops,
)
from lib.models._gpt_training import RATIO, initial, param_groups
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
from lib.nn.attention import choose_engine
from lib.nn.linear import Linear, Table, require_fp8
from lib.nn.norm import rms_norm
from lib.nn.rope import rope_tables

PAIR_PRIMES = (2_654_435_761, 805_459_861)  # products with ids stay below 2^63


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
    bigram: int
    vocab_pad: int
    init: Literal["base", "modern"]
    optim: Literal["base", "modern"]


_OFF = {"resid_mix": False, "smear": False, "value_embedding": False, "backout": False}
VARIANTS = {
    "base": Switches(
        rope_theta=10_000.0, qk_scale=1.0, softcap=15.0, windows="L", vocab_pad=1, bigram=0,
        init="base", optim="base", **_OFF,
    ),
    "modern": Switches(
        rope_theta=100_000.0, qk_scale=1.2, softcap=15.0, windows="SSSL", vocab_pad=64, bigram=0,
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
    bigram: int | None = None  # rows of a table for pairs of ids, hashed; 0 = off
    vocab_pad: int | None = None  # rows of the tables are a multiple of it
    init: Literal["base", "modern"] | None = None
    optim: Literal["base", "modern"] | None = None
    window_warmup: int = 0  # steps of training in which attention's reach grows to T, 0 = off
    fp8: bool = False  # training matmuls in fp8
    loss_chunk: int | Literal["auto"] = "auto"  # rows whose logits exist at once in the loss
    embedding_dtype: Literal["float32", "bfloat16"] = "float32"  # of wte and value embeddings

    def __post_init__(self) -> None:
        s = self.switches
        sizes = ("depth", "aspect_ratio", "head_dim", "width", "heads", "kv_heads", "mlp_ratio")
        refuse(
            self,
            *((_below(getattr(self, n), 1), n, "use 1 or more") for n in sizes),
            (self.variant not in VARIANTS, "variant", "use base or modern"),
            (self.context < 2, "context", "use 2 or more"),
            (s.vocab_pad < 1, "vocab_pad", "use 1 or more"),
            (s.bigram != 0 and s.bigram < 2, "bigram", "use 0 for off, or 2 or more"),
            (self.window_warmup < 0, "window_warmup", "use 0 or more"),
            ((self.width is None) != (self.heads is None), "width",
             "give both width and heads, or neither"),
            (bool(set(s.windows) - {"S", "L"}) or not s.windows, "windows",
             f"use the letters S and L{_other_letters(s.windows)}"),
            (not s.rope_theta > 0, "rope_theta", "use a number above 0"),
            (s.softcap < 0, "softcap", "use 0 for off, or a number above 0"),
            (self.loss_chunk != "auto" and _below(self.loss_chunk, 1), "loss_chunk",
             "use auto, or 1 or more"),
            (self.embedding_dtype not in ("float32", "bfloat16"), "embedding_dtype",
             "use float32 or bfloat16; no scaler could unscale float16"),
        )  # fmt: skip
        d, H, K = self.shape
        key = "width" if self.width else "depth"
        fix = f"nearest: {', '.join(map(str, _near(self, key)))}" if not _fits(d, H) else ""
        whole = [k for k in range(1, H + 1) if H % k == 0]
        refuse(
            self,
            (not _fits(d, H), key,
             f"width {d} must split into {H} heads of even width; {fix}"),
            (H % K != 0, "kv_heads", f"must divide {H} heads: {', '.join(map(str, whole))}"),
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

    def reach(self, step: int) -> int | None:
        """Keys before its own that training's attention sees at `step` at most: quarters of T."""
        if step >= self.window_warmup:
            return None
        return -(-self.context // 4) * (1 + 4 * step // self.window_warmup)

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
        training.add("window_warmup")
        found = {**asdict(self), **asdict(self.switches), **sizes}
        return {name: value for name, value in found.items() if name not in said | training}


# ---------------------------------------------------------------- the model


class State(NamedTuple):
    """Rows so far: length, last id (B, 1) and embedding (B, 1, d); k, v (B, K, m, D) by layer."""

    position: int
    last_id: Tensor
    last: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


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
        if s.bigram:
            self.pairs = Table(s.bigram, d, dtype)
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
        since: int = 0,
        reach: int | None = None,
    ) -> tuple[Tensor, State | None]:
        """tokens (B, n) -> the final normed x (B, n, d), and the state where `keep` asks for it.

        unit(i): inside it block i has its weights. since: x begins there; of positions before it
        the last block makes only what others look at, a sixth of its products. reach: most keys
        that any layer looks back at.
        """
        s, n, start = self.switches, tokens.shape[1], state.position if state else 0
        dtype, wide = self._dtypes(tokens.device)
        e = rms_norm(self.wte(tokens).to(wide))
        x0 = self._smeared(e, state) if s.smear else e
        if s.bigram:
            x0 = x0 + self.pairs(self._pair_rows(tokens, state)).to(wide)
        rope = rope_tables(start, n, self.head_dim, s.rope_theta, e.device, dtype)
        x = middle = x0
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            if s.resid_mix:
                x = self.resid[i] * x + self.skip[i] * x0
            table = self.value_tables[str(i)](tokens) if str(i) in self.value_tables else None
            past = (state.keys[i], state.values[i]) if state else None
            wanted = since if i == len(self.blocks) - 1 else 0
            with unit(i):
                x, k, v = self.run_block(
                    block, x, rope, table, past, self.attention, wanted, keep, reach
                )
            if keep:  # a windowed layer never looks back further than its window
                seen = self.windows[i] or k.shape[2]
                keys.append(k[:, :, -seen:])
                values.append(v[:, :, -seen:])
            if i == self.config.depth // 2:
                middle = x
        x = rms_norm(x - self.backout * middle[:, -x.shape[1] :] if s.backout else x)
        if not keep:
            return x, None
        return x, State(start + n, tokens[:, -1:], e[:, -1:], tuple(keys), tuple(values))

    def _smeared(self, e: Tensor, state: State | None) -> Tensor:
        """e_t + lambda sigma(w . e_t[:c]) e_(t-1); before the first position there is nothing."""
        first = torch.zeros_like(e[:, :1]) if state is None else state.last
        before = torch.cat((first, e[:, :-1]), dim=1)
        gate = torch.sigmoid(self.smear(e[..., : self.smear.weight.shape[1]]))
        return e + (self.smear_scale * gate * before).to(e.dtype)

    def _pair_rows(self, tokens: Tensor, state: State | None) -> Tensor:
        """Row (B, n) for the id before and this one, by a spatial hash (arXiv 2201.05989 eq. 4).

        Row 0 is the first position's, which has no id before it.
        """
        first = tokens[:, :1] if state is None else state.last_id
        before = torch.cat((first, tokens[:, :-1]), dim=1)
        rows = 1 + ((before * PAIR_PRIMES[0]) ^ (tokens * PAIR_PRIMES[1])) % (
            self.switches.bigram - 1
        )
        if state is None:
            rows[:, 0] = 0
        return rows

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
        self, tokens: Tensor, where: Tensor, state: State | None = None, keep: bool = True
    ) -> tuple[Tensor, State | None]:
        """Logits (N, V) of the marked positions (B, n) alone, and the state where `keep` says."""
        marked = where.any(dim=0).nonzero()
        since = int(marked[0]) if len(marked) else tokens.shape[1] - 1
        with self.in_place() as unit:
            x, kept = self.hidden(tokens, state, keep=keep, unit=unit, since=since)
            return self._logits(x[where[:, since:]]), kept

    def repeat_state(self, state: State, n: int) -> State:
        """Views of row 0: nothing here writes into a state."""
        repeat = lambda x: x[:1].expand(n, *x.shape[1:])  # noqa: E731
        return State(
            state.position, repeat(state.last_id), repeat(state.last),
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
        reach = self.config.reach(batch.step)
        yield self._cross_entropy(batch.tokens, batch.targets, "mean", reach)

    # ------------------------------------------------------------ in the units that are streamed

    @property
    def width(self) -> int:
        """d."""
        return self.config.shape[0]

    def stream_units(self) -> Sequence[nn.Module]:
        """The blocks; UserError where more than x goes from one to the next."""
        s = self.switches
        names = ("resid_mix", "value_embedding", "backout", "smear", "bigram")
        in_use = [n for n in names if getattr(s, n)] + ["window_warmup"] * (
            self.config.window_warmup > 0
        )
        if in_use:
            raise UserError(
                "blocks cannot be streamed", value=in_use[0], remedy="set runtime.stream: off"
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

    def _cross_entropy(
        self, tokens: Tensor, targets: Tensor, reduction: Any, reach: int | None = None
    ) -> Tensor:
        with self.in_place() as unit:
            x, _ = self.hidden(tokens, unit=unit, reach=reach)
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
        """The era's table of first values."""
        return initial(self.config, name, shape, draw)

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
        era = self.switches.optim
        if era == "base":
            return Defaults(schedule="base", grad_clip=1.0, param_data_ratio=RATIO[era])
        return Defaults(
            schedule="modern", grad_clip=0.0, param_data_ratio=RATIO[era], batch_tokens="auto"
        )

    def scaling_params(self) -> int:
        """Parameters that the horizon counts."""
        return scaling_params(self.config, self.vocab_size)

    def reference_params(self) -> int:
        """The same at depth 12."""
        return reference_params(self.config, self.vocab_size)

    def param_groups(self, optim: Optim) -> list[Group]:
        """The era's table; `lr`, `betas`, `eps`, `weight_decay` of `optim` have no part in it."""
        return param_groups(self.config, self.vocab_size, dict(self.named_parameters()), optim)

    def flops_per_token(self, T: int) -> int:
        """6 a weight, 12 a visible key channel; causality is not halved (arXiv 2204.02311)."""
        return training_flops(self.config, self.vocab_size, T)

    def decode_flops(self, n: int) -> int:
        """FLOPs of one new token after n others."""
        return decode_flops(self.config, self.vocab_size, n)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes that one position adds to the state of a row (windowed layers stop growing)."""
        return kv_bytes_per_token(self.config, element_bytes)

    def hf_native(self) -> Native:
        """transformers' nanochat class; UserError names the first switch that it has not."""
        return native(self.config, VARIANTS["base"], self.vocab_size, list(self.state_dict()))
