"""Rows of a tensor train against the expanded table."""

from __future__ import annotations

import pytest
import torch

from lib.kernels.tt_gather import reference, tt_gather

F64 = torch.float64


def draw(v1=5, v2=4, R=3, d1=3, d2=4, dtype=F64):
    g = torch.Generator().manual_seed(v1)
    shapes = ((v1, R, d1), (v2, R, d2))
    return [torch.randn(s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (200,)])
@pytest.mark.parametrize("width", [1, 10, 12])
def test_equals_rows_of_the_table_with_gradients(shape, width, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 16)  # several, the last one ragged
    C1, C2 = draw()
    cell = torch.randint(20, shape, generator=torch.Generator().manual_seed(1))
    results = []
    for rows in (tt_gather(cell, C1, C2, width), reference.expand(C1, C2, width)[cell]):
        weights = torch.linspace(-1, 1, rows.numel(), dtype=F64).view_as(rows)
        results.append((rows, *torch.autograd.grad((rows * weights).sum(), (C1, C2))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_the_table_is_the_formula():
    """E[i1 v2 + i2, a d2 + b] = sum_k C1[i1, k, a] C2[i2, k, b], by loops."""
    C1, C2 = (x.detach() for x in draw())
    table = reference.expand(C1, C2, 11)
    for p, column in ((0, 0), (7, 10), (19, 4), (13, 9)):
        want = sum(C1[p // 4, k, column // 4] * C2[p % 4, k, column % 4] for k in range(3))
        assert torch.allclose(table[p, column], want)


def test_gradients_agree_with_differences():
    cell = torch.tensor([3, 3, 0, 19])
    assert torch.autograd.gradcheck(lambda a, b: tt_gather(cell, a, b, 10), draw())


def test_autocast_leaves_the_rows_alone():
    C1, C2 = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert tt_gather(torch.tensor([1, 2]), C1, C2, 12).dtype == torch.float32


def test_wrong_shapes_are_named():
    C1, C2 = draw()
    with pytest.raises(ValueError, match="width 13"):
        tt_gather(torch.tensor([0]), C1, C2, 13)
    with pytest.raises(ValueError, match=r"\(4, 2, 4\)"):
        tt_gather(torch.tensor([0]), C1, C2[:, :2], 10)
