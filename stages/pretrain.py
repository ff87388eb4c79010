"""pretrain --run <run>: token rows x one model family -> a trained model and its curves.

In:  the tokens' manifest, their tokenizer, `train.<run>` or `runs.<run>`, `model.<family>`.
Out: checkpoints/<run>/final/ (weights, config, tokenizer, provenance) and metrics/<run>/*.csv.
Note: checkpoints and the log lie in checkpoints/<run>/work/, where the same command continues.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.core import artifact, ranks, stage
from lib.core.artifact import Manifest
from lib.core.kernel_choice import require
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="pretrain",
    about="Train one run of a model family; an interrupted run continues where it stopped.",
    sections=("seed", "train.defaults", "train.{name}", "model.{family}"),
    inputs={"tokens": "data/tokens/bpe.manifest.json", "tokenizer": "data/tokenizers/bpe"},
    extras=("embeddings", "contexts"),  # vectors of the training tokens; weights to begin with
    out="checkpoints/{name}/final",
    beside={"curves": "metrics/{name}"},
    item="run",
    work="checkpoints/{name}/work",
    defer_stop=True,
)
ELSEWHERE = ("model", "tokens", "family", "init_from")  # in the identity under another form


def family_of(run: Run) -> str:
    """The family of the run: its own name where nothing else is said."""
    return run.settings.train[run.name].family or run.name


def modules(run: Run) -> list[str]:
    """What is loaded by name: the family."""
    return [f"lib.models.{family_of(run)}"]


def identity(run: Run) -> dict[str, Any]:
    """The run's settings, model, seed, token rows, tokenizer, and the weights it begins with."""
    settings = run.settings.train[run.name]
    own = {k: v for k, v in artifact.plain(settings).items() if k not in ELSEWHERE}
    source = settings.init_from and stage.input_hash(Path(settings.init_from))
    extras = {n: stage.input_hash(run.inputs[n]) for n in STAGE.extras if n in run.inputs}
    return {
        "seed": run.settings.seed,
        "train": own,
        "family": family_of(run),
        "model": artifact.plain(settings.model),
        "tokens": stage.input_hash(run.inputs["tokens"]),
        "tokenizer": Manifest.read(run.inputs["tokens"]).recipe["inputs"]["tokenizer"],
        "init_from": source,
        **extras,
    }


def body(run: Run) -> None:
    """Train, then write the final model and the curves."""
    require(run.runtime.kernels, f"{STAGE.name} {run.name}")  # before torch is imported
    from lib.models.base import load_family
    from lib.train.session import files_beside, open_job, write_result
    from lib.train.trainer import train

    found = identity(run)
    with open_job(run, family_of(run), found) as job:
        outcome = train(job)
        if ranks.rank() == 0:
            beside = files_beside(job, load_family(family_of(run)))
            write_result(run, job, outcome, found, beside)
            plan, best = outcome.plan, outcome.position.best
            told = f", best {best['bpb']:.4f} bits per byte at step {best['step']}" if best else ""
            run.summary = f"{plan.steps} steps of {plan.batch_tokens:,} tokens{told}"


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity, modules=modules))
