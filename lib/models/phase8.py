"""Phase 8: linear attention with a scalar decay per head, O(T); a tensor train for ids.

    x = E[token]; per block: x = x + Y(N(x)), x = x + M(N(x)); logits = N(x) E^T
    S_t = a_t S_(t-1) + Delta_t k_t^T v_t, o_t = q_t S_t, Y = (N_head(o) * silu(n W_z)) W_o

In: ids (B, n). Out: logits (B, n, V). The state is one matrix a head and layer, whatever the
context. Table, feed-forward layer and norms are those of phase 7.
Letters: B batch, n positions, T context, V vocabulary, L layers, d width, H heads, D_k key width,
D_v = d / H, F d_ff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.refusal import refuse
from lib.kernels.gla import gla
from lib.models._phase7_tied import State, Tied
from lib.nn.conv import CausalConv
from lib.nn.linear import Linear
from lib.nn.norm import RmsNorm
from lib.nn.swiglu import SwiGlu

CHUNK = 64  # steps that the operator takes at once, for the count of FLOPs
CONV = 4  # inputs that q, k and v see


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.phase8`."""

    width: int = 2048  # d
    depth: int = 24  # L
    heads: int = 16  # H
    key_width: int = 64  # D_k, of a head
    d_ff: int = 7424  # F, hidden width of SwiGLU
    context: int = 1024  # T
    tt_rank: int = 32  # R
    tt_order: Literal["identity", "strided", "random"] = "identity"
    tt_phase: bool = False  # cos(theta_k) on each term: a gauge, folded at export
    tt_lr: float = 8.0  # rate of the cores over that of the rest
    embedding: Literal["tt", "lowrank", "dense"] = "tt"
    beyond_context: bool = False  # rows may go on after T positions

    def __post_init__(self) -> None:
        d, H = self.width, self.heads
        sizes = ("width", "depth", "heads", "key_width", "d_ff", "context", "tt_rank")
        near = [x for x in range(max(1, d - H), d + H + 1) if H > 0 and x % H == 0]
        refuse(
            self,
            *((getattr(self, n) < 1, n, "use 1 or more") for n in sizes),
            (H > 0 and d % H != 0, "width",
             f"must split into {H} heads; nearest: {', '.join(map(str, near))}"),
            (not self.tt_lr > 0, "tt_lr", "use a number above 0"),
        )  # fmt: skip


class LayerState(NamedTuple):
    """Of one layer: last inputs of the convolutions of q, k, v, and S (B, H, D_k, D_v) fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    S: Tensor


class Mixer(nn.Module):
    """Y: q, k, v through short convolutions, the decaying sum, a norm per head, an output gate."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, self.heads = config.width, config.heads
        keys = config.heads * config.key_width
        self.q, self.k, self.v, self.z = (
            Linear(d, keys),
            Linear(d, keys),
            Linear(d, d),
            Linear(d, d),
        )
        self.conv_q, self.conv_k = CausalConv(keys, CONV), CausalConv(keys, CONV)
        self.conv_v = CausalConv(d, CONV)
        self.step = Linear(d, config.heads)  # w_h
        self.step_bias = nn.Parameter(torch.empty(config.heads))
        self.rate = nn.Parameter(torch.empty(config.heads))  # A_h
        self.norm = RmsNorm(d // config.heads)
        self.o = Linear(d, d)

    def forward(self, n: Tensor, past: LayerState | None) -> tuple[Tensor, LayerState]:
        """normed n (B, n, d) -> Y(n), and what the next call needs."""
        q, last_q = self.conv_q(self.q(n), past.q if past else None)
        k, last_k = self.conv_k(self.k(n), past.k if past else None)
        v, last_v = self.conv_v(self.v(n), past.v if past else None)
        q, k, v = (
            F.silu(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)
        )  # (B, H, n, width)
        with torch.autocast(n.device.type, enabled=False):
            x = n.to(self.rate.dtype)
            delta = F.softplus(self.step(x) + self.step_bias)  # (B, n, H), fp32
            log_a = -(delta * self.rate.exp()).transpose(1, 2)
            S = (
                x.new_zeros(len(n), self.heads, k.shape[-1], v.shape[-1])
                if past is None
                else past.S
            )
            scaled = _unit(k) * delta.transpose(1, 2)[..., None]
            o, S = gla(_unit(q).to(v.dtype), scaled.to(v.dtype), v, log_a, S)
            o = self.norm(o.to(x.dtype))
        gated = o.transpose(1, 2).flatten(2) * F.silu(self.z(n))
        return self.o(gated), LayerState(last_q, last_k, last_v, S)


def _unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, fp32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """x + Y(N(x)), then x + M(N(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(config.width), RmsNorm(config.width)
        self.mixer = Mixer(config)
        self.mlp = SwiGlu(config.width, config.d_ff)

    def forward(self, x: Tensor, past: LayerState | None) -> tuple[Tensor, LayerState]:
        """x (B, n, d) -> the same, and what the layer keeps."""
        mixed, kept = self.mixer(self.norm1(x), past)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), kept


class Model(Tied):
    """Tensor train -> L blocks -> norm -> the same tensor train."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RmsNorm(config.width)

    def hidden(
        self, tokens: Tensor, state: State | None = None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """tokens (B, n) -> the final normed x (B, n, d), and what each layer keeps."""
        x, _ = self.begin(tokens, state)
        kept = []
        for i, block in enumerate(self.blocks):
            x, layer = self.run_block(block, x, state.layers[i] if state else None)
            kept.append(layer)
        return self.norm(x), tuple(kept)

    def first_value(self, kind: str, shape: torch.Size) -> Tensor | None:
        """phase7.md 7.6."""
        match kind:
            case "rate":  # exp(A_h) evenly over [1, 16]
                return torch.linspace(1, 16, shape[0]).log()
            case "step_bias":  # softplus(b_h) evenly in its logarithm over [1e-3, 0.1]
                steps = torch.logspace(-3, -1, shape[0], dtype=torch.float64)
                return torch.log(torch.expm1(steps)).float()
        return None

    def flops_per_token(self, T: int) -> int:
        """6 (block matrices + V d), thrice the operator's 2 C (D_k + D_v) + 4 D_k D_v a head."""
        c, keys, values = self.config, self.config.key_width, self.config.width // self.config.heads
        operator = 2 * min(CHUNK, T) * (keys + values) + 4 * keys * values
        mixers = 3 * c.depth * c.heads * operator
        return 6 * (self.matrix_weights() + self.vocab_size * c.width) + mixers
