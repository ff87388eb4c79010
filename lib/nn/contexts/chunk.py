"""One chunk of a learning sweep: its micro-batches, its rows on disk, its line in the journal.

    C_t = f(c~_t, e_t),  c~_t = C'_{t-1} + sigma eps  (cvfp.md 4)

C' is what the sweep before stored; before the chunk's first token stands the row that this sweep
wrote last. Letters: d width, n rows of a micro-batch, k sweep, j chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lib.nn.contexts import probes
from lib.nn.contexts.first_sweep import contraction_of, inputs_of_stream, ranks_of
from lib.nn.contexts.memory_term import Memory, offset_targets
from lib.nn.contexts.objective import Learner, Numbers, Terms, unique_tables
from lib.nn.contexts.one_step import one_step
from lib.nn.contexts.sweeps import Noise, Sweeps


class Chunk:
    """What chunk j of sweep k is made of; `terms` may run more than once."""

    def __init__(
        self, model: Learner, disk: Sweeps, k: int, j: int, step: int, noise: Noise
    ) -> None:
        assert model.source is not None
        self.model, self.disk, self.k, self.j, self._noise = model, disk, k, j, noise
        self.start, self.stop = disk.span(j)
        self.weights, self.hand_on = model.weights().apart()
        self._wide = self.weights.b[0].dtype
        ids = model.source.ids(self.start, self.stop)
        self.tables, self._index = unique_tables(model, self.weights, ids, learns=True)
        self._keep = None
        if model.config.get("reset") == "document":
            self._keep = (~model.source.starts(self.start, self.stop)).to(self._wide)
        self._memory = Memory(model, step, ids)
        self._targets, self._valid = self._ahead(ids)
        self._first = self._before().to(self._wide)

    @property
    def pairs(self) -> int:
        """(position, horizon) pairs of the memory term."""
        return sum(int(v.sum()) for v in self._valid)

    def terms(self) -> Iterator[Terms]:
        """The micro-batches in order."""
        before, at, sigma = self._first, self.start, self.model.config.get("noise")
        for old in self.disk.read(self.k - 1, self.j, self.model.config.micro_tokens):
            old, stop = old.to(self._wide), at + len(old)
            here = slice(at - self.start, stop - self.start)
            noisy = torch.cat((before[None], old[:-1]))
            if sigma:
                noisy.add_(self._noise.rows(self.k, at, stop).to(self._wide), alpha=sigma)
            noisy = noisy if self._keep is None else noisy * self._keep[here, None]
            c = one_step(noisy, self._token_side(at, stop), self.weights, owned=True)
            found = Terms(c=c, stepped=c, wanted=old)
            if self._memory.active:
                picked = ([x[here] for x in xs] for xs in (self._targets, self._valid))
                found.memory = self._memory.loss(c, *picked)
            yield found
            before, at = old[-1], stop

    def _token_side(self, start: int, stop: int) -> list[Tensor]:
        if self.tables is not None:
            return self.tables.gather(self._index[start - self.start : stop - self.start])
        return self.weights.token_side(inputs_of_stream(self.model, start, stop))

    def _before(self) -> Tensor:
        """What this sweep wrote last; for the first token the wrap."""
        if self.j:
            return self.disk.last_written(self.k, self.j)
        if not self.model.config.get("wrap"):
            return torch.zeros(self.model.config.d)
        return self.disk.row(self.k - 1, self.disk.tokens - 1)

    def _ahead(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Targets and masks of the memory term within the chunk, (n,) each."""
        if not self._memory.active:
            return [], []
        column = None if self._keep is None else self._keep[:, None]
        targets, valid = offset_targets(ids[:, None], column, self._memory.offsets)
        return [t[:, 0] for t in targets], [v[:, 0] for v in valid]


class Record:
    """What pass 1 leaves of a chunk: rows, and the numbers of its line."""

    def __init__(self, chunk: Chunk, advance: Callable[[int], object]) -> None:
        """advance: told of tokens that have been stored."""
        self._chunk, self._advance = chunk, advance
        self._writer, self._converged = chunk.disk.writer(chunk.k, chunk.j), 0
        self._sample: list[Tensor] = []
        self._share = min(1.0, probes.SEED_ROWS / (chunk.stop - chunk.start))

    def see(self, terms: Terms, distances: Tensor) -> None:
        """One micro-batch with the squared distances to the sweep before."""
        rows, config = terms.c.detach(), self._chunk.model.config
        self._writer.put(rows)
        self._advance(len(rows))
        self._converged += int((distances < config.converged_mse * config.d).sum())
        wanted = max(1, round(self._share * len(rows)))
        self._sample.append(probes.sample_rows(rows, wanted))

    def commit(self, numbers: Numbers) -> None:
        """Rows durable, then the line."""
        chunk, disk = self._chunk, self._chunk.disk
        disk.commit({
            "sweep": chunk.k, "chunk": chunk.j, "crc32": self._writer.finish(),
            **ranks_of(torch.cat(self._sample)), **numbers.terms(),
            "converged": self._converged / (chunk.stop - chunk.start),
            "rho": contraction_of(chunk.model, chunk.weights, chunk.start, chunk.stop),
        })  # fmt: skip
        disk.forget(chunk.k, chunk.j)
        disk.forget(chunk.k - 1, chunk.j)
