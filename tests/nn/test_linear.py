"""The fp8 arithmetic, simulated where no GPU multiplies it: scales, rounding, gradients, gates."""

from __future__ import annotations

import pytest
import torch

from lib.core.errors import UserError
from lib.nn.linear import E4M3, E5M2, Linear, fp8_linear, quantize, require_fp8


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_quantisation_fills_the_range_at_any_scale(dtype, scale):
    x = draw(64, 64, scale=scale)
    q, s = quantize(x, dtype)
    back = q.float() * s
    assert q.float().abs().max() == torch.finfo(dtype).max
    step = 2**-4 if dtype == E4M3 else 2**-3  # half a step of 3 or 2 mantissa bits
    assert ((back - x).abs() <= step * x.abs() + s * torch.finfo(dtype).smallest_normal).all()


def test_a_zero_tensor_survives():
    q, s = quantize(torch.zeros(16, 16), E4M3)
    assert torch.equal(q.float() * s, torch.zeros(16, 16))


def test_fp8_linear_is_near_the_exact_one_with_both_gradients():
    """21 rows: padding to 16 is invisible. Errors of random data, measured 3.7e-2 to 6.5e-2."""
    x, w = draw(3, 7, 128).requires_grad_(), draw(256, 128, seed=1).requires_grad_()
    up = draw(3, 7, 256, scale=1e-5, seed=2)
    out, want = fp8_linear(x, w), x @ w.mT
    assert out.shape == want.shape
    ours, exact = (torch.autograd.grad((y * up).sum(), (x, w)) for y in (out, want))
    for a, b in zip((out, *ours), (want, *exact), strict=True):
        assert 1e-3 < (a - b).norm() / b.norm() < 0.1


def test_only_large_even_layers_in_training_are_fp8():
    assert not Linear(127, 256, fp8=True).fp8
    assert not Linear(64, 256, fp8=True).fp8
    layer = Linear(128, 128, fp8=True)
    with torch.no_grad():
        layer.weight.copy_(draw(128, 128))
    x = draw(16, 128, seed=3)
    exact = x @ layer.weight.mT
    assert not torch.equal(layer(x), exact)
    assert torch.equal(layer.eval()(x), exact)


def test_a_device_without_fp8_is_refused():
    with pytest.raises(UserError, match="capability"):
        require_fp8(torch.device("cpu"))
