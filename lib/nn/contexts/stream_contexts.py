"""Frozen vectors of one stream, made once and read by position: Phase 2 under `reset: never`.

Held:  c_t of every training token, sweep 0 of `sweeps` in a single file. Its key is a hash of
       the frozen weights and the table, so runs that have equal ones share it.
Use:   z^1..z^L of a token follow from c_{t-1} in one step, all rows and times in parallel; kept
       they would take L times the room (cvfp.md 12.1).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from lib.core import artifact, files
from lib.core.errors import UserError
from lib.core.progress import progress
from lib.nn.contexts.first_sweep import write_first_sweep
from lib.nn.contexts.objective import Learner
from lib.nn.contexts.solver import Solver
from lib.nn.contexts.sweeps import Sweeps

CHUNK_TOKENS = 1_000_000  # of a journal line


class StreamContexts(Solver):
    """Supplies the vectors before the tokens of packed rows; learns nothing."""

    has_contexts = True

    def __init__(self, model: Learner) -> None:
        self._model = model
        self._disk: Sweeps | None = None

    def before(self, rows: np.ndarray) -> Tensor:
        """c_{t-1} of the inputs of packed rows, (T, B, d); 0 before the first token."""
        disk, source = self._open(), self._model.source
        assert source is not None
        at = source.positions(rows)  # (B, T)
        if (at < 0).any():
            raise UserError(
                "rows hold ids that are no part of the stream",
                value=f"row {int(rows[np.flatnonzero((at < 0).any(1))[0]])}",
                remedy="encode with packing: stream, or use reset: document",
            )
        wide = torch.float64 if disk.dtype == "float64" else torch.float32
        found = torch.zeros(*at.shape, self._model.config.d, dtype=wide)
        for row, where in zip(found, at, strict=True):
            for piece in np.split(np.arange(len(where)), np.flatnonzero(np.diff(where) != 1) + 1):
                start, stop = int(where[piece[0]]) - 1, int(where[piece[-1]])
                own = row[int(piece[0]) : int(piece[-1]) + 1]
                own[len(own) - (stop - max(0, start)) :] = disk.rows(0, max(0, start), stop)
        return found.transpose(0, 1)

    def finish(self) -> None:
        """They can be made again."""
        if self._disk is not None and not self._model.config.keep_contexts:
            self._disk.close()
            files.remove_tree(self._disk.folder)
            self._disk = None

    def _open(self) -> Sweeps:
        """The finished file; a killed run goes on with the first chunk that its journal lacks."""
        if self._disk is not None:
            return self._disk
        config, source, key = self._model.config, self._model.source, self._key()
        assert source is not None
        disk = Sweeps(
            artifact.scratch_folder("contexts", key), key, tokens=source.tokens, width=config.d,
            chunk_tokens=min(CHUNK_TOKENS, source.tokens), layout="slots", spare=0,
            dtype=config.store_dtype,
        )  # fmt: skip
        done = [j for j in range(disk.chunks) if (0, j) in disk.lines]
        if done:  # compared with its crc32
            for _ in disk.read(0, done[-1], config.micro_tokens):
                pass
        left = disk.tokens - len(done) * disk.chunk_tokens
        with progress(left, "tokens", "contexts of the stream") as advance:
            for j in range(len(done), disk.chunks):
                write_first_sweep(self._model, disk, j, advance)
        self._disk = disk
        return disk

    def _key(self) -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            if name.startswith(("context_block", "embedding")):
                found.update(name.encode())
                data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                found.update(memoryview(data))  # type: ignore[arg-type]  # a buffer
        c, source = self._model.config, self._model.source
        assert source is not None
        return artifact.key_of("contexts", {
            "source": source.key, "weights": found.hexdigest(), "dtype": c.store_dtype,
            "tol": c.halo_tol,
        })  # fmt: skip
