"""precompute_embeddings: token files x a table of vectors -> embeddings in scratch.

In:  data/tokens/bpe.manifest.json, a finished model whose table is the offline default.
Out: data/embeddings.manifest.json; the bytes lie in $KUMIKI_SCRATCH/embeddings/<key>/.
Note: a killed run goes on with the first chunk that its journal does not name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lib.core import artifact, stage
from lib.core.artifact import Manifest
from lib.core.data_settings import CheckpointTable, Embeddings
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="precompute_embeddings",
    about="Write the vector of every training token to scratch, or the table that gives the same.",
    sections=("precompute_embeddings",),
    inputs={"tokens": "data/tokens/bpe.manifest.json", "model": "checkpoints/gpt/final"},
    out="data/embeddings.manifest.json",
)


def section_of(run: Run) -> Embeddings:
    """The section; a model given on the command line is the one whose table is taken."""
    section = run.settings.precompute_embeddings
    table = CheckpointTable(path=str(run.inputs["model"]), tensor=section.checkpoint.tensor)
    return replace(section, checkpoint=table)


def identity(run: Run) -> dict[str, Any]:
    """The section, the token files, what the vectors are taken from."""
    from lib.data.embeddings import recipe_of

    section = section_of(run)
    return {
        "recipe": recipe_of(section, run.inputs["tokens"]),
        "chunk_tokens": section.chunk_tokens,
    }


def modules(run: Run) -> list[str]:
    """The families whose blocks may make hidden states, loaded by name."""
    hidden = run.settings.precompute_embeddings.source == "hidden"
    return ["lib.models.gpt", "lib.models.ramgpt"] if hidden else []


def check(run: Run) -> bool:
    """Whether the files of the finished manifest still lie in scratch, unchanged."""
    manifest = Manifest.read(run.result, kind="embeddings")
    folder = artifact.scratch_folder("embeddings", manifest.key)
    bad = artifact.damaged(folder, manifest.files, full=run.runtime.verify == "full")
    for name, found in bad.items():
        run.warn(f"embedding file {name}: {found}")
    return not bad


def body(run: Run) -> None:
    """Check the disk, write chunk by chunk, then the manifest."""
    from lib.data.embeddings import precompute

    section = section_of(run)
    made = precompute(section, run.inputs["tokens"], run.runtime, run.log)
    made.write(run.result)
    run.summary = f"{made.counts['tokens']:,} tokens, width {made.counts['width']}"


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity, check=check, modules=modules))
