"""Y = alpha X X^T + beta A, symmetric: the specification (kernels.md 5.8)."""

from __future__ import annotations

import torch
from torch import Tensor


def xxt(X: Tensor, alpha: float = 1.0, beta: float = 0.0, A: Tensor | None = None) -> Tensor:
    """X (b, n, m), A (b, n, n) symmetric or None -> (b, n, n) in X's dtype; 2 b n^2 m FLOP."""
    if A is None:
        Y = torch.bmm(X, X.mT)
        return Y if alpha == 1.0 else Y.mul_(alpha)
    return torch.baddbmm(A, X, X.mT, beta=beta, alpha=alpha)
