"""What a profile costs before anything runs: bytes, memory, time, and the term that binds.

In:    the resolved settings, a machine.   Out: one `Cost` a stage.
Rule:  counted where it can be counted (parameters and FLOPs from the model itself on the meta
       device, steps from the trainer's plan, bytes from manifests that exist), else bounded from
       the settings, else null; nothing is guessed in silence: `basis` says which.
Form:  training holds 16 B a parameter (fp32 weights and gradients, two moments) and activations of
       34 B a token and channel of a block in bf16 (arXiv 2205.05198), one block's with checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib.cli.machines import Machine, this_machine
from lib.core import dag, params
from lib.core.artifact import Manifest
from lib.core.data_settings import EmbeddedSource, HubDatasetSource, ParquetSource
from lib.core.errors import EnvError
from lib.core.run_settings import Train
from lib.core.settings import Settings
from lib.export import amounts

SHARD_BYTES = 100e6  # a FineWeb-Edu shard as its hosts serve it
SHARD_CHARACTERS = 250e6
CHARACTERS_PER_TOKEN = 4.8  # of a 65,536-id BPE on English web text
PACKAGE_BYTES = 12.7e6 / 6  # of docstrings, of each package of the embedded corpus
PROCESS_BYTES = 0.45e9  # Python with torch, before any model
WORKER_BYTES = 0.32e9  # one worker of a data stage (measured: 644 MB with two)
STATE_BYTES = 16  # a parameter
ACTIVATION_BYTES = 34  # a token, channel and block
CLEAN_RATE, ENCODE_RATE = 15e6, 8e6  # bytes of text a second and core


KNOBS = {  # in order of effect
    "memory": "runtime.device_batch_size, activation_checkpointing, context, then width",
    "disk": "fewer shards or tokens, then KUMIKI_SCRATCH on a larger disk",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One stage. Bytes and seconds; None is not known."""

    stage: str
    download_bytes: float | None = None
    scratch_bytes: float | None = None
    ram_bytes: float | None = None
    vram_bytes: float | None = None
    seconds: float | None = None
    binds: str = ""  # the term that decides the time
    basis: str = "bounded by the settings"
    facts: tuple[tuple[str, Any], ...] = ()  # parameters, FLOPs, tokens of a training stage

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "facts": dict(self.facts)}


def costs(settings: Settings, machine: Machine, run: str | None = None) -> list[Cost]:
    """Every stage in order, or the training of one run only."""
    names = [run] if run else runs_of(settings)
    training = [train_cost(settings, name, machine) for name in names]
    if run:
        return training
    return [*data_costs(settings, machine), *training]


def runs_of(settings: Settings) -> list[str]:
    """The runs that the profile is about: those it overlays, or all where it overlays none."""
    every = [name for name in settings.train if name != "defaults"]
    touched = _touched(_overlay(settings))
    return [n for n in every if {n, settings.train[n].family} & touched] or every


def _overlay(settings: Settings) -> dict[str, Any]:
    profiles = params.read_yaml(Path(params.PARAMS)).get("profiles") or {}
    return profiles.get(settings.profile) or {}


def _touched(overlay: dict[str, Any]) -> set[str]:
    """Runs and families that an overlay says something of."""
    return {
        n for part in ("train", "model", "runs") for n, v in (overlay.get(part) or {}).items() if v
    }


# ---------------------------------------------------------------- data


def data_costs(settings: Settings, machine: Machine) -> Iterator[Cost]:
    """download_shards, extract_texts, encode_tokens@..., precompute_embeddings."""
    down = [download_bytes(s) for s in settings.download_shards.sources.values()]
    total = None if any(d is None for d in down) else sum(d or 0 for d in down)
    here = settings.profile == _active_profile()
    known = _scratch_of(Path("data/shards.manifest.json")) if here else None
    remote = sum(
        d or 0
        for d, s in zip(down, settings.download_shards.sources.values(), strict=True)
        if _is_remote(s)
    )
    yield Cost(
        stage="download_shards",
        download_bytes=remote if total is not None else None,
        scratch_bytes=known or total,
        ram_bytes=WORKER_BYTES * settings.runtime.workers,
        seconds=None if total is None else remote / machine.network + total / CLEAN_RATE,
        binds="network" if remote else "CPU",
        basis="counted in the manifest" if known else "bounded by the settings",
    )
    rates = settings.runtime.workers
    text = _text_bytes(settings)
    ram = WORKER_BYTES * settings.runtime.workers
    seconds = None if text is None else text / CLEAN_RATE / rates
    yield Cost(stage="extract_texts", scratch_bytes=None, ram_bytes=ram, seconds=seconds,
               binds="CPU")  # fmt: skip
    for name in settings.encode_tokens:
        tokens = train_tokens(settings, name)
        known = _scratch_of(Path(f"data/tokens/{name}.manifest.json")) if here else None
        wide = 2 if _vocab_size(settings, name) <= 2**16 else 4
        yield Cost(
            stage=f"encode_tokens@{name}",
            scratch_bytes=known or (None if tokens is None else wide * tokens),
            ram_bytes=ram,
            seconds=None if tokens is None else tokens * 4 / ENCODE_RATE / rates,
            binds="CPU",
            basis="counted in the manifest" if known else "bounded by the settings",
            facts=(("tokens", tokens),),
        )
    if _wants_embeddings(settings):
        yield embedding_cost(settings)


def download_bytes(source: Any) -> float | None:
    """Bytes of a source's shards; None where only its host can tell."""
    if isinstance(source, EmbeddedSource):
        return PACKAGE_BYTES * len(source.packages) * 0.4  # as zstd Parquet
    if isinstance(source, ParquetSource) and source.shards:
        return (source.shards + 1) * SHARD_BYTES
    pinned = getattr(source, "files", None)
    if pinned:
        return sum(one.bytes for one in pinned.values())
    names = [*getattr(source, "train", ()), *getattr(source, "val", ())]
    folder = Path(getattr(source, "folder", "."))
    sizes = [(folder / n).stat().st_size for n in names if (folder / n).is_file()]
    return float(sum(sizes)) if names and len(sizes) == len(names) else None


def _is_remote(source: Any) -> bool:
    local = isinstance(source, EmbeddedSource) or bool(getattr(source, "train", ()))
    return not local and not getattr(source, "paths", ())


def train_tokens(settings: Settings, encoding: str) -> float | None:
    """Training tokens of an encoding: counted, else the most that the settings allow."""
    path = Path(f"data/tokens/{encoding}.manifest.json")
    section = settings.encode_tokens[encoding]
    if path.is_file() and settings.profile == _active_profile():
        return Manifest.read(path).counts["train"]["tokens"]
    recipe = settings.extract_texts.recipes[section.documents]
    bounds = []
    for name in recipe.sources:
        source = settings.download_shards.sources[name]
        if isinstance(source, ParquetSource) and source.shards:
            bounds.append(source.shards * SHARD_CHARACTERS / CHARACTERS_PER_TOKEN)
        elif isinstance(source, HubDatasetSource) and section.truncate_tokens:
            bounds.append(float(source.max_train_samples * section.truncate_tokens))
        else:
            return section.max_tokens
    total = sum(bounds)
    return min(total, section.max_tokens) if section.max_tokens else total


def _text_bytes(settings: Settings) -> float | None:
    """Bytes of text in all sources, as far as the settings tell."""
    total = 0.0
    for source in settings.download_shards.sources.values():
        if isinstance(source, EmbeddedSource):
            total += PACKAGE_BYTES * len(source.packages)
        elif isinstance(source, ParquetSource) and source.shards:
            total += source.shards * SHARD_CHARACTERS
        elif isinstance(source, HubDatasetSource):
            return None
    return total


def _wants_embeddings(settings: Settings) -> bool:
    """Whether the profile says anything of token vectors, or nothing of any run: then all count."""
    overlay = _overlay(settings)
    if _touched(overlay):
        return bool(overlay.get("precompute_embeddings"))
    return "precompute_embeddings" in params.read_yaml(Path(params.PARAMS))


def embedding_cost(settings: Settings) -> Cost:
    """Token vectors on disk, by the stage's own plan; what training adds is told beside it."""
    from lib.data.embedding_plan import plan_of

    sizes = plan_of(settings).files()
    contexts = sum(size for name, size in sizes.items() if name.startswith("context_"))
    vectors = sizes.get("embeddings.npy", sizes["table.npy"])
    return Cost(
        stage="precompute_embeddings",
        scratch_bytes=sizes["token_ids.npy"] + vectors,
        ram_bytes=PROCESS_BYTES,
        binds="disk",
        facts=(("embeddings_bytes", vectors), ("contexts_bytes", contexts)),
    )


def _scratch_of(path: Path) -> float | None:
    """Bytes that an existing manifest names."""
    if not path.is_file():
        return None
    return sum(entry.bytes for entry in Manifest.read(path).files)


def _active_profile() -> str | None:
    return params.read_yaml(Path(params.PARAMS)).get("profile")


# ---------------------------------------------------------------- training


def train_cost(settings: Settings, name: str, machine: Machine) -> Cost:
    """Parameters and FLOPs counted on the meta device, steps by the trainer's own plan."""
    import torch

    from lib.models.base import load_family
    from lib.train.plan import make_plan

    section = settings.train[name]
    family = load_family(section.family or name)
    encoding = settings.encode_tokens[section.tokens or "bpe"]
    vocab_size, context = _vocab_size(settings, section.tokens or "bpe"), encoding.context
    with torch.device("meta"):
        model = family.Model(section.model, vocab_size)
    model.vocab_size = vocab_size
    if hasattr(model, "read_from"):  # its steps are sweeps over all tokens of its source
        tokens = train_tokens(settings, section.tokens or "bpe") or 0
        model.source = SimpleNamespace(tokens=int(tokens), has_rows=False)  # type: ignore[assignment]
        context = getattr(model, "stream_rows", None) or context
    plan = make_plan(section, model, context, torch.bfloat16)
    tokens = plan.tokens(plan.steps)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables |= {id(p) for p in model.parameters() if p.ndim == 2 and p.shape[0] >= vocab_size}
    embedding = sum(p.numel() for p in model.parameters() if id(p) in tables)
    worked = _streamed(settings, section, model, plan, machine)
    worked = worked or _resident(model, plan, settings, machine)
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


def checkpoint_bytes(section: Train, parameters: int) -> int:
    """Weights, AdamW's two moments, the average where the run keeps one."""
    moments = 8 if section.moments == "float32" else 4
    return parameters * (4 + moments + (4 if section.ema_decay else 0))


def stage_of(run: str) -> str:
    """The stage of dvc.yaml that trains a run."""
    for stage, body in dag.stages_of(Path()).items():
        if f"--run {run} " in f"{body['cmd']} " and "stages.pretrain" in body["cmd"]:
            return stage
    return f"train@{run}"


def _resident(model: Any, plan: Any, settings: Settings, machine: Machine) -> dict[str, Any]:
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
    held = STATE_BYTES * plan.parameters + activations
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
    if STATE_BYTES * plan.parameters <= 0.9 * machine.vram_bytes:
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


def _vocab_size(settings: Settings, encoding: str) -> int:
    return settings.train_tokenizer[settings.encode_tokens[encoding].tokenizer].vocab_size


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


# ---------------------------------------------------------------- against a machine


def totals(found: list[Cost]) -> dict[str, float]:
    """Sums of bytes and seconds, the largest memory; what is not known is left out."""
    sums = {
        name: sum(getattr(cost, name) or 0.0 for cost in found)
        for name in ("download_bytes", "scratch_bytes", "seconds")
    }
    for name in ("ram_bytes", "vram_bytes"):
        sums[name] = max((getattr(cost, name) or 0.0 for cost in found), default=0.0)
    return sums


def problems(found: list[Cost], machine: Machine) -> list[tuple[str, str, float, float]]:
    """(what, stage, needed, present) of everything that does not fit."""
    lacking = []
    for cost in found:
        for kind, needed, present in (
            ("GPU memory", cost.vram_bytes, machine.vram_bytes),
            ("memory", cost.ram_bytes, machine.ram_bytes),
        ):
            if needed is not None and present is not None and needed > present:
                lacking.append((kind, cost.stage, needed, present))
    disk = totals(found)["scratch_bytes"]
    if machine.disk_bytes is not None and disk > machine.disk_bytes:
        stage = max(found, key=lambda c: c.scratch_bytes or 0.0).stage
        lacking.append(("disk", stage, disk, machine.disk_bytes))
    return lacking


def refuse(lacking: list[tuple[str, str, float, float]]) -> None:
    """EnvError that names the largest lack and the knobs, in order of effect."""
    if not lacking:
        return
    kind, stage, needed, present = max(lacking, key=lambda p: p[2] / p[3])
    raise EnvError(
        f"{kind} too small for {stage}",
        value=f"{amounts.size(needed)} needed, {amounts.size(present)} present",
        remedy=KNOBS["disk" if kind == "disk" else "memory"],
    )


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
