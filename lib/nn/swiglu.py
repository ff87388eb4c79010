"""The gated feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lib.nn.linear import Linear


class SwiGlu(nn.Module):
    """M(y) = (silu(y W_1) * (y W_3)) W_2: `gate` W_1 and `up` W_3 to d_ff, `down` W_2 back."""

    def __init__(self, width: int, d_ff: int) -> None:
        super().__init__()
        self.gate, self.up = Linear(width, d_ff), Linear(width, d_ff)
        self.down = Linear(d_ff, width)

    def forward(self, y: Tensor) -> Tensor:
        """y (..., width) -> the same."""
        return self.down(F.silu(self.gate(y)) * self.up(y))
