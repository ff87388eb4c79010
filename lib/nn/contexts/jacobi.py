"""The original's solver: sweeps over one stream on disk (cvfp.md 4, 7, 8).

Every token is one step from the vector that the sweep before stored; sweep 0 is the true
trajectory. Letters: d width, e token width, k sweep, j chunk, M chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.core.rng import torch_generator
from lib.nn.contexts.budget import sweep_bytes
from lib.nn.contexts.chunk import Chunk, Record
from lib.nn.contexts.first_sweep import write_first_sweep
from lib.nn.contexts.objective import (
    Learner,
    Numbers,
    Objective,
    activation_bytes,
    handed,
    two_pass,
)
from lib.nn.contexts.pace import KEPT, TWICE, Pace
from lib.nn.contexts.solver import Solver
from lib.nn.contexts.sweep_state import SweepState
from lib.nn.contexts.sweeps import Noise, Sweeps


class Jacobi(Solver):
    """The original's sweeps: every token one step from the vector that the sweep before stored."""

    def __init__(self, model: Learner) -> None:
        self.model, self.state = model, SweepState(model)
        self.numbers = Numbers()
        self.place: tuple[int, int] = (0, 0)  # sweep, chunk of the last step
        self.pace: Pace | None = None  # from the first step on
        seed = model.seed
        self._noise = Noise(
            model.config.d, lambda k, block: torch_generator(seed, "noise", k, block)
        )

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Step k M + j: sweep 0 yields nothing, later ones the losses of chunk j."""
        disk = self.state.open()
        k, j = self.place = divmod(batch.step, disk.chunks)
        stop = self.model.config.stop_at_converged
        if k > 1 and stop is not None and self._share(disk, k - 1) >= stop:
            return
        pace = self.pace = self.pace or self._start_pace()
        learning = 1 / pace.learning  # share of pass 1
        with pace.chunk(disk, k, j) as advance:
            if k == 0:
                write_first_sweep(self.model, disk, j, lambda tokens: advance(tokens, 1.0))
                return
            seen = lambda tokens: advance(tokens, learning)  # noqa: E731
            for loss in self._sweep(disk, k, j, batch.step, seen):
                yield loss
                advance(self.model.config.micro_tokens, 1 - learning)

    def _start_pace(self) -> Pace:
        learning = KEPT if self._keeps(self.stream_rows) else TWICE
        return Pace(self.model.config.get("sweeps"), learning)

    def _keeps(self, tokens: int) -> bool:
        """Whether the graphs of so many tokens fit the budget."""
        needed = tokens * activation_bytes(self.model.config, self.model.weights())
        return needed <= self.model.activation_bytes

    def _share(self, disk: Sweeps, k: int) -> float:
        """Share of tokens that had converged in sweep k; 1 when it was left out itself."""
        lines = [disk.lines.get((k, j)) for j in range(disk.chunks)]
        if any(line is None for line in lines):
            return 1.0
        ends = [disk.span(j) for j in range(disk.chunks)]
        sizes = [stop - start for start, stop in ends]
        return sum(x["converged"] * n for x, n in zip(lines, sizes, strict=True)) / sum(sizes)  # type: ignore[index]

    def _sweep(self, disk: Sweeps, k: int, j: int, step: int, advance: Any) -> Iterator[Tensor]:
        chunk = Chunk(self.model, disk, k, j, step, self._noise)
        objective = Objective(self.model, step, chunk.stop - chunk.start, chunk.pairs)
        record = Record(chunk, advance)

        def commit() -> None:
            record.commit(objective.numbers)
            self.numbers = objective.numbers

        yield from two_pass(
            chunk.terms, objective, keeps=self._keeps(chunk.stop - chunk.start), seen=record.see,
            commit=commit, last=handed(chunk.tables, chunk.hand_on),
        )  # fmt: skip

    # ------------------------------------------------------------ state and words

    @property
    def stream_rows(self) -> int:  # type: ignore[override]  # read only
        """Tokens of a chunk."""
        return self.state.chunk_tokens

    def planned_bytes(self) -> float:
        """Peak resident bytes, which the length of the stream has no part in."""
        config, source = self.model.config, self.model.source
        assert source is not None
        return sweep_bytes(
            vocab_size=len(source.table()), width=config.width, context_width=config.d,
            depth=config.get("depth"), chunk_tokens=self.stream_rows, memmap=source.has_rows,
            activation_bytes=self.model.activation_bytes,
        )  # fmt: skip

    def attach(self, folder: Path) -> None:
        """Remember where the run works; files are opened at the first step."""
        self.state.folder = folder

    def describe(self) -> dict[str, Any]:
        """Which files the checkpoint belongs to."""
        return self.state.describe()

    def flush(self) -> None:
        """Rows durable before the manifest that counts on them."""
        if self.state.disk is not None:
            self.state.disk.sync()

    def sweep_end(self) -> bool:
        """Commit after every chunk: before the first overwrite of what the last one reads."""
        if self.state.disk is None:
            return False
        sweep, chunk = self.place
        if chunk == self.state.disk.chunks - 1:
            self.state.snapshot(sweep + 1)
        return True

    def finish(self) -> None:
        """Remove the files."""
        self.state.finish()

    def statistics(self) -> dict[str, Any]:
        """Of every finished sweep."""
        return self.state.statistics()

    def log_scalars(self) -> dict[str, float]:
        """The terms of the last step, what its chunk was measured by, and its pace."""
        line = self.state.disk.lines.get(self.place) if self.state.disk else None
        if line is None or self.pace is None:  # before the first step, or converged before it
            return {}
        terms = self.numbers.terms() if self.place[0] else {}
        measured = {k: v for k, v in line.items() if k not in ("crc32", *terms)}
        return terms | measured | self.pace.numbers

    def progress(self) -> str | None:
        """The guide's five lines and ours (cvfp.md 13)."""
        disk, n, d = self.state.disk, self.log_scalars(), self.model.config.d
        if disk is None or self.pace is None or not n:
            return None
        (sweep, chunk), (start, stop) = self.place, disk.span(self.place[1])
        lines = [
            f"Iteration {sweep + 1}/{self.model.config.get('sweeps')}",
            f"Processing chunk {chunk + 1}/{disk.chunks}: {start}-{stop}",
            f"  Effective Rank: {100 * n['er_seed'] / d:.1f}% ({n['er_seed']:.0f}/{d})",
        ]
        rest = f"rank centred {100 * n['er'] / d:.1f}% | rho {n['rho']:.2f}"
        if sweep:  # the first sweep learns nothing, so has no losses
            lines += [
                f"  CVFP Loss: {n['fixed_point']:.4f}",
                f"  Diversity Loss: {n['diversity']:.4f}",
            ]
            rest = f"Converged: {100 * n['converged']:.1f}% | {rest}"
        return "\n".join([*lines, f"  {rest}", self.pace.line(disk.folder)])
