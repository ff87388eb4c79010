"""Measured steps of a family at full size: time, peak memory, and whether its training is sound.

In:    a family, its Config, sizes of a step.   Out: numbers; nothing is written anywhere.
Note:  the only place where random ids are trained on. `python -m lib.cli.measure` is one trial in
       a process of its own, so that its peak is its own and running out of memory ends it alone.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.core.rng import torch_generator
from lib.core.run_settings import Runtime, Train
from lib.models.base import Family, Optim, build, load_family
from lib.train.job import Batch
from lib.train.optim import build_optimizer
from lib.train.precision import autocast, compute_dtype, pick_device
from lib.train.rounding import of_run
from lib.train.schedule import Multipliers

FIRST_LOSS = 0.25  # how far from ln V the first loss may be
FIRST_STEPS = 4  # heads and outputs that begin at zero let a gradient through one after another


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured."""

    family: str
    config: Any
    vocab_size: int
    rows: int
    context: int
    settings: Train
    device: str = "auto"


class Stepper:
    """A model with an optimizer, making steps on seeded random ids."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.device = trial, pick_device(trial.device)
        self.dtype = compute_dtype(trial.settings.precision, self.device)
        self.model: Family = build(
            load_family(trial.family), trial.config, trial.vocab_size, seed=1, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip
        settings = trial.settings
        optim = Optim(
            lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
            weight_decay=settings.weight_decay, optimizer=settings.optimizer,
            batch_tokens=trial.rows * trial.context, steps=100, compute_dtype=self.dtype,
        )  # fmt: skip
        rounding = of_run(settings, Runtime(), 1, self.model, self.dtype)
        self.optimizer = build_optimizer(self.model.param_groups(optim), rounding=rounding)
        self.multipliers = Multipliers()
        self.model.train()

    def batch(self, number: int) -> Batch:
        """Random rows; the same number gives the same rows."""
        draw = torch_generator(7, "measured rows", number)
        shape = (self.trial.rows, self.trial.context + 1)
        ids = torch.randint(self.trial.vocab_size, shape, generator=draw).to(self.device)
        return Batch(tokens=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), step=0)

    def forward(self, batch: Batch) -> float:
        """The summed losses of a batch, no gradients."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            return sum(float(one) for one in self.model.losses(batch) if torch.is_tensor(one))

    def backward(self, batch: Batch) -> float:
        """Forward and backward; gradients are left in place."""
        self.model.zero_grad(set_to_none=True)
        total, losses = 0.0, self.model.losses(batch)
        while True:
            with autocast(self.device, self.dtype):
                loss = next(losses, None)
            if loss is None:
                return total
            if torch.is_tensor(loss):  # a family may yield marks between its losses
                loss.backward()
                total += float(loss.detach())

    def step(self, batch: Batch) -> float:
        """A whole step; returns the loss before it."""
        loss = self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.multipliers)
        return loss


def rates(trial: Trial, repeat: int = 7) -> dict[str, Any]:
    """Median, p20, p80 of forward, forward + backward, step, after one that warms up."""
    stepper = Stepper(trial)
    batch = stepper.batch(0)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in stepper.model.parameters())}
    for name, call in (
        ("forward", stepper.forward),
        ("backward", stepper.backward),
        ("step", stepper.step),
    ):
        seconds = timed(lambda call=call: call(batch), repeat, stepper.device)
        low, _, _, high = statistics.quantiles(seconds, n=5)
        found |= {f"{name}_s": statistics.median(seconds), f"{name}_p20_s": low,
                  f"{name}_p80_s": high}  # fmt: skip
    tokens = trial.rows * trial.context
    return found | {
        "tokens": tokens,
        "tokens_per_s": tokens / found["step_s"],
        "peak_bytes": peak_bytes(stepper.device),
        "device": stepper.device.type,
    }


def timed(call: Callable[[], Any], repeat: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeat` calls, after one that is not counted."""
    found = []
    for n in range(repeat + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if n:
            found.append(time.perf_counter() - start)
    return found


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would carry the parent's peak over
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rehearse(trial: Trial, steps: int, say: Callable[[int], object]) -> dict[str, Any]:
    """`steps` steps on one repeated batch of random ids, and what a sound training must show.

    problems: one sentence each; empty where the loss starts near ln V and falls, and every
    parameter that is trained gets a finite gradient that is not all zero.
    """
    stepper = Stepper(trial)
    batch, problems, losses = stepper.batch(0), [], []
    reached: set[str] = set()
    for step in range(steps):
        losses.append(stepper.step(batch))
        reached |= reached_by_gradient(stepper.model) if step < FIRST_STEPS else set()
        say(step + 1)
        if not math.isfinite(losses[-1]):
            problems.append(f"loss is {losses[-1]} at step {step + 1}")
            break
    trained = {name for name, p in stepper.model.named_parameters() if p.requires_grad}
    problems += [f"{name} has no finite gradient above 0" for name in sorted(trained - reached)]
    with torch.no_grad(), autocast(stepper.device, stepper.dtype):
        fresh = build(load_family(trial.family), trial.config, trial.vocab_size, seed=1,
                      device=stepper.device, dtype=stepper.dtype)  # fmt: skip
        first = float(fresh.token_losses(batch.tokens, batch.targets).mean())
    wanted = math.log(trial.vocab_size)
    if abs(first - wanted) > FIRST_LOSS:
        problems.append(f"first loss {first:.3f}, ln V is {wanted:.3f}")
    if len(losses) > 1 and not losses[-1] < losses[0]:
        problems.append(
            f"loss does not fall on a repeated batch: {losses[0]:.3f}, {losses[-1]:.3f}"
        )
    return {
        "first_loss": first, "ln_v": wanted, "losses": losses, "problems": problems,
        "peak_bytes": peak_bytes(stepper.device),
        "parameters": sum(p.numel() for p in stepper.model.parameters()),
    }  # fmt: skip


def reached_by_gradient(model: Family) -> set[str]:
    """Names of the parameters with a finite gradient that is not all zero."""
    named = ((n, p.grad) for n, p in model.named_parameters())
    return {n for n, g in named if g is not None and bool(torch.isfinite(g).all() and g.any())}


def main() -> int:
    """One trial: two steps of a model of `depth` blocks under a limit of memory; JSON on stdout."""
    from lib.core.typed import typed

    asked = json.loads(sys.argv[1])
    family = load_family(asked["family"])
    settings = Train(**asked["settings"])
    trial = Trial(
        family=asked["family"], config=typed(family.Config, asked["config"], "trial"),
        vocab_size=asked["vocab_size"], rows=asked["rows"], context=asked["context"],
        settings=settings, device=asked["device"],
    )  # fmt: skip
    stepper = Stepper(trial)
    for number in range(2):
        stepper.step(stepper.batch(number))
    peak = peak_bytes(stepper.device)
    count = sum(p.numel() for p in stepper.model.parameters())
    fits = asked["budget_bytes"] is None or peak <= asked["budget_bytes"]
    sys.stdout.write(json.dumps({"peak_bytes": peak, "parameters": count, "fits": fits}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
