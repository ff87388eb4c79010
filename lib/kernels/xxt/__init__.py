"""Symmetric products for Muon: X X^T, and b A + c A A^T for symmetric A. No autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.xxt.reference import xxt as _reference

MIN_ROWS = 512  # below, the library's product is one wave of tiles anyway


def xxt(X: Tensor, alpha: float = 1.0, beta: float = 0.0, A: Tensor | None = None) -> Tensor:
    """alpha X X^T + beta A for a batch X (b, n, m) with n <= m; A (b, n, n) symmetric."""
    b, n, m = X.shape
    if n > m:
        raise ValueError(f"X {tuple(X.shape)} must be wide")
    if A is not None and A.shape != (b, n, n):
        raise ValueError(f"A {tuple(A.shape)} must be square, X is {tuple(X.shape)}")
    limit = f"fewer than {MIN_ROWS} rows" if n < MIN_ROWS and X.is_cuda else ""
    if decide("xxt", X.device, X.dtype, limit):
        return torch.ops.kumiki.xxt(X, alpha, beta, A)
    return _reference(X, alpha, beta, A)
