"""What a model of contexts asks of whoever learns or supplies them; the defaults do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor


class Solver:
    """No losses of its own, no state on disk, nothing to tell."""

    stream_rows: int | None = None  # tokens of a step that reads the corpus as one stream
    has_contexts = False  # the vectors are on disk: `before` reads them

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """The losses of one step of the fixed-point phase."""
        raise TypeError(f"{type(self).__name__} learns nothing")

    def before(self, numbers: Any) -> Tensor:
        """The contexts (T, B, d) before the tokens of packed rows, where `has_contexts`."""
        raise TypeError(f"{type(self).__name__} holds no contexts")

    def planned_bytes(self) -> float:
        """Peak resident bytes; 0: no plan."""
        return 0

    def attach(self, folder: Path) -> None:
        """Remember where the run works; files are opened at the first step."""

    def describe(self) -> dict[str, Any]:
        """Which files a checkpoint belongs to; what they hold their journal says."""
        return {}

    def flush(self) -> None:
        """Rows durable before the manifest that counts on them."""

    def sweep_end(self) -> bool:
        """After a step. True: commit a checkpoint before the next one."""
        return False

    def finish(self) -> None:
        """The result is written."""

    def statistics(self) -> dict[str, Any]:
        """What stats.json holds."""
        return {}

    def log_scalars(self) -> dict[str, float]:
        """Numbers of the last step."""
        return {}

    def progress(self) -> str | None:
        """Lines below those of the step."""
        return None


class Solved:
    """The methods of the family contract that a family's solver answers."""

    solver: Solver

    @property
    def stream_rows(self) -> int | None:  # type: ignore[override]  # the solver's
        """Tokens of a step that reads the corpus as one stream; None: packed rows."""
        return self.solver.stream_rows

    def planned_bytes(self) -> float:
        """Peak resident bytes of sweeps, whatever the length of the stream."""
        return self.solver.planned_bytes()

    def attach(self, folder: Path) -> None:
        """Remember where the run works; files are opened at the first step."""
        self.solver.attach(folder)

    def describe(self) -> dict[str, Any]:
        """Which files the checkpoint belongs to; what they hold their journal says."""
        return self.solver.describe()

    def flush(self) -> None:
        """Rows durable before the manifest that counts on them."""
        self.solver.flush()

    def sweep_end(self) -> bool:
        """Whether a checkpoint must be committed before the next step."""
        return self.solver.sweep_end()

    def finish(self) -> None:
        """Contexts have served; `keep_contexts` spares them."""
        self.solver.finish()

    def statistics(self) -> dict[str, Any]:
        """`iteration` and, per sweep, the means over its chunks."""
        return self.solver.statistics()

    def log_scalars(self) -> dict[str, float]:
        """The terms of the last step."""
        return self.solver.log_scalars()

    def progress(self) -> str | None:
        """The guide's lines and ours, under Jacobi; else one line of the terms."""
        return self.solver.progress()
