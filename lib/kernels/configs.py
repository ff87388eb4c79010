"""Launch configurations: a static table, so that the same stack always sums in the same order.

Each `lib/kernels/<op>/configs.py` lists candidates by kernel and width, the start first, and what
`benchmarks/tune.py` chose on a GPU, by target. Nothing is chosen by timing while training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Config:
    """Tile sides by name, warps of a program, stages of the software pipeline."""

    tiles: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    def __getitem__(self, name: str) -> int:
        return dict(self.tiles)[name]


def tile(warps: int = 4, stages: int = 2, **tiles: int) -> Config:
    """`tile(8, BM=64, BN=32)`."""
    return Config(tuple(tiles.items()), warps, stages)


Candidates = Mapping[str, Mapping[int, Sequence[Config]]]  # kernel -> largest width -> configs
Tuned = Mapping[tuple[str, str, str, int], Config]  # (target, dtype, kernel, width) -> config

_forced: dict[str, Config] = {}


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Inside, `kernel` is launched with `config`: for tests and the tuner."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


def candidates(table: Candidates, kernel: str, width: int) -> Sequence[Config]:
    """The configurations of `kernel` for the narrowest listed width that holds `width`."""
    fits = [w for w in sorted(table[kernel]) if w >= width]
    if not fits:
        raise ValueError(f"{kernel} has no configuration for width {width}")
    return table[kernel][fits[0]]


def pick(
    table: Candidates, tuned: Tuned, kernel: str, width: int, device: torch.device, dtype: str
) -> Config:
    """The tuned configuration of this device, else the start; on an unknown one the smallest."""
    if kernel in _forced:
        return _forced[kernel]
    choices = candidates(table, kernel, width)
    target = target_of(device)
    if target and (target, dtype, kernel, width) in tuned:
        return tuned[target, dtype, kernel, width]
    if target is None:
        return min(choices, key=lambda c: prod(side for _, side in c.tiles))
    return choices[0]


KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90", "gfx942")


def target_of(device: torch.device) -> str | None:
    """`sm_90`, `gfx942`; `cpu` off accelerators; None for one that nobody has listed."""
    if device.type != "cuda":
        return "cpu"
    found = torch.cuda.get_device_properties(device)
    name = getattr(found, "gcnArchName", "").split(":")[0] if torch.version.hip else ""
    name = name or f"sm_{found.major}{found.minor}"
    return name if name in KNOWN else None
