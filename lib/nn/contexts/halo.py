"""The true trajectory of one stream, by segments in parallel that are repaired (cvfp.md 7).

Letters: T time, B segments, L layers, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.nn.contexts.context import Weights
from lib.nn.contexts.one_step import step_rows

SLICE = 4  # time steps whose token side is held at once


@dataclass
class Repairs:
    """What `halo` had to do again."""

    segments: int = 0
    tokens: int = 0


@torch.no_grad()
def halo(
    c0: Tensor,
    token_side: Callable[[Tensor], list[Tensor]],
    count: int,
    weights: Weights,
    *,
    segment: int,
    warm: int,
    tol: float,
    keep: Tensor | None = None,
    repairs: Repairs | None = None,
) -> Tensor:
    """c of `count` consecutive tokens, (count, d): segments stepped in parallel, then repaired.

    c0 (d,) is the true state before the first token. token_side(positions (T, B)) gives P. Segments
    of `segment` tokens are warmed from 0 over `warm` tokens; where the warm start differs from the
    end of the segment before by more than `tol` (rms), the segment is stepped again from that end
    until new and stored rows agree. The warm-up length alone is no bound (cvfp.md 7.1).
    """
    starts = torch.arange(0, count, segment)
    warm = min(warm, segment)

    def kept(at: Tensor) -> Tensor | None:
        return None if keep is None else keep[at.clamp(0, count - 1)]

    def advance(c: Tensor, at: Tensor, out: Tensor | None = None) -> Tensor:
        """The states after the tokens `at` (T, B), all of them in out (B, T, d)."""
        for first in range(0, len(at), SLICE):
            here = at[first : first + SLICE]
            P, keeps = token_side(here), kept(here)
            narrow = weights.narrow(P[0].dtype)
            for t in range(len(here)):
                c = c if keeps is None else c * keeps[t, :, None]
                c = step_rows(c, [p[t] for p in P], narrow, weights)
                if out is not None:
                    out[:, first + t] = c
        return c

    c = c0.new_zeros(len(starts), len(c0))
    if warm and len(starts) > 1:
        c[1:] = advance(c[1:], starts[1:] + torch.arange(-warm, 0)[:, None])
    c[0] = c0
    inside = (starts + torch.arange(segment)[:, None]).clamp(max=count - 1)  # (segment, B)
    Z = c0.new_empty(len(starts), segment, len(c0))
    advance(c, inside, Z)
    begun = c  # (B, d): the state that each segment was stepped from
    while True:
        ends = torch.cat((c0[None], Z[:-1, -1]))
        wrong = ((ends - begun).square().mean(-1).sqrt() > tol).nonzero().flatten()
        if not len(wrong):
            return Z.flatten(0, 1)[:count]
        begun = begun.clone()
        begun[wrong] = ends[wrong]
        redone = _repair(Z, ends[wrong], wrong, inside, token_side, weights, kept, tol)
        if repairs is not None:
            repairs.segments += len(wrong)
            repairs.tokens += redone


def _repair(Z, c, rows, at, token_side, weights, kept, tol) -> int:  # type: ignore[no-untyped-def]
    """Step segments `rows` again from `c` until their stored rows agree; tokens redone."""
    redone = 0
    for t in range(Z.shape[1]):
        P, keeps = token_side(at[t : t + 1, rows]), kept(at[t, rows])
        c = c if keeps is None else c * keeps[:, None]
        c = step_rows(c, [p[0] for p in P], weights.narrow(P[0].dtype), weights)
        differ = (c - Z[rows, t]).square().mean(-1).sqrt() > tol / 2
        Z[rows, t] = c
        redone += len(rows)
        rows, c = rows[differ], c[differ]
        if not len(rows):
            break
    return redone


def warm_tokens(rho: float, tol: float, longest: int) -> int:
    """ceil(ln tol / ln rho) tokens after which a difference of 1 has shrunk to tol; `longest` at

    most, also where the map does not contract.
    """
    if rho >= 1:
        return longest
    return min(longest, max(1, math.ceil(math.log(tol) / math.log(max(rho, 1e-9)))))
