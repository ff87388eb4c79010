"""Where a streamed model lies: masters, wire and gradients on the host, places on the device.

Host:   a unit's parameters become views into one flat master; the wire is what crosses the bus,
        matrices in the compute dtype, vectors as they are, tensors aligned to 256 bytes, so that
        one copy loads a unit and the numbers are those that autocast would have cast.
Device: places, gradient buffers and boundaries are allocated once and live as long as the engine.
Note:   wires and gradient stages are one slab of exact size, registered with the driver as it is:
        the caching pinned allocator would round a request up to a power of two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.core.errors import EnvError

FP32 = torch.float32
ALIGN = 256  # bytes: what a device's copy engine and its vector loads like


@dataclass(frozen=True)
class Piece:
    """One tensor inside a flat buffer of bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int  # byte

    def of(self, buffer: Tensor) -> Tensor:
        """View of this tensor in `buffer` (uint8)."""
        stop = self.start + prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : stop].view(self.dtype).view(self.shape)


def lay_out(tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> tuple[list[Piece], int]:
    """Pieces in the given order, each aligned, and the bytes that all take."""
    pieces, start = [], 0
    for name, (shape, dtype) in tensors.items():
        pieces.append(Piece(name, shape, dtype, start))
        start += -(-prod(shape) * dtype.itemsize // ALIGN) * ALIGN
    return pieces, start


def wire_dtype(parameter: Tensor, compute: torch.dtype) -> torch.dtype:
    """In which a parameter crosses: matrices as autocast casts them, all else as it is stored."""
    is_cast = parameter.ndim >= 2 and parameter.dtype == torch.float32
    return compute if is_cast else parameter.dtype


class HostUnit:
    """The host side of a unit: parameters in one flat master, wire, where gradients are added."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], compute: torch.dtype, *, keep: bool = False
    ) -> None:
        """keep: no dtype changes on the wire, as for the ends, which are read in several ways."""
        self.parameters = dict(parameters)
        trainable = {n: p for n, p in self.parameters.items() if p.requires_grad}
        own = {n: (p.shape, p.dtype) for n, p in self.parameters.items()}
        assert not any(d == torch.float64 for _, d in own.values()), "fp64 is never streamed"
        self.master = self._gather(own)
        wires = {
            n: (shape, dtype if keep else wire_dtype(self.parameters[n], compute))
            for n, (shape, dtype) in own.items()
        }
        self.wires, self.wire_bytes = lay_out(wires)
        self.gradients, grad_bytes = lay_out({n: (p.shape, FP32) for n, p in trainable.items()})
        self.gradient_size = grad_bytes // FP32.itemsize  # elements, gaps included
        self.wire = torch.empty(0, dtype=torch.uint8)  # a part of the slab, once there is one
        self.gradient = torch.zeros(self.gradient_size)  # pages that nothing touched cost nothing
        self.updates = 0  # that torch's fused AdamW made: it leaves no trace in a tensor's version
        self._written = -1  # version of the masters in the wire

    def _gather(self, own: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Tensor:
        pieces, total = lay_out(own)
        flat = torch.empty(total, dtype=torch.uint8)
        for piece in pieces:
            view, parameter = piece.of(flat), self.parameters[piece.name]
            view.copy_(parameter.detach())
            parameter.data = view
        return flat

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def version(self) -> int:
        """Rises with every change of a master: updates, averages swapped in, weights loaded."""
        return self.updates + sum(p._version for p in self.parameters.values())

    def is_written(self) -> bool:
        """Whether the wire holds the masters of now."""
        return self._written == self.version

    @torch.no_grad()
    def write_wire(self) -> None:
        """Cast the masters into the wire, where they have changed since the last time."""
        version = self.version
        if self._written != version:
            for piece in self.wires:
                piece.of(self.wire).copy_(self.parameters[piece.name].detach())
            self._written = version

    @torch.no_grad()
    def add_gradient(self, start: int, part: Tensor, *, is_last: bool) -> None:
        """Add elements `start` .. of the flat gradient; after the last part `.grad` is bound to it.

        A parameter without a gradient begins anew: its values are taken, not added to 0, which
        would turn -0 into 0.
        """
        if start == 0:
            self._begun = {n: self.parameters[n].grad is not None for n in self._names()}
        flat = self.gradient[start : start + len(part)]
        if not any(self._begun.values()):
            flat.copy_(part)
        else:
            for piece in self.gradients:
                if not self._begun[piece.name]:
                    piece.of(self.gradient.view(torch.uint8)).zero_()
                    self._begun[piece.name] = True
            flat.add_(part)
        for piece in self.gradients if is_last else ():
            parameter = self.parameters[piece.name]
            parameter.grad = piece.of(self.gradient.view(torch.uint8)).to(parameter.dtype)

    def _names(self) -> Iterator[str]:
        return (piece.name for piece in self.gradients)


class Slab:
    """Host memory that copies run from and to: wires and stages, pinned as one where asked."""

    def __init__(self, total_bytes: int, *, pinned: bool) -> None:
        """EnvError when the driver refuses to pin so much."""
        require_ram(total_bytes, "the wires of the weights")
        self.buffer = torch.empty(total_bytes, dtype=torch.uint8)
        self.pinned_bytes, self._next = 0, 0
        if pinned and total_bytes:
            code = int(_driver().cudaHostRegister(self.buffer.data_ptr(), total_bytes, 0))
            if code:
                raise EnvError(
                    "host memory cannot be pinned",
                    value=f"{total_bytes:,} bytes asked, limit {_lock_limit()}, CUDA error {code}",
                    remedy="raise ulimit -l, or set runtime.stream_pinned: false (slower)",
                )
            self.pinned_bytes = total_bytes

    def take(self, size: int) -> Tensor:
        """The next `size` bytes."""
        part = self.buffer[self._next : self._next + size]
        assert len(part) == size, "the slab was measured for this"
        self._next += -(-size // ALIGN) * ALIGN
        return part

    def close(self) -> None:
        """Hand the pages back to the system's ordinary care."""
        if self.pinned_bytes:
            _driver().cudaHostUnregister(self.buffer.data_ptr())
            self.pinned_bytes = 0


class DeviceMemory:
    """Places of weights, gradient buffers, group buffers of boundaries: allocated once."""

    def __init__(self, device: torch.device, place_bytes: Sequence[int]) -> None:
        self.device = device
        self.places = [self._bytes(size) for size in place_bytes]
        self.gradients: list[Tensor] = []  # fp32, of the largest unit
        self.ends_gradient = torch.empty(0)
        self.boundaries: list[Tensor] = []  # group buffers (G, b, T, d)
        self.saved: list[Tensor] = []  # by application, on the host (G, b, T, d)

    def _bytes(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def need_gradients(self, count: int, size: int, ends_size: int) -> None:
        """At least `count` buffers of `size` elements, and the one of the ends."""
        while len(self.gradients) < count:
            self.gradients.append(torch.empty(size, device=self.device))
        if len(self.ends_gradient) < ends_size:
            self.ends_gradient = torch.empty(ends_size, device=self.device)

    def need_boundaries(
        self, buffers: int, saved: int, shape: Sequence[int], dtype: torch.dtype, pinned: bool
    ) -> None:
        """Group buffers of this shape, and host buffers behind them; kept while they fit."""
        like = (tuple(shape), dtype)
        if [(tuple(b.shape), b.dtype) for b in self.boundaries] != [like] * buffers:
            self.boundaries = []  # the old ones go first
            self.boundaries = [
                torch.empty(like[0], dtype=dtype, device=self.device) for _ in range(buffers)
            ]
        if [(tuple(b.shape), b.dtype) for b in self.saved] != [like] * saved:
            require_ram(saved * prod(shape) * dtype.itemsize, "the boundaries of a group")
            self.saved = [
                torch.empty(like[0], dtype=dtype, pin_memory=pinned) for _ in range(saved)
            ]

    def poison(self) -> None:
        """NaN everywhere: tests show that nothing is read before it is written."""
        for buffer in (*self.places, *self.gradients, self.ends_gradient, *self.boundaries):
            buffer.view(torch.uint8).fill_(0xFF)


def available_ram() -> int | None:
    """Bytes that the system can still give; None where it does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "kB" in line}
    return found.get("MemAvailable")


def require_ram(needed: int, what: str) -> None:
    """EnvError unless `needed` bytes of memory are there."""
    present = available_ram()
    if present is not None and needed > present:
        raise EnvError(
            f"not enough memory for {what}",
            value=f"needs {needed / 1e9:.1f} GB, {present / 1e9:.1f} GB are free",
            remedy="lower runtime.stream_group or the width, or close other programs",
        )


def _driver() -> Any:
    torch.cuda.init()
    return torch.cuda.cudart()


def _lock_limit() -> str:
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return "none" if soft == resource.RLIM_INFINITY else f"{soft:,} bytes"
    return "not known"
