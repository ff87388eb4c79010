"""Operators: a PyTorch reference that is the specification, and Triton kernels beside it.

In:   an operator's name with device and dtype of its tensors.   Out: kernel or reference?
Law:  a kernel is trusted after its self-test on this device, in this process, in this dtype; `auto`
      without one is the reference, `triton` without one an error. Results agree to rounding, so the
      choice is `runtime`: checkpoints record it, fingerprints do not.
Note: importing this imports neither triton nor CUDA. `lib.kernels.<op>.triton` registers
      `torch.ops.kumiki.<op>` and is loaded by name when it is first wanted: no stage depends on it,
      and an exported copy of a model's code runs on references alone.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lib.core.errors import EnvError
from lib.core.kernel_choice import (
    OPERATORS,
    Choices,
    choice_of,
    interpreting,
    missing,
    unavailable,
)

HALF_SINCE = 80  # compute capability with bf16 tensor cores; 75 runs fp16 and fp32
HIP_TARGETS = ("gfx942",)
# What drivers, compilers and kernels raise: none of it may stop a run that can do without them.
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError,
    OSError, ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """What runs for one operator, device, dtype and width, and why."""

    operator: str
    kernel: bool
    reason: str = ""  # empty where the kernel runs
    error: float | None = None  # largest error of the self-test over its tolerance
    tolerance: float | None = None  # of outputs, relative RMS
    seconds: float = 0.0  # of compilation and self-test


@dataclass
class _Process:
    """What this process was told and has decided."""

    choices: Choices = "auto"
    run: str = "this run"
    forced: str | None = None  # by `forced`, above everything


_process = _Process()
_decisions: dict[tuple, Decision] = {}
_said: set[tuple] = set()


def configure(choices: Choices, run: str, device: torch.device) -> None:
    """Take `runtime.kernels` for this process; UserError at once where `triton` cannot be had."""
    _process.choices, _process.run = choices, run
    _decisions.clear()
    _said.clear()
    if any(choice_of(choices, name) == "triton" for name in OPERATORS) and (
        reason := unusable(device)
    ):
        raise unavailable(run, reason)


@contextmanager
def forced(choice: str) -> Iterator[None]:
    """Inside, every operator is `triton` or `reference`, unasked: for checks and benchmarks."""
    before, _process.forced = _process.forced, choice
    try:
        yield
    finally:
        _process.forced = before


def decide(
    op: str, device: torch.device, dtype: torch.dtype, limit: str = "", width: int = 0
) -> bool:
    """Whether `torch.ops.kumiki.<op>` runs; constant in a compiled graph.

    limit: why the operator's kernel cannot take these shapes, or empty; width: a head width whose
    kernels are compiled apart. UserError where triton was asked for and is unusable, EnvError where
    it was and its self-test fails.
    """
    if _process.forced is not None:
        return _process.forced == "triton" and bool(load(op))
    key = (op, device, dtype, limit, width)
    found = _decisions.get(key)
    if found is None:
        found = _decisions[key] = _decide(*key)
    return found.kernel


# As torch.compiler.assume_constant_result does, which would import all of the compiler here.
decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide(op: str, device: torch.device, dtype: torch.dtype, limit: str, width: int) -> Decision:
    choice = choice_of(_process.choices, op)
    if choice == "reference":
        return Decision(op, False, "asked for")
    reason = unusable(device, dtype) or limit
    if reason and choice == "triton":
        raise unavailable(_process.run, f"{op}: {reason}")
    if reason:
        return Decision(op, False, reason)
    found = selftest(op, device, dtype, width)
    if found.kernel:
        return found
    if choice == "triton":
        raise EnvError(
            f"kernel {op} is wrong on this device",
            value=found.reason,
            remedy=f"set runtime.kernels: {{{op}: reference}}",
        )
    sys.stderr.write(f"warning: kernel {op} is left out: {found.reason}\n")
    return found


def unusable(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why no kernel can run on `device` with `dtype`; empty where one can be tried."""
    if __name__ != "lib.kernels":
        return "an exported copy"
    if reason := missing():
        return reason
    if interpreting():
        if device.type != "cpu":
            return f"interpreting, and tensors are on {device.type}"
        return (
            ""
            if _triton().knobs.runtime.interpret
            else "TRITON_INTERPRET was set after triton was imported"
        )
    if device.type != "cuda":
        return f"no kernels on {device.type}"
    return _unsupported_target(dtype)


def _unsupported_target(dtype: torch.dtype | None) -> str:
    try:
        target = _triton().runtime.driver.active.get_current_target()
    except FAILURES as error:
        return f"no active driver ({type(error).__name__})"
    if target.backend == "hip":
        return "" if target.arch in HIP_TARGETS else f"{target.arch} is not supported"
    capability = int(target.arch)
    enough = capability >= HALF_SINCE or (capability == 75 and dtype != torch.bfloat16)
    return "" if enough else f"compute capability {capability / 10} with {dtype}"


def _triton():
    """The package, by name: loaders of exported code demand whatever an import statement names."""
    return importlib.import_module("triton")


def load(op: str):
    """The module with the kernels of `op`; it registers `torch.ops.kumiki.<op>`."""
    return importlib.import_module(f"lib.kernels.{op}.triton")


def eager(compute: Callable, save: Callable, backward: Callable) -> Callable:
    """`compute` with its gradient, as torch.library has it, for calls outside of compiled graphs.

    A call through torch.library imports all of the compiler: a second of every run.
    """
    parts = {"forward": compute, "setup_context": save, "backward": backward}
    methods = {name: staticmethod(part) for name, part in parts.items()}
    return type(compute.__name__, (torch.autograd.Function,), methods).apply


def operator(op: str):
    """What checks and benchmarks know about `op` (lib.kernels.check.Operator)."""
    return importlib.import_module(f"lib.kernels.{op}.check").OPERATOR


def selftest(op: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> Decision:
    """Run the kernels of `op` on two small odd cases, forward and all gradients, and compare."""
    check = importlib.import_module("lib.kernels.check")
    began = time.monotonic()
    try:
        load(op)
        error = check.selftest(operator(op), device, dtype, width)
        reason = "" if error <= 1 else f"self-test is off by {error:.1e} times its tolerance"
    except (*FAILURES, _triton().errors.TritonError) as raised:  # not compiled is not there
        error, reason = None, f"self-test raised {type(raised).__name__}: {raised}"
    tolerance = operator(op).tolerance("", dtype)
    seconds = time.monotonic() - began
    return Decision(op, not reason, reason, error, tolerance, seconds)


def report(device: torch.device, dtype: torch.dtype) -> list[Decision]:
    """A row for every operator as it would run on `device`: what `kumiki doctor --kernels` prints.

    Never raises: a self-test that fails is a row whose `error` is above 1 or whose reason says what
    was raised.
    """
    rows = []
    for op in OPERATORS:
        if choice_of(_process.choices, op) == "reference":
            rows.append(Decision(op, False, "asked for"))
        elif reason := unusable(device, dtype):
            rows.append(Decision(op, False, reason, tolerance=operator(op).tolerance("", dtype)))
        else:
            rows.append(selftest(op, device, operator(op).dtype(dtype)))
    return rows


def news() -> str:
    """The line of all decisions, when some have come since the last call; else empty."""
    if _said == set(_decisions):
        return ""
    _said.update(_decisions)
    return f"kernels: {summary()}"


def summary() -> str:
    """`rms_norm=triton scan=reference(asked for)`, or one word where one reason holds for all."""
    if not _decisions:
        return "none used"
    reasons = {d.reason for d in _decisions.values() if not d.kernel}
    if len(reasons) == 1 and not any(d.kernel for d in _decisions.values()):
        return f"reference ({reasons.pop()})"
    words = {
        d.operator + ("=triton" if d.kernel else f"=reference({d.reason})")
        for d in _decisions.values()
    }
    seconds = sum(d.seconds for d in _decisions.values())
    return f"{' '.join(sorted(words))}, {seconds:.1f} s of compilation and self-tests"


def stack(device: torch.device) -> str:
    """What a checkpoint records before the first decision: equal words, equal bits."""
    reason = unusable(device)
    if reason or all(choice_of(_process.choices, op) == "reference" for op in OPERATORS):
        return "reference"
    asked = {op: choice_of(_process.choices, op) for op in OPERATORS}
    words = set(asked.values())
    told = words.pop() if len(words) == 1 else " ".join(f"{k}={v}" for k, v in asked.items())
    return f"{told}, triton {_triton().__version__}"
