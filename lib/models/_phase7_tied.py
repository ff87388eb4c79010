"""What phase 7 and phase 8 share: one table for ids in and out, rates, first values, export.

A family adds `hidden` (ids -> final rows), and what its own parameters begin with. Letters: B
batch, n positions, V vocabulary, L layers, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib.models.base import Batch, Defaults, Family, Group, Optim, ReadWeights, require_same
from lib.nn.tt import Dense, TensorTrain, tied_table

RANK_TRAVEL = 3.0  # of a channel's score over the whole run
OUTPUTS = ("o", "down", "conv")  # kinds that end a branch: a factor 1 / sqrt(2 L) smaller
# Two-dimensional, and no matrices: convolutions, the mix gate, one number a head.
SMALL = (
    "conv.weight", "conv_q.weight", "conv_k.weight", "conv_v.weight", "mix.weight", "beta", "eta",
)  # fmt: skip


class State(NamedTuple):
    """Rows so far: their length, and what each layer keeps; its size is constant."""

    position: int
    layers: tuple[Any, ...]


def group_of(name: str, parameter: Tensor) -> str:
    """The optimizer's group of a parameter."""
    if name.startswith("table."):
        return "table"
    if name == "alpha":
        return "scores"
    return "matrices" if parameter.ndim == 2 and not name.endswith(SMALL) else "rest"


class Tied(Family):
    """A table, L blocks that the family gives, a norm, the same table."""

    compiled = ("hidden",)

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.max_context = None if config.beyond_context else config.context
        self.table = tied_table(
            config.embedding, vocab_size, config.width, config.tt_rank, config.tt_order,
            config.tt_phase,
        )  # fmt: skip

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """tokens (B, n) -> the final normed x (B, n, d), and what each layer keeps."""
        raise TypeError(f"{type(self).__name__} defines no hidden")

    def begin(self, tokens: Tensor, state: State | None) -> tuple[Tensor, int]:
        """First x (B, n, d), and the first position; ValueError beyond the context."""
        start, n, T = state.position if state else 0, tokens.shape[1], self.max_context
        if T is not None and start + n > T:
            raise ValueError(f"{start + n} positions, the context is {T}: set beyond_context: true")
        return self.table(tokens), start

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, n) int64 -> logits (B, n, V) fp32, and the state that continues the rows."""
        x, layers = self.hidden(tokens, state)
        return self.table.logits(x), self._next(tokens, state, layers)

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: State | None = None, keep: bool = True
    ) -> tuple[Tensor, State]:
        """Logits (N, V) of the marked positions (B, n) alone, and the state."""
        x, layers = self.hidden(tokens, state)
        return self.table.logits(x[where]), self._next(tokens, state, layers)

    @staticmethod
    def _next(tokens: Tensor, state: State | None, layers: tuple[Any, ...]) -> State:
        return State((state.position if state else 0) + tokens.shape[1], layers)

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """One loss: mean cross-entropy of the batch's targets."""
        yield self.table.loss(self.hidden(batch.tokens)[0], batch.targets)

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy by position (B, T), without the logits of all positions."""
        return self.table.loss(self.hidden(tokens)[0], targets, "none")

    # ------------------------------------------------------------ weights

    def take_weights(self, config: Any, read: ReadWeights) -> None:
        """Those of a model with the same settings."""
        require_same(asdict(self.config), asdict(config))
        super().take_weights(config, read)

    def init_buffers(self) -> None:
        """The order of ids."""
        if isinstance(self.table, TensorTrain):
            self.table.init_buffers()

    def first_value(self, kind: str, shape: torch.Size) -> Tensor | None:
        """What parameters of a kind begin with, where it is not drawn."""
        return None

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """phase7.md 3.8.1: inputs N(0, 1/fan-in), outputs a factor 1/sqrt(2L) smaller."""
        kind = name.removesuffix(".weight").split(".")[-1]
        if name.startswith("table."):
            return self.table.initial(kind, shape, draw)
        if kind in ("norm1", "norm2", "norm"):
            return torch.ones(shape)
        if (value := self.first_value(kind, shape)) is not None:
            return value
        std = 1 / math.sqrt(shape[-1])
        if kind in OUTPUTS:
            std /= math.sqrt(2 * self.config.depth)
        return torch.empty(shape).normal_(0, std, generator=draw)

    def folded(self, config: Any, state: dict[str, Tensor]) -> tuple[Any, Family]:
        """(Config, model) of `state` without phases: equal logits. `state` is the caller's own."""
        if "table.theta" in state:
            state["table.C1"], _ = self.table.cores()  # type: ignore[union-attr]  # it has phases
            del state["table.theta"]
            config = replace(config, tt_phase=False)
        with torch.device("meta"):
            model = type(self)(config, self.vocab_size)
        model.to_empty(device="cpu")
        model.load_state_dict(state)
        return config, model.eval()

    @torch.no_grad()
    def exported(self, config: Any) -> tuple[Any, Family]:
        """Without phases: equal logits."""
        return self.folded(config, self.state_dict()) if config.tt_phase else (config, self)

    # ------------------------------------------------------------ optimisation

    def defaults(self) -> Defaults:
        """Cosine to the run's `final_lr`, norm clipped at 1, 16 rows of the largest preset."""
        return Defaults(schedule="cosine", grad_clip=1.0, batch_tokens=16_384)

    def param_groups(self, optim: Optim) -> list[Group]:
        """Matrices with decay; table and scores of channels at rates of their own; the rest."""
        members: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            members.setdefault(group_of(name, parameter), {})[name] = parameter
        common = {"betas": optim.betas, "eps": optim.eps}
        factor = 1.0 if isinstance(self.table, Dense) else self.config.tt_lr
        settings: dict[str, dict[str, Any]] = {
            "matrices": {
                "lr": optim.lr, "rule": optim.optimizer, "weight_decay": optim.weight_decay,
            },
            "table": {"lr": optim.lr * factor},
            # Channels cross 0 one by one whatever the base rate is: the travel is of the whole run.
            "scores": {"lr": RANK_TRAVEL / optim.steps, "scheduled": False},
            "rest": {"lr": optim.lr},
        }  # fmt: skip
        # The log shows the first group's rate: the matrices', which is the run's own `lr`.
        return [
            Group(name=n, params=members[n], **common, **settings[n])
            for n in settings
            if n in members
        ]

    def matrix_weights(self) -> int:
        """Parameters of block matrices, which FLOPs are counted by."""
        return sum(p.numel() for n, p in self.named_parameters() if group_of(n, p) == "matrices")
