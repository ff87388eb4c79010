"""How a GPT begins and is optimised: first values, and the optimizer's table of each era.

In:    a config and named parameters. Out: tensors, `Group`s. Source: gpt.md 4, 5 and 7.4.
Note:  the rates are the table's, whatever the run's own say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib.models._gpt_sizes import reference_params
from lib.models.base import Group, Optim

if TYPE_CHECKING:
    from lib.models.gpt import Config

REFERENCE_BATCH = 2**19  # tokens of a step at which rates and decay were tuned, on depth 12
RATIO = {"base": 20.0, "modern": 12.0}  # tokens per scaling parameter


def initial(config: Config, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
    """First value of a parameter by its name, gpt.md 4."""

    def normal(std: float) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=draw)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=draw)

    modern, L = config.switches.init == "modern", config.depth
    slope = torch.arange(L) / max(L - 1, 1)
    a = math.sqrt(3 / config.shape[0])
    kind = name.removesuffix(".weight").split(".")[-1]
    if kind in ("o", "down") or (kind == "head" and not modern):
        return torch.zeros(shape)
    if name.startswith("value_tables"):
        return uniform(-a, a)
    match kind:
        case "resid":
            return 1.15 - 0.10 * slope
        case "skip":
            return 0.20 - 0.15 * slope
        case "smear_scale" | "pairs":
            return torch.zeros(shape)
        case "backout":
            return torch.full(shape, 0.2)
        case "gate" | "smear":
            return uniform(0, 0.02)
        case "wte":
            return normal(0.8 if modern else 1.0)
        case "head":
            return normal(0.001)
    if modern:
        return uniform(-0.4 * a, 0.4 * a) if kind == "up" else uniform(-a, a)
    out, inputs = shape
    return normal(min(1.0, math.sqrt(out / inputs)) / math.sqrt(inputs))


def param_groups(
    config: Config, vocab_size: int, parameters: Mapping[str, nn.Parameter], optim: Optim
) -> list[Group]:
    """The era's groups, each parameter in one of them."""
    members: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        members.setdefault(_group_of(name), {})[name] = parameter
    groups = [
        Group(name=name, params=members[name], lr=lr, betas=betas, eps=1e-10, weight_decay=decay)
        for name, (lr, betas, decay) in _adamw_table(config, optim).items()
        if name in members
    ]
    # The reference iterates in bf16, for its devices are fast at it; an fp32 run's is not.
    bf16 = optim.compute_dtype == torch.bfloat16
    dtype = torch.bfloat16 if bf16 else torch.float32
    rule, matrices = _muon_rule(config, vocab_size, optim), members["matrices"]
    return [*groups, Group(name="matrices", params=matrices, iteration_dtype=dtype, **rule)]


def _group_of(name: str) -> str:
    """The row of the optimizer table that a parameter belongs to."""
    if name.startswith("blocks."):
        return "matrices"
    if name in ("smear.weight", "smear_scale", "backout"):
        return "scalars"
    return name.split(".")[0]


def _adamw_table(
    config: Config, optim: Optim
) -> dict[str, tuple[float, tuple[float, float], float]]:
    """Group -> (lr, betas, weight decay); epsilon is 1e-10 in all of them."""
    modern = config.switches.optim == "modern"
    eta = batch_factor(optim.batch_tokens) if modern else 1.0
    m = (config.shape[0] / 768) ** -0.5
    table = {
        "head": (0.004 * m, (0.8, 0.95), 0.0),
        "wte": (0.2 * m, (0.8, 0.95), 0.0),
        "value_tables": (0.15 * m * eta, (0.8, 0.995), 0.01),
        "pairs": (0.15 * m * eta, (0.8, 0.95), 0.0),
        "resid": (0.005 * eta, (0.8, 0.95), 0.05),
        "skip": (0.5 * eta, (0.96, 0.95), 0.0),
        "scalars": (0.2, (0.8, 0.95), 0.0),
    }
    if modern:
        table["head"] = (0.008 * m * eta, (0.8, 0.96), 0.01)
        table["wte"] = (0.3 * m * eta, (0.8, 0.995), 0.001)
    return table


def _muon_rule(config: Config, vocab_size: int, optim: Optim) -> dict[str, Any]:
    if config.switches.optim == "base":
        return {"rule": "muon", "lr": 0.02}
    ratio, batch = optim.param_data_ratio or RATIO["modern"], optim.batch_tokens
    tokens = float(optim.tokens or optim.steps * batch)
    decay = muon_decay(batch, tokens, ratio * reference_params(config, vocab_size))
    return {
        "rule": "normuon", "lr": 0.02 * batch_factor(batch), "betas": (0.0, 0.9),
        "weight_decay": decay,
    }  # fmt: skip


def batch_factor(batch_tokens: int) -> float:
    """eta = sqrt(batch / 2^19) in [0.25, 2]: rates follow the batch, yet a toy still learns."""
    return min(2.0, max(0.25, math.sqrt(batch_tokens / REFERENCE_BATCH)))


def muon_decay(batch_tokens: int, tokens: float, reference_tokens: float) -> float:
    """0.28 sqrt(batch / 2^19) D_ref / D in [0, 0.6] (arXiv 2405.13698); D tokens really trained."""
    return min(
        0.6, 0.28 * math.sqrt(batch_tokens / REFERENCE_BATCH) * reference_tokens / max(tokens, 1)
    )
