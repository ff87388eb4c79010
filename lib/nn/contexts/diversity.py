"""Diversity losses of context vectors, exact over all rows of a step in bounded memory (cvfp.md 5).

Every loss is a function of sums over rows. Pass 1 adds rows (`add`), `finish` gives the value and
dL/dc as a function of c, which pass 2 applies to each micro-batch: values and gradients are those
of one graph over all rows. Sums are fp64, products fp32 at least, whatever autocast says: S in bf16
has negative eigenvalues. Letters: n rows, d width, m mean, S covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["mcdl", "oacd", "vicreg", "logdet", "sigreg"]
Gradient = Callable[[Tensor], Tensor]

VARIANCE_EPS, COVARIANCE_WEIGHT = 1e-4, 0.04  # vicreg (arXiv 2105.04906)
RIDGE = 0.01  # a of logdet
OFF_CENTRE = 0.1  # weight of |m|^2 in oacd
PROJECTIONS, POINTS, REACH = 256, 17, 5.0  # sigreg (arXiv 2511.08544): R, quadrature, |w| <= 5


class Diversity:
    """One step's loss of `kind`. directions (R, d), unit rows: the projections of sigreg."""

    def __init__(self, kind: Kind, directions: Tensor | None = None) -> None:
        self.kind, self.directions = kind, directions
        self.n = 0
        self._sums: list[Tensor] = []

    def add(self, c: Tensor) -> None:
        """Rows c (n, d) of pass 1."""
        self.n += len(c)
        with torch.autocast(c.device.type, enabled=False):
            sums = self._sums_of(c.detach())
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def _sums_of(self, c: Tensor) -> list[Tensor]:
        sums = [c.sum(0).double()]  # of one micro-batch; over these in fp64
        if self.kind in ("mcdl", "oacd"):
            sums.append(torch.linalg.vector_norm(c).double().square())
        elif self.kind == "sigreg":
            assert self.directions is not None
            angles = (c @ self.directions.to(c.dtype).t())[..., None] * _points(c)  # (n, R, W)
            sums += [f(angles).sum(0, dtype=torch.float64) for f in (torch.cos, torch.sin)]
        else:
            sums.append((c.t() @ c).double())
        return sums

    def finish(self, weight: float = 1.0) -> tuple[Tensor, Gradient]:
        """(value, `weight` times dL/dc for rows c), over the rows of all ranks."""
        if dist.is_initialized():
            count = torch.tensor(float(self.n), device=self._sums[0].device, dtype=torch.float64)
            for part in (count, *self._sums):
                dist.all_reduce(part)
            self.n = int(count)
        m = self._sums[0] / self.n
        if self.kind == "sigreg":
            return self._sigreg(weight)
        if self.kind in ("mcdl", "oacd"):
            return self._spread(m, weight)
        S = self._sums[1] / self.n - torch.outer(m, m)
        find = self._vicreg if self.kind == "vicreg" else self._logdet
        return find(m, S, weight)

    def _spread(self, m: Tensor, weight: float) -> tuple[Tensor, Gradient]:
        n, d = self.n, len(m)
        norm = (self._sums[1] - n * m.square().sum()).clamp(min=1e-30).sqrt()  # |c^|_F
        value, slope = -norm / math.sqrt(n * d), -1 / (math.sqrt(n * d) * norm)
        pull = torch.zeros_like(m)
        if self.kind == "oacd":
            value, pull = value + OFF_CENTRE * m.square().sum() / d, 2 * OFF_CENTRE * m / (n * d)
        # weight (slope (c - m) + pull) in one pass over c
        shift, factor = weight * (pull - slope * m), weight * float(slope)
        return value, lambda c: torch.add(shift.to(c.dtype), c, alpha=factor)

    def _vicreg(self, m: Tensor, S: Tensor, weight: float) -> tuple[Tensor, Gradient]:
        n, d = self.n, len(m)
        S1 = S * (n / (n - 1))
        deviation = (S1.diagonal() + VARIANCE_EPS).sqrt()
        off = S1 - S1.diagonal().diag()
        value = (1 - deviation).clamp(min=0).mean() + COVARIANCE_WEIGHT * off.square().sum() / d
        G = COVARIANCE_WEIGHT * (2 / d) * off - ((deviation < 1) / (2 * d * deviation)).diag()
        return value, _affine(G * (2 * weight / (n - 1)), m)

    def _logdet(self, m: Tensor, S: Tensor, weight: float) -> tuple[Tensor, Gradient]:
        n, d = self.n, len(m)
        ridged = S + RIDGE * torch.eye(d, dtype=S.dtype, device=S.device)
        factor = torch.linalg.cholesky(ridged)
        value = math.log1p(RIDGE) - 2 * factor.diagonal().log().sum() / d
        return value, _affine(torch.cholesky_inverse(factor) * (-2 * weight / (n * d)), m)

    def _sigreg(self, weight: float) -> tuple[Tensor, Gradient]:
        assert self.directions is not None
        a, n = self.directions.double(), self.n
        w = _points(a)
        target = (-w.square() / 2).exp()
        h = torch.full_like(w, 2 * REACH / (POINTS - 1))
        h[0] = h[-1] = h[0] / 2  # trapezium
        real, imaginary = self._sums[1] / n - target, self._sums[2] / n  # (R, W)
        value = ((real.square() + imaginary.square()) * target * h).sum(1).mean()
        scale = 2 * weight / (len(a) * n) * h * target * w

        def gradient(c: Tensor) -> Tensor:
            project = a.to(c.dtype)
            with torch.autocast(c.device.type, enabled=False):
                angles = (c @ project.t())[..., None] * w.to(c.dtype)
                inner = imaginary.to(c.dtype) * angles.cos() - real.to(c.dtype) * angles.sin()
                return (inner * scale.to(c.dtype)).sum(-1) @ project

        return value, gradient


def _affine(G: Tensor, m: Tensor) -> Gradient:
    """c -> (c - m) G for a symmetric G."""
    shift = m @ G

    def gradient(c: Tensor) -> Tensor:
        with torch.autocast(c.device.type, enabled=False):
            return c @ G.to(c.dtype) - shift.to(c.dtype)

    return gradient


def _points(like: Tensor) -> Tensor:
    return torch.linspace(-REACH, REACH, POINTS, dtype=like.dtype, device=like.device)


def random_directions(d: int, draw: torch.Generator) -> Tensor:
    """R unit vectors (R, d), fp32."""
    return torch.nn.functional.normalize(torch.randn(PROJECTIONS, d, generator=draw), dim=1)
