"""The context block's epilogue: its formula and its gradients by numbers."""

from __future__ import annotations

import pytest
import torch

from lib.kernels.cvfp_epilogue import cvfp_epilogue

F64 = torch.float64


def inputs(n: int = 5, d: int = 4):
    g = torch.Generator().manual_seed(n)
    shapes = ((n, d), (n, d), (d,), (d,))
    return [torch.randn(s, generator=g, dtype=F64).requires_grad_() for s in shapes]


def test_values_and_gradients():
    P, z, gamma, beta = inputs()
    y = z + torch.relu(P)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(cvfp_epilogue(P, z, gamma, beta), y * gamma + beta)
    assert torch.autograd.gradcheck(cvfp_epilogue, (P, z, gamma, beta))


def test_shapes_that_do_not_fit_are_named():
    P, z, gamma, beta = inputs()
    with pytest.raises(ValueError, match=r"P \(5, 3\), z \(5, 4\)"):
        cvfp_epilogue(P[:, :3], z, gamma, beta)
