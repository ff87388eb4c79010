"""The loop that trains every family; read it from top to bottom, there are no callbacks.

In:    a `Job`: settings, a placed model, rows by step, where to work, what to ask on the way.
Out:   `Outcome`; on the way checkpoints, training_log.jsonl and points for the curves.
Law:   killed anywhere and run again it ends with the same bits, on the same stack: batch(step) is a
       pure function, all else that changes is in the checkpoint (state.py).
Note:  `step` counts finished updates in logs and names, so batch(step) makes update step + 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from lib.core import ranks
from lib.train import parallel, rounding, safety
from lib.train.checkpoint import Checkpoints
from lib.train.ema import Ema
from lib.train.job import Batch, Job, Outcome, cut
from lib.train.observe import Observer
from lib.train.optim import build_optimizer
from lib.train.plan import describe, make_plan, refuse_accumulation, refuse_unshardable
from lib.train.precision import LossScaler, autocast
from lib.train.state import Position, RunState, stack_of


@safety.memory_errors()
def train(job: Job) -> Outcome:
    """Train to the end of the plan; `Interrupted` after a commit when a stop was asked for.

    InputError for a non-finite loss or gradient, EnvError when memory does not suffice.
    """
    settings, runtime, model, device = job.settings, job.runtime, job.model, job.device
    rank, world = ranks.rank(), ranks.world_size()
    plan = make_plan(settings, model, job.context, job.dtype)
    model.activation_checkpointing = runtime.activation_checkpointing
    if runtime.shard == "fsdp":
        parallel.shard_blocks(model)
        refuse_unshardable(model, plan)
    rounded = rounding.of_run(settings, runtime, job.seed, model, job.dtype)
    groups = parallel.split_groups(model.param_groups(plan.optim))
    state = RunState(
        model=model,
        optimizer=build_optimizer(groups, shard=runtime.shard == "optimizer", model=model,
                                  rounding=rounded, gathers=plan.adamw_every > 1),
        ema=Ema(model, settings.ema_decay) if settings.ema_decay else None,
        scaler=LossScaler(job.dtype), device=device, position=Position(), extra=job.extra,
        checkpoints=Checkpoints(job.work, job.identity, runtime.keep_last, job.warn),
        narrow=rounded.weights, stack={**stack_of(device, job.dtype), **model.engine_facts()},
    )  # fmt: skip
    observer = Observer(
        job.work, runtime, run=job.run, steps=plan.steps, tokens=plan.tokens,
        flops_per_token=plan.flops_per_token, bytes_per_token=job.bytes_per_token, warn=job.warn,
        peak_flops=parallel.peak_flops(device), config=job.described(), quiet=rank > 0,
    )  # fmt: skip
    rows, parameters = job.rows(plan), list(model.parameters())
    numbered = rows if model.reads_rows() else None
    model.attach(job.work)
    observer.cut(state.resume(job.seed, job.log))
    position, scaler, optimizer = state.position, state.scaler, state.optimizer
    micro_rows = plan.micro_rows(runtime, device, world, model.whole_steps)
    micro_rows = model.group_rows(state.keep_micro_rows(micro_rows, job.log), plan.rows // world)
    for name in model.compiled if runtime.compile else ():
        setattr(model, name, torch.compile(getattr(model, name)))

    def backward(batch: Batch) -> Iterator[tuple[Tensor | None, bool]]:
        """Gradients of one micro-batch, added: (its loss, or None without any; True at its end).

        More than once where the family yields STEP: an update is made before it goes on.
        """
        total, losses = None, iter(model.losses(batch))
        while True:
            with autocast(device, job.dtype):
                loss = next(losses, None)
            if isinstance(loss, Tensor):
                (loss * (scaler.scale / batch.of)).backward()
                total = loss.detach() if total is None else total + loss.detach()
                continue
            yield total, loss is None
            if loss is None:
                return
            refuse_accumulation(batch.of)
            total = None

    def updates(arrays: Iterator[Any]) -> Iterator[tuple[int, Any, list[Tensor], bool]]:
        """(step, micro-batches, their losses, last of its batch) with the gradients in place."""
        for step, ids in enumerate(arrays, start=position.step):
            parts = cut(ids, step, micro_rows, device, numbered, plan.pieces.at(step), job.answers)
            for found in zip(*map(backward, parts), strict=True):
                yield step, parts, [x for x, _ in found if x is not None], found[0][1]

    def evaluate(step: int) -> bool:
        """Validate the averaged weights; True when they are the best so far."""
        with state.averaged(), safety.nothing_remembered(model, device), torch.no_grad():
            bpb = job.validate(model.eval())
        if bpb is None:
            return False
        observer.validated(step, bpb)
        if position.best is not None and position.best["bpb"] <= bpb:
            return False
        position.best = {"step": step, "bpb": bpb}
        return True

    def sample(step: int) -> None:
        with state.averaged(), safety.nothing_remembered(model, device), torch.no_grad():
            observer.sampled(step, job.sample(model.eval()))

    def dry_step() -> float:
        """One micro-batch, then forgotten: a lack of memory shows now, not hours later. Seconds."""
        ids = next(rows.prefetch(position.step, position.step + 1, rank, world))
        began = time.monotonic()
        with safety.nothing_remembered(model, device):
            first = cut(ids, position.step, micro_rows, device, numbered, answers=job.answers)[0]
            for loss, _ in backward(first):
                float(loss or 0)  # waits for the device
        return time.monotonic() - began

    with closing(observer):
        model.train()
        if position.step < plan.steps:
            state.check_space()
            # A family with files of its own would change them.
            seconds = 0.0 if model.describe() else dry_step()
            lines = [*model.notes(), *model.engine_notes()]
            if position.step == 0:
                lines += describe(plan, model, micro_rows, device, seconds, state.total_bytes())
            for line in lines:
                job.log(line)
        committed, committed_at = position.step, time.monotonic()
        observer.begin(position.step)
        batches = rows.prefetch(position.step, position.end(plan.steps, settings), rank, world)
        with closing(batches) as arrays:  # type: ignore[type-var]  # loaders give generators
            batch_loss = 0.0
            for step, parts, seen, is_done in updates(arrays):
                # ---- gradients of the whole batch
                parallel.sum_gradients(parameters)
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = parallel.global_norm(gradients).to(device) / scaler.scale
                late = time.monotonic() - committed_at >= runtime.checkpoint_every_minutes * 60
                flags = torch.tensor([job.stop.asked, late and rank == 0, 0.0], device=device)
                flags[2] = torch.stack(seen).sum() / parts[0].of if seen else 0.0
                # The only place where the host waits for the device; all ranks get equal numbers.
                numbers = torch.cat([parallel.sum_over_ranks(flags), norm.view(1)]).tolist()
                asked, late, loss, grad = bool(numbers[0]), bool(numbers[1]), *numbers[2:]
                # ---- finite? clip, schedule, update, average
                multipliers, done = plan.at(step), step + 1
                updated = bool(seen) and safety.are_finite(loss, grad)
                if updated:
                    clip = min(1.0, plan.grad_clip / (grad + 1e-6)) if plan.grad_clip else 1.0
                    parallel.scale_gradients(gradients, clip / scaler.scale)
                    optimizer.step(multipliers)
                    if state.ema:
                        ramp = (1 + step) / (10 + step) if settings.ema_ramp else 1.0
                        state.ema.decay = min(settings.ema_decay, ramp)
                        state.ema.update()
                    scaler.went_well()
                elif seen:
                    if state.leave_out() > settings.skip_steps:
                        found = safety.find_culprit(model, parts, backward)
                        raise safety.non_finite(
                            done, found, micro_rows, rows, loss, grad, committed, device
                        )
                    job.warn(f"update {done} is left out: loss {loss}, gradient norm {grad}")
                optimizer.zero_grad()
                batch_loss += loss
                if not is_done:
                    continue
                position.step = done
                # ---- log? evaluate? sample? commit? stop asked?
                if updated or not seen:  # steps without a loss are told as well
                    lr = optimizer.rate(multipliers)
                    observer.step(done, batch_loss, lr, grad, state, learned=updated)
                batch_loss = 0.0
                looks = done == plan.steps or settings.looks_at(done)
                improved = looks and evaluate(done)
                is_last = done == position.end(plan.steps, settings)
                if settings.sample_every and done % settings.sample_every == 0:
                    sample(done)
                hub = runtime.hub
                pushes = hub is not None and (is_last or done % hub.every_steps == 0)
                asked = asked or (world == 1 and job.stop.asked)  # since the numbers were taken
                waits = model.sweep_end() or done - committed >= runtime.checkpoint_every_steps
                if is_last or asked or late or improved or waits or pushes:
                    state.commit(observer)
                    committed, committed_at = done, time.monotonic()
                if pushes:
                    job.push(done, state.weights(), is_last)
                if looks or committed == done:
                    observer.restart_clock()
                if is_last:
                    break
                if asked:
                    raise safety.interrupted(done, plan.steps)
        state.finish()
    return Outcome(plan=plan, position=position, weights=state.weights(), observer=observer)
