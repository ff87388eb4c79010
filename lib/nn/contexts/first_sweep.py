"""Sweep 0 of a stream on disk: the true trajectory, by segments with repair (cvfp.md 7).

Chunk by chunk: the state goes on from the last row that was stored, as it was rounded. Letters: d
width, e token width, q token vectors of a step, T time, B segments in parallel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib.core.errors import UserError
from lib.core.rng import torch_generator
from lib.nn.contexts import probes
from lib.nn.contexts.budget import FIRST_BLOCK
from lib.nn.contexts.context import Weights, matmul_dtype
from lib.nn.contexts.halo import Repairs, halo, warm_tokens
from lib.nn.contexts.objective import Learner, unique_tables
from lib.nn.contexts.sweeps import Sweeps

HALO_ROWS = 256  # segments stepped in parallel
RHO_ROWS, RHO_STEPS = 64, 48


@torch.no_grad()
def write_first_sweep(
    model: Learner, disk: Sweeps, j: int, advance: Callable[[int], object] = lambda tokens: None
) -> None:
    """Chunk j of sweep 0: the true trajectory, by halo with repair (or token by token).

    advance: told of tokens that have been written.
    """
    config = model.config
    assert model.source is not None
    weights, (start, stop) = model.weights(), disk.span(j)
    wide = weights.b[0].dtype
    c = torch.zeros(config.d, dtype=wide)
    if j:
        c = disk.last_written(0, j).to(wide)
    slow = "sequential_start" in config.seed_defects
    if slow and model.source.tokens > 10**6:
        raise UserError(
            "sequential_start is for at most 1,000,000 tokens",
            value=f"{model.source.tokens:,}", remedy="leave it out of seed_defects",
        )  # fmt: skip
    rho = contraction_of(model, weights, start, stop)
    # Trajectories cannot be told apart below the rounding of their matmuls: in bf16 every segment
    # would be stepped again to its end, round after round: 20 times as slow (seen).
    tol = max(config.halo_tol, torch.finfo(matmul_dtype(weights.b[0])).eps)
    # Twice what the mean contraction asks for: with once a third of the segments was repaired.
    warm = 2 * warm_tokens(rho, tol, FIRST_BLOCK // HALO_ROWS)
    writer, repairs, sample = disk.writer(0, j), Repairs(), []
    for first in range(start, stop, FIRST_BLOCK):
        last = min(stop, first + FIRST_BLOCK)
        side, keep = _token_side(model, weights, first, last)
        rows = last - first if slow else max(64, -(-(last - first) // HALO_ROWS))
        made = halo(
            c, side, last - first, weights, segment=rows, warm=warm,
            tol=tol, keep=keep, repairs=repairs,
        )  # fmt: skip
        writer.put(made)
        c = writer.last.to(wide)
        advance(last - first)
        sample.append(
            probes.sample_rows(made, probes.SEED_ROWS * (last - first) // (stop - start) + 1)
        )
    line = {"sweep": 0, "chunk": j, "crc32": writer.finish()}
    extra = {"repaired": repairs.segments, "redone": repairs.tokens, "rho": rho}
    disk.commit(line | ranks_of(torch.cat(sample)) | extra)
    disk.forget(0, j)


def _token_side(
    model: Learner, weights: Weights, start: int, stop: int
) -> tuple[Callable[[Tensor], list[Tensor]], Tensor | None]:
    """(positions relative to `start`, possibly before it -> P, keep) of a stretch."""
    source = model.source
    assert source is not None
    keep = None
    if model.config.get("reset") == "document":
        keep = (~source.starts(start, stop)).to(weights.b[0].dtype)
    before = min(start, FIRST_BLOCK // HALO_ROWS)
    tables, index = unique_tables(model, weights, source.ids(start - before, stop), False)
    if tables is not None:
        held = tables.values
    else:
        held, index = weights.token_side(inputs_of_stream(model, start - before, stop)), None

    def side(at: Tensor) -> list[Tensor]:
        at = (at + before).clamp(min=0)
        rows = at if index is None else index[at]
        return [h.index_select(0, rows.flatten()).view(*rows.shape, -1) for h in held]

    return side, keep


def inputs_of_stream(model: Learner, start: int, stop: int) -> Tensor:
    """u (n, q e) of tokens [start, stop)."""
    source = model.source
    assert source is not None
    before = min(start, model.config.get("input_tokens") - 1)
    first = start - before
    if source.has_rows:
        e = model.seen(source.rows(first, stop))
    else:
        e = model.embed(source.ids(first, stop))
    keep = None
    if model.config.get("reset") == "document":
        keep = (~source.starts(first, stop)).to(e.dtype)[:, None]
    return model.inputs_of(e[:, None], keep)[0][before:, 0]


def ranks_of(rows: Tensor) -> dict[str, float]:
    """Ranks of the chunk's new rows."""
    uncentred, centred = probes.effective_ranks(rows)
    return {"er_seed": uncentred, "er": centred, "rows": len(rows)}


@torch.no_grad()
def contraction_of(model: Learner, weights: Weights, start: int, stop: int) -> float:
    """Contraction over stretches of the chunk; UserError where the map does not contract."""
    length = min(RHO_STEPS, stop - start)
    rows = max(1, min(RHO_ROWS, (stop - start) // length // 32))  # a small part of the step
    first = torch.linspace(start, stop - length, rows).long()
    source = model.source
    assert source is not None
    pieces = [weights.token_side(inputs_of_stream(model, int(s), int(s) + length)) for s in first]
    P = [torch.stack(side, 1).to(weights.b[0].dtype) for side in zip(*pieces, strict=True)]
    draw = torch_generator(model.seed, "rho")
    v = torch.randn(rows, model.config.d, generator=draw)
    dropped = probes.DROPPED if length > 2 * probes.DROPPED else 0
    rho = probes.contraction(torch.zeros(rows, model.config.d), P, weights, dropped, v)
    if rho >= 1 and dropped:  # a stretch too short to turn to the leading direction says nothing
        raise UserError(
            "the context block does not contract",
            value=f"rho {rho:.3f}",
            remedy="use solver: exact, or a deeper block",
        )
    return rho
