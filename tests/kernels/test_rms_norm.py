"""RMSNorm's reference: its formula, gradients by numbers, the bits it always had on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lib.kernels.rms_norm import rms_norm
from lib.nn import norm

F64 = torch.float64


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 47), (3, 5, 8), (0, 4)])
def test_values_and_gradients(weighted, shape):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g, dtype=F64).requires_grad_()
    w = torch.randn(shape[-1], generator=g, dtype=F64).requires_grad_() if weighted else None
    y = rms_norm(x, w, 1e-6)
    assert torch.allclose(y, F.rms_norm(x, shape[-1:], w, 1e-6))
    leaves = (x, w) if weighted else (x,)
    if x.numel():
        assert torch.autograd.gradcheck(lambda x, w=None: rms_norm(x, w, 1e-6), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_the_layers_norm_keeps_its_bits(dtype):
    """The lines of before dispatch, forward and backward: a run on a CPU changes by no bit."""
    x = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    wide = b.float() if dtype == torch.bfloat16 else b
    want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.EPS)).to(dtype)
    got = norm.rms_norm(a)
    assert torch.equal(got, want)
    up = torch.ones_like(x) * 0.5
    assert torch.equal(*(torch.autograd.grad(y, i, up)[0] for y, i in ((got, a), (want, b))))


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"weight \(3,\) does not fit x \(2, 4\)"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
