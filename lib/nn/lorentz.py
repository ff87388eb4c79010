"""Hyperbolic attention around its operator: the layer, bound, temperature, centroid, curvature.

Points are held by their space part x (..., D); the time sqrt(1 / c + |x|^2) follows from it
(phase7.md 3.6, 3.7). All functions are pure; statistics in fp32, or fp64. Letters: B batch, n
positions, d width, H heads, D = d / H, W window.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lib.kernels.lorentz_attention import lorentz_attention
from lib.kernels.lorentz_attention.reference import visible
from lib.nn.attention import causal_attention
from lib.nn.linear import Linear
from lib.nn.rope import Tables, rotate

Kind = Literal["linear", "cosine", "constant"]
Geometry = Literal["lorentz", "euclid", "dot"]
Values = Literal["euclid", "centroid"]  # mean of values, or their centroid


def bound_factor(head_dim: int, r_max: float, c_max: float) -> float:
    """kappa: |x| < kappa sqrt D keeps points within r_max of the origin at the learned maximum.

    min(2, sinh(r_max) / sqrt(2 c_max D)): a head's curvature is 2 c_max at most.
    """
    return min(2.0, math.sinh(r_max) / math.sqrt(2 * c_max * head_dim))


def bound(x: Tensor, kappa: float) -> Tensor:
    """x / sqrt(1 + |x|^2 / (kappa^2 D)): norms below the bound still tell points apart."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(1 + wide.square().sum(-1, keepdim=True) / (kappa**2 * x.shape[-1]))


def curvature_at(kind: Kind, step: int, warmup: int, c_min: float, c_max: float) -> float:
    """c_min + (c_max - c_min) f(min(step / warmup, 1)), f(x) = x, (1 - cos pi x) / 2, or 1."""
    x = min(step / warmup, 1.0) if warmup else 1.0
    share = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "constant": 1.0}[kind]
    return c_min + (c_max - c_min) * share


def temperature(c: Tensor, head_dim: int) -> Tensor:
    """tau = sqrt(U (U + 2)) / acosh(1 + U), U = c D: sharpness stays as curvature grows."""
    U = c * head_dim
    root = torch.sqrt(U * (U + 2))
    return root / torch.log1p(U + root)


def lift(v: Tensor, c: Tensor) -> Tensor:
    """v (B, H, n, D) with its time behind it, (B, H, n, D + 1); c (H,)."""
    time = torch.sqrt(1 / c[:, None, None] + v.square().sum(-1, keepdim=True))
    return torch.cat((v, time), dim=-1)


def centroid(mean: Tensor, c: Tensor) -> Tensor:
    """Mean of lifted points (B, H, n, D + 1) -> the space part of their centroid.

    m / (sqrt c sqrt(m0^2 - |m|^2)), the Einstein midpoint; m0^2 - |m|^2 >= 1 / c.
    """
    m, m0 = mean[..., :-1], mean[..., -1:]
    c = c[:, None, None]
    length = (m0.square() - m.square().sum(-1, keepdim=True)).clamp(min=1 / c)
    return m / torch.sqrt(c * length)


class LorentzAttention(nn.Module):
    """Softmax of minus beta times a squared distance within the window (phase7.md 3.6)."""

    def __init__(
        self, width: int, heads: int, window: int, *, kappa: float,
        geometry: Geometry = "lorentz", values: Values = "euclid",
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.window, self.kappa = heads, window, kappa
        self.geometry, self.centroid = geometry, values == "centroid"
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))

    def points(self, n: Tensor, rope: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, bounded and rotated, and v: (B, H, n, D) each, rounded to the compute dtype."""
        q, k, v = (
            f(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        # A rotation of the space part fixes the origin: norms and times stay.
        q, k = (rotate(bound(x, self.kappa), rope).to(x.dtype) for x in (q, k))
        return q, k, v

    def forward(
        self, n: Tensor, rope: Tables, c: Tensor | None, beta: Tensor,
        past: tuple[Tensor, Tensor] | None, engine: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """normed n (B, n, d) -> output, and the keys and values that the next call may see."""
        q, k, v = self.points(n, rope)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
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


def facts(q: Tensor, k: Tensor, c: Tensor, beta: Tensor, window: int) -> dict[str, float]:
    """What the log tells of one row (1, H, n, D): radius, clamped pairs, entropy in nats."""
    q, k = q.float(), k.float()
    c = c[:, None, None]
    squares = [x.square().sum(-1, keepdim=True) for x in (q, k)]
    Q, K = (torch.sqrt(1 + c * x) for x in squares)
    raw = Q * K.mT - 1 - c * (q @ k.mT)
    seen = visible(q.shape[-2], k.shape[-2], window, q.device)
    others = seen & ~torch.eye(q.shape[-2], dtype=torch.bool, device=q.device)
    scores = -beta[:, None, None] / c * torch.acosh(1 + raw.clamp(min=0)).square()
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return {
        "radius": float(torch.asinh(torch.sqrt(c * torch.maximum(*squares))).max()),
        "clamped": float((raw < 0)[..., others].float().mean()) if bool(others.any()) else 0.0,
        "entropy": float(torch.special.entr(p).sum(-1).mean()),
    }
