"""Bound, schedule, temperature and centroid of the hyperbolic layers."""

from __future__ import annotations

import math

import pytest
import torch

from lib.kernels.lorentz_attention import reference
from lib.nn import lorentz
from lib.nn.rope import rope_tables, rotate

F64 = torch.float64


def test_no_point_lies_beyond_r_max():
    """At head width 128 and c 1 kappa is 1.71; inputs of norm 1e6 stay inside."""
    assert lorentz.bound_factor(128, 4.0, 1.0) == pytest.approx(1.705, abs=2e-3)
    kappa = lorentz.bound_factor(64, 4.0, 1.0)
    x = torch.randn(10, 64, dtype=F64, generator=torch.Generator().manual_seed(0)) * 1e6
    norms = lorentz.bound(x, kappa).norm(dim=-1)
    assert (norms < kappa * 8).all()
    assert torch.asinh(math.sqrt(2.0) * norms).max() <= 4.0


def test_rope_leaves_times_and_changes_no_norm():
    x = torch.randn(1, 2, 7, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rope_tables(3, 7, 8, 10_000.0, x.device, F64))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", (0.001, 0.5005, 1.0, 1.0)),
        ("cosine", (0.001, 0.5005, 1.0, 1.0)),
        ("constant", (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_schedule(kind, values):
    got = [lorentz.curvature_at(kind, s, 60, 1e-3, 1.0) for s in (0, 30, 60, 600)]
    assert got == pytest.approx(values)
    assert lorentz.curvature_at("cosine", 15, 60, 1e-3, 1.0) == pytest.approx(0.1473, abs=1e-4)


def test_sharpness_does_not_follow_the_schedule():
    """Standard deviation of scores of random pairs over the whole warm-up: a factor below 1.5."""
    draw = torch.Generator().manual_seed(0)
    q, k = (lorentz.bound(torch.randn(1, 1, 200, 64, generator=draw, dtype=F64), 2.0) for _ in "qk")
    none, spreads = torch.zeros(200, 200, dtype=torch.bool), []
    for step in range(0, 61, 10):
        c = torch.tensor([lorentz.curvature_at("cosine", step, 60, 1e-3, 1.0)], dtype=F64)
        beta = 0.5 / 8 * lorentz.temperature(c, 64)
        spreads.append(float(reference._Scores(q, k, c, beta, none).values.std()))
    assert max(spreads) / min(spreads) < 1.5, spreads
    assert float(lorentz.temperature(torch.tensor(1e-9, dtype=F64), 64)) == pytest.approx(
        1, abs=1e-4
    )


def test_the_centroid_lies_on_the_hyperboloid_and_is_the_einstein_midpoint():
    draw = torch.Generator().manual_seed(0)
    v, c = torch.randn(1, 1, 6, 3, generator=draw, dtype=F64), torch.tensor([0.7], dtype=F64)
    p = torch.rand(1, 1, 2, 6, generator=draw, dtype=F64).softmax(-1)
    lifted = lorentz.lift(v, c)
    mean = p @ lifted
    o = lorentz.centroid(mean, c)
    time = mean[..., -1:] * (o / mean[..., :-1])[..., :1]  # the same factor for all coordinates
    assert torch.allclose(time.square() - o.square().sum(-1, keepdim=True), 1 / c, atol=1e-12)
    gamma = torch.sqrt(1 + c * v.square().sum(-1))  # Klein coordinates, Lorentz factors as weights
    klein = v / gamma[..., None]
    weighed = p * gamma[:, :, None]
    midpoint = weighed @ klein / weighed.sum(-1, keepdim=True)
    factor = torch.rsqrt(1 - c * midpoint.square().sum(-1, keepdim=True))
    assert torch.allclose(o, midpoint * factor, atol=1e-12)
