"""The files of a run of sweeps: opened at the first step, described, snapshotted, removed.

Held: context vectors below `$KUMIKI_SCRATCH/contexts/<key>/`, key the name of the run's working
      folder; snapshots of the weights, `checkpoint_iter_<i>/`, in that folder (cvfp.md 11).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.core import artifact, files
from lib.nn.contexts.objective import Learner
from lib.nn.contexts.sweeps import JOURNAL, Sweeps, read_journal


class SweepState:
    """Where a run of sweeps keeps what lies beside its weights."""

    def __init__(self, model: Learner) -> None:
        self._model = model
        self.folder: Path | None = None
        self.disk: Sweeps | None = None

    @property
    def tokens(self) -> int:
        """N."""
        source = self._model.source
        assert source is not None, "sweeps go over an embeddings artefact"
        return source.tokens

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one step."""
        return min(self._model.config.get("chunk_tokens"), self.tokens)

    @property
    def _place(self) -> Path:
        assert self.folder is not None
        return artifact.scratch_folder("contexts", self.folder.name)

    def open(self) -> Sweeps:
        """The files, made at the first call."""
        if self.disk is None:
            config, about = self._model.config, self.describe()
            self.disk = Sweeps(
                self._place, about["key"], tokens=self.tokens, width=config.d,
                chunk_tokens=self.chunk_tokens, layout=config.get("buffers"),
                spare=config.spare_chunks, dtype=config.store_dtype, work=self.folder,
            )  # fmt: skip
        return self.disk

    def describe(self) -> dict[str, Any]:
        """Which files a checkpoint belongs to; what they hold their journal says."""
        if self.folder is None:
            return {}
        config = self._model.config
        return {
            "key": self.folder.name, "layout": config.get("buffers"), "dtype": config.store_dtype,
            "tokens": self.tokens, "chunk_tokens": self.chunk_tokens,
        }  # fmt: skip

    def snapshot(self, iteration: int) -> None:
        """checkpoint_iter_<i>/ in the working folder: weights and statistics, kept."""
        from safetensors.torch import save_file

        assert self.folder is not None
        with files.atomic_folder(self.folder / f"checkpoint_iter_{iteration}") as part:
            weights = self._model.state_dict()
            own = {
                n: t.contiguous()
                for n, t in weights.items()
                if not n.startswith(("embedding", "frozen"))
            }
            with files.library_file(part / "model.safetensors") as temp:
                save_file(own, temp)
            files.write_json(part / "stats.json", self.statistics(iteration))
            entries = artifact.describe(part)
            recipe = {"fingerprint": self.folder.name, "iteration": iteration}
            artifact.Manifest(kind="snapshot", recipe=recipe, files=entries).write(
                part / files.MANIFEST
            )

    def statistics(self, iteration: int | None = None) -> dict[str, Any]:
        """`iteration` and, per sweep, the means over its chunks.

        From the journal, not from what this process did: a run may end in another one.
        """
        if self.folder is None:
            return {"iteration": iteration, "sweeps": []}
        lines = {(x["sweep"], x["chunk"]): x for x in read_journal(self._place / JOURNAL)}
        chunks, found = -(-self.tokens // self.chunk_tokens), []
        for k in range(self._model.config.get("sweeps")):
            of = [lines[k, j] for j in range(chunks) if (k, j) in lines]
            if len(of) == chunks:
                names = sorted(set.intersection(*(set(x) for x in of)) - {"chunk", "crc32"})
                found.append({n: sum(x[n] for x in of) / chunks for n in names})
        return {"iteration": iteration or len(found), "sweeps": found}

    def finish(self) -> None:
        """Contexts have served; `keep_contexts` spares them."""
        if self.disk is not None and not self._model.config.keep_contexts:
            self.disk.remove()
            self.disk = None
