"""Reading and decoding speed of every trained model, or of those named.

In:  checkpoints/<run>/final, or folders of models.
Out: a row a model on stdout (best of a few, tokens per second of one row); the same in
     benchmarks/out/generate.csv. A model that cannot be opened is a row with the reason.

    python -m benchmarks.generate gpt trm      (kumiki bench generate: all of them)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.cli.bench_trials import write_csv
from lib.cli.commands.bench import machine
from lib.core.errors import KumikiError, UserError, report_lines
from lib.eval.speed import measure_speed
from lib.export import amounts, saved
from lib.train.precision import compute_dtype, pick_device

ROW = 1024  # tokens of a model that has no longest row


def main() -> int:
    """Measure one after another, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate")
    parser.add_argument("models", nargs="*", help="runs or folders; default: every trained run")
    trained = sorted(path.parents[1].name for path in Path("checkpoints").glob("*/final/*.json"))
    names = parser.parse_args().models or list(dict.fromkeys(trained))
    if not names:
        error = UserError("no model in checkpoints", remedy="run `dvc repro train_gpt`")
        sys.stderr.write("\n".join(report_lines(error)) + "\n")
        return error.code
    rows = [speed_of(name) for name in names]
    cells = [
        (r["model"], amounts.number(r.get("prefill_tokens_per_s"), 1),
         amounts.number(r.get("decode_tokens_per_s"), 1), r.get("device"), r.get("dtype"),
         r["problem"])
        for r in rows
    ]  # fmt: skip
    header = ("model", "prefill tokens/s", "decoding tokens/s", "on", "in", "")
    path = write_csv("generate", rows)
    tables.put([*tables.lines(cells, header), "", machine(), f"csv: {path}"])
    return 0


def speed_of(name: str) -> dict[str, Any]:
    """One model's row."""
    device = pick_device("auto")
    try:
        model = saved.open_model(name, Path(), device=device).model
        context = model.max_context or ROW
        found = measure_speed(model, context, device, compute_dtype("auto", device))
    except KumikiError as error:
        return {"model": name, "problem": str(error)}
    return {"model": name, "problem": "", **found}


if __name__ == "__main__":
    raise SystemExit(main())
