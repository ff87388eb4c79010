"""Numbers kept in bfloat16 without a bias: AdamW's moments, the weights of linear layers, or both.

In:    fp32 values.   Out: a bf16 neighbour of each, the farther one as often as its nearness asks,
       so that the mean of many roundings is the value (arXiv 2010.06192). To nearest, an average
       stops moving once a step changes it by less than half a unit, and so does a weight.
Law:   the noise follows from (seed, parameter, step) alone: no order of updates, no resume and no
       cut into parts changes a bit.
Bytes: a parameter under AdamW takes 16; 12 with moments in bf16; 12 with weights, whose gradients
       are bf16 then; 8 with both; 6 with weights and moments of eight bits (phase7.md 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lib.core.errors import UserError
from lib.core.rng import torch_generator
from lib.core.run_settings import Runtime, Train
from lib.models.base import Family
from lib.nn.linear import Linear

LOW = 0xFFFF  # the digits of fp32 that bf16 does not have


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """x fp32 -> bf16; noise int32, uniform in its lowest 16 bits, of the same shape.

    A sum of integers carries into the digit that stays as often as the lost ones are large; the
    sign is apart, so both directions are alike. Numbers that bf16 has stay what they are.
    """
    return ((x.view(torch.int32) + (noise & LOW)) & ~LOW).view(torch.float32).bfloat16()


class Rounding:
    """What a run keeps in bf16 between updates; fp32 inside of them."""

    def __init__(
        self, seed: int, moments: bool = False, weights: frozenset[str] = frozenset()
    ) -> None:
        """weights: names of parameters that are bf16 already (`narrow`)."""
        self.seed, self.moments, self.weights = seed, moments, weights

    @contextmanager
    def widened(self, name: str, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The state of parameter `name` with moments in fp32; afterwards they are rounded back."""
        wide = {kind: state[kind].float() for kind in ("exp_avg", "exp_avg_sq")}
        yield {"step": state["step"], **wide}
        first, second = wide.values()
        noise = self._noise("moments", name, int(state["step"]), first)
        state["exp_avg"].copy_(round_stochastically(first, noise))
        state["exp_avg_sq"].copy_(round_stochastically(second, noise >> 16))

    def put(self, name: str, parameter: Tensor, value: Tensor, step: int) -> None:
        """The fp32 value of its update `step` into a bf16 parameter."""
        if name in self.weights:
            value = round_stochastically(value, self._noise("weights", name, step, value))
        parameter.copy_(value)

    def _noise(self, kind: str, name: str, step: int, like: Tensor) -> Tensor:
        draw = torch_generator(self.seed, kind, name, step, device=str(like.device))
        return torch.randint(
            -(2**31), 2**31, like.shape, dtype=torch.int32, device=like.device, generator=draw
        )


def of_run(
    settings: Train, runtime: Runtime, seed: int, model: Family, dtype: torch.dtype
) -> Rounding:
    """What a run's `moments` and `weights` ask for; weights are bf16 afterwards.

    UserError where weights are cut over ranks or streamed, or where matmuls are not in bf16.
    """
    moments, weights = settings.moments == "bfloat16", settings.weights == "bf16_sr"
    told = " and ".join(f"{n}: {getattr(settings, n)}" for n, on in (
        ("moments", moments), ("weights", weights)) if on)  # fmt: skip
    if told and runtime.shard == "fsdp":
        raise UserError(
            "rounded numbers need whole tensors",
            value=f"{told} with runtime.shard: fsdp",
            remedy="set moments: float32 and weights: fp32, or another shard",
        )
    if weights and (dtype != torch.bfloat16 or model.engine is not None):
        raise UserError(
            "weights of two bytes need matmuls in bf16 and a model on one device",
            value=f"weights: bf16_sr, matmuls in {str(dtype).removeprefix('torch.')}"
            + (", streamed" if model.engine is not None else ""),
            remedy="set precision: bf16 and runtime.stream: off, or weights: fp32",
        )
    return Rounding(seed, moments, narrow(model) if weights else frozenset())


def narrow(model: nn.Module) -> frozenset[str]:
    """The weights of linear layers become bf16, to nearest; their names.

    They are most of a model, and autocast multiplies in bf16 whatever they are; tables, gains and
    what recurrences and geometry are made of stay fp32.
    """
    found = {id(m.weight) for m in model.modules() if isinstance(m, Linear | nn.Linear)}
    own = {name: p for name, p in model.named_parameters() if id(p) in found}
    for parameter in own.values():
        parameter.data = parameter.data.bfloat16()
    return frozenset(own)
