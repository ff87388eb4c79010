"""The fixed-point phase: the loss of a step, exact in bounded memory (cvfp.md 4-6).

    L = w_f L_fix + w_d L_div + w_m L_mem

Pass 1 runs the micro-batches, gathers sums and, under Jacobi, stores the rows; pass 2 runs them
again with a graph and yields one loss each. Values add up to L, gradients to dL. Where the graphs
of a step fit the budget pass 2 takes those of pass 1: the same micro-batches in the same order,
hence the same bits. Letters: n rows of the step, d width, e token width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.core.errors import InputError
from lib.core.rng import torch_generator
from lib.nn.contexts.budget import graph_bytes
from lib.nn.contexts.context import TokenTables, Weights, matmul_dtype
from lib.nn.contexts.diversity import Diversity, random_directions


class Source(Protocol):
    """The training tokens as one stream, and their vectors where they lie on disk."""

    key: str  # of the artefact
    tokens: int  # N
    has_rows: bool  # vectors are read, not looked up

    def table(self) -> Tensor: ...  # noqa: D102  (V, e)
    def ids(self, start: int, stop: int) -> Tensor: ...  # noqa: D102  (n,) int64
    def starts(self, start: int, stop: int) -> Tensor: ...  # noqa: D102  (n,) a document begins
    def rows(self, start: int, stop: int) -> Tensor: ...  # noqa: D102  (n, e) fp32
    def stream(self, start: int, stop: int, rows: int) -> Iterator[Tensor]: ...  # noqa: D102
    def positions(self, numbers: Any) -> Any: ...  # noqa: D102  (B, T) int64, -1: none of its own
    def packed(self, numbers: Any) -> Tensor: ...  # noqa: D102  (B, T, e) of packed rows


class Learner(Protocol):
    """What the solvers ask of the model."""

    config: Any
    seed: int
    activation_bytes: int
    source: Source | None
    memory_head: nn.ModuleList

    def weights(self) -> Weights: ...  # noqa: D102
    def contextual(self, tokens: Tensor) -> tuple[Tensor, Any]: ...  # noqa: D102
    def seen(self, e: Tensor) -> Tensor: ...  # noqa: D102
    def embed(self, tokens: Tensor) -> Tensor: ...  # noqa: D102
    def keep_of(self, tokens: Tensor) -> Tensor | None: ...  # noqa: D102
    def inputs_of(self, e: Tensor, keep: Tensor | None) -> tuple[Tensor, list[Tensor]]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102


@dataclass
class Terms:
    """One micro-batch: contexts c (n, d), what one step makes of them; with graphs in pass 2."""

    c: Tensor
    stepped: Tensor  # (n, d); c itself under Jacobi
    wanted: Tensor  # what it should be
    memory: Tensor | None = None  # sum over pairs

    def distances(self) -> Tensor:
        """(n,) squared distance of `stepped` from what it should be."""
        return torch.linalg.vector_norm(self.stepped.detach() - self.wanted, dim=-1).square()


@dataclass
class Numbers:
    """What the log and stats.json hold of a step."""

    fixed_point: float = 0.0
    diversity: float = 0.0
    memory: float = 0.0

    def terms(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


class Objective:
    """The weighted loss of one step from the terms of its micro-batches."""

    def __init__(self, model: Learner, step: int, rows: int, pairs: int) -> None:
        """rows: n of this rank; pairs: (position, horizon) pairs that the memory term averages."""
        c = self.config = model.config
        self.rows, self.pairs = rows, max(1, pairs)
        directions = None
        if c.get("kind") == "sigreg":
            directions = random_directions(c.d, torch_generator(model.seed, "sigreg", step))
        self.diversity = Diversity(c.get("kind"), directions)
        self.w_f, self.w_d, self.w_m = (c.get(n) for n in ("fixed_point", "diversity", "memory"))
        self.unit = 1.0
        if c.seed_compat:  # -|c^|_F / n = sqrt(d / n) mcdl; n fixed at the chunk's length
            length = rows if "length_weight" in c.seed_defects else c.get("chunk_tokens")
            self.unit = math.sqrt(c.d / length)
            self.w_f, self.w_d = 1 - c.get("diversity"), c.get("diversity")
        self.numbers = Numbers()
        self._fixed: list[Tensor] = []  # sums of distances, by micro-batch
        self._memory = torch.zeros((), dtype=torch.float64)

    def add(self, terms: Terms) -> Tensor:
        """Sums of pass 1; (n,) squared distances. InputError for a context that is not finite."""
        moved = terms.distances()
        finite = moved.isfinite() & (terms.c.detach().sum(-1) if terms.c is not terms.stepped
                                     else moved).isfinite()  # fmt: skip
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise InputError(
                "context vectors are not finite",
                value=f"row {bad} of a micro-batch",
                remedy="lower lr; the last good checkpoint is kept",
            )
        self.diversity.add(terms.c)
        self._fixed.append(moved.sum(dtype=torch.float64).cpu())
        if terms.memory is not None:
            self._memory += terms.memory.detach().double().cpu()
        return moved

    def finish(self) -> None:
        """All rows have been added."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        # the trainer averages over ranks
        value, self._slope = self.diversity.finish(self.w_d * self.unit * world)
        d = self.config.d
        self._value = float(value) * self.unit
        self.numbers.fixed_point = float(sum(self._fixed)) / (self.rows * d)
        self._next = iter(self._fixed)
        self.numbers.memory = float(self._memory) / self.pairs
        self.numbers.diversity = self._value
        if self.config.seed_compat:  # log in the original's own units, of this step's length
            own = math.sqrt(d / self.rows) / self.unit
            self.numbers.diversity *= own

    def loss(self, terms: Terms) -> Tensor:
        """This micro-batch's share of L and of its gradient, which is known in closed form."""
        share, pull = len(terms.c) / self.rows, self.w_f / (self.rows * self.config.d)
        value = next(self._next) * pull + self.w_d * self._value * share
        with torch.no_grad():
            slope = self._slope(terms.c) if self.w_d else torch.zeros_like(terms.c)
            own = slope if terms.c is terms.stepped else torch.zeros_like(terms.stepped)
            own.add_(terms.stepped, alpha=2 * pull).sub_(terms.wanted, alpha=2 * pull)
        total = _Known.apply(value.to(terms.c), terms.stepped, own)
        if self.w_d and terms.c is not terms.stepped:
            total = total + _Known.apply(torch.zeros_like(value).to(terms.c), terms.c, slope)
        if terms.memory is not None:
            total = total + terms.memory * (self.w_m / self.pairs)
        return total  # type: ignore[return-value]  # a tensor


class _Known(torch.autograd.Function):
    """A value whose gradient with respect to x is given."""

    @staticmethod
    def forward(ctx, value, x, gradient):  # type: ignore[override]
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        return None, ctx.gradient.mul_(upstream), None  # used once


def two_pass(
    run: Callable[[], Iterator[Terms]],
    objective: Objective,
    *,
    keeps: bool,
    seen: Callable[[Terms, Tensor], None] = lambda terms, distances: None,
    commit: Callable[[], None] = lambda: None,
    last: Sequence[Callable[[], Tensor]] = (),
) -> Iterator[Tensor]:
    """The losses of one step.

    seen: rows of pass 1, with their squared distances; commit: after them, before the first loss.

    last: losses of value 0 that carry gathered gradients on.
    """
    kept: list[Terms] = []
    with torch.set_grad_enabled(keeps):
        for terms in run():
            seen(terms, objective.add(terms))
            if keeps:
                kept.append(terms)
    objective.finish()
    commit()
    for terms in kept if keeps else run():
        yield objective.loss(terms)
    for hand_on in last:
        yield hand_on()


def handed(tables: TokenTables | None, weights: Callable[[], Tensor]) -> list[Callable[[], Tensor]]:
    """What is yielded last, in order: tables hand on to the weights' leaves, those to the model."""
    return [weights] if tables is None else [tables.hand_on, weights]


def unique_tables(
    model: Learner, weights: Weights, ids: Tensor, learns: bool
) -> tuple[TokenTables | None, Tensor]:
    """(tables of the distinct ids, the row of each token); none where an id does not suffice."""
    config, reads = model.config, model.source is not None and model.source.has_rows
    if reads or config.hidden is not None or config.get("input_tokens") > 1:
        return None, ids
    distinct, index = torch.unique(ids, return_inverse=True)
    return TokenTables(weights, model.embed(distinct).detach(), learns), index


def activation_bytes(config: Any, weights: Weights) -> int:
    """Bytes that backward keeps of one token's step."""
    b = weights.b[0]
    return graph_bytes(config.get("depth"), config.d, b.element_size(), matmul_dtype(b).itemsize)
