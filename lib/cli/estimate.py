"""What a profile costs before anything runs: bytes, memory, time, and the term that binds.

In:    the resolved settings, a machine.   Out: one `Cost` a stage.
Rule:  counted where it can be counted (parameters and FLOPs from the model itself on the meta
       device, steps from the trainer's plan, bytes from manifests that exist), else bounded from
       the settings, else null; nothing is guessed in silence: `basis` says which.
Form:  training holds 16 B a parameter (fp32 weights and gradients, two moments), less where a run
       keeps them in fewer, and activations of 34 B a token and channel of a block in bf16 (arXiv
       2205.05198), one block's with checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib.cli.cost import PROCESS_BYTES, Cost, problems, refuse
from lib.cli.data_costs import data_costs, overlay, text_tokens, touched, vocab_size_of
from lib.cli.machines import Machine, this_machine
from lib.core import dag
from lib.core.run_settings import Train
from lib.core.settings import Settings
from lib.export import amounts

ACTIVATION_BYTES = 34  # a token, channel and block
WEIGHT_BYTES = 4  # a parameter of a finished model
WRITE_RATE = 0.5e9  # bytes a second, hashed as they are written


def costs(settings: Settings, machine: Machine, run: str | None = None) -> list[Cost]:
    """Every stage in order, or the training of one run only."""
    names = [run] if run else runs_of(settings)
    training = {name: train_cost(settings, name, machine) for name in names}
    if run:
        return [*training.values()]
    finished = [
        cost
        for name, trained in training.items()
        if name in settings.families
        for cost in finished_costs(settings, name, trained, machine)
    ]
    return [*data_costs(settings, machine), *training.values(), *finished, Cost(stage="report")]


def runs_of(settings: Settings) -> list[str]:
    """The runs that the profile is about: those it overlays, or all where it overlays none."""
    every = [name for name in settings.train if name != "defaults"]
    wanted = touched(overlay(settings))
    return [n for n in every if {n, settings.train[n].family} & wanted] or every


def train_cost(settings: Settings, name: str, machine: Machine) -> Cost:
    """Parameters and FLOPs counted on the meta device, steps by the trainer's own plan."""
    import torch

    from lib.models.base import load_family
    from lib.train.plan import make_plan

    section = settings.train[name]
    family = load_family(section.family or name)
    encoding = settings.encode_tokens[section.tokens or "bpe"]
    vocab_size, context = vocab_size_of(settings, section.tokens or "bpe"), encoding.context
    with torch.device("meta"):
        model = family.Model(section.model, vocab_size)
    model.vocab_size = vocab_size
    if hasattr(model, "read_from"):  # its steps are sweeps over all tokens of its source
        tokens = text_tokens(settings, section.tokens or "bpe", "train") or 0
        model.source = SimpleNamespace(tokens=int(tokens), has_rows=False)  # type: ignore[assignment]
        context = getattr(model, "stream_rows", None) or context
    plan = make_plan(section, model, context, torch.bfloat16)
    tokens = plan.tokens(plan.steps)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables |= {id(p) for p in model.parameters() if p.ndim == 2 and p.shape[0] >= vocab_size}
    embedding = sum(p.numel() for p in model.parameters() if id(p) in tables)
    worked = _streamed(settings, section, model, plan, machine)
    worked = worked or _resident(settings, section, model, plan, machine)
    checkpoint = checkpoint_bytes(section, plan.parameters)
    facts = (
        ("run", name),
        ("parameters", plan.parameters),
        ("embedding", embedding),
        ("non_embedding", plan.parameters - embedding),
        ("steps", plan.steps),
        ("tokens", tokens),
        ("flops_per_token", plan.flops_per_token),
        ("flops", tokens * plan.flops_per_token),
        ("checkpoint_bytes", checkpoint),
        ("tokens_per_s", worked["tokens_per_s"]),
    )
    return Cost(
        stage=stage_of(name),
        scratch_bytes=(settings.runtime.keep_last + 2) * checkpoint,  # the best, one being written
        ram_bytes=worked["ram_bytes"],
        vram_bytes=worked["vram_bytes"],
        seconds=tokens / worked["tokens_per_s"],
        binds=worked["binds"],
        basis=machine.source,
        facts=facts,
    )


def finished_costs(
    settings: Settings, name: str, trained: Cost, machine: Machine
) -> Iterator[Cost]:
    """evaluate@ and export@ of a trained run; of the exams only the text's own bits are counted."""
    facts = dict(trained.facts)
    weights = WEIGHT_BYTES * facts["parameters"]
    tokens = text_tokens(settings, settings.train[name].tokens or "bpe", "val")
    forward = facts["flops_per_token"] / 3  # a backward pass costs two forward passes
    yield Cost(
        stage=f"evaluate@{name}",
        ram_bytes=PROCESS_BYTES + weights,
        seconds=None if tokens is None else tokens * forward / machine.flops,
        binds="arithmetic",
        basis=f"{machine.source}, bits per byte without exams",
        facts=(("run", name), ("tokens", tokens)),
    )
    yield Cost(
        stage=f"export@{name}",
        scratch_bytes=weights,
        ram_bytes=PROCESS_BYTES + 2 * weights,  # read whole, and the tensors that are written
        seconds=weights / WRITE_RATE,
        binds="disk",
    )


def checkpoint_bytes(section: Train, parameters: int) -> int:
    """Weights, AdamW's two moments, the average where the run keeps one."""
    weight, moments = kept_bytes(section)
    return round(parameters * (weight + moments + (4 if section.ema_decay else 0)))


def kept_bytes(section: Train) -> tuple[float, float]:
    """(a weight, its two moments) between updates; a gradient is as wide as its weight."""
    coded = 2.03 if section.optimizer == "adamw8bit" else None  # codes, and a scale for 256
    moments = coded or (8 if section.moments == "float32" else 4)
    return (2 if section.weights == "bf16_sr" else 4), moments


def state_bytes(section: Train) -> float:
    """Weight, gradient and moments of a parameter in training."""
    weight, moments = kept_bytes(section)
    return 2 * weight + moments


def stage_of(run: str) -> str:
    """The stage of dvc.yaml that trains a run."""
    for stage, body in dag.stages_of(Path()).items():
        if f"--run {run} " in f"{body['cmd']} " and "stages.pretrain" in body["cmd"]:
            return stage
    return f"train@{run}"


def _resident(
    settings: Settings, section: Train, model: Any, plan: Any, machine: Machine
) -> dict[str, Any]:
    """Everything on one device."""
    import torch

    device = torch.device("cpu" if machine.vram_bytes is None else "cuda")
    rows = plan.micro_rows(settings.runtime, device, 1)
    tables = [p for p in model.parameters() if p.ndim == 2 and p.shape[0] >= model.vocab_size]
    squares = [p.shape[-1] for p in model.parameters() if p.ndim == 2]
    width = min((p.shape[-1] for p in tables), default=min(squares, default=1))
    depth = max((len(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)), default=1)
    depth = 1 if settings.runtime.activation_checkpointing else depth
    activations = ACTIVATION_BYTES * rows * plan.context * width * depth
    held = state_bytes(section) * plan.parameters + activations
    if getattr(model, "stream_rows", None):  # a sweep's memory does not follow its step's length
        from lib.data.embedding_plan import plan_of

        held = plan_of(settings).memory()
    cpu = machine.vram_bytes is None
    return {
        "ram_bytes": PROCESS_BYTES + held if cpu else PROCESS_BYTES + 1.5e9,
        "vram_bytes": None if cpu else held + 0.6e9,
        "tokens_per_s": machine.flops / plan.flops_per_token,
        "binds": "arithmetic",
    }


def _streamed(
    settings: Settings, section: Train, model: Any, plan: Any, machine: Machine
) -> dict[str, Any] | None:
    """By the streaming engine's own planner, where the family has units and does not fit whole."""
    if machine.vram_bytes is None or not hasattr(model, "stream_units"):
        return None
    if state_bytes(section) * plan.parameters <= 0.9 * machine.vram_bytes:
        return None
    import torch

    decide = import_module("lib.nn.stream.decide")
    estimate = import_module("lib.nn.stream.estimate")
    card = next(
        (card for name, card in estimate.CARDS.items() if machine.name.startswith(name)),
        estimate.Card(name=machine.name, memory=machine.vram_bytes, flops=machine.flops,
                      in_rate=13e9, out_rate=13e9),
    )  # fmt: skip
    card = replace(card, flops=machine.flops)
    request = decide.Streaming(
        runtime=settings.runtime, context=plan.context,
        grad_dtype=getattr(torch, section.grad_wire), moment_dtype=getattr(torch, section.moments),
    )  # fmt: skip
    load = decide.load_of(model, torch.bfloat16, request)
    accumulation = max(1, plan.rows // load.rows)
    load = replace(load, accumulation=accumulation)
    load, _ = estimate.choose_group(load, machine.vram_bytes, card)
    step = estimate.step_seconds(load, card)
    return {
        "ram_bytes": estimate.host_bytes(load) + PROCESS_BYTES,
        "vram_bytes": estimate.device_bytes(load),
        "tokens_per_s": plan.batch_tokens / step.seconds,
        "binds": f"{step.binding}, streamed; {step.knob}",
    }


def fitting(cost: Cost, seconds: float) -> dict[str, Any]:
    """Steps and tokens that fit in `seconds`, and the compute-optimal size for that many FLOPs.

    C = 6 N D with D = 20 N (arXiv 2203.15556): N = sqrt(C / 120).
    """
    facts = dict(cost.facts)
    share = min(1.0, seconds / cost.seconds) if cost.seconds else 1.0
    flops = facts["flops_per_token"] * facts["tokens_per_s"] * seconds
    return {
        "steps": int(facts["steps"] * share),
        "tokens": int(facts["tokens"] * share),
        "model_parameters": int((flops / 120) ** 0.5),
    }


def preflight(settings: Settings, stage: str, item: str) -> str:
    """What a stage is about to take, in words, empty where nothing is known; EnvError for too

    little memory. Disks are looked at by the stages themselves, which know what is there already.
    """
    machine = this_machine()
    if settings.runtime.device == "cpu":
        machine = replace(machine, vram_bytes=None)
    found = [cost for cost in _costs_of(settings, stage, item, machine) if cost is not None]
    refuse(problems([replace(cost, scratch_bytes=None) for cost in found], machine))
    told = {}
    for cost in found:
        told = {
            "to download": amounts.size(cost.download_bytes or None),
            "of scratch": amounts.size(cost.scratch_bytes),
            "of RAM": amounts.size(cost.ram_bytes),
            "of VRAM": amounts.size(cost.vram_bytes),
            "": amounts.duration(cost.seconds) if (cost.seconds or 0) >= 1 else "-",
        }
    return ", ".join(f"{value} {name}".strip() for name, value in told.items() if value != "-")


def _costs_of(settings: Settings, stage: str, item: str, machine: Machine) -> list[Cost]:
    if stage == "pretrain":
        encoding = settings.train[item].tokens or "bpe"
        return [train_cost(settings, item, machine)] if encoding in settings.encode_tokens else []
    name = f"{stage}@{item}" if item else stage
    return [cost for cost in data_costs(settings, machine) if cost.stage == name]
