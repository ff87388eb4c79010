"""extract_texts: shards -> cleaned, deduplicated documents and the ledger of all that was dropped.

In:  data/shards.manifest.json (bytes in scratch, verified or brought again).
Out: data/documents/<recipe>/ for every recipe of params.yaml (data.md 6).
Also: `--txt data/<recipe>.txt` writes that recipe's training text, one document a line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.core import artifact, files, stage
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="extract_texts",
    about="Clean and deduplicate the shards' texts into documents, with a ledger of every change.",
    sections=("seed", "download_shards", "extract_texts"),  # sources: where local shards lie
    inputs={"shards": "data/shards.manifest.json"},
    out="data/documents",
    wishes={"txt": "also write <recipe>.txt: its training text, one document a line"},
    tasks=True,
)


def identity(run: Run) -> dict[str, Any]:
    """The recipes and the shard manifest."""
    return {
        "recipes": artifact.plain(run.settings.extract_texts.recipes),
        "shards": stage.input_hash(run.inputs["shards"]),
    }


def body(run: Run) -> None:
    """Every recipe in turn; finished shards of an interrupted run are taken as they are."""
    from lib.data.extract import build_share, extract_texts
    from lib.data.raw import sources

    stage.require_tasks(run, run.settings.extract_texts.n_tasks)
    found = Manifest.read(run.inputs["shards"], "shards")
    shards = sources.ensure_shards(found, run.settings.download_shards, run.runtime, run.log)
    absent = {name: about.get("missing", []) for name, about in found.counts["sources"].items()}
    if run.task is not None and run.of is not None:  # one share of a job array
        with run.pool() as pool_map:
            for name, recipe in run.settings.extract_texts.recipes.items():
                mine = [shard for shard in shards if shard.source in recipe.sources]
                count = build_share(mine, recipe, run.units / name, pool_map, run.task, run.of)
                run.log(f"{name}: {count} shards of task {run.task}")
        return
    taken = kept = 0
    with run.pool() as pool_map, files.atomic_folder(run.result) as out:
        for name, recipe in run.settings.extract_texts.recipes.items():
            files.make_folder(out / name)
            manifest = extract_texts(
                [shard for shard in shards if shard.source in recipe.sources],
                recipe,
                run.units / name,
                out / name,
                pool_map,
                {source: absent[source] for source in recipe.sources},
            )
            for split, counts in manifest.counts["splits"].items():
                documents = sum(count["documents"] for count in counts.values())
                size = sum(count["bytes"] for count in counts.values())
                run.log(f"{name} {split}: {documents:,} documents, {size:,} bytes")
            ledger = files.read_json(out / name / "ledger.json")["sources"]
            entries = [entry for splits in ledger.values() for entry in splits.values()]
            taken += sum(entry["documents_in"] for entry in entries)
            kept += sum(entry["documents_out"] for entry in entries)
    run.summary = f"{taken:,} documents in, {kept:,} kept, {taken - kept:,} dropped"


def after(run: Run) -> None:
    """`--txt FILE`: the recipe is the file's name without its suffix."""
    from lib.data.documents import write_lines

    if run.wishes["txt"] is None or run.task is not None:
        return
    path = Path(run.wishes["txt"])
    recipes = run.settings.extract_texts.recipes
    if path.stem not in recipes:
        remedy = f"name the file after its recipe: {', '.join(f'{name}.txt' for name in recipes)}"
        raise UserError("no such recipe", value=f"--txt {path}", remedy=remedy)
    count = write_lines(run.out / path.stem, path)
    run.log(f"{path}: {count:,} lines, line ends within a document are spaces")


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity, after=after))
