"""A run laid out before its first step: length, batch, schedule, optimizer, and what it will cost.

In:    the settings of a run, its model, the context of its rows. Out: `Plan`, and lines that print
       it.
Rule:  what the settings leave open is the family's (`Family.defaults`); steps come from `steps`,
       else `target_flops`, else tokens per parameter (gpt.md 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lib.core import ranks
from lib.core.errors import UserError
from lib.core.run_settings import Runtime, Train
from lib.models.base import Family, Optim
from lib.train.parallel import is_sharded
from lib.train.schedule import Schedule, auto_batch, horizon, make_schedule

AUTO_TOKENS = {"cpu": 2**13, "cuda": 2**16}  # of a micro-batch where device_batch_size is auto


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every step of the run needs to know."""

    steps: int
    batch_tokens: int  # of one step over all ranks
    context: int  # T
    schedule: Schedule
    optim: Optim
    grad_clip: float  # global norm, 0 = off
    flops_per_token: int
    parameters: int

    @property
    def rows(self) -> int:
        """G, rows of a step over all ranks."""
        return self.batch_tokens // self.context

    def micro_rows(
        self, runtime: Runtime, device: torch.device, world: int, whole: bool = False
    ) -> int:
        """Rows of a micro-batch: the largest divisor of a rank's rows that the device may hold.

        whole: all of them, the family cuts the step itself.
        """
        limit = self.rows if whole else runtime.device_batch_size
        if limit == "auto":
            limit = max(1, AUTO_TOKENS.get(device.type, 2**13) // self.context)
        share = self.rows // world
        if share * world != self.rows:
            raise UserError(
                "ranks do not divide the rows of a step",
                value=f"{self.rows} rows, {world} ranks",
                remedy="change batch_tokens or the number of ranks",
            )
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
    steps = horizon(
        batch_tokens=batch,
        params=model.scaling_params(),
        flops_per_token=flops,
        num_iterations=model.matched_steps(settings.steps, context) or wanted.steps,
        target_flops=settings.target_flops,
        param_data_ratio=ratio,
    )
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
        ),
        grad_clip=clip,
        flops_per_token=flops,
        parameters=sum(p.numel() for p in model.parameters()),
    )


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
    tokens = plan.steps * plan.batch_tokens
    lines = [
        f"parameters: {plan.parameters:,} ({groups})",
        f"steps: {plan.steps:,} of {plan.batch_tokens:,} tokens, {tokens:,} in all, "
        f"{tokens / max(1, model.scaling_params()):.2f} a scaling parameter",
        f"FLOPs: {tokens * plan.flops_per_token:.3e}, {plan.flops_per_token:,} a token",
        f"device: {device.type} x {world}, {plan.optim.compute_dtype}, {micro_rows} rows at once",
    ]
    hours = seconds * plan.rows / micro_rows / world * plan.steps / 3600
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
