"""The exact solver: trajectories of documents stepped in parallel (cvfp.md 5, 7).

Letters: d width, e token width, T time, B rows in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lib.core.rng import torch_generator
from lib.nn.contexts.context import Weights, trajectory
from lib.nn.contexts.memory_term import Memory, offset_targets
from lib.nn.contexts.objective import (
    Learner,
    Numbers,
    Objective,
    Terms,
    activation_bytes,
    handed,
    two_pass,
    unique_tables,
)
from lib.nn.contexts.one_step import one_step
from lib.nn.contexts.solver import Solver

EXACT_TOKENS = 32_768  # most tokens of a micro-batch of documents; fixes the order of sums


class Exact(Solver):
    """Trajectories of packed rows under the current weights, reset where a document begins."""

    def __init__(self, model: Learner) -> None:
        self.model = model
        self.numbers = Numbers()

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """The losses of one step over batch.tokens (B, T)."""
        model, config, step = self.model, self.model.config, batch.step
        tokens = batch.tokens.t().contiguous()  # (T, B)
        T, B = tokens.shape
        (weights, hand_on), keep = model.weights().apart(), model.keep_of(tokens)
        tables, index = unique_tables(model, weights, tokens, learns=True)
        vectors = batch_vectors(model, batch)
        memory = Memory(model, step, tokens)
        targets, valid = offset_targets(tokens, keep, memory.offsets if memory.active else ())
        width = max(1, min(B, EXACT_TOKENS // T))
        parts = [slice(i, min(B, i + width)) for i in range(0, B, width)]

        def run() -> Iterator[Terms]:
            for number, part in enumerate(parts):
                kept = None if keep is None else keep[:, part]
                if tables is not None:
                    flat = tables.gather(index[:, part].flatten())
                    P = [p.view(T, -1, config.d) for p in flat]
                else:
                    P = weights.token_side(vectors(part, kept))
                draw = torch_generator(model.seed, "noise", step, number)
                terms = self._terms(P, kept, weights, draw)
                if memory.active:
                    picked = ([x[:, part].flatten() for x in xs] for xs in (targets, valid))
                    terms.memory = memory.loss(terms.c, *picked)
                yield terms

        pairs = sum(int(v.sum()) for v in valid)
        objective = Objective(model, step, T * B, pairs)
        # the trajectory, and beside it the step that the noise term takes
        keeps = 2 * T * B * activation_bytes(config, weights) <= model.activation_bytes
        yield from two_pass(run, objective, keeps=keeps, last=handed(tables, hand_on))
        self.numbers = objective.numbers

    def _terms(
        self, P: list[Tensor], keep: Tensor | None, weights: Weights, draw: torch.Generator
    ) -> Terms:
        config = self.model.config
        _, B, d = P[0].shape
        start = torch.zeros(B, d, dtype=weights.b[0].dtype, device=P[0].device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.get("grad") == "bptt"):
            C = trajectory(start, P, weights, keep)[-1]
        fixed = C.detach()
        before = torch.cat((start[None], fixed[:-1]))
        if sigma := config.get("noise"):
            eps = torch.randn(before.shape, generator=draw).to(before)
            eps[0] = 0  # a reset state has no noise
            before = before + sigma * eps
        before = before if keep is None else before * keep.to(before.dtype)[..., None]
        again = one_step(before.flatten(0, 1), [p.flatten(0, 1) for p in P], weights)
        whole = C.flatten(0, 1) if config.get("grad") == "bptt" else again
        return Terms(c=whole, stepped=again, wanted=fixed.flatten(0, 1))

    def statistics(self) -> dict[str, Any]:
        """No sweeps."""
        return {"iteration": None, "sweeps": []}

    def log_scalars(self) -> dict[str, float]:
        """The terms of the last step."""
        return self.numbers.terms()

    def progress(self) -> str:
        """One line of the terms."""
        return "  " + " | ".join(f"{k} {v:.4f}" for k, v in self.numbers.terms().items())


def batch_vectors(model: Learner, batch: Any) -> Callable[[slice, Tensor | None], Tensor]:
    """part, keep -> inputs u (T, B, q e) of those rows, read from disk or looked up."""
    reads = model.source is not None and model.source.has_rows and batch.rows is not None

    def vectors(part: slice, keep: Tensor | None) -> Tensor:
        if reads:
            assert model.source is not None
            e = model.source.packed(batch.rows[part]).to(batch.tokens.device).transpose(0, 1)
        else:
            e = model.contextual(batch.tokens[part].t())[0]
        return model.inputs_of(e, keep)[0]

    return vectors
