"""Layers 2 and 4: every kernel against its reference, interpreted on a CPU or run on a GPU.

The interpreter cannot show races, TF32, bf16 rounding or speed; memory outside of a tensor is
guarded here because it reads that without an error.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib import kernels
from lib.kernels import configs, scatter
from lib.kernels.check import Draw, results
from lib.nn.contexts.context import Weights
from lib.nn.contexts.one_step import one_step
from tests.kernels.harness import (
    BF16,
    CASES,
    DEVICE,
    F16,
    F32,
    F64,
    INTERPRETED,
    SHAPES,
    assert_right,
    case_of,
    every_operator,
    layer,
    vanishing,
    worst,
)

pytestmark = layer


@pytest.mark.parametrize(("op", "sizes"), CASES)
def test_odd_shapes_in_fp32(op, sizes):
    assert_right(op, case_of(op, F32, sizes), F32, vanishing(op, sizes))


@every_operator
@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
def test_other_dtypes(op, dtype):
    """bf16 in the interpreter truncates at stores: numbers that decide come from a GPU."""
    if op == "scan" and dtype != F64:
        pytest.skip("the recurrence is fp32 only")
    assert_right(op, case_of(op, dtype, SHAPES[op][2]), dtype)


def _configurations() -> list:
    found = []
    for op in SHAPES:
        module = __import__(f"lib.kernels.{op}.configs", fromlist=["CANDIDATES", "TUNED"])
        for kernel, by_width in module.CANDIDATES.items():
            tuned = [c for (_, _, name, _), c in module.TUNED.items() if name == kernel]
            for config in dict.fromkeys([c for cs in by_width.values() for c in cs] + tuned):
                name = "-".join(f"{n}{side}" for n, side in config.tiles)
                found.append(pytest.param(op, kernel, config, id=f"{op}-{kernel}-{name}"))
    return found


@pytest.mark.parametrize(("op", "kernel", "config"), _configurations())
def test_every_listed_configuration(op, kernel, config):
    """The table and the tuner's candidates, launched whatever the width."""
    if op == "gla" and dict(config.tiles).get("BV", 16) > 64:
        pytest.skip("wider than the values")
    sizes = {"gla": {"B": 1, "H": 1, "T": 65, "Dk": 16, "Dv": 64}}.get(op, SHAPES[op][2])
    with configs.forced(kernel, config):
        assert_right(op, case_of(op, F32, sizes), F32)


@every_operator
def test_zeros_give_zeros_or_the_reference(op):
    case = case_of(op, F32, SHAPES[op][2])
    empty = {
        n: torch.zeros_like(x).requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point() and n not in ("c", "beta", "gamma")
        else x
        for n, x in case.tensors.items()
    }
    assert_right(op, replace(case, tensors=empty), F32)


@pytest.mark.parametrize("op", ["rms_norm", "relu2_mlp", "cvfp_epilogue", "linear_cross_entropy"])
def test_one_huge_row_and_equal_rows(op):
    case = case_of(op, F32, SHAPES[op][2])
    name = {"cvfp_epilogue": "z", "linear_cross_entropy": "h"}.get(op, "x")
    x = case.tensors[name].detach().clone()
    x[1:3] = x[0]
    x[-1] *= 1e3
    assert_right(op, replace(case, tensors={**case.tensors, name: x.requires_grad_()}), F32)


def test_huge_logits():
    case = case_of("linear_cross_entropy", F32, {"n": 5, "d": 24, "V": 97, "softcap": 0.0})
    h = (case.tensors["h"].detach() * 1e4).requires_grad_()
    assert_right("linear_cross_entropy", replace(case, tensors={**case.tensors, "h": h}), F32)


def test_coincident_points_have_finite_gradients():
    case = case_of("lorentz_attention", F32, {"B": 1, "H": 2, "T": 17, "D": 16, "window": 9})
    q = case.tensors["q"].detach().clone().requires_grad_()
    same = {**case.tensors, "q": q, "k": q.detach().clone().requires_grad_()}
    assert_right("lorentz_attention", replace(case, tensors=same), F32)


@pytest.mark.parametrize("op", ["scan", "gla"])
@pytest.mark.parametrize("value", [0.0, -80.0])
def test_no_decay_and_total_decay(op, value):
    case = case_of(op, F32, SHAPES[op][4])
    log_a = torch.full_like(case.tensors["log_a"], value).requires_grad_()
    # Where nothing is kept, what an earlier decay would have changed is exp(-80): seen 6e-43 in the
    # scan; gla takes it as a difference of two equal sums, seen 4e-6.
    vanish = {"log_a": {"scan": 1e-30, "gla": 1e-5}[op]} if value else {}
    assert_right(op, replace(case, tensors={**case.tensors, "log_a": log_a}), F32, vanish)


@every_operator
def test_strides_offsets_and_expansion(op):
    """The last dimension with a stride, or none at all: one copy in the launcher, same numbers."""
    case = case_of(op, F32, SHAPES[op][2])
    spread = {}
    for name, x in case.tensors.items():
        if x is None or not x.is_floating_point():
            spread[name] = x
            continue
        wide = torch.full((*x.shape, 2), torch.nan, device=x.device, dtype=x.dtype)
        wide[..., 0] = x.detach()
        spread[name] = wide[..., 0].requires_grad_(x.requires_grad)
    assert_right(op, replace(case, tensors=spread), F32)
    name = next(n for n, x in case.tensors.items() if x is not None and x.ndim > 1)
    x = case.tensors[name].detach()
    if name != "X":  # a symmetric companion would no longer fit
        repeated = x[..., :1, :].expand(x.shape).requires_grad_()
        assert_right(op, replace(case, tensors={**case.tensors, name: repeated}), F32)


@every_operator
def test_gradients_on_each_single_input(op):
    """A kernel may not depend on which gradients are asked for."""
    case = case_of(op, F32)
    wanted = [n for n, x in case.tensors.items() if x is not None and x.requires_grad]
    full = results(kernels.operator(op), case, "triton")
    for name in wanted:
        alone = {
            n: x.detach().requires_grad_(n == name)
            if x is not None and x.is_floating_point()
            else x
            for n, x in case.tensors.items()
        }
        got = results(kernels.operator(op), replace(case, tensors=alone), "triton")
        assert torch.equal(got[name], full[name]), name


def test_sums_by_index_are_split_and_put_together(monkeypatch):
    """A frequent index goes over many segments; the limit is lowered to see it with few entries."""
    monkeypatch.setattr(scatter, "LIMIT", 4)
    assert_right("tt_gather", case_of("tt_gather", F32, {"n": 37, "d": 7, "R": 3, "V": 2}), F32)


def test_symmetric_products_are_symmetric_bit_for_bit():
    for sizes in SHAPES["xxt"]:
        Y = results(kernels.operator("xxt"), case_of("xxt", F32, sizes), "triton")["out0"]
        assert torch.equal(Y, Y.mT), sizes


@every_operator
def test_the_operator_keeps_torchs_rules(op):
    """Schema, fake shapes and autograd registration."""
    if op in ("linear_cross_entropy", "tt_linear_cross_entropy"):
        pytest.skip("its operator is the reference's, tested with it")
    kernels.load(op)
    case, extra = case_of(op, F32), {"rms_norm": (1e-6,), "xxt": (1.0, 0.0, None)}
    tensors = tuple(case.tensors.values())
    options = {"cvfp_epilogue": (), "relu2_mlp": (), "scan": (), "gla": ()}
    rest = extra.get(op) or options.get(op, tuple(case.options.values()))
    torch.library.opcheck(getattr(torch.ops.kumiki, op), (*tensors, *rest))


@pytest.mark.slow
@pytest.mark.parametrize("op", [o for o in SHAPES if o != "xxt"])
def test_gradcheck_in_fp64(op):
    """Numerical gradients of the kernels themselves (sizes tiny: hundreds of interpreted runs)."""
    sizes = {
        "rms_norm": {"n": 2, "d": 5},
        "linear_cross_entropy": {"n": 3, "d": 3, "V": 5},
        "tt_linear_cross_entropy": {"n": 2, "d": 4, "R": 2, "V": 6, "block": 2, "softcap": 15.0},
        "relu2_mlp": {"n": 2, "d": 3, "F": 4},
        "lorentz_attention": {"B": 1, "H": 1, "T": 3, "D": 16, "window": 2},
        "scan": {"B": 1, "T": 3, "r": 2},
        "gla": {"B": 1, "H": 1, "T": 2, "Dk": 16, "Dv": 16},
        "tt_gather": {"n": 3, "d": 5, "R": 2, "V": 5},
        "cvfp_epilogue": {"n": 2, "d": 5},
    }[op]
    case, operator = case_of(op, F64, sizes), kernels.operator(op)
    names = [n for n, x in case.tensors.items() if x is not None and x.requires_grad]

    def function(*values):
        with kernels.forced("triton"):
            tensors = {**case.tensors, **dict(zip(names, values, strict=True))}
            out = operator.function(**tensors, **case.options)
        out = out if isinstance(out, tuple) else (out,)
        return tuple(x for x in out if x is not None and x.requires_grad)

    values = tuple(case.tensors[n] for n in names)
    torch.autograd.gradcheck(function, values, fast_mode=True, atol=1e-5)


@every_operator
def test_the_self_test_passes_and_is_remembered(op, monkeypatch):
    calls = []
    exact = kernels.selftest
    monkeypatch.setattr(kernels, "selftest", lambda *a: calls.append(a) or exact(*a))
    kernels.configure("auto", "a test", torch.device(DEVICE))
    dtype = kernels.operator(op).dtype(F32)
    for _ in range(2):
        assert kernels.decide(op, torch.device(DEVICE), dtype, "", 0)
    assert len(calls) == 1
    assert f"{op}=triton" in kernels.news()
    assert kernels.news() == ""


@pytest.mark.skipif(INTERPRETED, reason="programs of the interpreter run one after the other")
@every_operator
def test_twenty_repetitions_are_bit_equal(op):
    case, operator = case_of(op, BF16), kernels.operator(op)
    first = results(operator, case, "triton")
    for _ in range(20):
        again = results(operator, case, "triton")
        assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.skipif(INTERPRETED, reason="production shapes and full graphs need a GPU")
@every_operator
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_production_shapes(op, dtype):
    operator = kernels.operator(op)
    if dtype not in operator.dtypes:
        pytest.skip("not a dtype of this operator")
    case = operator.make(Draw(DEVICE, dtype), **operator.production)
    assert worst(op, case, dtype) <= 1


@pytest.mark.skipif(INTERPRETED, reason="compiling around an interpreted kernel fails")
@every_operator
def test_a_compiled_graph_passes_through(op):
    case, operator = case_of(op, F32), kernels.operator(op)
    with kernels.forced("triton"):
        plain = operator.function(**case.tensors, **case.options)
        compiled = torch.compile(operator.function, fullgraph=True)
        out = compiled(**case.tensors, **case.options)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (plain, out)), strict=True):
        assert a is None or torch.allclose(a, b)


@pytest.mark.skipif(INTERPRETED, reason="streams and graphs need a GPU")
@pytest.mark.parametrize("op", ["rms_norm", "relu2_mlp", "lorentz_attention", "scan", "gla"])
def test_a_graph_captured_on_a_side_stream_replays(op):
    case, operator = case_of(op, F32), kernels.operator(op)
    tensors = {n: x if x is None else x.detach() for n, x in case.tensors.items()}
    with kernels.forced("triton"), torch.no_grad():
        eager = operator.function(**tensors, **case.options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = operator.function(**tensors, **case.options)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(
        *((x if isinstance(x, tuple) else (x,)) for x in (eager, captured)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("half", [False, True])
def test_a_step_of_contexts_through_the_kernel_is_the_one_written_by_hand(half):
    """CVFP's own path on a CPU has a backward of its own; products in bf16 meet a wide state."""
    draw = torch.Generator().manual_seed(2)
    n, d, layers = 37, 48, 3
    c = torch.randn(n, d, generator=draw)

    def found(choice: str):
        made = torch.Generator().manual_seed(3)
        A, gain, offset, P = (
            tuple(
                torch.randn(s, generator=made).mul_(w).add_(m).requires_grad_()
                for _ in range(layers)
            )
            for s, w, m in (((d, d), 0.2, 0), ((d,), 0.1, 1), ((d,), 0.1, 0), ((n, d), 1, 0))
        )
        sides = [p.bfloat16() if half else p for p in P]
        with kernels.forced(choice):
            out = one_step(c, sides, Weights(A, (), offset, gain, offset))  # b only says how wide
            (out * c).sum().backward()
        assert out.dtype == torch.float32
        return [out.detach(), *(x.grad for x in (*A, *gain, *offset, *P))]

    bound = 2e-2 if half else 1e-5  # seen: 8e-3, 2e-7
    for ours, wanted in zip(found("triton"), found("reference"), strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < bound
