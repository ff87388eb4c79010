"""The cost of one stage, sums over stages, and what of it a machine lacks.

Rule:  None is "not known", never zero; sums leave it out. `basis` says where a figure comes from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lib.cli.machines import Machine
from lib.core.errors import EnvError
from lib.export import amounts

PROCESS_BYTES = 0.45e9  # Python with torch, before any model
KNOBS = {  # in order of effect
    "memory": "runtime.device_batch_size, activation_checkpointing, context, then width",
    "disk": "fewer shards or tokens, then KUMIKI_SCRATCH on a larger disk",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One stage. Bytes and seconds; None is not known."""

    stage: str
    download_bytes: float | None = None
    scratch_bytes: float | None = None
    ram_bytes: float | None = None
    vram_bytes: float | None = None
    seconds: float | None = None
    binds: str = ""  # the term that decides the time
    basis: str = "bounded by the settings"
    facts: tuple[tuple[str, Any], ...] = ()  # parameters, FLOPs, tokens of a training stage

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "facts": dict(self.facts)}


def totals(found: list[Cost]) -> dict[str, float]:
    """Sums of bytes and seconds, the largest memory; what is not known is left out."""
    sums = {
        name: sum(getattr(cost, name) or 0.0 for cost in found)
        for name in ("download_bytes", "scratch_bytes", "seconds")
    }
    for name in ("ram_bytes", "vram_bytes"):
        sums[name] = max((getattr(cost, name) or 0.0 for cost in found), default=0.0)
    return sums


def problems(found: list[Cost], machine: Machine) -> list[tuple[str, str, float, float]]:
    """(what, stage, needed, present) of everything that does not fit."""
    lacking = []
    for cost in found:
        for kind, needed, present in (
            ("GPU memory", cost.vram_bytes, machine.vram_bytes),
            ("memory", cost.ram_bytes, machine.ram_bytes),
        ):
            if needed is not None and present is not None and needed > present:
                lacking.append((kind, cost.stage, needed, present))
    disk = totals(found)["scratch_bytes"]
    if machine.disk_bytes is not None and disk > machine.disk_bytes:
        stage = max(found, key=lambda c: c.scratch_bytes or 0.0).stage
        lacking.append(("disk", stage, disk, machine.disk_bytes))
    return lacking


def refuse(lacking: list[tuple[str, str, float, float]]) -> None:
    """EnvError that names the largest lack and the knobs, in order of effect."""
    if not lacking:
        return
    kind, stage, needed, present = max(lacking, key=lambda p: p[2] / p[3])
    raise EnvError(
        f"{kind} too small for {stage}",
        value=f"{amounts.size(needed)} needed, {amounts.size(present)} present",
        remedy=KNOBS["disk" if kind == "disk" else "memory"],
    )
