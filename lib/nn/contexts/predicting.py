"""What predicts from context vectors: the token block and its head (cvfp.md 2.4).

    h^0 = e_t,  h^l = LN_l(h^{l-1} + relu(V_l [z^l_t; h^{l-1}] + b_l)),  logits = U h^K + b_U

Letters: e token width, V vocabulary, K token layers, L context layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.kernels.linear_cross_entropy import linear_cross_entropy
from lib.nn.contexts.context import Layer


class TokenBlock(nn.ModuleList):
    """K layers (`Layer`); those beyond the L vectors they are given read the last one."""

    def forward(self, e: Tensor, Z: Sequence[Tensor]) -> Tensor:
        """e (..., e), Z: L of (..., width) -> h^K (..., e)."""
        h = e
        for number, layer in enumerate(self):
            assert isinstance(layer, Layer)
            z = Z[min(number, len(Z) - 1)]
            x = torch.cat((z, h), -1)  # weights may be kept narrower (bf16_state)
            grown = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
            h = layer.norm((h + F.relu(grown)).to(layer.norm.weight.dtype)).to(e.dtype)
        return h


class _Reads:
    """Logits and losses of a head, from how it reads h: the same for all of them."""

    def parts(self, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows (V, e), bias (V,), what the rows are multiplied with); table: token vectors."""
        raise TypeError(f"{type(self).__name__} reads nothing")

    def logits(self, h: Tensor, table: Tensor) -> Tensor:
        """h (..., e) -> (..., V), fp32 at least."""
        rows, bias, h = self.parts(h, table)
        logits = F.linear(h, rows, bias)
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, h: Tensor, table: Tensor, targets: Tensor, reduction: Any) -> Tensor:
        """Cross-entropy of targets (...), reduced as asked."""
        rows, bias, h = self.parts(h, table)
        # The operator knows no bias: one more column of ones.
        h = torch.cat((h, torch.ones_like(h[..., :1])), -1)
        whole = torch.cat((rows, bias[:, None]), 1)
        return linear_cross_entropy(h, whole, targets, vocab_size=len(rows), reduction=reduction)


class Head(_Reads, nn.Linear):
    """U of its own."""

    def parts(self, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U, b_U, h."""
        return self.weight, self.bias, h


class TiedHead(_Reads, nn.Module):
    """U = E P over the token vectors E: P (e, e) and b_U."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def parts(self, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E, b_U, P h: (E P) h without a matrix of V rows."""
        return table, self.bias, F.linear(h, self.weight)
