"""Seeds by purpose: every random draw of the project comes from a generator named here.

No global generator is used but by layers of torch that know no other (dropout, which training seeds
here and keeps in its checkpoints), so a new draw somewhere never changes another one
(pipeline.md 8.6).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed from the run's seed, the name of the purpose and any indices.

    blake2b over the written-out parts: equal on every machine, unrelated for neighbouring indices.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, index)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """NumPy's PCG64 for one purpose."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *index)))


def torch_generator(
    seed: int, purpose: str, *index: int | str, device: str = "cpu"
) -> torch.Generator:
    """A torch generator for one purpose; draws on the CPU are equal on every device."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *index))


@contextmanager
def drawing(seed: int, purpose: str, *index: int | str, device: torch.device) -> Iterator[None]:
    """Inside, torch's default generators draw for one purpose; afterwards they are as before.

    For layers that know no other generator and must draw the same at another time or in another
    order: masks of a block that is computed again, or on another schedule.
    """
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_global(seed, purpose, *index)
        yield


def seed_global(seed: int, purpose: str, *index: int | str) -> None:
    """Seed torch's default generators, which dropout and the like draw from, on every device."""
    import torch

    torch.manual_seed(derive_seed(seed, purpose, *index))
