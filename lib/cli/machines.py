"""Machines that an estimate may speak of: this one, and those of a table.

Rule:  a rate is measured (`kumiki doctor --full` keeps it in the user's cache folder) or from the
       table, and the estimate says which. Peaks are the makers' dense bf16 figures; what training
       sustains is taken as 40 % of them, as in ramgpt.md 5.2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from lib.core import files
from lib.core.errors import UserError

SUSTAINED = 0.4  # of a GPU's peak
CPU_CORE_FLOPS = 35e9  # one core's matmuls in small models; seen: 20 to 47e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides whether a run fits, and how long it takes."""

    name: str
    flops: float  # sustained FLOP/s of training
    vram_bytes: float | None  # of the accelerator; None: there is none
    ram_bytes: float | None = None
    disk_bytes: float | None = None  # free in scratch
    network: float = 12.5e6  # bytes/s of downloads, 100 Mbit/s
    source: str = "from table, not measured"

    @property
    def memory_bytes(self) -> float | None:
        """Where weights and activations have to fit."""
        return self.ram_bytes if self.vram_bytes is None else self.vram_bytes


TABLE = {
    m.name: m
    for m in (
        Machine(name="rtx3050-6gb", flops=13.5e12 * SUSTAINED, vram_bytes=6e9, ram_bytes=32e9),
        Machine(name="rtx3060-12gb", flops=25.5e12 * SUSTAINED, vram_bytes=12e9, ram_bytes=32e9),
        Machine(name="rtx3080-10gb", flops=59.5e12 * SUSTAINED, vram_bytes=10e9, ram_bytes=32e9),
        Machine(name="rtx4090", flops=165.2e12 * SUSTAINED, vram_bytes=24e9, ram_bytes=64e9),
        Machine(name="h200", flops=989e12 * SUSTAINED, vram_bytes=141e9, ram_bytes=256e9),
        Machine(name="cpu2", flops=2 * CPU_CORE_FLOPS, vram_bytes=None, ram_bytes=8e9),
    )
}


def named(name: str | None) -> Machine:
    """The machine of the table, or this one. UserError for a name that is not there."""
    if name is None:
        return this_machine()
    if name not in TABLE:
        choices = ", ".join(TABLE)
        raise UserError("unknown device", value=name, remedy=f"choose one of {choices}")
    return TABLE[name]


def this_machine() -> Machine:
    """Cores, memory and disk of this machine; rates from the last `kumiki doctor --full`."""
    from lib.core.artifact import scratch_root

    vram = gpu_memory()["vram_bytes"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    found = Machine(
        name="this machine",
        flops=cores * CPU_CORE_FLOPS,
        vram_bytes=vram,
        ram_bytes=memory()["ram_bytes"],
        disk_bytes=files.free_bytes(scratch_root()),
    )
    rates = measured()
    if rates.get("matmul_flops"):
        share = SUSTAINED if vram else 0.5
        found = replace(
            found, flops=rates["matmul_flops"] * share, source="measured by doctor --full"
        )
    return found


def memory() -> dict[str, int | None]:
    """Bytes of RAM and of the GPUs, used and in all; None where nothing tells."""
    table = {}
    if Path("/proc/meminfo").is_file():
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            table[name] = int(rest.split()[0]) * 1024
    found: dict[str, int | None] = {
        "ram_bytes": table.get("MemTotal"),
        "ram_available_bytes": table.get("MemAvailable"),
    }
    return found | gpu_memory()


def gpu_memory() -> dict[str, int | None]:
    """From nvidia-smi, so that torch is not imported."""
    nothing: dict[str, int | None] = {"vram_bytes": None, "vram_used_bytes": None}
    if shutil.which("nvidia-smi") is None:
        return nothing
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    if done.returncode or not rows:
        return nothing
    total, used = (sum(int(row[i]) for row in rows) * 2**20 for i in (0, 1))
    return {"vram_bytes": total, "vram_used_bytes": used}


def cache_file() -> Path:
    """Where measured rates are kept, outside of the project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kumiki" / "rates.json"


def measured() -> dict[str, float]:
    """What was measured on this machine; empty where nothing was."""
    path = cache_file()
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, OSError):
        return {}  # a cache only saves measuring again
