"""Rotary positions over halves of a head (arXiv 2104.09864), as rotation by the negative angle.

Tables are computed for the positions asked for, at every call: no buffer that a device, a dtype or
a longer context could invalidate. They cost n D/2 cosines, nothing beside one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]


def rope_tables(
    start: int, n: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Tables:
    """cos and sin (n, D/2) of t theta^(-2j/D), t = start .. start + n - 1, rounded to dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=wide) / head_dim)
    angles = torch.outer(torch.arange(start, start + n, device=device, dtype=wide), inverse)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """x: (B, H, n, D) -> the same: y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos, x1, x2 the halves.

    The sign is a convention, yet part of the weights: a model trained with the other one is another
    model.
    """
    cos, sin = tables
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
