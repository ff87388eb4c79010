"""Probes of context vectors on clouds and maps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.nn.contexts import probes
from lib.nn.contexts.context import Weights, trajectory
from tests import golden
from tests.nn.contexts.test_context import golden_weights, random_weights


def test_golden_ranks_and_contraction(shared):
    X = torch.from_numpy(np.load(shared / "golden/cvfp.npz")["sequential_3"])
    assert probes.effective_rank(X, centred=True) == pytest.approx(12.685838085357, abs=1e-9)
    assert probes.effective_rank(X) == pytest.approx(12.488607274928, abs=1e-9)
    assert probes.participation(X) == pytest.approx(6.409436633163, abs=1e-9)
    weights = golden_weights(3)
    P = [p[1:, None] for p in weights.token_side(golden.wide_array(700, (50, 16), 1))]
    for dropped, wanted in ((0, 0.855984252825), (16, 0.810933345781)):
        assert probes.contraction(X[:1], P, weights, dropped) == pytest.approx(wanted, abs=1e-9)


def test_golden_rank_matrices(shared):
    wanted = golden.read(shared, "cvfp.json")["effective_rank_matrices"]
    decay = golden.wide_array(783, (60, 10), 1) * 0.5 ** torch.arange(10)
    found = {
        "uniform_hash_40x12": golden.wide_array(780, (40, 12), 1),
        "rank_one": torch.outer(golden.wide_array(781, (30,), 1), golden.wide_array(782, (8,), 1)),
        "identity_10": torch.eye(10, dtype=torch.float64),
        "decay": decay,
    }
    for name, matrix in found.items():
        assert probes.effective_rank(matrix) == pytest.approx(wanted[name], abs=1e-9), name


def test_both_ways_to_the_rank_agree_and_a_gaussian_scores_what_it_should():
    c = torch.randn(5000, 24, generator=torch.Generator().manual_seed(1))
    long, short = probes.effective_rank(c), None
    values = torch.linalg.svdvals(c.double())
    p = values / values.sum()
    short = float((-(p * (p + 1e-10).log()).sum()).exp())
    assert long == pytest.approx(short, rel=1e-6)
    c = c + 30  # a mean that takes nearly all of the second moment
    apart = probes.effective_rank(c), probes.effective_rank(c, centred=True)
    assert probes.effective_ranks(c) == pytest.approx(apart, rel=1e-9)
    assert probes.effective_ranks(c[:90]) == (
        probes.effective_rank(c[:90]), probes.effective_rank(c[:90], centred=True)
    )  # fmt: skip
    c = torch.randn(1280, 768, generator=torch.Generator().manual_seed(2))
    assert probes.effective_rank(c) / 768 == pytest.approx(0.907, abs=0.005)


def test_the_analytic_jacobian_is_that_of_autograd():
    for gelu in (False, True):
        base = random_weights(3, d=8)
        weights = Weights(base.A, base.B, base.b, base.gain, base.offset, gelu)
        draw = torch.Generator().manual_seed(3)
        c, v = (torch.randn(1, 8, generator=draw, dtype=torch.float64) for _ in "ab")
        P = [torch.randn(1, 8, generator=draw, dtype=torch.float64) for _ in range(3)]

        def f(z, P=P, weights=weights):
            return trajectory(z, [p[None] for p in P], weights)[-1][0]

        rows = torch.autograd.functional.jacobian(f, c)  # (1, 8, 1, 8); first order is all f has
        wanted = torch.einsum("aibj,bj->ai", rows, v)
        assert torch.allclose(probes.apply_jacobian(c, v, P, weights), wanted, atol=1e-10)


def test_a_shift_register_remembers_one_token_and_no_more():
    e = torch.randn(40, 64, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    c = torch.cat((e, torch.cat((torch.zeros(1, 64, 6), e[:-1]))), -1)
    found = probes.recall(c, e, torch.ones(40, 64), lags=(0, 1, 2))
    assert found[0] == pytest.approx(1, abs=0.01) and found[1] == pytest.approx(1, abs=0.01)
    assert abs(found[2]) < 0.05


def test_sampled_rows_are_spread_evenly():
    rows = probes.sample_rows(torch.arange(100)[:, None], 4).flatten()
    assert rows.tolist() == [12, 37, 62, 87]


def test_measures_that_are_asked_for_are_those_of_the_whole_look():
    """A table of controls shows four; each lag of the others would be a regression of its own."""
    draw = torch.Generator().manual_seed(1)
    Z, e = (torch.randn(20, 30, 6, generator=draw) for _ in range(2))
    keep = torch.ones(20, 30)
    whole, asked = probes.look(Z, e, keep), ("er", "rho", "r2_4")
    assert {"er", "er_seed", "pr", "mean_share", "rows", "r2_0", "r2_16"} < set(whole)
    assert probes.look(Z, e, keep, asked) == {"er": whole["er"], "r2_4": whole["r2_4"]}
