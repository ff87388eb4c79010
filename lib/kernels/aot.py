"""Ahead-of-time compilation for real GPUs on a machine without one, and what it must not exceed.

In:   an operator, dtype, target.   Out: a row per kernel and configuration: shared memory,
      registers, stack (spills), seconds, and the gates it breaks.
Note: signatures come from the launcher's own calls, recorded on the CPU; nothing is executed.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lib import kernels
from lib.kernels import configs
from lib.kernels.check import Draw, results
from lib.kernels.launch import TYPES, Call, recorded

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have (CUDA programming guide, table of capabilities).
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "gfx942": 65_536}
PRODUCTS = ("relu2_mlp", "lorentz_attention", "gla", "xxt")  # tiles of tl.dot fill their registers
STACK_PRODUCTS, STACK_OTHERS = 128, 0  # bytes a thread, in half precision
MATRIX_UNIT = {"cuda": r"mma\.sync|wgmma", "hip": r"mfma"}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. registers and stack are None where no tool tells them (HIP)."""

    op: str
    kernel: str
    target: str
    dtype: str
    config: str
    shared: int
    registers: int | None
    stack: int | None
    seconds: float
    broken: tuple[str, ...]  # gates


def calls_of(op: str, dtype: torch.dtype, sizes: dict[str, Any] | None = None) -> list[Call]:
    """The launches of one forward and backward pass at the widths of production."""
    operator = kernels.operator(op)
    case = operator.make(Draw("cpu", dtype), **(sizes or operator.compiled))
    with recorded() as calls:
        results(operator, case, "triton")
    first: dict[tuple, Call] = {}
    for call in calls:
        first.setdefault(_key(call), call)
    return list(first.values())


def variants(op: str, dtype: torch.dtype, *, every: bool) -> Iterator[Call]:
    """Calls with the first configuration, or with every one that the width of production has."""
    starts = calls_of(op, dtype)
    yield from starts
    seen = {_key(call) for call in starts}
    for kernel, config in _alternatives(op, starts) if every else ():
        with configs.forced(kernel, config):
            calls = calls_of(op, dtype)
        for call in calls:
            if _key(call) not in seen:
                seen.add(_key(call))
                yield call


def _alternatives(op: str, starts: list[Call]) -> Iterator[tuple[str, configs.Config]]:
    """What stands in the lists that the starts come from: other widths have other tiles."""
    table = importlib.import_module(f"lib.kernels.{op}.configs").CANDIDATES
    used = {call.config for call in starts}
    for kernel, by_width in table.items():
        for options in by_width.values():
            if options[0] in used:
                yield from ((kernel, config) for config in options[1:])


def _key(call: Call) -> tuple:
    constants = tuple(sorted((n, str(v)) for n, v in _constants(call).items()))
    return call.kernel.fn.__name__, call.config.warps, call.config.stages, constants


def _constants(call: Call) -> dict[str, Any]:
    names = {p.name for p in call.kernel.params if p.is_constexpr}
    return {n: v for n, v in call.arguments.items() if n in names}


def compiled(op: str, call: Call, target: str, dtype: torch.dtype) -> Row:
    """Compile one launch for one target and hold it against the gates."""
    signature, attributes, constants = {}, {}, _constants(call)
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        signature[parameter.name] = "constexpr" if parameter.name in constants else _type_of(value)
        whole = isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0
        fixed = parameter.name not in constants and not parameter.do_not_specialize
        if fixed and (isinstance(value, Tensor) or whole):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": call.config.warps, "num_stages": call.config.stages}
    began = time.monotonic()
    binary = triton.compile(source, target=TARGETS[target], options=options)
    seconds = time.monotonic() - began
    usage = _usage(binary) if target.startswith("sm_") else {}
    tiles = " ".join(f"{name}={side}" for name, side in call.config.tiles)
    row = {
        "op": op,
        "kernel": call.kernel.fn.__name__.removesuffix("_kernel"),
        "target": target,
        "dtype": str(dtype).removeprefix("torch."),
        "config": f"{tiles} warps={call.config.warps} stages={call.config.stages}".strip(),
        "shared": int(binary.metadata.shared),
        "registers": usage.get("REG"),
        "stack": usage.get("STACK"),
        "seconds": round(seconds, 1),
    }  # fmt: skip
    return Row(**row, broken=tuple(_broken(row, binary, dtype)))


def _broken(row: dict[str, Any], binary: Any, dtype: torch.dtype) -> Iterator[str]:
    """The gates of kernels.md 9.3 that this binary does not pass."""
    target, op, assembly = row["target"], row["op"], _assembly(binary)
    if row["shared"] > SHARED[target]:
        yield f"shared {row['shared']} > {SHARED[target]}"
    half = dtype in (torch.bfloat16, torch.float16)
    most = STACK_PRODUCTS if op in PRODUCTS else STACK_OTHERS
    if half and row["stack"] is not None and row["stack"] > most:
        yield f"stack {row['stack']} > {most}"
    multiplies = "tt.dot" in binary.asm["ttir"]
    unit = MATRIX_UNIT["cuda" if target.startswith("sm_") else "hip"]
    if half and multiplies and not re.search(unit, assembly):
        yield "no matrix unit"
    if dtype != torch.float64 and re.search(r"\.f64\b|v_\w+_f64\b", assembly):
        yield "fp64 instructions"


def _assembly(binary: Any) -> str:
    return binary.asm["ptx"] if "ptx" in binary.asm else binary.asm["amdgcn"]


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        kinds = {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
        found = kinds.get(value.dtype) or str(TYPES[value.dtype])
        return "*" + found
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    assert isinstance(value, float), value
    return "fp32"


def _usage(binary: Any) -> dict[str, int]:
    """REG, STACK, SHARED of a cubin, by the tool that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        run = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED):(\d+)", run.stdout)}
