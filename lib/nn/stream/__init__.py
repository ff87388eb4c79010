"""Weights that wait in RAM and cross to the device unit by unit (ramgpt.md 4).

`open_stream` decides whether a run streams and makes the engine; asked for and not to be had is an
error, never a silent fallback. A family offers `Streamable` and hands its `losses` and `forward` to
the engine; the trainer sees larger micro-batches and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib.core.errors import UserError
from lib.core.run_settings import Runtime
from lib.nn.stream.decide import Streaming, free_bytes, load_of, require_memory, resident_needs
from lib.nn.stream.passes import Moment
from lib.nn.stream.unit import Engine

__all__ = ["Engine", "Streamable", "Streaming", "for_reading", "open_stream"]


class Streamable(Protocol):
    """What a model offers so that its units can be streamed: x -> x, unit after unit."""

    def stream_units(self) -> Sequence[nn.Module]:
        """Module of each application, in order; one that comes twice is applied twice."""
        ...

    def embed(self, tokens: Tensor, moment: Moment) -> Tensor:
        """tokens (b, T) -> x (b, T, d)."""
        ...

    def apply_unit(self, application: int, x: Tensor, moment: Moment) -> Tensor:
        """One application, (b, T, d) -> (b, T, d) in the same dtype."""
        ...

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a micro-batch from the last x."""
        ...


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
        needed = resident_needs(load, request)
        free = free_bytes(device, runtime.device_memory_gb)
        model.stream_reason = f"resident needs {needed / 1e9:.1f} GB, free {free / 1e9:.1f} GB"
        if runtime.stream == "auto" and needed <= 0.9 * free:
            return None
    require_memory(model, device, dtype, request)
    if not request.trains:
        model.requires_grad_(False)  # no buffer waits for a gradient
    return Engine(model, device, dtype, request)


def for_reading(stream: str, rows: int = 1) -> Callable[[Any, torch.device, torch.dtype], Any]:
    """The `streamer` of a model that only reads; rows: texts at once, whose caches must fit too."""
    runtime = Runtime(stream=stream, device_batch_size=rows, stream_overlap_optimizer="off")  # type: ignore[arg-type]  # checked by whoever asks

    def streamer(model: Any, device: torch.device, dtype: torch.dtype) -> Engine | None:
        request = Streaming(runtime=runtime, context=model.max_context or 1024, trains=False)
        return open_stream(model, device, dtype, request)

    return streamer


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
