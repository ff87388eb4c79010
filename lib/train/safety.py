"""Before and beside the loop: a dry step, non-finite numbers named, memory errors as a sentence.

One NaN in a gradient makes the global norm NaN, clipping then spreads it over all weights and into
the optimizer's moments for good. So the check stands before clipping, and here it is found out
where it came from: the step is computed again, one micro-batch at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib.core import ranks
from lib.core.errors import EnvError, InputError, Interrupted
from lib.train import parallel

if TYPE_CHECKING:
    from lib.train.job import Batch, Rows

KNOBS = "lower runtime.device_batch_size (the result stays), then the context, then the width"


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Out of memory, on the device or the host, as EnvError with the three knobs."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if not isinstance(error, MemoryError) and not _is_memory(text):
            raise
        raise EnvError(
            "out of memory", value=text.splitlines()[0] if text else None, remedy=KNOBS
        ) from error


def _is_memory(text: str) -> bool:
    return any(
        mark in text for mark in ("out of memory", "can't allocate memory", "Cannot allocate")
    )


@contextlib.contextmanager
def nothing_remembered(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards random states, buffers and mode of `model` are what they were, gradients gone."""
    states, training = random_states(device), model.training
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        yield
    finally:
        restore_random_states(states, device)
        model.train(training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for parameter in model.parameters():
            parameter.grad = None


def random_states(device: torch.device) -> dict[str, Tensor]:
    """torch's default generators as uint8 tensors: `cpu`, and the device's own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_states`; another kind of device keeps its own."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


Culprit = tuple[int, str]  # a micro-batch, and where in it: a parameter, or the loss


def find_culprit(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    backward: Callable[[Batch], Iterator[tuple[Tensor | None, bool]]],
) -> Culprit | None:
    """The first micro-batch whose own loss or gradient is not finite, None if none is.

    Where: the last parameter in the model's order with such a gradient, which backward met first.
    """
    for number, batch in enumerate(micro_batches):
        for parameter in model.parameters():
            parameter.grad = None
        loss, _ = next(backward(batch))
        if loss is not None and not loss.isfinite():
            return number, "the loss"
        grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        bad = [name for name, grad in grads if not bool(grad.isfinite().all())]
        if bad:
            return number, f"the gradient of {bad[-1]}"
    return None


def interrupted(done: int, steps: int) -> Interrupted:
    """A stop was asked for, and the checkpoint of step `done` is committed."""
    return Interrupted(
        f"interrupted at step {done} of {steps}, saved; run the same command to continue"
    )


def are_finite(*numbers: float) -> bool:
    """Whether none of the numbers is NaN or infinite."""
    return all(math.isfinite(number) for number in numbers)


def non_finite(
    step: int,
    culprit: Culprit | None,
    micro_rows: int,
    rows: Rows,
    loss: float,
    grad: float,
    saved: int,
    device: torch.device,
) -> InputError:
    """The error for update `step`: the micro-batch of this rank, or of the last that has one.

    saved: step of the last checkpoint. All ranks must call.
    """
    rank, world = ranks.rank(), ranks.world_size()
    here = -1 if culprit is None else rank * 10**6 + culprit[0]
    found = int(parallel.max_over_ranks(here, device))
    where = "no micro-batch by itself"
    if found >= 0:
        guilty, number = divmod(found, 10**6)
        numbers = rows.row_numbers(step - 1, guilty, world)
        mine = numbers[number * micro_rows : (number + 1) * micro_rows].tolist()
        where = f"micro-batch {number} of rank {guilty}, rows {' '.join(map(str, mine[:8]))}"
        where += " ..." if len(mine) > 8 else ""
        where += f", {culprit[1]}" if culprit and found == here else ""
    kept = f"step_{saved}" if saved else "the beginning"
    return InputError(
        f"loss or gradient is not finite at step {step}",
        value=f"loss {loss:.4g}, norm {grad:.4g}, {where}",
        remedy=f"no update was made, the last good checkpoint is {kept}; lower lr or mend the rows",
    )
