"""Numbers kept in bfloat16 without a bias: AdamW's moments in 4 bytes a parameter instead of 8.

In:    fp32 values.   Out: a bf16 neighbour of each, the farther one as often as its nearness asks,
       so that the mean of many roundings is the value (arXiv 2010.06192). To nearest, an average
       stops moving once a step changes it by less than half a unit: at beta 0.999, always.
Law:   the noise follows from (seed, parameter, step) alone: no order of updates, no resume and no
       cut into parts changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lib.core.errors import UserError
from lib.core.rng import torch_generator
from lib.core.run_settings import Runtime, Train

LOW = 0xFFFF  # the digits of fp32 that bf16 does not have


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """x fp32 -> bf16; noise int32, uniform in its lowest 16 bits, of the same shape.

    A sum of integers carries into the digit that stays as often as the lost ones are large; the
    sign is apart, so both directions are alike. Numbers that bf16 has stay what they are.
    """
    return ((x.view(torch.int32) + (noise & LOW)) & ~LOW).view(torch.float32).bfloat16()


class RoundedMoments:
    """The moments of AdamW in bf16; fp32 inside of an update."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @contextmanager
    def widened(self, name: str, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The state of parameter `name` with moments in fp32; afterwards they are rounded back."""
        wide = {kind: state[kind].float() for kind in ("exp_avg", "exp_avg_sq")}
        yield {"step": state["step"], **wide}
        first, second = wide.values()
        device, step = str(first.device), int(state["step"])
        draw = torch_generator(self.seed, "moments", name, step, device=device)
        noise = torch.randint(
            -(2**31), 2**31, first.shape, dtype=torch.int32, device=device, generator=draw
        )
        state["exp_avg"].copy_(round_stochastically(first, noise))
        state["exp_avg_sq"].copy_(round_stochastically(second, noise >> 16))


def of_run(settings: Train, runtime: Runtime, seed: int) -> RoundedMoments | None:
    """What a run's `moments` ask for; UserError where weights are cut over ranks."""
    if settings.moments == "float32":
        return None
    if runtime.shard == "fsdp":
        raise UserError(
            "rounded moments need whole tensors",
            value="moments: bfloat16 with runtime.shard: fsdp",
            remedy="set moments: float32, or another shard",
        )
    return RoundedMoments(seed)
