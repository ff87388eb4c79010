"""From a stage's settings to a `Job`, and from its outcome to what the stage publishes.

Order: threads and device, ranks, data, model, first weights; what is missing is found in that order
       and before any work.
Note:  thread count and device are `runtime`: the same on one stack, which checkpoints record.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib import kernels
from lib.core import ranks
from lib.core.artifact import Manifest, plain
from lib.core.params import typed
from lib.core.run_settings import Runtime
from lib.core.stage import Run
from lib.models.base import load_family
from lib.train import parallel
from lib.train.final import write_final
from lib.train.inputs import Data, require_context, sized, take_weights
from lib.train.job import Job, Outcome
from lib.train.precision import compute_dtype, pick_device
from lib.train.sinks import HubPush


def prepare(runtime: Runtime, run: str) -> torch.device:
    """Threads, determinism, kernels and the device of this rank."""
    torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
    device = pick_device(runtime.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what collective calls and generators look at
    kernels.configure(runtime.kernels, run, device)
    return device


@contextlib.contextmanager
def open_job(run: Run, family: str, identity: Mapping[str, Any]) -> Iterator[Job]:
    """The job of one run; within the block this rank has joined the others."""
    settings, seed = run.settings.train[run.name], run.settings.seed
    device = prepare(run.runtime, run.name)
    dtype = compute_dtype(settings.precision, device)
    parallel.start(device)
    push = HubPush(run.runtime.hub, run.warn) if run.runtime.hub and ranks.rank() == 0 else None
    try:
        data = Data.open(
            run.inputs["tokens"], run.inputs["tokenizer"], seed, full=run.runtime.verify == "full"
        )
        module = load_family(family)
        config = typed(module.Config, plain(settings.model), "params.yaml")
        with torch.device("meta"):
            model = module.Model(config, data.store.vocab_size)
        model.vocab_size = data.store.vocab_size
        model.attention = run.runtime.attention
        require_context(data.store.context, model)
        model.to_empty(device="cpu")
        model.init_weights(seed)
        if settings.init_from:
            take_weights(Path(settings.init_from), model, data.tokenizer.fingerprint)
        model.place(device, dtype)

        def push_weights(step: int, weights: dict[str, Tensor]) -> None:
            if push is not None and push.is_due(step):
                folder = run.work / "push"
                config = describe_model(family, identity, data.store.vocab_size, data.store.context)
                provenance = {"fingerprint": run.fingerprint, "steps": step}
                write_final(folder, weights, config, provenance, run.inputs["tokenizer"])
                push.start(folder)

        yield Job(
            run=run.name,
            settings=sized(settings, data.store),
            runtime=run.runtime,
            seed=seed,
            model=model,
            rows=data.rows,
            context=data.store.context,
            device=device,
            dtype=dtype,
            work=run.work,
            identity={
                "fingerprint": run.fingerprint,
                "family": family,
                "vocab_size": data.store.vocab_size,
                "tokenizer": data.tokenizer.fingerprint,
                "data": identity["tokens"],
                "seed": seed,
            },
            extra={"code": run.code, "parents": parents_of(identity)},
            bytes_per_token=data.bytes_per_token,
            validate=data.validator(settings, device, dtype),
            sample=data.sampler(device),
            push=push_weights,
            stop=run.stop,
            log=run.log,
            warn=run.warn,
        )
    finally:
        if push is not None:
            push.close()
        parallel.stop()


def parents_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of what the run was made from."""
    return {name: identity[name] for name in ("tokens", "tokenizer", "init_from")}


def describe_model(
    family: str, identity: Mapping[str, Any], vocab_size: int, context: int
) -> dict[str, Any]:
    """config.json of the final model: all that building it needs."""
    return {
        "family": family,
        "config": identity["model"],
        "vocab_size": vocab_size,
        "context": context,
        "tokenizer": identity["tokenizer"],
    }


def write_result(run: Run, job: Job, outcome: Outcome, identity: Mapping[str, Any]) -> None:
    """The final model and the curves, where the frame publishes them from."""
    plan, position = outcome.plan, outcome.position
    tokens = (position.step - position.skipped) * plan.batch_tokens
    family, vocab_size = job.identity["family"], job.identity["vocab_size"]
    provenance = {
        "run": run.name,
        "fingerprint": run.fingerprint,
        "seed": job.seed,
        "boundary": Manifest.read(run.inputs["tokens"]).recipe["params"]["boundary"],
        "train": identity["train"],
        "steps": position.step,
        "skipped": position.skipped,
        "best": position.best,
        "params": plan.parameters,
        "notes": job.model.notes(),
        "train_tokens": tokens,
        "train_flops": tokens * plan.flops_per_token,
        "parents": parents_of(identity),
        "code_changes": position.code_changes,
    }
    config = describe_model(family, identity, vocab_size, job.context)
    write_final(run.result, outcome.weights, config, provenance, run.inputs["tokenizer"])
    outcome.observer.write_curves(run.files_beside("curves"))
