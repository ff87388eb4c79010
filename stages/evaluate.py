"""evaluate --run <run>: a finished model x the validation documents -> its numbers and samples.

In:  checkpoints/<run>/final, the documents and token files behind its training; the shard manifest,
     since CORE's tasks may be a source.
Out: metrics/<run>/eval.json; beside it eval_record.json, samples.json, depth.csv, controls.csv,
     examples/.
Note: a killed run continues at the block of documents, or the task, that it was scoring.
"""

from __future__ import annotations

from typing import Any

from lib.core import artifact, files, ranks, stage
from lib.core.artifact import Manifest
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="evaluate",
    about="Measure one trained model: bits per byte, cloze, CORE, samples.",
    sections=("eval",),
    inputs={
        "model": "checkpoints/{name}/final",
        "documents": "data/documents",
        "tokens": "data/tokens/bpe.manifest.json",
        "shards": "data/shards.manifest.json",
    },
    out="metrics/{name}/eval.json",
    beside={"records": "metrics/{name}"},
    item="run",
)


def identity(run: Run) -> dict[str, Any]:
    """The model, the tokens it was trained on, the documents behind them, tasks, settings."""
    from lib.eval.inputs import bundle_identity, find_documents

    tokens = Manifest.read(run.inputs["tokens"], kind="tokens")
    return {
        "eval": artifact.plain(run.settings.eval),
        "model": stage.input_hash(run.inputs["model"]),
        "tokens": stage.input_hash(run.inputs["tokens"]),
        "documents": stage.input_hash(find_documents(run.inputs["documents"], tokens)),
        "bundle": bundle_identity(run),
    }


def body(run: Run) -> None:
    """Score the text, compare, sample."""
    from lib.eval.judge import evaluate

    evaluate(run)
    if ranks.rank() == 0:
        numbers = files.read_json(run.result)
        run.summary = ", ".join(f"{name} {numbers[name]}" for name in ("bpb", "cloze", "core"))


def modules(run: Run) -> list[str]:
    """The family's file, which is loaded by name, and what makes the samples."""
    from lib.train.final import family_of

    family = family_of(run.inputs["model"])
    return [f"lib.models.{family}", "lib.export.samples", "lib.export.generate"]


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity, modules=modules))
