"""Inputs of the golden vectors: one integer hash, as the README beside them defines it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEED = 11


def uniform(k: int, n: int, seed: int = SEED) -> np.ndarray:
    """u(seed, k, 0 .. n - 1), float64 in (0, 1)."""
    mod = np.uint64(2**32)
    x = (np.arange(n, dtype=np.uint64) + np.uint64(1_000_003 * k + 7_654_321 * seed)) % mod
    x = x * np.uint64(0x9E3779B1) % mod
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x85EBCA6B) % mod
    x ^= x >> np.uint64(13)
    x = x * np.uint64(0xC2B2AE35) % mod
    x ^= x >> np.uint64(16)
    return (x + 0.5) / 2**32


def array(k: int, shape: list[int] | tuple[int, ...], scale: float, shift: float = 0.0) -> Tensor:
    """W(k, shape, scale, shift) rounded to float32."""
    return wide_array(k, shape, scale, shift).float()


def wide_array(
    k: int, shape: list[int] | tuple[int, ...], scale: float, shift: float = 0.0
) -> Tensor:
    """W(k, shape, scale, shift) as it is, float64."""
    flat = shift + scale * math.sqrt(3) * (2 * uniform(k, math.prod(shape)) - 1)
    return torch.from_numpy(flat).reshape(shape)


def read(folder: Path, name: str):
    return json.loads((folder / "golden" / name).read_text())
