"""Hyperbolic attention against golden numbers, its own definition, and the geometry's laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lib.kernels.lorentz_attention import lorentz_attention, reference
from lib.nn.lorentz import bound as bounded
from lib.nn.lorentz import bound_factor
from tests import golden

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype=F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def inputs(n: int, m: int | None = None, H: int = 3, D: int = 8, E: int = 8, dtype=F64):
    m = m or n
    q, k, v = draw(2, H, n, D, dtype=dtype), draw(2, H, m, D, seed=1, dtype=dtype), draw(2, H, m, E)
    wide = F64 if dtype == F64 else torch.float32
    c, beta = torch.tensor([0.3, 1.0, 2.0][:H], dtype=wide), torch.tensor([0.2, 0.5, 1.0][:H])
    every = [q, k, v.to(dtype), c, beta.to(wide)]
    return [x.requires_grad_() for x in every]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6))


@pytest.mark.parametrize("n", [1, 2, 17, 65, 130])
@pytest.mark.parametrize("window", [1, 7, 130, 1_000])
def test_blocks_equal_the_definition_with_every_gradient(n, window):
    x = inputs(n)
    for c in (x[3], None):
        leaves = [one for one in (*x[:3], c, x[4]) if one is not None]
        results = []
        for run in (lorentz_attention, reference.plain):
            out = run(*x[:3], c, x[4], window)
            results.append(
                (out, *torch.autograd.grad((out * draw(*out.shape, seed=3)).sum(), leaves))
            )
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def test_queries_may_be_the_last_of_more_keys():
    q, k, v, c, beta = inputs(40)
    whole = lorentz_attention(q, k, v, c, beta, 9)
    assert torch.allclose(lorentz_attention(q[:, :, 33:], k, v, c, beta, 9), whole[:, :, 33:])


@pytest.mark.parametrize("curved", [True, False])
def test_gradients_agree_with_differences(curved):
    """c, beta and the coincident pair included: the definition's own slope is tested here."""
    q, k, v, c, beta = inputs(5, H=2, D=3, E=2)
    with torch.no_grad():
        k[0, 0, 2] = q[0, 0, 2] + 1e-3
    leaves = (q, k, v, c, beta) if curved else (q, k, v, beta)

    def run(*x):
        return (
            lorentz_attention(*x, window=3) if curved else lorentz_attention(*x[:3], None, x[3], 3)
        )

    assert torch.autograd.gradcheck(run, leaves)


def test_golden_numbers(shared):
    found = golden.read(shared, "lorentz_attention.json")
    n, d, dv = found["n"], found["d"], found["dv"]
    q, k, v, dout = (
        golden.wide_array(found[f"k_{name}"], (n, width), scale)
        for name, width, scale in (("q", d, 0.8), ("k", d, 0.8), ("v", dv, 1), ("dout", dv, 1))
    )
    k[2] = q[2]
    q[1] = 0
    checked = 0
    for case in found["cases"]:
        if not case["causal"]:
            continue
        checked += 1
        x = [t.clone()[None, None].requires_grad_() for t in (q, k, v)]
        c, beta = (
            torch.tensor([float(case[s])], dtype=F64).requires_grad_() for s in ("c", "beta")
        )
        out = lorentz_attention(*x, c, beta, case["window"] or n)
        out.backward(dout[None, None])
        pairs = [("output", out[0, 0]), ("grad_c", c.grad), ("grad_beta", beta.grad)]
        pairs += [(f"grad_{s}", t.grad[0, 0]) for s, t in zip("qkv", x, strict=True)]
        for name, ours in pairs:
            want = torch.tensor(case[name], dtype=F64)
            assert torch.allclose(ours.squeeze(), want, atol=1e-10), (name, case["c"])
    assert checked >= 3


def test_coincident_points_zeros_and_equal_rows_have_finite_gradients():
    for dtype in (F64, torch.float32, torch.bfloat16):
        for fill in ("equal", "zero", "same", "far"):
            q, k, v, c, beta = inputs(70, dtype=dtype)
            with torch.no_grad():
                if fill == "equal":
                    k.copy_(q)
                elif fill == "zero":
                    q.zero_()
                elif fill == "same":
                    k.copy_(k[:, :, :1].expand_as(k))
                    q.copy_(k)
                else:
                    q.mul_(1e3)
            out = lorentz_attention(q, k, v, c, beta, 33)
            grads = torch.autograd.grad(out.float().square().sum(), (q, k, v, c, beta))
            assert all(torch.isfinite(g).all() for g in (out, *grads)), (dtype, fill)


def test_u_is_a_distance():
    """s <= 0, = 0 where q = k, symmetric, and unchanged by a boost applied to both (1e-12)."""
    q, k = draw(1, 1, 6, 3), draw(1, 1, 6, 3, seed=1)
    c, beta = torch.tensor([0.7], dtype=F64), torch.ones(1, dtype=F64)
    none = torch.zeros(6, 6, dtype=torch.bool)
    s = reference._Scores(q, k, c, beta, none).values
    assert (s < 0).all(), "no key is its query"
    assert (
        reference._Scores(q, q, c, beta, none).values.diagonal(dim1=-2, dim2=-1).abs().max() < 1e-12
    )
    assert torch.allclose(s, reference._Scores(k, q, c, beta, none).values.mT, atol=1e-12)
    rapidity, (ch, sh) = 0.9, (math.cosh(0.9), math.sinh(0.9))
    assert rapidity

    def boost(x: Tensor) -> Tensor:
        time = torch.sqrt(1 / c + x.square().sum(-1))
        first = ch * x[..., 0] + sh * time
        return torch.cat((first[..., None], x[..., 1:]), -1)

    moved = reference._Scores(boost(q), boost(k), c, beta, none).values
    assert torch.allclose(moved, s, atol=1e-12)


def test_small_curvature_is_the_euclidean_limit():
    """Mean relative difference of scores at D 64: below 1 % at c 1e-3, ten times less at 1e-4.

    Of points as the model has them, seen 0.85 %; without the bound of their radius 1.07 %.
    """
    kappa = bound_factor(64, 4.0, 1.0)
    q, k = (bounded(draw(1, 1, 50, 64, seed=seed), kappa) for seed in (0, 1))
    beta, none = torch.ones(1, dtype=F64), torch.zeros(50, 50, dtype=torch.bool)
    flat = reference._Scores(q, k, None, beta, none).values
    errors = []
    for c in (1e-3, 1e-4):
        s = reference._Scores(q, k, torch.tensor([c], dtype=F64), beta, none).values
        errors.append(float(((s - flat).abs() / flat.abs()).mean()))
    assert errors[0] < 0.01, errors
    assert errors[1] < errors[0] / 9.5, errors


def test_series_and_root_meet():
    for dtype, bound in ((torch.float32, 2e-6), (F64, 1e-14)):
        edge = reference.SERIES_BELOW[dtype]
        u = torch.tensor([edge * (1 - 1e-6), edge * (1 + 1e-6)], dtype=dtype)
        for value in (reference.squared_arcosh(u), reference.slope(u)):
            assert abs(value[1] / value[0] - 1) < 4e-6 + bound
        exact = torch.acosh(1 + u.double()).square()
        assert torch.allclose(reference.squared_arcosh(u).double(), exact, rtol=1e-5)


def test_wrong_shapes_are_named():
    q, k, v, c, beta = inputs(4)
    for bad in (
        (q[0], k, v, c, beta, 2),
        (q, k[:, :, :3], v, c, beta, 2),
        (q, k, v, c[:1], beta, 2),
        (q, k, v, c, beta, 0),
    ):
        with pytest.raises(ValueError, match=r"\d"):
            lorentz_attention(*bad)
