"""One layer of the GPT: attention with RoPE and QK-norm, then an MLP with relu^2; no biases.

Letters as in gpt.py: B batch, n positions, d width, H heads, K kv heads, D = d / H head width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.kernels.relu2_mlp import relu2_mlp
from lib.models._gpt_sizes import GATE_INPUTS
from lib.nn.attention import attend_after_shared, causal_attention, continues_one_row
from lib.nn.linear import Linear
from lib.nn.norm import rms_norm
from lib.nn.rope import Tables, rotate

if TYPE_CHECKING:
    from lib.models.gpt import Config


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
        since: int = 0,
        keep: bool = True,
        reach: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """normed x (B, n, d), value embeddings (B, n, K D) -> output, and all k, v so far.

        since: positions before it are looked at, but have no output. keep: False where nobody asks
        for k and v. reach: looks back no further than that, whatever the layer's window.
        """
        K = self.kv_heads
        q = self.q(x[:, since:]).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, n, D)
        k = self.k(x).unflatten(-1, (K, -1)).transpose(1, 2)  # (B, K, n, D)
        v = self.v(x).unflatten(-1, (K, -1)).transpose(1, 2)
        if self.gate is not None and table is not None:
            gates = 3 * torch.sigmoid(self.gate(x[..., : self.gate.weight.shape[1]]))  # (B, n, K)
            extra = gates[..., None] * table.unflatten(-1, (K, -1))
            v = (v + extra.transpose(1, 2)).to(v.dtype)
        cos, sin = rope
        q, k = rms_norm(rotate(q, (cos[since:], sin[since:]))), rms_norm(rotate(k, rope))
        if past is not None and not keep and continues_one_row(past[0], len(x)):
            out = attend_after_shared(q, k, v, past, window=self.window, scale=self.scale)
        else:
            if past is not None:
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            window = self.window if reach is None else min(self.window or reach, reach)
            out = causal_attention(q, k, v, window=window, scale=self.scale, engine=engine)
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
        x = x[:, -out.shape[1] :] + out
        h = rms_norm(x)
        if self.up.fp8 or self.down.fp8:
            return x + self.down(F.relu(self.up(h)).square()), k, v
        return x + relu2_mlp(h, self.up.weight, self.down.weight), k, v
