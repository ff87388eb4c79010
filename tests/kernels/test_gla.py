"""Chunked linear attention against its recurrence, with states, decays and gradients."""

from __future__ import annotations

import pytest
import torch

from lib.kernels.gla import gla, reference

F64 = torch.float64


def draw(
    T: int, B: int = 2, H: int = 2, Dk: int = 4, Dv: int = 3, dtype=F64, strength: float = 1.0
):
    g = torch.Generator().manual_seed(T)
    shapes = ((B, H, T, Dk), (B, H, T, Dk), (B, H, T, Dv))
    q, k, v = (torch.randn(s, generator=g, dtype=F64) for s in shapes)
    log_a = -torch.rand(B, H, T, generator=g, dtype=F64) * strength
    s0 = torch.randn(B, H, Dk, Dv, generator=g, dtype=F64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_a, s0)]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 500])
def test_chunks_equal_the_recurrence_with_every_gradient(T):
    x, results = draw(T), []
    for run in (gla, reference.loop):
        out, end = run(*x)
        weights = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        loss = (out * weights).sum() + end.square().sum()
        results.append((out, end, *torch.autograd.grad(loss, x)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strength", [0.0, 1e-6, 80.0])
def test_extreme_decays_stay_finite_and_right(strength):
    x = draw(130, strength=strength)
    for a, b in zip(gla(*x), reference.loop(*x), strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_fp32_is_close_to_fp64():
    """Seen 2e-7, bound 1e-5."""
    x = draw(500)
    got, want = gla(*[t.float() for t in x])[0], reference.loop(*x)[0]
    assert (got - want).norm() / want.norm() < 1e-5


def test_gradients_agree_with_differences():
    assert torch.autograd.gradcheck(gla, draw(5, B=1, Dk=2, Dv=2))


def test_the_state_continues_a_row():
    *x, s0 = draw(100)
    whole, end = gla(*x, s0)
    first, middle = gla(*(t[:, :, :37] for t in x), s0)
    rest, last = gla(*(t[:, :, 37:] for t in x), middle)
    assert torch.allclose(torch.cat((first, rest), 2), whole, atol=1e-11)
    assert torch.allclose(end, last, atol=1e-11)


def test_growth_and_wrong_shapes_are_refused():
    q, k, v, log_a, s0 = draw(6)
    with pytest.raises(ValueError, match="0 or less"):
        gla(q, k, v, log_a.detach() + 2, s0)
    with pytest.raises(ValueError, match=r"s0 \(2, 2, 4, 2\)"):
        gla(q, k, v, log_a, s0[..., :2])
