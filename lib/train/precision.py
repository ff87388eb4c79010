"""Mixed precision: fp32 master weights, matmuls in the compute dtype, loss scaling for fp16.

bf16 has fp32's range and needs no scaling. fp16 ends at 65,504 and loses gradients below 6e-8, so
its losses are multiplied by a power of two, which grows while gradients stay finite (arXiv
1710.03740, section 3.2). A power of two is exact: the unscaled gradient has the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lib.core.errors import UserError

FIRST_SCALE, GROWTH_STEPS, MIN_SCALE, MAX_SKIPS = 2.0**16, 2000, 1.0, 20


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls. `auto`: bf16 where the hardware multiplies it, else fp16 or fp32.

    fp16 on a GPU, fp32 on a CPU, where emulated bf16 would be slower.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu" and cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones.

    AMX tiles are made for it. AVX-512 BF16 alone is not enough: its dot product runs at half the
    rate of fp32's multiply-add on Intel, at full rate on AMD. A step of the small GPT takes 1.4
    times fp32's time on the one, 0.4 times on the other (docs/benchmarks.md).
    """
    return torch.cpu._is_amx_tile_supported() or (
        torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in _cpu_maker()
    )


def _cpu_maker() -> str:
    """The maker of the cores as Linux tells it; empty elsewhere."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    return next((line for line in lines if line.startswith("vendor_id")), "")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matmuls in `dtype` inside the block; nothing changes for fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def pick_device(name: str) -> torch.device:
    """runtime.device as a device: `auto` takes a GPU that answers. UserError if it is absent."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return _of_this_rank(found)
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here[name]:
        raise UserError(
            "device is absent", value=f"runtime.device is {name}", remedy="use auto or cpu"
        )
    return _of_this_rank(name)


def _of_this_rank(name: str) -> torch.device:
    import os

    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


class LossScaler:
    """The factor of the loss before backward; 1 for ever unless the compute dtype is fp16."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.active = dtype == torch.float16
        self.scale, self._good = (FIRST_SCALE if self.active else 1.0), 0
        self.skipped, self._in_a_row = 0, 0  # updates that an overflow has cost

    def overflowed(self) -> bool:
        """A gradient was not finite: halve, and count the update that is lost.

        False where no smaller scale would help: below 1, or after too many in a row.
        """
        self.scale, self._good, self._in_a_row = self.scale / 2, 0, self._in_a_row + 1
        helps = self.active and self.scale >= MIN_SCALE and self._in_a_row < MAX_SKIPS
        self.scale, self.skipped = self.scale if self.active else 1.0, self.skipped + helps
        return helps

    def went_well(self) -> None:
        """An update was made: double after enough of them in a row."""
        self._good, self._in_a_row = self._good + 1, 0
        if self.active and self._good % GROWTH_STEPS == 0:
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {
            "active": self.active, "scale": self.scale, "skipped": self.skipped,
            "good_steps": self._good if self.active else 0,
            "in_a_row": self._in_a_row if self.active else 0,
        }  # fmt: skip

    def load(self, state: dict[str, float]) -> None:
        """The inverse of `state`; a run whose dtype has changed starts a scale of its own."""
        self.skipped = int(state["skipped"])
        if self.active and state["active"]:
            self.scale = state["scale"]
            self._good, self._in_a_row = int(state["good_steps"]), int(state["in_a_row"])
