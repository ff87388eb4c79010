"""Trajectories of context vectors against the golden values, autograd and one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.nn.contexts.context import TokenTables, Weights, shifts, trajectory
from lib.nn.contexts.halo import Repairs, halo
from lib.nn.contexts.one_step import one_step
from tests import golden

D, N = 16, 50


def golden_weights(depth: int) -> Weights:
    W = [golden.wide_array(720 + 4 * i, (D, 2 * D), 0.25) for i in range(depth)]
    return Weights(
        tuple(w[:, :D] for w in W), tuple(w[:, D:] for w in W),
        tuple(golden.wide_array(721 + 4 * i, (D,), 0.05) for i in range(depth)),
        tuple(golden.wide_array(722 + 4 * i, (D,), 0.1, 1) for i in range(depth)),
        tuple(golden.wide_array(723 + 4 * i, (D,), 0.05) for i in range(depth)),
    )  # fmt: skip


def random_weights(depth: int, d: int = 32, seed: int = 0) -> Weights:
    """As a new block's: deviation sqrt(15.36 / inputs)."""
    draw = torch.Generator().manual_seed(seed)
    std = (15.36 / (2 * d)) ** 0.5

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * scale

    ones, zeros = (f(d, dtype=torch.float64) for f in (torch.ones, torch.zeros))
    return Weights(
        tuple(normal(d, d, scale=std) for _ in range(depth)),
        tuple(normal(d, d, scale=std) for _ in range(depth)),
        tuple(normal(d, scale=0.01) for _ in range(depth)),
        (ones,) * depth, (zeros,) * depth,
    )  # fmt: skip


def token_by_token(c: torch.Tensor, P: list[torch.Tensor], weights: Weights) -> torch.Tensor:
    """The definition, one token at a time, by torch's own layers."""
    found = []
    for t in range(len(P[0])):
        z = c
        for p, A, gain, offset in zip(P, weights.A, weights.gain, weights.offset, strict=True):
            grown = z + torch.relu(A @ z + p[t])
            z = torch.nn.functional.layer_norm(grown, grown.shape, gain, offset, 1e-5)
        c = z
        found.append(c)
    return torch.stack(found)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_sequences_and_sweeps_are_the_golden_ones(shared, depth):
    arrays = np.load(shared / "golden/cvfp.npz")
    weights, e = golden_weights(depth), golden.wide_array(700, (N, D), 1)
    P = weights.token_side(e)
    start = torch.zeros(1, D, dtype=torch.float64)
    C = trajectory(start, [p[:, None] for p in P], weights)[-1][:, 0]
    assert np.abs(C.numpy() - arrays[f"sequential_{depth}"]).max() < 1e-10
    before = golden.wide_array(760 + depth, (N, D), 1)
    swept = one_step(before.roll(1, 0), P, weights)
    assert np.abs(swept.numpy() - arrays[f"sweep_wrap_{depth}"]).max() < 1e-10
    rule, carried = [], before[-1]
    for s in (0, 20, 40):
        inputs = torch.cat((carried[None], before[s : min(s + 20, N) - 1]))
        rule.append(one_step(inputs, [p[s : s + 20] for p in P], weights))
        carried = rule[-1][-1]
    found = torch.cat(rule).numpy()
    assert np.abs(found - arrays[f"sweep_disk_rule_fixed_weights_{depth}"]).max() < 1e-10


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_solvers_agree_with_token_by_token(depth):
    """Documents in parallel exactly, a stream by halo within its tolerance at every row."""
    weights = random_weights(depth)
    u = torch.randn(2048, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P = weights.token_side(u)
    zero = torch.zeros(32, dtype=torch.float64)
    true = token_by_token(zero, P, weights)
    found = trajectory(zero[None], [p[:, None] for p in P], weights)[-1][:, 0]
    assert (found - true).abs().max() < 1e-12
    for tol in (1e-3, 1e-6):
        repairs = Repairs()
        made = halo(
            zero, lambda at: [p[at.clamp(min=0)] for p in P], 2048, weights,
            segment=128, warm=4, tol=tol, repairs=repairs,
        )  # fmt: skip
        assert (made - true).square().mean(-1).sqrt().max() <= tol
        assert repairs.segments > 0


def test_repair_is_needed_and_reset_makes_it_needless():
    weights = random_weights(1)
    u = torch.randn(512, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    P = weights.token_side(u)
    zero = torch.zeros(32, dtype=torch.float64)
    redone = []
    for keep in (None, (torch.arange(512) % 64 != 0).double()):
        repairs = Repairs()
        halo(
            zero, lambda at: [p[at.clamp(min=0)] for p in P], 512, weights,
            segment=64, warm=2, tol=1e-9, keep=keep, repairs=repairs,
        )  # fmt: skip
        redone.append(repairs.tokens)
    # Where every segment begins a document, the first token of each shows that all is right.
    assert redone[0] > 100 and redone[1] <= 7


def test_jacobi_is_exact_after_as_many_sweeps_as_tokens():
    weights = random_weights(3)
    u = torch.randn(64, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P = weights.token_side(u)
    zero = torch.zeros(1, 32, dtype=torch.float64)
    true = trajectory(zero, [p[:, None] for p in P], weights)[-1][:, 0]
    C = torch.ones(64, 32, dtype=torch.float64)
    for sweep in range(64):
        C = one_step(torch.cat((zero, C[:-1])), P, weights)
        assert torch.allclose(C[: sweep + 1], true[: sweep + 1], atol=1e-12), sweep
    assert torch.allclose(C, true, atol=1e-12)


@pytest.mark.parametrize("gelu", [False, True])
def test_the_hand_written_gradient_is_that_of_autograd(gelu):
    """Outputs of every layer, resets, all inputs: finite differences in fp64."""
    base = random_weights(2, d=5)
    draw = torch.Generator().manual_seed(4)
    keep = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.clone().requires_grad_()

    c0 = leaf(torch.randn(2, 5, generator=draw, dtype=torch.float64))
    P = [leaf(torch.randn(3, 2, 5, generator=draw, dtype=torch.float64)) for _ in range(2)]
    rest = [leaf(x) for x in (*base.A, *base.gain, *base.offset)]

    def f(c, *flat):
        w = Weights(flat[2:4], base.B, base.b, flat[4:6], flat[6:8], gelu)
        return tuple(trajectory(c, flat[:2], w, keep))

    assert torch.autograd.gradcheck(f, [c0, *P, *rest])


def test_tables_give_the_gradient_of_the_plain_product():
    """Rows of a table, summed by id, handed on at the end: B and b as if never factored."""
    draw = torch.Generator().manual_seed(5)
    B = torch.randn(4, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = Weights((torch.eye(4, dtype=torch.float64),), (B,), (b,), (b,), (b,))
    table = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    ids = torch.tensor([1, 1, 5, 2, 1])
    weight = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    (weights.token_side(table[ids])[0] * weight).sum().backward()
    wanted = B.grad.clone(), b.grad.clone()
    B.grad = b.grad = None
    distinct, index = torch.unique(ids, return_inverse=True)
    tables = TokenTables(weights, table[distinct], learns=True)
    for part in (slice(0, 2), slice(2, 5)):
        (tables.gather(index[part])[0] * weight[part]).sum().backward()
    zero = tables.hand_on()
    (7 * zero).backward()  # the scale of the losses is in the gathered gradients already
    assert zero.item() == 0
    assert torch.allclose(B.grad, wanted[0]) and torch.allclose(b.grad, wanted[1])


def test_shifts_stop_at_the_document_and_go_on_over_a_split():
    x = torch.arange(1.0, 7)[:, None, None]
    keep = torch.tensor([1.0, 1, 1, 0, 1, 1])[:, None]
    zeros = [torch.zeros(1, 1)] * 2
    whole, _ = shifts(x, keep, zeros)
    assert whole[0].flatten().tolist() == [0, 1, 2, 0, 4, 5]
    assert whole[1].flatten().tolist() == [0, 0, 1, 0, 0, 4]
    first, state = shifts(x[:4], keep[:4], zeros)
    second, _ = shifts(x[4:], keep[4:], state)
    for one, (a, b) in zip(whole, zip(first, second, strict=True), strict=True):
        assert torch.equal(torch.cat((a, b)), one)
