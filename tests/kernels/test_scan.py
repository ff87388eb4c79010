"""The doubling scan against its loop, the combine's law, and long bounded runs."""

from __future__ import annotations

import math

import pytest
import torch

from lib.kernels.scan import reference, scan

F64 = torch.float64


def draw(B: int, T: int, r: int, dtype=F64):
    g = torch.Generator().manual_seed(T)
    log_a = -torch.rand(B, T, r, generator=g, dtype=F64) * 3
    return [
        x.to(dtype).requires_grad_()
        for x in (
            log_a,
            torch.randn(B, T, r, generator=g, dtype=F64),
            torch.randn(B, r, generator=g, dtype=F64),
        )
    ]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 500])
def test_doubling_equals_the_loop_with_every_gradient(T):
    for x in (draw(2, T, 3), [*draw(2, T, 3)]):
        weights = torch.linspace(-1, 1, 2 * T * 3, dtype=F64).view(2, T, 3)
        results = []
        for run in (lambda *y: scan(*y)[0], reference.loop):
            h = run(*x)
            results.append((h, *torch.autograd.grad((h * weights).sum() + h[:, -1].sum(), x)))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a", [1 - 1e-6, 1e-6])
def test_extreme_decays(a):
    _, b, h0 = draw(1, 500, 2)
    log_a = torch.full_like(b, math.log(a)).requires_grad_()
    assert torch.allclose(
        scan(log_a, b, h0)[0], reference.loop(log_a, b, h0), rtol=1e-12, atol=1e-12
    )


def test_combine_is_associative():
    x, y, z = ([t.detach()[0] for t in draw(1, 20, 4 + i)[:2]] for i in range(3))
    x, y, z = ([t[:, :4] for t in one] for one in (x, y, z))
    left = reference.combine(reference.combine(x, y), z)
    right = reference.combine(x, reference.combine(y, z))
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(left, right, strict=True))


def test_gradients_agree_with_differences():
    assert torch.autograd.gradcheck(scan, draw(2, 5, 3))


def test_the_state_continues_a_row():
    log_a, b, h0 = draw(2, 30, 3)
    whole, end = scan(log_a, b, h0)
    first, middle = scan(log_a[:, :11], b[:, :11], h0)
    rest, last = scan(log_a[:, 11:], b[:, 11:], middle)
    assert torch.allclose(torch.cat((first, rest), 1), whole, atol=1e-12)
    assert torch.allclose(end, last, atol=1e-12)


def test_unit_noise_stays_bounded():
    """With the input times sqrt(1 - a^2) the variance of h is that of the noise, for ever."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 100_000, 3, generator=g)
    log_a = torch.tensor([-1e-6, -1e-3, -1.0]).expand_as(noise)
    h, _ = scan(log_a, torch.sqrt(-torch.expm1(2 * log_a)) * noise, torch.zeros(1, 3))
    assert torch.isfinite(h).all()
    assert h.abs().max() < 6


def test_wrong_shapes_are_named():
    log_a, b, h0 = draw(2, 4, 3)
    with pytest.raises(ValueError, match=r"\(2, 3, 3\)"):
        scan(log_a[:, :3], b, h0)
