"""A run laid out before its first step: length, batch, schedule, optimizer, and what it will cost.

In:    the settings of a run, its model, the context of its rows. Out: `Plan`, and lines that print
       it.
Rule:  what the settings leave open is the family's (`Family.defaults`); steps come from `steps`,
       else `target_flops`, else tokens per parameter (gpt.md 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lib.core import ranks
from lib.core.errors import UserError
from lib.core.ramp import Ramp
from lib.core.run_settings import Runtime, Train
from lib.models.base import Family, Optim
from lib.train.parallel import is_sharded
from lib.train.schedule import Multipliers, Schedule, auto_batch, horizon, make_schedule

AUTO_TOKENS = {"cpu": 2**13, "cuda": 2**16}  # of a micro-batch where device_batch_size is auto


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every step of the run needs to know."""

    steps: int
    batch_tokens: int  # of one step over all ranks, the largest one
    context: int  # T
    schedule: Schedule
    optim: Optim
    grad_clip: float  # global norm, 0 = off
    flops_per_token: int
    parameters: int
    rows_by_step: Ramp  # G, rows of a step over all ranks
    pieces: Ramp  # shorter rows that each row is read as
    adamw_every: int = 1

    @property
    def rows(self) -> int:
        """Rows that every step is a multiple of: all of them but where the batch has a ramp."""
        return math.gcd(*self.rows_by_step.values)

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        return self.rows_by_step.before(steps) * self.context

    def at(self, step: int) -> Multipliers:
        """What the update of `step` applies; rates follow the root of the batch (gpt.md 7.4)."""
        found = self.schedule.at(step)
        share = self.rows_by_step.at(step) * self.context / self.batch_tokens
        due = (step + 1) % self.adamw_every == 0 or step + 1 == self.steps
        return replace(found, lr=found.lr * math.sqrt(share), adamw=due)

    def micro_rows(
        self, runtime: Runtime, device: torch.device, world: int, whole: bool = False
    ) -> int:
        """Rows of a micro-batch: the largest divisor of a rank's rows that the device may hold.

        whole: all of them, the family cuts the step itself.
        """
        limit = self.rows if whole else runtime.device_batch_size
        if limit == "auto":
            limit = max(1, AUTO_TOKENS.get(device.type, 2**13) // self.context)
        share = ranks.share_of(self.rows, world)
        return max(n for n in range(1, min(share, limit) + 1) if share % n == 0)


def make_plan(settings: Train, model: Family, context: int, dtype: torch.dtype) -> Plan:
    """Resolve `settings` for `model`. UserError where no step or no whole rows come out."""
    wanted = model.defaults()
    flops = model.flops_per_token(context)
    if settings.steps is not None and wanted.steps is not None:
        raise UserError(
            "the family decides the length of this run",
            value=f"steps {settings.steps}, its own {wanted.steps}",
            remedy="leave steps null, or choose a solver without sweeps",
        )
    ratio = settings.param_data_ratio
    if ratio is None and settings.steps is None and settings.target_flops is None:
        ratio = wanted.param_data_ratio
    batch = settings.batch_tokens or wanted.batch_tokens
    if batch == "auto":
        batch = auto_batch(
            _tokens(settings, model, flops, ratio, wanted.param_data_ratio),
            (ratio or wanted.param_data_ratio) * model.reference_params(),
            context,
        )
    if batch % context:
        raise UserError(
            "batch_tokens is no multiple of the context",
            value=f"batch_tokens {batch}, context {context}",
            remedy=f"use {max(1, batch // context) * context}",
        )
    sizes = ramped_rows(settings, model, batch // context)
    steps = horizon(
        batch_tokens=sum(sizes) * context // len(sizes),
        params=model.scaling_params(),
        flops_per_token=flops,
        num_iterations=model.matched_steps(settings.steps, context) or wanted.steps,
        target_flops=settings.target_flops,
        param_data_ratio=ratio,
    )
    rows_by_step = Ramp(values=sizes, steps=steps)
    clip = wanted.grad_clip if settings.grad_clip is None else settings.grad_clip
    return Plan(
        steps=steps,
        batch_tokens=batch,
        context=context,
        schedule=make_schedule(
            settings.schedule or wanted.schedule,
            steps,
            warmup=settings.warmup,
            warmdown_ratio=settings.warmdown_ratio,
            final=settings.final_lr,
        ),
        optim=Optim(
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            optimizer=settings.optimizer,
            batch_tokens=batch,
            steps=steps,
            param_data_ratio=settings.param_data_ratio,
            compute_dtype=dtype,
            tokens=rows_by_step.before(steps) * context,
        ),
        grad_clip=clip,
        flops_per_token=flops,
        parameters=sum(p.numel() for p in model.parameters()),
        rows_by_step=rows_by_step,
        pieces=Ramp(values=pieces_of_rows(settings, model, context), steps=steps),
        adamw_every=settings.adamw_every,
    )


def ramped_rows(settings: Train, model: Family, rows: int) -> tuple[int, ...]:
    """Rows of a step in each part of the run; UserError for a share that is no whole rows."""
    if settings.batch_ramp and (model.whole_steps or model.stream_rows is not None):
        raise UserError(
            "batch_ramp changes the step, and this family has its own",
            value=str(settings.batch_ramp),
            remedy="leave it empty",
        )
    found = [share * rows for share in settings.batch_ramp or (1.0,)]
    for share, value in zip(settings.batch_ramp, found, strict=False):
        if not value.is_integer():
            raise UserError(
                "batch_ramp leaves no whole rows",
                value=f"{share} of {rows} rows",
                remedy=f"use multiples of 1/{rows}",
            )
    return tuple(int(value) for value in found)


def pieces_of_rows(settings: Train, model: Family, context: int) -> tuple[int, ...]:
    """Pieces that each row is cut into in each part of the run, all equally long."""
    if not settings.context_ramp:
        return (1,)
    if model.reads_rows() or model.stream_rows is not None or model.engine is not None:
        raise UserError(
            "context_ramp cuts rows, and here they are read whole",
            value=str(settings.context_ramp),
            remedy="leave it empty; a streamed run needs runtime.stream: off",
        )
    found = [1 / share for share in settings.context_ramp]
    if bad := [x for x in found if not x.is_integer() or context % int(x)]:
        raise UserError(
            "context_ramp leaves no equal pieces",
            value=f"{1 / bad[0]:g} of {context} positions",
            remedy="use shares like 0.25, 0.5, 1",
        )
    return tuple(int(x) for x in found)


def _tokens(
    settings: Train, model: Family, flops: int, ratio: float | None, usual_ratio: float
) -> float:
    """Tokens of the run as an automatic batch assumes them, before the batch is known."""
    if settings.target_flops is not None and settings.steps is None:
        return settings.target_flops / flops
    return (ratio or usual_ratio) * model.scaling_params()


def describe(
    plan: Plan, model: Family, micro_rows: int, device: torch.device, seconds: float, size: int
) -> list[str]:
    """The block printed before step 0; seconds: of the dry step, 0 where none was made.

    micro_rows: rows that the dry step took. size: bytes of a checkpoint.
    """
    world = ranks.world_size()
    groups = ", ".join(
        f"{g.name} {sum(p.numel() for p in g.params.values()):,}"
        for g in model.param_groups(plan.optim)
    )
    tokens = plan.tokens(plan.steps)
    lines = [
        f"parameters: {plan.parameters:,} ({groups})",
        f"steps: {plan.steps:,} of {plan.batch_tokens:,} tokens, {tokens:,} in all, "
        f"{tokens / max(1, model.scaling_params()):.2f} a scaling parameter",
        f"FLOPs: {tokens * plan.flops_per_token:.3e}, {plan.flops_per_token:,} a token",
        f"device: {device.type} x {world}, {plan.optim.compute_dtype}, {micro_rows} rows at once",
    ]
    hours = seconds * tokens / plan.context / micro_rows / world / 3600
    span = f"{hours:.2f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
    lines += [f"about {span} at the rate of the dry step"] if hours else []
    return [*lines, f"a checkpoint: {size / 1e6:,.1f} MB"]


def refuse_unshardable(model: Family, plan: Plan) -> None:
    """UserError where a rule needs whole matrices and the model is cut over ranks."""
    for group in model.param_groups(plan.optim):
        if group.rule != "adamw" and any(is_sharded(p) for p in group.params.values()):
            raise UserError(
                "optimizer needs whole matrices",
                value=f"{group.rule} with runtime.shard: fsdp",
                remedy="use optimizer: adamw, or shard: optimizer",
            )


def refuse_accumulation(micro_batches: int) -> None:
    """UserError where a family updates within a batch and the batch is cut into several."""
    if micro_batches > 1:
        raise UserError(
            "updates within a batch need it in one piece",
            value=f"supervision_update is step, {micro_batches} micro-batches",
            remedy="set supervision_update: sum, or raise runtime.device_batch_size to all rows",
        )
