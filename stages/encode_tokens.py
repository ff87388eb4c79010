"""encode_tokens@<name>: documents x tokenizer -> token files in scratch and packed rows.

In:  data/documents (the recipe that the section names), data/tokenizers/<tokenizer>.
Out: data/tokens/<name>.manifest.json; the bytes lie in $KUMIKI_SCRATCH/tokens/<key>/.
"""

from __future__ import annotations

from typing import Any

from lib.core import artifact, stage
from lib.core.artifact import Manifest
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="encode_tokens",
    about="Encode a recipe's documents into token files in scratch and pack them into rows.",
    sections=("seed", "encode_tokens.{name}"),
    inputs={"documents": "data/documents", "tokenizer": "data/tokenizers/{name}"},
    out="data/tokens/{name}.manifest.json",
    item="name",
    tasks=True,
)


def identity(run: Run) -> dict[str, Any]:
    """The section, the recipe's documents, the tokenizer."""
    section = run.settings.encode_tokens[run.name]
    return {
        "section": artifact.plain(section),
        "documents": stage.input_hash(run.inputs["documents"] / section.documents),
        "tokenizer": stage.input_hash(run.inputs["tokenizer"]),
    }


def check(run: Run) -> bool:
    """Whether the token files of the finished manifest still lie in scratch, unchanged."""
    manifest = Manifest.read(run.result, kind="tokens")
    folder = artifact.scratch_folder("tokens", manifest.key)
    bad = artifact.damaged(folder, manifest.files, full=run.runtime.verify == "full")
    for name, found in bad.items():
        run.warn(f"token file {name}: {found}")
    return not bad


def body(run: Run) -> None:
    """Encode part by part, then pack; parts that an interrupted run finished are taken."""
    from lib.data.encode import encode, plan_encoding
    from lib.data.vocab.tokenizer import load_tokenizer

    section = run.settings.encode_tokens[run.name]
    stage.require_tasks(run, section.n_tasks)
    plan = plan_encoding(
        section,
        run.inputs["documents"] / section.documents,
        run.inputs["tokenizer"],
        artifact.scratch_root(),
        threads=max(1, run.runtime.threads // run.runtime.workers),
        open_tokenizer=load_tokenizer,
    )
    with run.pool() as pool_map:
        manifest = encode(plan, pool_map, run.log, run.task)
    if manifest is not None:  # None: the share of one task of a job array
        manifest.write(run.result)
        counts = manifest.counts["train"], manifest.counts["val"]
        documents, tokens = (sum(c[name] for c in counts) for name in ("documents", "tokens"))
        run.summary = f"{documents:,} documents, {tokens:,} tokens"


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity, check=check))
