"""Transformer blocks that may be applied many times: pre-norm or post-norm.

In:  u (B, n, d) of the newest n positions, and what one application meets (`Past`).
Out: the same shape, and K/V of all positions so far, which the caller keeps by application.
Letters: B batch, n positions of this call, m earlier ones, d width, H heads, D = d / H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.nn.attention import causal_attention
from lib.nn.norm import rms_norm
from lib.nn.rope import Tables, rotate


class Past(NamedTuple):
    """What one block application meets: K/V (B, H, m, D) of earlier positions, and stand-ins.

    Where `halted` (B, n) is set, this call's own K/V are those of the last step that was computed.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    halted: Tensor | None = None
    own: tuple[Tensor, Tensor] | None = None


class Attention(nn.Module):
    """Causal softmax attention; with rotary tables also QK-norm (no biases), else biases."""

    def __init__(self, d: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (d // heads) ** -0.5
        self.qkv, self.o = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d, bias=bias)

    def forward(self, u: Tensor, rope: Tables | None, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, n, d) -> the same, and k, v (B, H, m + n, D) of all positions so far."""
        q, k, v = self.qkv(u).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rms_norm(rotate(q, rope)), rms_norm(rotate(k, rope))
        if past.halted is not None and past.own is not None:
            stays = past.halted[:, None, :, None]
            k, v = torch.where(stays, past.own[0], k), torch.where(stays, past.own[1], v)
        if past.keys is not None and past.values is not None:
            k, v = torch.cat((past.keys, k), dim=2), torch.cat((past.values, v), dim=2)
        out = causal_attention(q, k, v, window=None, scale=self.scale)
        return self.o(out.transpose(1, 2).flatten(2)), k, v


class PreNorm(nn.Module):
    """u + attention(norm u), then u + SwiGLU(norm u); norms without gain, no biases."""

    def __init__(self, d: int, heads: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.attn = Attention(d, heads, bias=False)
        self.up = nn.Linear(d, 2 * inner, bias=False)  # gate, value
        self.down = nn.Linear(inner, d, bias=False)

    def forward(self, u: Tensor, rope: Tables | None, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, n, d) -> the same, and all k, v."""
        out, k, v = self.attn(rms_norm(u), rope, past)
        u = u + F.dropout(out, self.dropout, self.training)
        gate, value = self.up(rms_norm(u)).chunk(2, dim=-1)
        return u + F.dropout(self.down(F.silu(gate) * value), self.dropout, self.training), k, v


class PostNorm(nn.Module):
    """LN(u + attention(u)), then LN(h + W2 gelu(W1 h)), as in 2017; gelu by erf, biases."""

    def __init__(self, d: int, heads: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.attn = Attention(d, heads, bias=True)
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, u: Tensor, rope: Tables | None, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, n, d) -> the same, and all k, v."""
        out, k, v = self.attn(u, rope, past)
        u = self.norm1(u + F.dropout(out, self.dropout, self.training))
        out = self.down(F.gelu(self.up(u)))
        return self.norm2(u + F.dropout(out, self.dropout, self.training)), k, v
