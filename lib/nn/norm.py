"""RMSNorm without a weight: same shape and dtype out as in, statistics in fp32."""

from __future__ import annotations

from torch import Tensor

from lib.kernels.rms_norm import rms_norm as _rms_norm

EPS = 2.0**-23  # fp32's machine epsilon, in every dtype


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467 eq. 4, no gain).

    x: (..., D), any float dtype; same shape and dtype out.
    """
    return _rms_norm(x, None, eps)
