"""Attention by squared hyperbolic distance in a causal window: the specification (phase7.md 3.6).

    Q = sqrt(1 + c|q|^2), K = sqrt(1 + c|k|^2);  u = max(0, Q K - 1 - c q.k)
    s = -(beta / c) a(u), a(u) = acosh(1 + u)^2: minus beta times the squared geodesic distance
    key j is visible to i where 0 <= i - j < W;  o = softmax(s) v over visible keys

c None is the limit c -> 0: s = -beta |q - k|^2. The square is why coincident points have finite
gradients; the clamp meets rounding only and passes gradients straight through.
Letters: B batch, H heads, n queries (the last n of m positions), m keys, D width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MIN_BLOCK, MAX_BLOCK = 64, 512  # queries of a block; smaller ones are all overhead
SERIES_BELOW = {torch.float32: 1e-2, torch.float64: 1e-4}  # of u: beyond it the root is exact


def squared_arcosh(u: Tensor) -> Tensor:
    """a(u) = acosh(1 + u)^2 for u >= 0, fp32 or fp64.

    Near 0 by its series, 2u - u^2/3 + 4u^3/45 - u^4/35.
    """
    near = (u * (-1 / 35)).add_(4 / 45).mul_(u).add_(-1 / 3).mul_(u).add_(2).mul_(u)
    return torch.where(u < SERIES_BELOW[u.dtype], near, _arcosh(u)[0].square_())


def slope(u: Tensor) -> Tensor:
    """a'(u) = 2 acosh(1 + u) / sqrt(u (u + 2)); near 0 2 - 2u/3 + 4u^2/15 - 4u^3/35."""
    near = (u * (-4 / 35)).add_(4 / 15).mul_(u).add_(-2 / 3).mul_(u).add_(2)
    small = u < SERIES_BELOW[u.dtype]
    distance, root = _arcosh(u)
    return torch.where(small, near, distance.div_(root.masked_fill_(small, 1)).mul_(2))


def _arcosh(u: Tensor) -> tuple[Tensor, Tensor]:
    """acosh(1 + u) and sqrt(u (u + 2))."""
    root = (u + 2).mul_(u).sqrt_()
    return (u + root).log1p_(), root


class _SquaredArcosh(torch.autograd.Function):
    """a(u) for `plain`, whose derivative is a'(u) also where autograd would meet 0 / 0."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return squared_arcosh(u)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return upstream * slope(u)


def visible(n: int, m: int, window: int, device: torch.device) -> Tensor:
    """(n, m) bool: may query i, at position m - n + i, see key j."""
    age = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (age >= 0) & (age < window)


def plain(q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, beta: Tensor, window: int) -> Tensor:
    """The definition by ordinary autograd, all pairs at once; shapes as in `forward`."""
    q, k, v, beta = (x.to(_wide(q)) for x in (q, k, v, beta))
    if c is None:
        squared = (q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :]) - 2 * q @ k.mT
        scores = -beta[:, None, None] * squared
    else:
        c = c.to(q.dtype)[:, None, None]
        Q, K = (torch.sqrt(1 + c * x.square().sum(-1, keepdim=True)) for x in (q, k))
        raw = Q * K.mT - 1 - c * (q @ k.mT)
        u = raw + (raw.clamp(min=0) - raw).detach()
        scores = -beta[:, None, None] / c * _SquaredArcosh.apply(u)
    unseen = ~visible(q.shape[-2], k.shape[-2], window, q.device)
    return scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v


def forward(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, beta: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """o (B, H, n, E) in v's dtype and lse (B, H, n) fp32, block by block.

    q (B, H, n, D), k (B, H, m, D), v (B, H, m, E), m >= n; c, beta (H,) positive. Times, products
    and softmax in fp32 (fp64 for fp64), from the given, rounded q and k; cost n (block + window).
    """
    out, lse = v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_wide(q))
    for rows, keys, unseen in _blocks(q.shape[-2], k.shape[-2], window, q.device):
        s = _Scores(q[:, :, rows], k[:, :, keys], c, beta, unseen).values
        lse[:, :, rows] = one = s.logsumexp(-1)
        out[:, :, rows] = (s - one[..., None]).exp_() @ v[:, :, keys].to(s.dtype)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor | None,
    beta: Tensor,
    window: int,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, c, beta (phase7.md 3.6.4); probabilities are made again from lse.

    c None has no gradient. dc and dbeta are (H,), summed in fp32.
    """
    wide = _wide(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    dc, dbeta = (torch.zeros_like(beta, dtype=wide) for _ in range(2))
    for rows, keys, unseen in _blocks(q.shape[-2], k.shape[-2], window, q.device):
        s = _Scores(q[:, :, rows], k[:, :, keys], c, beta, unseen, slopes=True)
        do, values = dout[:, :, rows].to(wide), v[:, :, keys].to(wide)
        p = (s.values - lse[:, :, rows, None]).exp_()
        dv[:, :, keys] += p.mT @ do
        delta = (do * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
        ds = p.mul_(do @ values.mT - delta)  # (B, H, rows, keys), 0 where unseen
        seen = s.values.masked_fill(unseen, 0)
        ds_s = (ds * seen).sum((0, 2, 3))  # (H,)
        dbeta += ds_s / beta.to(wide)
        one_dq, one_dk, one_dc = s.backward(ds)
        dq[:, :, rows] = one_dq
        dk[:, :, keys] += one_dk
        if c is not None:
            dc += one_dc - ds_s / c.to(wide)
    dq, dk, dv = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    return dq, dk, dv, None if c is None else dc.to(c.dtype), dbeta.to(beta.dtype)


class _Scores:
    """Scores of one block, `values` (B, H, rows, keys), -inf unseen, and what gradients need."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        c: Tensor | None,
        beta: Tensor,
        unseen: Tensor,
        slopes: bool = False,
    ) -> None:
        wide = _wide(q)
        self.q, self.k = q.to(wide), k.to(wide)
        self.beta = beta.to(wide)[:, None, None]
        self.squares = [x.square().sum(-1, keepdim=True) for x in (self.q, self.k)]
        self.product = self.q @ self.k.mT
        if c is None:
            self.c = None
            distance = (self.squares[0] + self.squares[1].mT).sub_(self.product, alpha=2)
            self.values = distance.mul_(-self.beta).masked_fill_(unseen, -torch.inf)
            return
        self.c = c.to(wide)[:, None, None]
        self.times = [torch.sqrt(1 + self.c * x) for x in self.squares]
        u = (self.times[0] * self.times[1].mT).sub_(1).sub_(self.c * self.product).clamp_(min=0)
        self.slope = slope(u) if slopes else None
        self.values = squared_arcosh(u).mul_(-self.beta / self.c).masked_fill_(unseen, -torch.inf)

    def backward(self, ds: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """dq, dk and the part of dc (H,) that comes through u."""
        q, k = self.q, self.k
        if self.c is None:
            G = ds * (-2 * self.beta)
            return G.sum(-1, keepdim=True) * q - G @ k, G.sum(-2)[..., None] * k - G.mT @ q, 0.0
        Q, K = self.times
        assert self.slope is not None
        G = self.slope.mul_(ds).mul_(-self.beta / self.c)
        GK, GQ = G @ K, G.mT @ Q  # (B, H, rows, 1), (B, H, keys, 1)
        dq = self.c * (GK * q / Q - G @ k)
        dk = self.c * (GQ * k / K - G.mT @ q)
        dc = (GK * self.squares[0] / (2 * Q)).sum((0, 2, 3))
        dc = dc + (GQ * self.squares[1] / (2 * K)).sum((0, 2, 3))
        return dq, dk, dc - (G * self.product).sum((0, 2, 3))


def _blocks(
    n: int, m: int, window: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(query rows, keys that they may see, (rows, keys) bool of pairs out of sight)."""
    size = min(max(window, MIN_BLOCK), MAX_BLOCK)
    for first in range(0, n, size):
        last = min(first + size, n)
        low, high = max(0, m - n + first - window + 1), m - n + last
        yield (
            slice(first, last),
            slice(low, high),
            ~visible(last - first, high - low, window, device),
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
