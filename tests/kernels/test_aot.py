"""Layer 3: kernels compiled for real GPUs without one. Run by `make test-aot`, in a process alone.

A sample by default; with -m "slow or not slow" every target, and every configuration on two.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from lib import kernels
from lib.core.kernel_choice import OPERATORS, interpreting, missing
from lib.kernels import configs

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("KUMIKI_TEST_AOT") != "1" or interpreting(),
        reason="compiles under make test-aot",
    ),
    pytest.mark.skipif(bool(missing()), reason=f"{missing()}"),
    pytest.mark.timeout(900),
]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    """What an earlier run compiled says nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def rows(op: str, target: str, dtype: torch.dtype, *, every: bool = False) -> list:
    from lib.kernels import aot

    return [aot.compiled(op, call, target, dtype) for call in aot.variants(op, dtype, every=every)]


def assert_gates(found: list) -> None:
    assert found
    assert not [(r.kernel, r.target, r.config, r.broken) for r in found if r.broken]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_starts_pass_the_gates(op, target):
    assert_gates(rows(op, target, kernels.operator(op).dtype(BF16)))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89"])
def test_starts_pass_the_gates_on_the_other_targets(op, target):
    assert_gates(rows(op, target, kernels.operator(op).dtype(BF16)))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
def test_fp32_compiles(op):
    """Products in ieee fp32 are for correctness: they spill, and only memory is gated."""
    assert_gates(rows(op, "sm_80", F32))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_configuration_compiles_within_shared_memory(op, target):
    """Candidates of the tuner may spill, which costs time; a start may not."""
    found = rows(op, target, kernels.operator(op).dtype(BF16), every=True)
    assert not [(r.config, b) for r in found for b in r.broken if not b.startswith("stack")]


def call_of(op: str, kernel: str, config: configs.Config, **sizes: int):
    from lib.kernels import aot

    operator = kernels.operator(op)
    with configs.forced(kernel, config):
        calls = aot.calls_of(op, BF16, {**operator.compiled, **sizes})
    return next(c for c in calls if c.kernel.fn.__name__ == f"{kernel}_kernel")


def test_a_tile_too_large_fails_the_shared_gate():
    from lib.kernels import aot

    call = call_of("lorentz_attention", "forward", configs.tile(8, 4, BM=128, BN=128))
    row = aot.compiled("lorentz_attention", call, "sm_86", BF16)
    assert any(b.startswith("shared") for b in row.broken), row


def test_a_tile_that_spills_fails_the_stack_gate():
    from lib.kernels import aot

    call = call_of("lorentz_attention", "dq", configs.tile(4, 2, BM=64, BN=64))
    row = aot.compiled("lorentz_attention", call, "sm_90", BF16)
    assert any(b.startswith("stack") for b in row.broken), row


def test_a_product_of_four_by_four_does_not_compile():
    """The interpreter accepts it: only this layer sees it."""
    from triton.errors import TritonError

    from lib.kernels import aot

    call = call_of("lorentz_attention", "forward", configs.tile(4, 2, BM=16, BN=16), D=16)
    small = replace(call, arguments={**call.arguments, "BM": 4, "BN": 4, "D": 4})
    with pytest.raises((TritonError, RuntimeError, ValueError)):
        aot.compiled("lorentz_attention", small, "sm_90", BF16)
