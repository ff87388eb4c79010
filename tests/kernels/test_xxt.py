"""Symmetric products: values, and shapes that are no symmetric product."""

from __future__ import annotations

import pytest
import torch

from lib.kernels.xxt import xxt


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 7), (16, 16)])
def test_xxt_is_the_product_and_its_affine_form(n, m):
    X = torch.randn(2, n, m, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    A = xxt(X)
    assert torch.allclose(A, X @ X.mT)
    assert torch.allclose(xxt(A, alpha=2.0, beta=-4.0, A=A), 2 * A @ A - 4 * A)
    assert torch.allclose(xxt(X, alpha=0.5), A / 2)


def test_tall_matrices_and_odd_companions_are_refused():
    with pytest.raises(ValueError, match="must be wide"):
        xxt(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="square"):
        xxt(torch.zeros(1, 2, 3), beta=1.0, A=torch.zeros(1, 3, 3))
