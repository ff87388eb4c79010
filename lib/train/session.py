"""From a stage's settings to a `Job`, and from its outcome to what the stage publishes.

Order: threads and device, ranks, data, model, first weights; what is missing is found in that order
       and before any work.
Note:  thread count and device are `runtime`: the same on one stack, which checkpoints record.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lib import kernels
from lib.core import files, ranks
from lib.core.artifact import Manifest, plain
from lib.core.errors import EnvError, KumikiError, UserError
from lib.core.run_settings import Runtime, Train
from lib.core.stage import Run
from lib.core.typed import typed
from lib.data.vocab import chat
from lib.export import hf
from lib.models.base import Family, load_family
from lib.nn.stream import Streaming, open_stream
from lib.train import parallel
from lib.train.controls import look_inside, table, train_controls
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
    if device.type != "cpu" and not kernels.unusable(device, dtype):
        run.log("compiling kernels (first run only)")  # nothing moves for minutes
    parallel.start(device)
    hub = run.runtime.hub if ranks.rank() == 0 else None
    push = HubPush(hub, run.log, run.warn) if hub else None
    model = None
    try:
        data = Data.open(
            run.inputs["tokens"], run.inputs["tokenizer"], seed, full=run.runtime.verify == "full"
        )
        module = load_family(family)
        start = settings.init_from or run.inputs.get("contexts")
        request = Streaming(
            runtime=run.runtime, context=data.store.context, averaged=settings.ema_decay > 0,
            grad_dtype=getattr(torch, settings.grad_wire),
            moment_dtype=getattr(torch, settings.moments),
        )  # fmt: skip

        def build(config: Any, own_seed: int, started: bool) -> Family:
            model = make_model(module, config, data, run.runtime)
            model.streamer = partial(open_stream, request=request)
            model.init_weights(own_seed)
            if "embeddings" in run.inputs:
                model.read_from(data.embeddings(run.inputs))
            if started and start:
                take_weights(Path(start), model, data.tokenizer.fingerprint)
            model.place(device, dtype)
            return model

        config = typed(module.Config, plain(settings.model), "params.yaml")
        model = build(config, seed, True)
        require_wire(settings, model)
        require_memory(model, run.runtime, device)

        def push_weights(step: int, weights: dict[str, Tensor], last: bool) -> None:
            if push is None or not push.is_free(wait=last):  # the finished model is never left out
                return
            what = exportable(module, family, config, weights, data, run.inputs["tokenizer"])
            facts = {"run": run.name, "steps": str(step), "seed": str(seed)}
            try:
                with files.atomic_folder(run.work / "push") as part:
                    hf.export(replace(what, facts=facts), part)
            except (KumikiError, OSError) as error:  # a full disk, say: the run goes on without
                run.warn(f"nothing is pushed after step {step}: {error}")
                return
            push.start(run.work / "push")

        yield Job(
            run=run.name,
            settings=sized(settings, data.store),
            runtime=run.runtime,
            seed=seed,
            model=model,
            rows=lambda plan: data.rows(plan, model.stream_rows),
            context=model.stream_rows or data.store.context,
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
            answers=data.answers(settings.loss_on),
            bytes_per_token=data.bytes_per_token,
            validate=data.validator(settings, device, dtype)
            if model.predicts
            else lambda model: None,
            sample=data.sampler(device),
            push=push_weights,
            build=build,
            diagnostic_rows=data.first_rows,
            val_bytes_per_token=data.val_bytes_per_token(settings) if settings.controls else 0.0,
            stop=run.stop,
            log=run.log,
            warn=run.warn,
        )
    finally:
        if model is not None:
            model.close()
        if push is not None:
            push.close()
        parallel.stop()


def make_model(module: ModuleType, config: Any, data: Data, runtime: Runtime) -> Family:
    """A model of the family on the CPU, its weights not yet filled."""
    with torch.device("meta"):
        model = module.Model(config, data.store.vocab_size)
    model.vocab_size = data.store.vocab_size
    model.attention, model.activation_bytes = runtime.attention, runtime.activation_bytes
    require_context(data.store.context, model)
    return model.to_empty(device="cpu")


def exportable(
    module: ModuleType, family: str, config: Any, weights: Mapping[str, Tensor], data: Data,
    tokenizer: Path,
) -> hf.Exportable:  # fmt: skip
    """The model of `weights`, which are not copied, as an export is made from it."""
    with torch.device("meta"):
        model = module.Model(config, data.store.vocab_size)
    model.vocab_size = data.store.vocab_size
    model.load_state_dict(weights, assign=True)
    config, model = model.exported(config)
    return hf.Exportable(
        family=family, config=config, model=model, tokenizer=data.tokenizer,
        tokenizer_folder=tokenizer, boundary=data.store.boundary,
        framed=data.store.template == chat.JOIN, facts={},
    )  # fmt: skip


def require_wire(settings: Train, model: Family) -> None:
    """UserError where gradients shall be rounded on a bus that they do not cross."""
    if settings.grad_wire != "float32" and model.engine is None:
        raise UserError(
            "grad_wire is of streamed runs, and this one is not",
            value=settings.grad_wire,
            remedy="set grad_wire: float32, or runtime.stream: on",
        )


def require_memory(model: Family, runtime: Runtime, device: torch.device) -> None:
    """EnvError where a family plans more than `runtime.memory_limit`."""
    planned = model.planned_bytes() if device.type == "cpu" else 0
    limit = runtime.memory_limit
    if planned > limit:
        raise EnvError(
            "the run would take too much memory",
            value=f"{planned / 1e9:.2f} GB, runtime.memory_limit {limit / 1e9:.2f} GB",
            remedy="lower chunk_tokens, depth or width, or raise the limit",
        )


def parents_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of what the run was made from."""
    names = ("tokens", "tokenizer", "init_from", "embeddings", "contexts")
    return {name: identity[name] for name in names if name in identity}


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


def write_result(
    run: Run, job: Job, outcome: Outcome, identity: Mapping[str, Any], beside: Mapping[str, Any]
) -> None:
    """The final model and the curves, where the frame publishes them from.

    beside: JSON values that lie in the model's folder, by file name.
    """
    plan, position = outcome.plan, outcome.position
    tokens = plan.tokens(position.step) - position.skipped * plan.batch_tokens
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
    settled = job.model.calibrated(outcome.weights, job.validate)
    for key, value in settled.items():
        job.log(f"model.{family}.{key}: {value:.4g}, found on validation text")
    model = {"model": {**identity["model"], **settled}}
    config = describe_model(family, {**identity, **model}, vocab_size, job.context)
    if "template" in Manifest.read(run.inputs["tokens"]).recipe["params"]:
        beside = {**beside, chat.CARD: chat.card()}
    write_final(run.result, outcome.weights, config, provenance, run.inputs["tokenizer"], beside)
    outcome.observer.write_curves(run.files_beside("curves"))
    job.model.finish()


def files_beside(job: Job, module: ModuleType) -> dict[str, Any]:
    """stats.json and controls.json of a run whose family has them."""
    found: dict[str, Any] = {}
    if statistics := job.model.statistics():
        found["stats.json"] = statistics | {"final": look_inside(job)}
    if job.settings.controls is not None:
        found["controls.json"] = controls = train_controls(job, module)
        for line in [*table(controls["rows"]), controls["verdict"]]:
            job.log(line)
    return found
