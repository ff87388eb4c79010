"""Causal depthwise convolution over time, with the inputs that the next call needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalConv(nn.Module):
    """y_t = sum_j K[:, j] x_(t-k+1+j): each channel sees its own last k inputs, never the next."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(width, kernel))

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, n, width), the k - 1 inputs before it (None: zeros) -> y, and the last k - 1."""
        n, k = x.shape[1], self.kernel
        if past is None:
            past = x.new_zeros(len(x), k - 1, x.shape[2])
        row = torch.cat((past, x), dim=1)
        weight = self.weight.to(x.dtype)
        # k shifted products: no transposition to channels first, which costs more than the sums.
        y = row[:, :n] * weight[:, 0]
        for j in range(1, k):
            y = torch.addcmul(y, row[:, j : j + n], weight[:, j])
        return y, row[:, row.shape[1] - k + 1 :]
