"""train_tokenizer@<name>: documents -> one tokenizer folder, measured on the validation documents.

In:  data/documents (the recipe that the section names); the shard manifest, since the files of a
     ready-made tokenizer may be a source. Out: data/tokenizers/<name>/ (data.md 8).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lib.core import artifact, files, stage
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="train_tokenizer",
    about="Train, or take, one tokenizer and measure it on the validation documents.",
    sections=("seed", "train_tokenizer.{name}"),
    inputs={"documents": "data/documents", "shards": "data/shards.manifest.json"},
    out="data/tokenizers/{name}",
    item="name",
)


def identity(run: Run) -> dict[str, Any]:
    """The section and the recipe's documents."""
    section = run.settings.train_tokenizer[run.name]
    documents = run.inputs["documents"] / section.documents
    return {"section": artifact.plain(section), "documents": stage.input_hash(documents)}


def body(run: Run) -> None:
    """Train on the recipe's order, measure on validation, write the folder."""
    from lib.data.documents import read_documents, read_mixture
    from lib.data.vocab.tokenizer import build

    section = run.settings.train_tokenizer[run.name]
    documents = run.inputs["documents"] / section.documents
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    with files.atomic_folder(run.result) as out:
        report = build(
            section,
            read(run, read_mixture(documents), documents, "train"),
            lambda: read(run, (t for _, t in read_documents(documents, "val")), documents, "val"),
            out,
            gpt2_folder=fetched(run, getattr(section, "source", None)),
            cache_folder=Path(cache) if cache else None,
            recipe={"documents": stage.input_hash(documents)},
            threads=run.runtime.threads,
        )
        entries = artifact.describe(out)
        recipe = {"stage": "train_tokenizer", "section": artifact.plain(section)}
        artifact.Manifest(kind="tokenizer", recipe=recipe, files=entries, counts=report).write(
            out / files.MANIFEST
        )
    rate = report["bytes_per_token"]
    run.summary = f"{section.kind}, {section.vocab_size:,} ids, {rate:.2f} bytes a token"


def read(run: Run, texts: Iterable[str], documents: Path, split: str) -> Iterator[str]:
    """The texts, with their progress; the trainers tell nothing of what they do afterwards."""
    splits = artifact.Manifest.read(documents / files.MANIFEST, "documents").counts["splits"]
    total = sum(count["documents"] for count in splits[split].values())
    yield from run.watch(texts, total, "documents", f"{run.title}: {split}")
    if split == "train":
        run.log("the texts are read; pieces are made")


def fetched(run: Run, source: str | None) -> Path | None:
    """The folder in scratch that holds the files of `source`, verified."""
    from lib.data.raw import sources

    if source is None:
        return None
    manifest = artifact.Manifest.read(run.inputs["shards"], "shards")
    paths = sources.ensure_files(manifest, source, None, run.runtime, run.log)
    return next(iter(paths.values())).parent


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity))
