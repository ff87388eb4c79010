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
    if runtime.stream == "off":
        return None
    offers = getattr(model, "stream_units", None)
    if offers is None:
        if runtime.stream == "on":
            raise UserError(
                "family does not stream its weights",
                value=f"runtime.stream is on, {type(model).__module__}",
                remedy="set runtime.stream: off",
            )
        return None
    if device.type == "cpu" and runtime.stream == "auto":
        return None
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            "no streaming on this device", value=device.type, remedy="set runtime.stream: off"
        )
    if runtime.stream == "auto":
        needed = resident_bytes(
            load_of(model, dtype, request), checkpointing=runtime.activation_checkpointing
        )
        free = free_bytes(device, runtime.device_memory_gb)
        if needed <= 0.9 * free:
            model.stream_decision = (
                f"stream: off | resident needs {needed / 1e9:.1f} GB, free {free / 1e9:.1f} GB"
            )
            return None
    for clash, value in (
        (runtime.shard == "fsdp", "runtime.shard is fsdp"),
        (runtime.compile, "runtime.compile is true"),
    ):
        if clash:
            raise UserError(
                "streaming and this exclude each other", value=value,
                remedy="switch it off, or set runtime.stream: off",
            )  # fmt: skip
    require_memory(model, device, dtype, request)
    return Engine(model, device, dtype, request)
