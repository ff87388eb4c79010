"""The squared-ReLU MLP's reference: its formula, gradients by numbers, and the model's own bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lib.kernels.relu2_mlp import relu2_mlp
from lib.models import gpt
from lib.models.base import build

F64 = torch.float64


@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 3), (0, 3)])
def test_values_and_gradients(shape):
    g = torch.Generator().manual_seed(1)
    x, W1, W2 = (
        torch.randn(s, generator=g, dtype=F64).requires_grad_() for s in (shape, (7, 3), (4, 7))
    )
    y = relu2_mlp(x, W1, W2)
    assert torch.allclose(y, torch.relu(x @ W1.mT) ** 2 @ W2.mT)
    if x.numel():
        assert torch.autograd.gradcheck(relu2_mlp, (x, W1, W2))


@pytest.mark.parametrize("half", [False, True])
def test_the_block_keeps_its_bits(half):
    """Forward and backward of a GPT block's MLP as it was written before the operator."""
    block = build(gpt, gpt.Config(depth=1, width=32, heads=2, context=8), 11, seed=1).blocks[0]
    torch.nn.init.normal_(block.down.weight, generator=torch.Generator().manual_seed(3))
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for mlp in (
        lambda h: relu2_mlp(h, block.up.weight, block.down.weight),
        lambda h: block.down(F.relu(block.up(h)).square()),
    ):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = mlp(x)
        y.float().square().sum().backward()
        found.append([y, block.up.weight.grad, block.down.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x \(2, 4\) does not fit W1 \(5, 3\)"):
        relu2_mlp(torch.zeros(2, 4), torch.zeros(5, 3), torch.zeros(3, 5))
