"""Between PyTorch and Triton: number formats, and the one place where a kernel is launched.

Note: `recorded` collects launches instead of making them: with tensors on `meta` it gives the
      ahead-of-time compiler the launcher's own argument lists, so that the two cannot drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels.configs import Config

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Call:
    """One launch: kernel, its arguments by name, its configuration."""

    kernel: Any
    arguments: dict[str, Any]
    config: Config


_recording: list[Call] | None = None


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Inside, launches are listed and not made."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Run `kernel` over `grid`; an empty grid is no launch."""
    arguments |= dict(config.tiles)
    if _recording is not None:
        _recording.append(Call(kernel, arguments, config))
    elif all(grid):
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def acc(x: Tensor) -> tl.dtype:
    """The format of arithmetic: fp64 for fp64, else fp32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dot(x: Tensor) -> tl.dtype:
    """The format of operands of `tl.dot`: the input's; fp32 where interpreted bf16 is garbage."""
    if x.dtype == torch.float64:
        return tl.float64
    return tl.float32 if INTERPRETED else TYPES[x.dtype]


def wide(x: Tensor) -> torch.dtype:
    """`acc` as a torch dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """`float32`, the name in tables of configurations."""
    return str(dtype).removeprefix("torch.")


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, last dimension) with stride 1 along it; a copy where there is no such view."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def unit(x: Tensor) -> Tensor:
    """x itself where its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def processors(x: Tensor) -> int:
    """Multiprocessors of the device; 2 where there are none."""
    if x.device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def power_of_two(n: int) -> int:
    """The next power of two, 16 at least: a side of `tl.dot`."""
    return max(16, triton.next_power_of_2(n))
