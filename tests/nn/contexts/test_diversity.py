"""Diversity losses: golden values, gradients against autograd, scale, what each one sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib.nn.contexts.diversity import Diversity, random_directions

KINDS = ("mcdl", "oacd", "vicreg", "logdet", "sigreg")


def sines(d: int = 16, rows: int = 4) -> torch.Tensor:
    a = [[math.sin(r * (i + 1)) for i in range(d)] for r in range(1, rows + 1)]
    return torch.nn.functional.normalize(torch.tensor(a, dtype=torch.float64), dim=1)


def value(kind: str, c: torch.Tensor, directions=None) -> float:
    found = Diversity(kind, directions)  # type: ignore[arg-type]
    found.add(c)
    return float(found.finish()[0])


def by_definition(kind: str, c: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    n, d = c.shape
    m = c.mean(0)
    h = c - m
    S, S1 = h.T @ h / n, h.T @ h / (n - 1)
    if kind == "mcdl":
        return -(h.square().sum() / (n * d)).sqrt()
    if kind == "oacd":
        return -(h.square().sum() / (n * d)).sqrt() + 0.1 * m.square().sum() / d
    if kind == "vicreg":
        off = S1 - S1.diagonal().diag()
        spread = (1 - (S1.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        return spread + 0.04 * off.square().sum() / d
    if kind == "logdet":
        eye = torch.eye(d, dtype=c.dtype)
        return math.log(1.01) - torch.logdet(S + 0.01 * eye) / d
    w = torch.linspace(-5, 5, 17, dtype=c.dtype)
    target = (-(w**2) / 2).exp()
    angles = (c @ a.T)[..., None] * w
    gap = (angles.cos().mean(0) - target) ** 2 + angles.sin().mean(0) ** 2
    return torch.trapezoid(gap * target, w).mean()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("mcdl", -0.907404445467),
        ("oacd", -0.883276530987),
        ("logdet", 0.998075439474),
        ("sigreg", 0.299341549294),
    ],
)
def test_values_on_the_golden_sequence(shared, kind, wanted):
    X = torch.from_numpy(np.load(shared / "golden/cvfp.npz")["sequential_3"])
    assert value(kind, X, sines()) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_in_micro_batches_are_those_of_one_graph(kind):
    c = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = (c + 0.3).requires_grad_()
    wanted = by_definition(kind, c, sines())
    (gradient,) = torch.autograd.grad(wanted, c)
    for micro in (7, 64, 1000):
        found = Diversity(kind, sines())  # type: ignore[arg-type]
        for part in c.split(micro):
            found.add(part)
        got, slope = found.finish()
        assert got.item() == pytest.approx(wanted.item(), abs=1e-12)
        pieces = torch.cat([slope(part.detach()) for part in c.split(micro)])
        assert (pieces - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    """Products of fp32 rows stay fp32: S of nearly flat rows in bf16 is no covariance any more."""
    draw = torch.Generator().manual_seed(6)
    c = torch.nn.functional.layer_norm(
        torch.randn(500, 32, generator=draw) * 0.01 + sines(32)[0], (32,)
    )
    c = c.float()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            one = Diversity(kind, sines(32).float())  # type: ignore[arg-type]
            one.add(c)
            value, slope = one.finish()
            found.append((value, slope(c)))
    (plain, slope), (wide, steep) = found
    assert torch.equal(plain, wide) and torch.equal(slope, steep)


@pytest.mark.parametrize("kind", ["mcdl", "logdet", "sigreg"])
def test_the_value_does_not_depend_on_the_number_of_rows(kind):
    c = torch.randn(200, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a = random_directions(8, torch.Generator().manual_seed(3)).double()
    assert value(kind, c, a) == pytest.approx(value(kind, c.repeat(4, 1), a), abs=1e-12)


def test_mcdl_cannot_tell_a_line_from_a_ball_and_the_others_can():
    """Kept for parity only: under LN it is a function of the mean alone."""
    d, draw = 16, torch.Generator().manual_seed(4)
    norm = lambda x: torch.nn.functional.layer_norm(x, (d,), eps=1e-12)  # noqa: E731
    ball = norm(torch.randn(4000, d, generator=draw, dtype=torch.float64))
    ball = torch.cat((ball, -ball))
    line = norm(torch.randn(1, d, generator=draw, dtype=torch.float64)).repeat(4000, 1)
    line = torch.cat((line, -line))
    a = random_directions(d, torch.Generator().manual_seed(5)).double()
    assert value("mcdl", line) == pytest.approx(value("mcdl", ball), abs=1e-6)
    for kind in ("logdet", "vicreg", "sigreg"):
        assert value(kind, line, a) > 10 * value(kind, ball, a), kind
