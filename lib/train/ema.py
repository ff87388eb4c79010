"""Exponential moving average of a model's parameters: shadow = decay shadow + (1 - decay)
parameter.

The shadow is fp32 whatever the parameters are: near decay 1 a bf16 shadow would never move.
Invariant: swapping in and out leaves the parameters bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lib.core.errors import InputError


class Ema:
    """The shadow of `model`'s parameters, starting as a copy of them."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._params = dict(model.named_parameters())
        self._shadow = {n: p.detach().float().clone() for n, p in self._params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        new = [p.detach().float() for p in self._params.values()]
        for shadow, value in zip(self._shadow.values(), new, strict=True):
            shadow.lerp_(value, 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model holds the average; afterwards its own parameters again."""
        own = {n: p.detach().clone() for n, p in self._params.items()}
        self._copy(self._shadow)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._params.items():
            parameter.copy_(values[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """The shadow by parameter name, fp32; not copied."""
        return dict(self._shadow)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`; InputError if the names differ."""
        if differing := set(tensors) ^ set(self._shadow):
            raise InputError(
                "EMA does not fit the model",
                value=sorted(differing)[0],
                remedy="use the checkpoint of this model",
            )
        for name, value in tensors.items():
            self._shadow[name].copy_(value)
