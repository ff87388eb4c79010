"""The loader: the rows of step s, a pure function of (seed, s) (data.md 11).

In:    packed rows of a token store, tokens per step, seed.  Out: `batch(step)`, int64 (rows,
       context + 1).
Rule:  slot j of step s takes row perm(seed, epoch)[g mod R] with g = s G + j, epoch = g // R; where
       the batch has a ramp, s G is the sum of its rows before s. Rank r of W reads slots
       [r G/W, (r+1) G/W): the global batch depends on no rank count, micro-batch or worker.
State: the integer s. Resuming is calling `batch` with it.
Note:  a permutation costs 8 bytes a row and two are kept, since a step may lie across an epoch
       border.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np

from lib.core.errors import UserError
from lib.core.ramp import Ramp
from lib.core.ranks import share_of
from lib.core.rng import numpy_generator
from lib.data.tokens import TokenStore


class Ahead:
    """Batches read ahead of the consumer."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows of one step."""
        raise TypeError(f"{type(self).__name__} defines no batch")

    def prefetch(
        self, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[np.ndarray]:
        """`batch(step)` for start <= step < stop, two batches read ahead in a thread.

        An error of the thread is raised here. While it runs the loader belongs to it.
        """
        ready: queue.Queue[np.ndarray | BaseException] = queue.Queue(maxsize=2)
        stopped = threading.Event()

        def put(item: np.ndarray | BaseException) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                for step in range(start, stop):
                    if not put(self.batch(step, rank, world)):
                        return
            except BaseException as error:  # carried over to the consumer, who raises it
                put(error)

        thread = threading.Thread(target=read, name="prefetch", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


class Loader(Ahead):
    """Batches of packed training rows in seeded order, every epoch permuted anew."""

    def __init__(
        self, store: TokenStore, batch_tokens: int, seed: int, ramp: Ramp | None = None
    ) -> None:
        """ramp: rows by step, where they change. batch_tokens: of the largest step.

        UserError when `batch_tokens` is no multiple of the context, or more rows than exist.
        """
        self.store, self.seed, self.context = store, seed, store.context
        self.rows_per_step, left = divmod(batch_tokens, self.context)
        if left or not self.rows_per_step:
            raise UserError(
                "batch_tokens is no multiple of the context",
                value=f"batch_tokens {batch_tokens}, context {self.context}",
                remedy=f"use {max(self.rows_per_step, 1) * self.context}",
            )
        if store.rows < self.rows_per_step:
            raise UserError(
                "fewer packed rows than one step takes",
                file=store.folder,
                value=f"{store.rows} rows, {self.rows_per_step} a step",
                remedy=f"set batch_tokens to {store.rows * self.context} or less, or add documents",
            )
        self.ramp = ramp or Ramp(values=(self.rows_per_step,), steps=1)
        self._orders: dict[int, np.ndarray] = {}

    def row_numbers(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows that `batch` reads, int64 (G / world,)."""
        share = share_of(self.ramp.at(step), world)
        first = self.ramp.before(step) + rank * share
        slots = np.arange(first, first + share)
        epochs, places = np.divmod(slots, self.store.rows)
        rows = np.empty(share, np.int64)
        for epoch in np.unique(epochs).tolist():  # one, or two across a border
            here = epochs == epoch
            rows[here] = self._order(epoch)[places[here]]
        return rows

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 (G / world, context + 1); inputs are [:, :-1], targets [:, 1:].

        UserError unless `world` divides G.
        """
        numbers = self.row_numbers(step, rank, world)
        rows = np.empty((len(numbers), self.context + 1), np.int64)
        for row, number in zip(rows, numbers.tolist(), strict=True):
            self.store.read_row(number, row)
        return rows

    def micro_batch_size(self, device_batch_size: int, world: int = 1) -> int:
        """Rows of a micro-batch: the largest divisor of G / world not above `device_batch_size`."""
        share = self.rows_per_step // world
        return max(n for n in range(1, min(share, device_batch_size) + 1) if share % n == 0)

    def _order(self, epoch: int) -> np.ndarray:
        """perm(seed, epoch), int64 (R,); NumPy's PCG64."""
        orders = self._orders  # read once: the thread that reads ahead may replace it
        order = orders.get(epoch)
        if order is None:
            order = numpy_generator(self.seed, "rows", epoch).permutation(self.store.rows)
            last = max(orders, default=epoch)
            self._orders = {e: o for e, o in orders.items() if e == last} | {epoch: order}
        return order


class Chunks(Ahead):
    """The training ids as one stream: step s is chunk s mod M, a single row of its ids.

    A last id stands behind them, so that inputs are [:, :-1] as in packed rows.
    """

    def __init__(self, store: TokenStore, chunk_tokens: int) -> None:
        self.store, self.chunk_tokens = store, chunk_tokens
        self.chunks = -(-store.length("train") // chunk_tokens)

    def row_numbers(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The chunk; UserError for several ranks, which would share the files of one stream."""
        if world > 1:
            raise UserError(
                "one stream is read by one rank",
                value=f"{world} ranks",
                remedy="use solver: exact, whose rows are split over ranks",
            )
        return np.array([step % self.chunks])

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 (1, n + 1)."""
        start = int(self.row_numbers(step, rank, world)[0]) * self.chunk_tokens
        length = min(self.chunk_tokens, self.store.length("train") - start)
        ids = self.store.tokens("train", start, length).astype(np.int64)
        return np.append(ids, ids[-1])[None]
