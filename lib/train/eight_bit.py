"""AdamW whose moments take a byte each, from torchao: 10 bytes a parameter instead of 16.

Optional: `pip install -e '.[optim8bit]'`. Moments are codes with one scale a block of 256 (arXiv
2110.02861); tensors that are small or no multiple of a block keep fp32 moments. The update is
compiled by torch. State is saved as raw codes and scales, so a resumed run has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib.core.errors import UserError
from lib.models.base import Group
from lib.train.schedule import Multipliers

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


class EightBitAdamW:
    """The groups of rule `adamw8bit`; the same interface as the other rules of lib.train.optim."""

    def __init__(self, groups: Sequence[Group], stochastic: bool = False) -> None:
        """stochastic: weights in bf16 are rounded so, with the device's own generator.

        UserError where torchao is not installed.
        """
        try:
            from torchao.optim import AdamW8bit  # type: ignore[import-not-found]  # optional
        except ImportError:
            raise UserError(
                "8-bit optimizer is not installed",
                value="optimizer: adamw8bit",
                remedy="pip install -e '.[optim8bit]', or set optimizer: adamw",
            ) from None
        self.groups = list(groups)
        rule: Any = AdamW8bit(
            [
                {
                    "params": list(g.params.values()), "lr": g.lr, "betas": g.betas, "eps": g.eps,
                    "weight_decay": g.weight_decay,
                }
                for g in self.groups
            ],
            bf16_stochastic_round=stochastic,
        )  # fmt: skip
        self._rule = rule
        self._names = {name: p for g in self.groups for name, p in g.params.items()}
        for p in self._names.values():  # the library would make them at the first step
            moments = {kind: rule._new_buffer(p, signed) for kind, signed in MOMENTS.items()}
            rule.state[p].update(step=torch.tensor(0.0), **moments)

    @torch.no_grad()
    def step(self, multipliers: Multipliers) -> None:
        """One update from the gradients that are there."""
        for settings, group in zip(self._rule.param_groups, self.groups, strict=True):
            # In place: a new number would be compiled anew.
            settings["lr"].fill_(group.lr * (multipliers.lr if group.scheduled else 1.0))
        self._rule.step()

    def state_tensors(self) -> Mapping[str, Tensor]:
        """`<parameter>.step`, and of each moment `.codes` and `.scale`, or itself in fp32."""
        found: dict[str, Tensor] = {}
        for name, p in self._names.items():
            state = self._rule.state[p]
            found[f"{name}.step"] = state["step"]
            for kind in MOMENTS:
                moment = state[kind]
                parts = ("codes", "scale") if hasattr(moment, "codes") else ()
                found |= {f"{name}.{kind}.{part}": getattr(moment, part) for part in parts}
                found |= {} if parts else {f"{name}.{kind}": moment}
        return found
