"""Whether a run streams, and with what: a model and a request as the estimator's numbers.

In:   what a run asks for (`Streaming`), the device.   Out: `Load`, free bytes, the card's rates.
Note: a shortage is an error before the first step, with what is needed, what is there, the knobs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lib.core.errors import EnvError, UserError
from lib.core.run_settings import Runtime
from lib.nn.stream.estimate import (
    CARDS,
    Card,
    Load,
    choose_group,
    device_bytes,
    host_bytes,
    inference_bytes,
    resident_bytes,
)
from lib.nn.stream.memory import available_ram

AUTO_TOKENS = 2**13  # of a micro-batch where device_batch_size is auto, for the decision only


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """What a run asks of the engine."""

    runtime: Runtime
    context: int  # T
    trains: bool = True  # False: a model that is only read, such as one that generates
    averaged: bool = False  # the run averages its weights after every update
    grad_dtype: torch.dtype = torch.float32  # in which gradients leave the device
    moment_dtype: torch.dtype = torch.float32  # of the optimizer's two moments


def spread(units: int, share: float) -> frozenset[int]:
    """A share of the units, evenly over the model: a resident one gives copies time to catch up."""
    count = round(units * share)
    return frozenset(i for i in range(units) if (i + 1) * count // units > i * count // units)


def load_of(model: Any, dtype: torch.dtype, request: Streaming, **changes: Any) -> Load:
    """The model and the request as the estimator's numbers."""
    units = list(dict.fromkeys(model.stream_units()))
    sizes = tuple(sum(p.numel() for p in m.parameters()) for m in units)
    runtime, batch = request.runtime, request.runtime.device_batch_size
    rows = batch if isinstance(batch, int) else max(1, AUTO_TOKENS // request.context)
    fields = {
        "unit_sizes": sizes,
        "applications": tuple(units.index(m) for m in model.stream_units()),
        "ends": sum(p.numel() for p in model.parameters()) - sum(sizes),
        "vocab_size": model.vocab_size,
        "width": model.width,
        "context": request.context,
        "rows": rows,
        "slots": runtime.stream_slots,
        "resident": spread(len(units), runtime.stream_resident),
        "host": runtime.stream_boundaries == "host",
        "wire_bytes": 4 if dtype == torch.float32 else 2,
        "gradient_bytes": request.grad_dtype.itemsize,
        "moment_bytes": 2 * request.moment_dtype.itemsize,
    }
    return Load(**{**fields, **changes})


def choose_load(
    model: Any, device: torch.device, dtype: torch.dtype, request: Streaming, rows: int,
    accumulation: int,
) -> tuple[Load, str | None]:  # fmt: skip
    """What one load shall serve when a step has `accumulation` micro-batches of `rows`; a warning.

    UserError where stream_group does not divide the micro-batches of a step.
    """
    group, runtime = request.runtime.stream_group, request.runtime
    load = load_of(model, dtype, request, rows=rows, accumulation=accumulation)
    if isinstance(group, int):
        fit = [g for g in range(1, accumulation + 1) if accumulation % g == 0]
        if group not in fit:
            near = min(fit, key=lambda g: (abs(g - group), g))
            raise UserError(
                "stream_group does not divide a step",
                value=f"stream_group {group}, {accumulation} micro-batches",
                remedy=f"nearest: {near}",
            )
        return replace(load, group=group), None
    kept = runtime.stream_boundaries != "auto"
    free = free_bytes(device, runtime.device_memory_gb)
    return choose_group(load, free, None if kept else this_card(device))


def free_bytes(device: torch.device, cap_gb: float | None = None) -> float:
    """Memory of the device that is free, below the cap where one is set."""
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = float(available_ram() or 8e9)
    return min(free, cap_gb * 1e9) if cap_gb else free


def this_card(device: torch.device) -> Card | None:
    """The rates of this device where the table has them."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).upper().replace("-", " ").split()
    for card in CARDS.values():
        if all(w in words for w in card.name.upper().replace(" 6 GB", "").split()):
            return card
    return None


def resident_needs(load: Load, request: Streaming) -> float:
    """Device memory that the same work takes with resident weights."""
    if not request.trains:
        return inference_bytes(load, streamed=False)
    return resident_bytes(load, checkpointing=request.runtime.activation_checkpointing)


def require_memory(
    model: Any, device: torch.device, dtype: torch.dtype, request: Streaming
) -> None:
    """EnvError before the first step where one micro-batch at a time would not fit."""
    load, needed = load_of(model, dtype, request), 0.0
    if device.type == "cuda":
        reads = not request.trains
        needed = inference_bytes(load, streamed=True) if reads else device_bytes(load)
    free = free_bytes(device, request.runtime.device_memory_gb)
    if needed > free:
        raise EnvError(
            "the streamed model does not fit the device",
            value=f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            remedy="lower runtime.device_batch_size or stream_slots",
        )
    masters = 4 * load.parameters  # are there already
    needed, present = host_bytes(load) - masters, available_ram()
    if not request.trains:  # the wires
        needed = load.wire_bytes * load.parameters
    if present is not None and needed > present:
        raise EnvError(
            "not enough memory for a streamed run",
            value=f"needs {needed / 1e9:.1f} GB more, {present / 1e9:.1f} GB are free",
            remedy="close other programs, or set train's moments: bfloat16",
        )
