"""export --run <run>: a finished model -> a folder in Hugging Face layout.

In:  checkpoints/<run>/final.   Out: checkpoints/<run>/export/, opened by transformers and by
     `kumiki generate`. transformers' own class where it has the architecture, else our code.
"""

from __future__ import annotations

from typing import Any

from lib.core import artifact, files, stage
from lib.core.artifact import Manifest
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="export",
    about="Write a trained model in Hugging Face layout.",
    sections=("export",),
    inputs={"model": "checkpoints/{name}/final"},
    out="checkpoints/{name}/export",
    item="run",
)


def identity(run: Run) -> dict[str, Any]:
    """The model, the form asked for, the exporter, and the code that may go along, by the word."""
    from lib.export.sources import ROOT, auto_map_sources, families_of
    from lib.train.final import config_of

    known = config_of(run.inputs["model"])
    sources = auto_map_sources(families_of(known["family"], known["config"]))
    sources["exporter"] = (ROOT / "lib/export/hf.py").read_text(encoding="utf-8")
    return {
        "export": artifact.plain(run.settings.export),
        "model": stage.input_hash(run.inputs["model"]),
        "sources": artifact.key_of("sources", sources),
    }


def body(run: Run) -> None:
    """Open the model, write the folder, its manifest last."""
    from lib.export import gguf, hf
    from lib.export.saved import open_folder

    folder = run.inputs["model"]
    opened = open_folder(folder)
    config, model = opened.model.exported(opened.config)
    provenance = files.read_json(folder / "provenance.json")
    what = hf.Exportable(
        family=opened.family,
        config=config,
        model=model,
        tokenizer=opened.tokenizer,
        tokenizer_folder=folder,
        boundary=opened.boundary,
        framed=opened.framed,
        facts={"run": run.name} | {k: str(provenance[k]) for k in hf.FACTS if k in provenance},
    )
    with files.atomic_folder(run.result) as part:
        form = hf.export(what, part, run.settings.export.form)
        if run.settings.export.gguf:
            gguf.convert(part)
            form += ", gguf"
        recipe = {"stage": "export", "inputs": {"model": stage.input_hash(folder)}}
        entries = artifact.describe(part)
        Manifest(kind="export", recipe=recipe, files=entries).write(part / files.MANIFEST)
    run.summary = f"{form}, {len(entries)} files"


def modules(run: Run) -> list[str]:
    """What is loaded by name or ends up in the folder as source."""
    from lib.train.final import family_of

    family = family_of(run.inputs["model"])
    return [f"lib.models.{family}", "lib.export.hf", "lib.export.modeling"]


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity, modules=modules))
