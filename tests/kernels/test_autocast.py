"""Autocast around an operator: what is stated to be fp32 keeps its bits, products go in bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lib import kernels
from lib.core.kernel_choice import OPERATORS
from lib.kernels.check import Draw, results
from tests.kernels.harness import F32

# Matrix products of operands that autocast may narrow; all others compute in what they are given.
PRODUCTS = ("linear_cross_entropy", "tt_linear_cross_entropy", "relu2_mlp")


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "xxt"])  # no autocast in an update
def test_autocast_narrows_products_and_nothing_else(op):
    """Forward inside, backward outside, as in training: the gradients have their inputs' types."""
    operator = kernels.operator(op)
    case = operator.make(Draw("cpu", F32), **operator.small[0])

    def inside(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return operator.function(*args, **options)

    plain = results(operator, case, "reference")
    found = results(replace(operator, function=inside), case, "reference")
    assert found.keys() == plain.keys()
    for name, wanted in plain.items():
        if op in PRODUCTS:
            error = float((found[name].float() - wanted).norm() / wanted.norm())
            assert error <= operator.tolerance(name, torch.bfloat16), (name, error)
        else:
            assert torch.equal(found[name], wanted), name
