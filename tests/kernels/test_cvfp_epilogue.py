"""The context block's epilogue: its formula, gradients by numbers, its two statistics."""

from __future__ import annotations

import pytest
import torch

from lib.kernels.cvfp_epilogue import cvfp_epilogue

F64 = torch.float64


def inputs(n: int = 5, d: int = 4, V: int = 3):
    g = torch.Generator().manual_seed(n)
    P, z, table, gamma, beta = (
        torch.randn(s, generator=g, dtype=F64).requires_grad_()
        for s in ((n, d), (n, d), (V, d), (d,), (d,))
    )
    return P, z, table, torch.arange(n) % V, gamma, beta


def test_values_and_gradients():
    P, z, table, ids, gamma, beta = inputs()
    out, share, sums = cvfp_epilogue(P, z, table, ids, gamma, beta)
    y = z + torch.relu(P + table[ids])
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(out, y * gamma + beta)
    assert share is None
    assert sums is None

    def run(P, z, table, gamma, beta):
        return cvfp_epilogue(P, z, table, ids, gamma, beta)[0]

    assert torch.autograd.gradcheck(run, (P, z, table, gamma, beta))


def test_statistics_need_no_gradient():
    x = inputs()
    out = cvfp_epilogue(*x)[0].detach()
    old = out.clone()
    old[0] += 1
    _, share, sums = cvfp_epilogue(*x, old, 0.5)
    assert share == pytest.approx(0.8)
    assert torch.allclose(sums, out.sum(0))
    assert not share.requires_grad
    assert not sums.requires_grad


def test_shapes_that_do_not_fit_are_named():
    P, z, table, ids, gamma, beta = inputs()
    with pytest.raises(ValueError, match=r"table \(3, 4\)"):
        cvfp_epilogue(P[:, :3], z, table, ids, gamma, beta)
