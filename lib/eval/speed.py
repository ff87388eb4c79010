"""How fast a model is here and now: for the receipt, never for metrics (evaluation.md 8.2).

In:    a model, the length of its rows.   Out: tokens per second of prefill and decoding, one row.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from lib.eval.reference import evaluating
from lib.train.flops import peak_flops

DECODED, REPEATS = 16, 3  # ids decoded one by one; best of


def measure_speed(
    model: Any, context: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float | str | None]:
    """Best of a few; `mfu` of the prefill where the device's peak is known."""
    n = max(1, min(context, 1024) - DECODED)
    row = torch.arange(n, device=device)[None] % model.vocab_size
    prefill, decode = [], []
    with evaluating(device, dtype):
        for _ in range(REPEATS + 1):  # the first one warms up
            start = _now(device)
            logits, state = model(row)
            middle = _now(device)
            for _ in range(DECODED):
                logits, state = model(logits[:, -1:, : model.vocab_size].argmax(-1), state)
            prefill.append(middle - start)
            decode.append(_now(device) - middle)
    rate = n / min(prefill[1:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(name)
    return {
        "prefill_tokens_per_s": round(rate, 1),
        "decode_tokens_per_s": round(DECODED / min(decode[1:]), 1),
        # forward alone: a third of what training counts
        "mfu": None if peak is None else rate * model.flops_per_token(n) / 3 / peak,
        "device": name or str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
