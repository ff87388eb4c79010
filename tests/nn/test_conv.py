"""The causal convolution against torch's, and its state."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lib.nn.conv import CausalConv


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_equals_torchs_padded_on_the_left(kernel, n):
    conv = CausalConv(5, kernel).double()
    draw = torch.Generator().manual_seed(n)
    with torch.no_grad():
        conv.weight.normal_(generator=draw)
    x = torch.randn(2, n, 5, generator=draw, dtype=torch.float64)
    padded = F.pad(x.mT, (kernel - 1, 0))
    want = F.conv1d(padded, conv.weight[:, None], groups=5).mT
    y, last = conv(x)
    assert torch.allclose(y, want, atol=1e-12)
    assert last.shape == (2, kernel - 1, 5)


def test_the_state_continues_a_row():
    conv = CausalConv(3, 4).double()
    with torch.no_grad():
        conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 11, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, _ = conv(x)
    parts, past = [], None
    for part in x.split((1, 2, 8), dim=1):
        y, past = conv(part, past)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
