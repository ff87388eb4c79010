"""Several processes of one run, as torchrun's environment describes them; one alone is rank 0 of 1.

Only rank 0 writes. What the others must know before work begins they hear through the store of the
rendezvous, so a finished run never leaves them waiting for a partner that has gone.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from lib.core import files
from lib.core.errors import UserError

EXIT_FILE = "KUMIKI_EXIT_FILE"  # where rank 0 leaves its exit code for the launcher


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share_of(rows: int, world: int) -> int:
    """Rows of a step that one of `world` ranks takes; UserError with the numbers that divide."""
    if rows % world:
        divisors = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        raise UserError(
            "ranks do not divide the rows of a step",
            value=f"{rows} rows, {world} ranks",
            remedy=f"use {', '.join(divisors)} ranks, or change batch_tokens",
        )
    return rows // world


@cache
def store() -> Any:
    """The key-value store that all ranks reach (torch.distributed.Store)."""
    from torch.distributed.rendezvous import rendezvous

    found, _, _ = next(rendezvous("env://"))
    return found


def agree(finished: bool | None = None) -> bool:
    """Rank 0 tells whether the work is finished, all others wait for its word and return it.

    Rank 0 may hold the store, so it returns, and may end, when all have heard.
    """
    if world_size() == 1:
        return bool(finished)
    key, heard = "kumiki/finished", [f"kumiki/heard_{n}" for n in range(1, world_size())]
    if rank() == 0:
        store().set(key, str(int(bool(finished))))
        store().wait(heard)
        return bool(finished)
    found = store().get(key) == b"1"
    store().set(f"kumiki/heard_{rank()}", "1")
    return found


def leave_code(code: int) -> None:
    """Rank 0 leaves its exit code where the launcher asked for it: torchrun turns all into 1."""
    path = os.environ.get(EXIT_FILE)
    if path and rank() == 0:
        files.write_bytes(Path(path), str(code).encode())
