"""The MLP with squared ReLU, relu(x W1^T)^2 W2^T, its activation fused into the products."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.relu2_mlp.reference import relu2_mlp as _reference


def relu2_mlp(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """x (..., d), W1 (F, d), W2 (out, F) -> (..., out). Under autocast the products run in its
    dtype.
    """
    if W1.ndim != 2 or x.shape[-1] != W1.shape[1] or W2.ndim != 2 or W2.shape[1] != W1.shape[0]:
        shapes = f"W1 {tuple(W1.shape)}, W2 {tuple(W2.shape)}"
        raise ValueError(f"x {tuple(x.shape)} does not fit {shapes}")
    device, dtype = x.device, x.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if not decide("relu2_mlp", device, dtype):
        return _reference(x, W1, W2)
    return torch.ops.kumiki.relu2_mlp(x.to(dtype), W1.to(dtype), W2.to(dtype))[0]
