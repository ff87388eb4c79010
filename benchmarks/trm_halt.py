"""Where halting costs 0.1 % of bits per byte, by bisection: python -m benchmarks.trm_halt MODEL.

In:    a finished TRM (a folder) trained with `halt: q`, or any (kl), and a text to validate on.
Out:   tau by bisection in its logarithm, BPB with and without, mean exit, share of FLOPs saved; the
       value belongs into `model.trm.halt_tau`, or into the model's config.json by training anew.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lib.eval.bpb import validate
from lib.eval.scorer import Rules
from lib.export import saved

RISE, ROUNDS = 1e-3, 12


def main() -> None:
    """Bisect between never halting and halting at once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trm_halt")
    parser.add_argument("model", type=Path, help="checkpoints/<run>/final")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--halt", choices=("q", "kl"), default="kl")
    arguments = parser.parse_args()
    opened = saved.open_folder(arguments.model)
    model, tokenizer = opened.model, opened.tokenizer
    rules = Rules.of(tokenizer, opened.boundary or "bos", model.max_context)
    document = (str(arguments.text), arguments.text.read_text(encoding="utf-8"))

    def bpb(tau: float) -> float:
        model.config = replace(model.config, halt=arguments.halt, halt_tau=tau)
        model.set_depth(model.trained_depth)
        found = validate(model, [document], tokenizer, rules).bpb
        assert found is not None, "a lossy tokenizer has no bits per byte"
        return found

    whole, low, high = bpb(0.0), 1e-6, 10.0
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if bpb(middle) <= whole * (1 + RISE) else (low, middle)
    halting = bpb(low)
    told = ", ".join(f"{name} {value:.3f}" for name, value in model.log_scalars().items())
    print(f"tau {low:.3g}: BPB {halting:.4f}, {whole:.4f} without; {told}")


if __name__ == "__main__":
    main()
