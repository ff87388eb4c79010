"""A kernel against its reference: the measure of self-test, tests, tuner and benchmarks.

Law:  err(y, r) = |y - r| / max(|r|, 1e-6 sqrt(numel)), r from the reference in fp64 on the same
      rounded inputs; and no element is off by more than 50 tolerances of rms(r).
Note: inside, uninitialised memory is NaN: an element that nobody wrote cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib.core.kernel_choice import interpreting
from lib.kernels import forced

HALF = (torch.bfloat16, torch.float16)
TRUNCATED = 2.0**-7  # the interpreter's bf16 stores cut instead of rounding
OUTLIER = 50  # tolerances of rms(r) that one element may be off


@dataclass(frozen=True)
class Case:
    """One call: tensors by name, of which floating ones with a gradient are leaves; options."""

    tensors: Mapping[str, Tensor | None]
    options: Mapping[str, Any] = field(default_factory=dict)


class Draw:
    """Seeded tensors on one device; `half` draws in the dtype under test, `wide` in fp32 or fp64.

    The numbers depend on the seed only: they are drawn in fp64 on the CPU.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(seed)

    def half(self, *shape: int, std: float = 1.0, grad: bool = True) -> Tensor:
        """Normal numbers of the dtype under test."""
        return self._normal(shape, std, self.dtype).requires_grad_(grad)

    def wide(self, *shape: int, std: float = 1.0, mean: float = 0.0, grad: bool = True) -> Tensor:
        """Normal numbers of inputs that stay fp32."""
        return self._normal(shape, std, self.wide_dtype).add_(mean).requires_grad_(grad)

    def ids(self, *shape: int, below: int) -> Tensor:
        """Uniform integers."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(0, below, shape, generator=self._generator).to(self.device)

    def _normal(self, shape: tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
        if self.device.type == "meta":  # shapes only, for compilation without a device
            return torch.empty(shape, dtype=dtype, device="meta")
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64) * std
        return drawn.to(self.device, dtype)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What a check needs to know. Dispatch stays with `function`, under `forced`."""

    name: str
    function: Callable[..., Any]  # tensors and options of a Case -> a tensor or several
    make: Callable[..., Case]  # Draw and sizes -> Case
    small: tuple[Mapping[str, Any], ...]  # sizes of the self-test, odd, over one block edge
    production: Mapping[str, Any]  # sizes at which targets are stated
    compiled: Mapping[str, Any]  # production's widths with few rows: what is compiled ahead of time
    bounds: Mapping[str, tuple[float, float]]  # result -> fp32, bf16; "" is everything else
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    width: str | None = None  # the size that a head width replaces

    def tolerance(self, result: str, dtype: torch.dtype) -> float:
        """Relative RMS error allowed; fp16 a quarter of bf16's; fp64 near its rounding."""
        fp32, bf16 = self.bounds.get(result, self.bounds[""])
        if dtype == torch.float64:
            return 1e-11 if result in self.bounds and result else 1e-12
        if dtype == torch.bfloat16:
            return max(bf16, TRUNCATED) if interpreting() else bf16
        return max(bf16 / 4, 1e-3) if dtype == torch.float16 else fp32

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """`wanted` where the operator takes it, else its only one."""
        return wanted if wanted in self.dtypes else self.dtypes[0]


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `torch.empty` is full of NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # its switch is a property of the module
    fill, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def results(operator: Operator, case: Case, choice: str) -> dict[str, Tensor]:
    """Outputs `out0`, `out1` ... and gradients by input name, for one fixed upstream."""
    leaves = {}
    for name, x in case.tensors.items():
        leaves[name] = x if x is None else x.detach().requires_grad_(x.requires_grad)
    with forced(choice), torch.enable_grad():
        out = operator.function(**leaves, **case.options)
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        found = {f"out{i}": x.detach() for i, x in enumerate(outs)}
        wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
        sources = [x for x in outs if x.requires_grad]
        if wanted and sources:
            upstream = [_upstream(x, i) for i, x in enumerate(sources)]
            grads = torch.autograd.grad(sources, list(wanted.values()), upstream, allow_unused=True)
            found |= {n: _present(g, n) for n, g in zip(wanted, grads, strict=True)}
    return found


def _present(gradient: Tensor | None, name: str) -> Tensor:
    if gradient is None:
        raise ValueError(f"there is no gradient for {name}")
    return gradient.detach()


def _upstream(like: Tensor, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + i)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return drawn.to(like.device, like.dtype)


def widened(case: Case) -> Case:
    """The same rounded numbers in fp64."""
    wide = {
        n: x.detach().double().requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point()
        else x
        for n, x in case.tensors.items()
    }
    return Case(wide, case.options)


def error(y: Tensor, r: Tensor) -> float:
    """Relative RMS error; infinite where y is not finite or r is not."""
    y, r = y.double(), r.double()
    if y.shape != r.shape:
        raise ValueError(f"shape {tuple(y.shape)}, the reference gives {tuple(r.shape)}")
    if not y.numel():
        return 0.0
    if not bool(torch.isfinite(y).all()) or not bool(torch.isfinite(r).all()):
        return float("inf")
    return ((y - r).norm() / r.norm().clamp(min=1e-6 * r.numel() ** 0.5)).item()


def compare(
    operator: Operator, case: Case, dtype: torch.dtype, *, against_half: bool = True
) -> dict[str, float]:
    """Error over tolerance for each result: above 1 is wrong. Half precision must also be no worse

    than twice the reference executed in that dtype.
    """
    want = results(operator, widened(case), "reference")
    with poisoned():
        got = results(operator, case, "triton")
    if got.keys() != want.keys():
        raise ValueError(f"results {sorted(got)}, the reference gives {sorted(want)}")
    half = {}
    if against_half and dtype in HALF and not interpreting():
        half = results(operator, case, "reference")
    ratios = {}
    for name, r in want.items():
        bound, found = operator.tolerance(name, dtype), error(got[name], r)
        ratios[name] = found / bound
        if r.numel() and ratios[name] < float("inf"):
            rms = r.double().square().mean().sqrt().clamp(min=1e-6)
            worst = ((got[name].double() - r.double()).abs().max() / rms).item()
            ratios[name] = max(ratios[name], worst / (OUTLIER * bound))
        if name in half:
            ratios[name] = max(ratios[name], found / (2 * error(half[name], r) + 1e-5))
    return ratios


def selftest(operator: Operator, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The largest error over its tolerance, over the operator's small cases."""
    worst = 0.0
    for sizes in operator.small:
        own = {operator.width: width} if operator.width and width else {}
        case = operator.make(Draw(device, dtype), **{**sizes, **own})
        ratios = compare(operator, case, dtype, against_half=False)
        worst = max(worst, *ratios.values())
    return worst
