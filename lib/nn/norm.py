"""RMSNorm without and with a weight: same shape out as in, statistics in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib.kernels.rms_norm import rms_norm as _rms_norm

EPS = 2.0**-23  # fp32's machine epsilon, in every dtype


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467 eq. 4, no gain).

    x: (..., D), any float dtype; same shape and dtype out.
    """
    return _rms_norm(x, None, eps)


class RmsNorm(nn.Module):
    """w x / sqrt(mean(x^2) + 1e-6) over the last axis, w (width,); statistics in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same, in the wider dtype of x and the weight."""
        if x.dtype == self.weight.dtype:
            return _rms_norm(x, self.weight, 1e-6)
        return rms_norm(x, 1e-6) * self.weight
