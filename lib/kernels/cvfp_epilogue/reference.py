"""z' = LN(z + relu(P)) gamma + beta: the specification (cvfp.md 2.1, kernels.md 5.9).

LN(y) = (y - mean) / sqrt(var + 1e-5), biased variance, statistics in fp32. Autograd differentiates.
Letters: n rows, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def cvfp_epilogue(P: Tensor, z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """z' (n, d) in z's dtype."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    y = z.to(wide) + F.relu(P.to(wide))
    return F.layer_norm(y, y.shape[-1:], gamma.to(wide), beta.to(wide), EPS).to(z.dtype)
