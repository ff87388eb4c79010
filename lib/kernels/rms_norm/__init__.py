"""RMSNorm over the last axis, with or without a weight (kernels.md 5.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.rms_norm.reference import rms_norm as _reference

MAX_WIDTH = 16_384


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times weight (d,) if given; x (..., d), the same out."""
    d = x.shape[-1]
    if weight is not None and weight.shape != (d,):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    limit = "" if d <= MAX_WIDTH else f"width {d}"
    if decide("rms_norm", x.device, x.dtype, limit):
        return torch.ops.kumiki.rms_norm(x, weight, eps)[0]
    return _reference(x, weight, eps)
