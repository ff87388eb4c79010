"""Linear attention with scalar decay: the specification (phase7.md 7.3 to 7.5, kernels.md 5.6).

    S_t = exp(log_a_t) S_{t-1} + k_t^T v_t,  o_t = q_t S_t

`loop` is the definition. `forward` goes by chunks of C steps: with g = cumsum(log a) in the chunk,
    M_ij = exp(g_i - g_j) for i >= j, else 0 (masked before exp: every exponent is <= 0)
    O = ((q k^T) * M) v + (q e^g) S;   S' = e^(g_C) S + (k e^(g_C - g))^T v
Letters: B batch, H heads, T length, N chunks, Dk and Dv widths. Arithmetic in fp32, or fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


def loop(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """The definition by ordinary autograd; shapes as in `forward`."""
    S, outs = s0, []
    for t in range(q.shape[2]):
        a = torch.exp(log_a[:, :, t])[..., None, None]
        S = a * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None] @ S).squeeze(-2))
    return torch.stack(outs, dim=2), S


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, H, T, Dv) in v's dtype, s_T and the states before each chunk (B, H, N, Dk, Dv).

    q, k (B, H, T, Dk), v (B, H, T, Dv), log_a (B, H, T) <= 0, s0 (B, H, Dk, Dv). ValueError for a
    log_a above 0: the state would grow without bound.
    """
    if log_a.numel() and log_a.max() > 0:
        raise ValueError(f"log_a must be 0 or less, its largest value is {log_a.max().item()}")
    q, k, values, g, M = _chunks(q, k, v, log_a)
    to_end = torch.exp(g[..., -1:] - g)[..., None]  # (B, H, N, C, 1)
    added = (k * to_end).mT @ values  # (B, H, N, Dk, Dv)
    decay = torch.exp(g[..., -1])[..., None, None]  # (B, H, N, 1, 1)
    S, states = s0.to(q.dtype), []
    for i in range(q.shape[2]):
        states.append(S)
        S = decay[:, :, i] * S + added[:, :, i]
    before = torch.stack(states, dim=2)
    out = ((q @ k.mT) * M) @ values + (q * g.exp()[..., None]) @ before
    return out.flatten(2, 3)[:, :, : v.shape[2]].to(v.dtype), S, before


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    before: Tensor,
    s_end: Tensor,
    dout: Tensor,
    ds_end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_a, s0: the three products backwards, dS carried from the end.

    d log_a_t = sum_(s >= t) (q_s.dq_s - k_s.dk_s) + <dS_T, S_T>.
    """
    T, wide = q.shape[2], _wide(q)
    qs, ks, vs, g, M = _chunks(q, k, v, log_a)
    do, ds_end = _pad(dout.to(wide)), ds_end.to(wide)
    from_start, to_end = g.exp()[..., None], torch.exp(g[..., -1:] - g)[..., None]
    pulled = (qs * from_start).mT @ do  # (B, H, N, Dk, Dv)
    decay = torch.exp(g[..., -1])[..., None, None]
    dS, after = ds_end, []
    for i in reversed(range(qs.shape[2])):
        after.append(dS)  # of the state behind chunk i
        dS = decay[:, :, i] * dS + pulled[:, :, i]
    later = torch.stack(after[::-1], dim=2)
    P = (do @ vs.mT) * M
    dq = P @ ks + from_start * (do @ before.mT)
    dk = P.mT @ qs + to_end * (vs @ later.mT)
    dv = ((qs @ ks.mT) * M).mT @ do + to_end * (ks @ later)
    each = ((qs * dq).sum(-1) - (ks * dk).sum(-1)).flatten(2)[:, :, :T]
    each[:, :, -1] += (ds_end * s_end).sum((-2, -1))
    dlog_a = each.flip(2).cumsum(2).flip(2)
    dq, dk, dv = (x.flatten(2, 3)[:, :, :T] for x in (dq, dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlog_a.to(log_a.dtype), dS


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as (B, H, N, C, width), g (B, H, N, C), M (B, H, N, C, C); the tail is padded.

    Padding adds nothing and decays nothing: k = v = 0, log a = 0.
    """
    q, k, v = (_pad(x.to(_wide(q))) for x in (q, k, v))
    log_a = log_a.to(q.dtype)
    g = F.pad(log_a, (0, -log_a.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK)).cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    gaps = (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf)
    return q, k, v, g, gaps.exp()


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
