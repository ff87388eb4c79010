"""z' = LN(z + relu(P + table[ids])) gamma + beta: the specification (cvfp.md 2.1, kernels.md 5.9).

LN(y) = (y - mean) / sqrt(var + 1e-5), biased variance, statistics in fp32. Autograd differentiates.
Letters: n rows, d width, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def cvfp_epilogue(
    P: Tensor,
    z: Tensor,
    table: Tensor,
    ids: Tensor,
    gamma: Tensor,
    beta: Tensor,
    z_old: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z' (n, d) in z's dtype; with z_old the share of rows within tau, and column sums."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    y = z.to(wide) + F.relu(P.to(wide) + F.embedding(ids, table).to(wide))
    out = F.layer_norm(y, y.shape[-1:], gamma.to(wide), beta.to(wide), EPS)
    if z_old is None:
        return out.to(z.dtype), None, None
    with torch.no_grad():
        moved = (out - z_old.to(wide)).square().mean(-1)
        return out.to(z.dtype), (moved < tau).to(wide).mean(), out.sum(0)
