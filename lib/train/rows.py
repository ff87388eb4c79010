"""What the loop asks of a data source: the rows of a step, for any number of ranks."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import numpy as np


class Rows(Protocol):
    """Where batches come from: rows of T + 1 ids by step, the same for every number of ranks."""

    def row_numbers(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray: ...  # noqa: D102
    def prefetch(  # noqa: D102
        self, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Generator[np.ndarray, None, None]: ...
