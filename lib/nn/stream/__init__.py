"""Weights that wait in RAM and cross to the device unit by unit (ramgpt.md 4).

`open_stream` decides whether a run streams and makes the engine; asked for and not to be had is an
error, never a silent fallback. A family offers `Streamable` and hands its `losses` and `forward` to
the engine; the trainer sees larger micro-batches and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from lib.core.errors import UserError
from lib.nn.stream.decide import Streaming, free_bytes, load_of, require_memory
from lib.nn.stream.estimate import resident_bytes
from lib.nn.stream.unit import Engine

__all__ = ["Engine", "Streaming", "open_stream"]


def open_stream(
    model: Any, device: torch.device, dtype: torch.dtype, request: Streaming
) -> Engine | None:
    """The engine over `model`, whose weights lie on the CPU; None where they shall be resident.

    UserError for a request that contradicts itself, EnvError where memory does not suffice.
    """
    runtime = request.runtime
    if runtime.stream == "off" or (runtime.stream == "auto" and device.type == "cpu"):
        return None
    if refusal := _refusal(model, device, request):
        if runtime.stream == "on":
            raise refusal
        return None
    if device.type == "cuda":
        load = load_of(model, dtype, request)
        needed = resident_bytes(load, checkpointing=runtime.activation_checkpointing)
        free = free_bytes(device, runtime.device_memory_gb)
        model.stream_reason = f"resident needs {needed / 1e9:.1f} GB, free {free / 1e9:.1f} GB"
        if runtime.stream == "auto" and needed <= 0.9 * free:
            return None
    require_memory(model, device, dtype, request)
    return Engine(model, device, dtype, request)


def _refusal(model: Any, device: torch.device, request: Streaming) -> UserError | None:
    """Why this run cannot stream, as an error that says what to change; None where it can."""
    runtime, remedy = request.runtime, "switch it off, or set runtime.stream: off"
    if getattr(model, "stream_units", None) is None:
        family = type(model).__module__.split(".")[-1]
        return UserError(
            "family does not stream its weights",
            value=f"runtime.stream is {runtime.stream}, family {family}",
            remedy="set runtime.stream: off",
        )
    if device.type not in ("cpu", "cuda"):
        return UserError("no streaming on this device", value=device.type, remedy=remedy)
    for clash in ("shard is fsdp" if runtime.shard == "fsdp" else "", "compile is true" if
                  runtime.compile else ""):  # fmt: skip
        if clash:
            value = f"runtime.{clash}"
            return UserError("streaming and this exclude each other", value=value, remedy=remedy)
    try:
        model.stream_units()
    except UserError as error:
        return error
    return None
