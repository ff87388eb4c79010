"""Shared by the kernel layers: where they run, shapes, guarded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lib import kernels
from lib.core.kernel_choice import OPERATORS, interpreting
from lib.kernels.check import Case, Draw, compare

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INTERPRETED = interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
GUARD = 64  # elements before and behind every tensor that a kernel gets

# Layers 2 and 4: the interpreter on a CPU, or a GPU; nothing where there is neither.
layer = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="kernels run under make test-interpret, or on a GPU",
    ),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
every_operator = pytest.mark.parametrize("op", OPERATORS)

# Odd sizes of each operator, a few programs each: an interpreted program costs 2 to 4 ms.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "rms_norm": [
        {"n": n, "d": d, "weighted": w}
        for n, d, w in [(1, 1, 1), (2, 47, 0), (15, 128, 1), (17, 123, 1), (65, 2_070, 1),
                        (127, 130, 0), (3, 5_000, 1), (0, 8, 1)]
    ],
    "linear_cross_entropy": [
        {"n": 1, "d": 1, "V": 2, "softcap": 0.0},
        {"n": 2, "d": 47, "V": 31},
        {"n": 16, "d": 16, "V": 97, "reduction": "sum", "chunk": 7},
        {"n": 65, "d": 24, "V": 1_000, "softcap": 0.0, "chunk": 64},
        {"n": 15, "d": 24, "V": 4_100, "reduction": "none", "chunk": 4},
        {"n": 5, "d": 24, "V": 4_096, "ignored": 5},
        {"n": 3, "d": 24, "V": 97, "ignored": 3, "reduction": "none"},
        {"n": 0, "d": 8, "V": 9, "ignored": 0},
    ],
    "tt_linear_cross_entropy": [
        {"n": 1, "d": 4, "R": 1, "V": 2, "block": 1},
        {"n": 2, "d": 47, "R": 5, "V": 31, "block": 4, "softcap": 15.0},
        {"n": 17, "d": 24, "R": 16, "V": 97, "block": 3, "shuffled": 1, "reduction": "sum"},
        {"n": 65, "d": 24, "R": 5, "V": 1_000, "block": 40, "softcap": 15.0},
        {"n": 16, "d": 24, "R": 5, "V": 97, "block": 9, "reduction": "none", "ignored": 16},
        {"n": 5, "d": 24, "R": 5, "V": 60, "block": 1, "shuffled": 1, "ignored": 5},
    ],
    "relu2_mlp": [
        {"n": 1, "d": 1, "F": 1},
        {"n": 2, "d": 47, "F": 31},
        {"n": 65, "d": 128, "F": 97},
        {"n": 127, "d": 33, "F": 130},
        {"n": 0, "d": 8, "F": 16},
    ],
    "lorentz_attention": [
        {"B": b, "H": h, "T": t, "D": d, "window": w}
        for b, h, t, d, w in [(1, 1, 1, 16, 1), (1, 3, 2, 32, 7), (3, 1, 15, 16, 15),
                              (1, 1, 63, 64, 630), (1, 2, 64, 16, 64), (2, 1, 65, 128, 7),
                              (1, 1, 127, 32, 1), (1, 1, 127, 64, 65), (0, 2, 17, 32, 5)]
    ],
    "scan": [
        {"B": b, "T": t, "r": r}
        for b, t, r in [(1, 1, 1), (3, 2, 5), (1, 63, 33), (1, 64, 16), (2, 65, 7), (1, 130, 3),
                        (0, 5, 4)]
    ],
    "gla": [
        {"B": b, "H": h, "T": t, "Dk": dk, "Dv": dv}
        for b, h, t, dk, dv in [(1, 1, 1, 16, 16), (1, 3, 2, 32, 16), (2, 1, 15, 16, 64),
                                (1, 1, 63, 64, 32), (1, 1, 64, 32, 128), (1, 2, 65, 16, 16),
                                (1, 1, 127, 128, 64), (1, 1, 200, 16, 32), (0, 2, 17, 16, 16)]
    ],
    "tt_gather": [
        {"n": n, "d": d, "R": r, "V": v}
        for n, d, r, v in [(1, 1, 1, 2), (2, 47, 5, 31), (17, 123, 32, 97), (40, 17, 16, 1_000),
                           (64, 20, 3, 5), (0, 9, 4, 9)]
    ],
    "xxt": [
        {"b": b, "n": n, "m": m, "affine": a}
        for b, n, m, a in [(1, 1, 1, 0), (3, 2, 15, 1), (1, 17, 123, 1), (2, 65, 128, 0),
                           (1, 127, 127, 1), (0, 4, 5, 0)]
    ],
    "cvfp_epilogue": [
        {"n": n, "d": d}
        for n, d in [(1, 1), (2, 47), (17, 123), (65, 130), (9, 1_100), (0, 8)]
    ],
}  # fmt: skip
CASES = [
    pytest.param(op, sizes, id=f"{op}-" + "-".join(map(str, sizes.values())))
    for op, found in SHAPES.items()
    for sizes in found
]


def case_of(op: str, dtype: torch.dtype, sizes: Mapping[str, Any] | None = None) -> Case:
    operator = kernels.operator(op)
    small = operator.small[1 if op == "scan" else 0]  # an interpreted scan step takes 0.3 s
    return operator.make(Draw(DEVICE, dtype), **(sizes or small))


# RMS in fp32 of what is 0 but for rounding. Seen: q, k 5e-8, x 2e-8; c 4e-6 and beta 7e-5 are sums
# over 127 rows of such a rounding times a squared distance.
VANISHING = {"q": 1e-7, "k": 1e-7, "x": 1e-7, "c": 1e-5, "beta": 1e-4}


def vanishing(op: str, sizes: Mapping[str, Any]) -> dict[str, float]:
    """Gradients that are 0 but for rounding, and their bound: one visible key has probability 1

    whatever it is, and the sign of a number does not change with it.
    """
    if op == "lorentz_attention" and min(sizes["window"], sizes["T"]) == 1:
        return {name: VANISHING[name] for name in ("q", "k", "c", "beta")}
    return {"x": VANISHING["x"]} if op == "rms_norm" and sizes["d"] == 1 else {}


def assert_right(
    op: str, case: Case, dtype: torch.dtype, vanish: Mapping[str, float] | None = None
) -> None:
    """Every result within its tolerance, in guarded, poisoned memory.

    vanish: results that must be small by themselves, relative to nothing, with their bound.
    """
    operator = kernels.operator(op)
    with guarded(op):
        ratios = compare(operator, inside_nan(case), dtype)
    for name, bound in (vanish or {}).items():
        absolute = ratios.pop(name) * operator.tolerance(name, dtype) * 1e-6
        assert absolute < bound, f"{name} should vanish, is {absolute:.1e}"
    wrong = {name: f"{ratio:.2g} x tolerance" for name, ratio in ratios.items() if not ratio <= 1}
    assert not wrong, wrong


def worst(op: str, case: Case, dtype: torch.dtype) -> float:
    return max(compare(kernels.operator(op), case, dtype).values())


def inside_nan(case: Case) -> Case:
    """The same numbers as views into wider buffers of NaN: a load beyond a row is seen."""
    tensors = {n: x if x is None else _surrounded(x) for n, x in case.tensors.items()}
    return replace(case, tensors=tensors)


def _surrounded(x: Tensor) -> Tensor:
    if not x.is_floating_point() or not x.numel():
        return x
    rows = x.detach() if x.ndim > 1 else x.detach()[None]
    shape = (*rows.shape[:-2], rows.shape[-2] + 2, rows.shape[-1] + 3)
    buffer = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[..., 1:-1, 1:-2]
    view.copy_(rows)
    return (view if x.ndim > 1 else view[0]).requires_grad_(x.requires_grad)


@contextmanager
def guarded(op: str) -> Iterator[None]:
    """Every contiguous tensor that a kernel gets lies between guards, intact afterwards."""
    from lib.kernels import launch, scatter_triton

    exact = launch.launch

    def launched(kernel, grid, config, **arguments):
        guards: dict[int, tuple[Tensor, Tensor]] = {}
        replaced = dict(arguments)
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.numel() and x.is_contiguous():
                if x.data_ptr() not in guards:
                    guards[x.data_ptr()] = (x, _between_guards(x))
                replaced[name] = guards[x.data_ptr()][1][GUARD:-GUARD].view(x.shape)
        exact(kernel, grid, config, **replaced)
        for x, buffer in guards.values():
            for edge in (buffer[:GUARD], buffer[-GUARD:]):
                kept = edge.isnan() if edge.is_floating_point() else edge == _fill(edge)
                assert bool(kept.all()), f"{kernel.__name__} writes outside of a tensor"
            x.copy_(buffer[GUARD:-GUARD].view(x.shape))

    modules = [kernels.load(op), scatter_triton, kernels.load("linear_cross_entropy")]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "launch", launched, create=True))
        yield


def _between_guards(x: Tensor) -> Tensor:
    buffer = torch.full((x.numel() + 2 * GUARD,), _fill(x), dtype=x.dtype, device=x.device)
    buffer[GUARD:-GUARD] = x.detach().reshape(-1)
    return buffer


def _fill(x: Tensor) -> float:
    return torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
