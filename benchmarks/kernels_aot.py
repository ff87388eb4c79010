"""Compile every kernel for real GPUs without one: python -m benchmarks.kernels_aot [--every].

Writes benchmarks/results/aot.csv, sorted; its diff shows what a change did to shared memory,
registers and spills. Compiled is not run: nothing here says that a kernel is right or fast.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from lib import kernels
from lib.core.kernel_choice import OPERATORS, interpreting, missing

TABLE = Path(__file__).parent / "results" / "aot.csv"


def main() -> int:
    """Exit 1 where a start breaks a gate in half precision (fp32 products may spill)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_aot")
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--target", nargs="+", default=None, help="all of them if not given")
    parser.add_argument("--every", action="store_true", help="all configurations on sm_80, sm_90")
    arguments = parser.parse_args()
    if reason := "unset TRITON_INTERPRET" if interpreting() else missing():
        print(f"error: nothing can be compiled: {reason}", file=sys.stderr)
        return 2
    from lib.kernels import aot

    rows = []
    for op in arguments.op:
        half = kernels.operator(op).dtype(torch.bfloat16)
        for target in arguments.target or aot.TARGETS:
            every = arguments.every and target in ("sm_80", "sm_90")
            dtypes = {half, torch.float32} if target == "sm_80" else {half}
            for dtype in sorted(dtypes, key=str):
                for call in aot.variants(op, dtype, every=every and dtype == half):
                    rows.append(aot.compiled(op, call, target, dtype))
                    print(*asdict(rows[-1]).values(), flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f.name for f in fields(aot.Row) if f.name != "seconds"]  # of this machine
        writer.writerow(names)
        found = [[str(getattr(row, n)) for n in names] for row in rows]
        writer.writerows(sorted(found))
    return int(any(row.broken for row in rows if row.dtype != "float32"))


if __name__ == "__main__":
    raise SystemExit(main())
