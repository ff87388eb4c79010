"""What context vectors hold: effective rank, participation, contraction, memory (cvfp.md 9).

Pure functions of rows; nothing here is trained. Letters: n rows, d width, T time, B rows in
parallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.nn.contexts.context import EPS, Weights, trajectory

SEED_ROWS, ROWS, SVD_ROWS = 10_000, 25_600, 4096
LAGS = (0, 1, 2, 4, 8, 16)
DROPPED = 16  # first steps of rho, before the direction has turned to the leading one


def sample_rows(c: Tensor, rows: int) -> Tensor:
    """At most `rows` rows of c (n, d), evenly spread: row i is floor((i + 1/2) n / rows)."""
    n = len(c)
    if n <= rows:
        return c
    return c[((torch.arange(rows, dtype=torch.float64) + 0.5) * n / rows).long()]


def effective_rank(c: Tensor, *, centred: bool = False) -> float:
    """exp(-sum p ln(p + 1e-10)), p = singular values of c (n, d) over their sum.

    Above 4,096 rows from the second moment in fp64, values below 1e-7 of the largest count as 0.
    """
    c = c.double()
    c = c - c.mean(0) if centred else c
    if len(c) <= SVD_ROWS:
        return _entropy_rank(torch.linalg.svdvals(c))
    return _rank_of_moment(c.t() @ c)


def effective_ranks(c: Tensor) -> tuple[float, float]:
    """(uncentred, centred) effective rank of rows c (n, d), from one second moment where many."""
    if len(c) <= SVD_ROWS:
        return effective_rank(c), effective_rank(c, centred=True)
    c = c.double()
    m = c.mean(0)
    S = (c - m).t() @ (c - m)  # adding the mean's part loses nothing, taking it away would
    return _rank_of_moment(S + len(c) * torch.outer(m, m)), _rank_of_moment(S)


def _rank_of_moment(S: Tensor) -> float:
    values = torch.linalg.eigvalsh(S).clamp(min=0).sqrt()
    return _entropy_rank(values * (values >= 1e-7 * values.max()))


def _entropy_rank(values: Tensor) -> float:
    p = values / values.sum().clamp(min=1e-300)
    return math.exp(-float((p * (p + 1e-10).log()).sum()))


def participation(c: Tensor) -> float:
    """(tr S1)^2 / tr(S1^2) of the covariance S1 of c (n, d)."""
    c = c.double() - c.double().mean(0)
    S = c.t() @ c / (len(c) - 1)
    return float(S.trace() ** 2 / S.square().sum())


def mean_share(c: Tensor) -> float:
    """|m|^2 / d of c (n, d): near 1 under LN where all rows point the same way."""
    return float(c.double().mean(0).square().sum() / c.shape[1])


def apply_jacobian(z: Tensor, v: Tensor, P: list[Tensor], weights: Weights) -> Tensor:
    """J v of one step at state z: z, v (B, d), P: L of (B, d) -> (B, d). Analytic, cvfp.md 2.5."""
    for p, A, gain, offset in zip(P, weights.A, weights.gain, weights.offset, strict=True):
        mapped = torch.cat((z, v)) @ A.t()  # both at once: with few rows reading A is the work
        h, turned = p.to(z.dtype) + mapped[: len(z)], mapped[len(z) :]
        if weights.gelu:
            x = h.detach()
            slope = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            slope = slope + x * (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
            y = z + F.gelu(h)
        else:
            slope, y = (h > 0).to(z.dtype), z + h.relu()
        w = v + slope * turned
        mean = y.mean(-1, keepdim=True)
        rstd = (y.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
        unit = (y - mean) * rstd
        w = w - w.mean(-1, keepdim=True) - unit * (unit * w).mean(-1, keepdim=True)
        v, z = gain * rstd * w, unit * gain + offset
    return v


def contraction(
    c0: Tensor,
    P: list[Tensor],
    weights: Weights,
    dropped: int = DROPPED,
    draw: Tensor | None = None,
) -> float:
    """rho = exp(mean ln |J_t v_{t-1}|), v normalised after each step; resets are ignored.

    c0 (B, d), P: L of (T, B, d); draw (B, d): the first directions, default all equal.
    """
    with torch.no_grad():
        P = [p.to(c0.dtype) for p in P]
        C = trajectory(c0, P, weights)[-1]
        before = torch.cat((c0[None].to(C.dtype), C[:-1]))
        v = torch.ones_like(before[0]) if draw is None else draw.to(C.dtype)
        v = F.normalize(v, dim=-1)
        total, counted = 0.0, 0
        for t in range(len(C)):
            v = apply_jacobian(before[t], v, [p[t] for p in P], weights)
            length = v.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            v = v / length
            if t >= dropped or len(C) <= dropped:
                total, counted = total + float(length.log().sum()), counted + len(length)
        return math.exp(total / counted)


def reach(rho: float) -> int | None:
    """ceil(ln 0.01 / ln rho): tokens after which a hundredth is left; None: it does not shrink."""
    return math.ceil(math.log(0.01) / math.log(max(rho, 1e-9))) if rho < 1 else None


def recall(c: Tensor, e: Tensor, keep: Tensor, lags: tuple[int, ...] = LAGS) -> dict[int, float]:
    """R^2 of ridge regression c_t -> e_{t-k} for each lag k, fitted on 80 % of the rows.

    c (T, B, d), e (T, B, w), keep (T, B): 0 where a document begins; pairs lie in one document.
    Rows are split, not tokens. lambda = 1e-3 n. Sums over rows are fp32 sums of centred values,
    a third of fp64's time, the solution is fp64.
    """
    c, e = c.float(), e.float()
    document = (1 - keep.double()).cumsum(0)
    train = max(1, int(0.8 * c.shape[1]))
    found = {}
    for k in lags:
        if k >= len(c):
            continue
        same = document[k:] == document[: len(c) - k]
        sides = []
        for rows in (slice(0, train), slice(train, None)):
            mask = same[:, rows]
            sides.append((c[k:, rows][mask], e[: len(c) - k, rows][mask]))
        (X, Y), (x, y) = sides
        if len(X) < 2 or len(x) < 2:
            continue
        mx, my = X.mean(0), Y.mean(0)
        X, Y = X - mx, Y - my
        ridge = 1e-3 * len(X) * torch.eye(X.shape[1], dtype=torch.float64)
        W = torch.linalg.solve((X.t() @ X).double() + ridge, (X.t() @ Y).double()).float()
        left = (y - my - (x - mx) @ W).square().sum()
        found[k] = float(1 - left / (y - y.mean(0)).square().sum().clamp(min=1e-30))
    return found


def look(Z: Tensor, e: Tensor, keep: Tensor, only: Sequence[str] = ()) -> dict[str, float]:
    """Ranks, shape and memory of vectors Z (T, B, d) over token vectors e (T, B, w), by name.

    only: names to compute, empty for all. Each lag of `recall` is a regression of its own.
    """
    c = sample_rows(Z.flatten(0, 1), ROWS)
    measures: dict[str, Callable[[], float]] = {
        "er_seed": lambda: effective_rank(sample_rows(c, SEED_ROWS)),
        "er": lambda: effective_rank(c, centred=True),
        "pr": lambda: participation(c),
        "mean_share": lambda: mean_share(c),
        "rows": lambda: float(len(c)),
    }
    found = {name: measure() for name, measure in measures.items() if not only or name in only}
    lags = tuple(k for k in LAGS if not only or f"r2_{k}" in only)
    return found | {f"r2_{k}": x for k, x in recall(Z, e, keep, lags).items()}
