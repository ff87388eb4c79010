"""y = relu(x W1^T)^2 W2^T: the specification (arXiv 2109.08668, squared ReLU; kernels.md 5.3).

With a = relu(x W1^T) and dp = 2 a (dy W2): dW2 = dy^T a^2, dW1 = dp^T x, dx = dp W1, by autograd.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def relu2_mlp(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """x (..., d), W1 (F, d), W2 (out, F) -> (..., out)."""
    return F.linear(F.relu(F.linear(x, W1)).square(), W2)
