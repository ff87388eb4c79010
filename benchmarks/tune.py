"""Choose launch configurations on this GPU: python -m benchmarks.tune [--op ...].

Every candidate of lib/kernels/<op>/configs.py is checked, then timed at the shape of production;
the fastest is printed as a line for that file's TUNED table, to be committed with device name and
date. Training never times: it reads the table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys

import torch

from lib import kernels
from lib.core.kernel_choice import OPERATORS, interpreting
from lib.kernels import configs
from lib.kernels.check import Case, Draw, compare


def main() -> int:
    """Lines for TUNED, by operator and kernel; exit 2 where no kernel runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune")
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = "interpreted kernels are not timed" if interpreting() else kernels.unusable(device)
    if reason:
        print(f"error: nothing can be tuned here: {reason}", file=sys.stderr)
        return 2
    target, day = configs.target_of(device), datetime.date.today().isoformat()
    print(f"# {torch.cuda.get_device_name(0)}, {day}")
    for op in arguments.op:
        operator = kernels.operator(op)
        dtype = operator.dtype(getattr(torch, arguments.dtype))
        case = operator.make(Draw(device, dtype), **operator.production)
        table = importlib.import_module(f"lib.kernels.{op}.configs").CANDIDATES
        for kernel in table:
            for width, config in best(op, kernel, case, dtype).items():
                tiles = ", ".join(f"{n}={s}" for n, s in config.tiles)
                key = f'("{target}", "{str(dtype).split(".")[1]}", "{kernel}", {width})'
                print(f"{op}: {key}: tile({config.warps}, {config.stages}, {tiles}),")
    return 0


def best(op: str, kernel: str, case: Case, dtype: torch.dtype) -> dict[int, configs.Config]:
    """Width that the launcher asks for -> the fastest right candidate of its list."""
    widths: dict[int, configs.Config] = {}
    for width, options in _asked(op, kernel, case).items():
        times = {}
        for config in options:
            with configs.forced(kernel, config):
                if max(compare(kernels.operator(op), case, dtype).values()) <= 1:
                    times[config] = _time(op, case)
        if times:
            widths[width] = min(times, key=lambda c: times[c])
    return widths


def _asked(op: str, kernel: str, case: Case) -> dict[int, tuple[configs.Config, ...]]:
    """The widths for which a pass asks for `kernel`, with their candidates."""
    found: dict[int, tuple[configs.Config, ...]] = {}
    exact = configs.candidates

    def spy(table: configs.Candidates, name: str, width: int):
        options = exact(table, name, width)
        if name == kernel:
            found[width] = tuple(options)
        return options

    configs.candidates = spy
    try:
        _full(op, case)
    finally:
        configs.candidates = exact
    return found


def _full(op: str, case: Case) -> None:
    with kernels.forced("triton"):
        out = kernels.operator(op).function(**case.tensors, **case.options)
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        out = [x for x in out if x.requires_grad]
        if out:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])


def _time(op: str, case: Case) -> float:
    from triton.testing import do_bench

    inputs = [x for x in case.tensors.values() if x is not None and x.requires_grad]
    return float(do_bench(lambda: _full(op, case), grad_to_none=inputs, return_mode="median"))


if __name__ == "__main__":
    raise SystemExit(main())
