"""The fixed-point phase: losses of a step, exact in bounded memory (cvfp.md 4-6).

    L = w_f L_fix + w_d L_div + w_m L_mem

Pass 1 runs the micro-batches, gathers sums and, under Jacobi, stores the rows; pass 2 runs them
again with a graph and yields one loss each. Values add up to L, gradients to dL. Where the graphs
of a step fit the budget pass 2 takes those of pass 1: the same micro-batches in the same order,
hence the same bits. Letters: n rows of the step, d width, e token width, T time, B rows in
parallel, k sweep, j chunk, N tokens of the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import InputError, UserError
from lib.core.rng import torch_generator
from lib.nn import probes
from lib.nn.context import (
    Repairs,
    TokenTables,
    Weights,
    halo,
    matmul_dtype,
    one_step,
    trajectory,
    warm_tokens,
)
from lib.nn.diversity import Diversity, random_directions
from lib.nn.sweeps import Noise, Sweeps

CANDIDATES = 512  # of the predictive term, the true one included
EXACT_TOKENS = 32_768  # most tokens of a micro-batch of documents; fixes the order of sums
HALO_TOKENS = 65_536  # tokens that sweep 0 holds at once
HALO_ROWS = 256  # segments stepped in parallel
RHO_ROWS, RHO_STEPS = 64, 48


class Source(Protocol):
    """The training tokens as one stream, and their vectors where they lie on disk."""

    tokens: int  # N
    has_rows: bool  # vectors are read, not looked up

    def ids(self, start: int, stop: int) -> Tensor: ...  # noqa: D102  (n,) int64
    def starts(self, start: int, stop: int) -> Tensor: ...  # noqa: D102  (n,) a document begins
    def rows(self, start: int, stop: int) -> Tensor: ...  # noqa: D102  (n, e) fp32
    def stream(self, start: int, stop: int, rows: int) -> Iterator[Tensor]: ...  # noqa: D102
    def packed(self, numbers: Any) -> Tensor: ...  # noqa: D102  (B, T, e) of packed rows


class Learner(Protocol):
    """What the solvers ask of the model."""

    config: Any
    seed: int
    activation_bytes: int
    source: Source | None
    memory_head: nn.ModuleList

    def weights(self) -> Weights: ...  # noqa: D102
    def embed(self, tokens: Tensor) -> Tensor: ...  # noqa: D102
    def keep_of(self, tokens: Tensor) -> Tensor | None: ...  # noqa: D102


@dataclass
class Terms:
    """One micro-batch: its contexts c (n, d), and sums over its rows, with graphs in pass 2."""

    c: Tensor
    fix: Tensor  # sum of squared differences
    memory: Tensor | None = None  # sum over pairs
    old: Tensor | None = None  # c of the sweep before


@dataclass
class Numbers:
    """What the log and stats.json hold of a step."""

    fixed_point: float = 0.0
    diversity: float = 0.0
    memory: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


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
        self._total = torch.zeros((), dtype=torch.float64)
        self._memory = torch.zeros((), dtype=torch.float64)

    def add(self, terms: Terms) -> None:
        """Sums of pass 1; InputError where a context is not finite: nothing was stored."""
        if not bool(terms.c.detach().isfinite().all()):
            bad = int((~terms.c.detach().isfinite().all(-1)).nonzero()[0])
            raise InputError(
                "context vectors are not finite",
                value=f"row {bad} of a micro-batch",
                remedy="lower lr; the last good checkpoint is kept",
            )
        self.diversity.add(terms.c)
        self._total += terms.fix.detach().double().cpu()
        if terms.memory is not None:
            self._memory += terms.memory.detach().double().cpu()

    def finish(self) -> None:
        """All rows have been added."""
        value, self._slope = self.diversity.finish()
        d = self.config.d
        self._value = float(value) * self.unit
        world = dist.get_world_size() if dist.is_initialized() else 1
        self._scale = self.w_d * self.unit * world  # the trainer averages over ranks
        self.numbers.fixed_point = float(self._total) / (self.rows * d)
        self.numbers.memory = float(self._memory) / self.pairs
        self.numbers.diversity = self._value
        if self.config.seed_compat:  # log in the original's own units, of this step's length
            own = math.sqrt(d / self.rows) / self.unit
            self.numbers.diversity *= own

    def loss(self, terms: Terms) -> Tensor:
        """This micro-batch's share of L and of its gradient."""
        share = len(terms.c) / self.rows
        total = terms.fix * (self.w_f / (self.rows * self.config.d))
        if terms.memory is not None:
            total = total + terms.memory * (self.w_m / self.pairs)
        if self.w_d:
            pull = (self._slope(terms.c.detach()) * terms.c).sum() * self._scale
            total = total + pull - pull.detach() + self.w_d * self._value * share
        return total


def two_pass(
    run: Callable[[], Iterator[Terms]],
    objective: Objective,
    *,
    keeps: bool,
    seen: Callable[[Terms], None] = lambda terms: None,
    commit: Callable[[], None] = lambda: None,
    last: Sequence[Callable[[], Tensor]] = (),
) -> Iterator[Tensor]:
    """The losses of one step. seen: rows of pass 1; commit: after them, before the first loss.

    last: losses of value 0 that carry gathered gradients on.
    """
    kept: list[Terms] = []
    with torch.set_grad_enabled(keeps):
        for terms in run():
            objective.add(terms)
            seen(terms)
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


class Memory:
    """The memory term of one step: predict ids ahead, or recall earlier vectors (cvfp.md 5.3)."""

    def __init__(self, model: Learner, step: int, ids: Tensor) -> None:
        """ids: those of the step; candidates are drawn from them."""
        self.model, config = model, model.config
        self.active = config.get("memory") > 0
        self.predicts = config.memory_kind == "predict"
        self.offsets = config.horizons if self.predicts else tuple(-k for k in config.lags)
        if self.active and self.predicts:
            flat = ids.flatten()
            draw = torch_generator(model.seed, "candidates", step)
            at = torch.randint(len(flat), (CANDIDATES - 1,), generator=draw)
            self.candidates = flat[at.to(flat.device)]
            with torch.no_grad():
                self.vectors = model.embed(self.candidates)

    def loss(self, c: Tensor, targets: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
        """Sum over pairs; c (n, d), and for each offset targets (n,) ids, valid (n,)."""
        total = c.new_zeros(())
        for head, ids, mask in zip(self.model.memory_head, targets, valid, strict=True):
            rows, wanted = c[mask], ids[mask]
            with torch.no_grad():
                true = self.model.embed(wanted)
            dtype = matmul_dtype(c)
            assert isinstance(head, nn.Linear)
            guess = F.linear(rows.to(dtype), head.weight.to(dtype))  # (m, e)
            if not self.predicts:
                total = total + (guess.to(c.dtype) - true).square().sum() / true.shape[-1]
                continue
            scale = 1 / math.sqrt(true.shape[-1])
            scores = F.linear(guess, self.vectors.to(dtype)).to(c.dtype) * scale
            scores = scores.masked_fill(wanted[:, None] == self.candidates, -math.inf)
            own = (guess.to(c.dtype) * true).sum(-1, keepdim=True) * scale
            nats = torch.logsumexp(torch.cat((own, scores), 1), 1) - own[:, 0]
            total = total + nats.sum() / math.log(CANDIDATES)
        return total


def offset_targets(
    ids: Tensor, keep: Tensor | None, offsets: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each offset: the id at t + offset (T, B), and whether it lies in the same document."""
    document = torch.zeros_like(ids) if keep is None else (1 - keep.long()).cumsum(0)
    targets, valid = [], []
    for offset in offsets:
        target, other = ids.roll(-offset, 0), document.roll(-offset, 0)
        t = torch.arange(len(ids), device=ids.device) + offset
        inside = ((t >= 0) & (t < len(ids)))[:, None]
        targets.append(target)
        valid.append(inside & (other == document))
    return targets, valid


def unique_tables(
    model: Learner, weights: Weights, ids: Tensor, learns: bool
) -> tuple[TokenTables | None, Tensor]:
    """(tables of the distinct ids, the row of each token); none where rows are read or q > 1."""
    if (model.source is not None and model.source.has_rows) or model.config.get("input_tokens") > 1:
        return None, ids
    distinct, index = torch.unique(ids, return_inverse=True)
    return TokenTables(weights, model.embed(distinct).detach(), learns), index


# ---------------------------------------------------------------- documents in parallel


class Exact:
    """Trajectories of packed rows under the current weights, reset where a document begins."""

    def __init__(self, model: Learner) -> None:
        self.model = model
        self.numbers = Numbers()
        self.sample: tuple[Tensor, Tensor] | None = None

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
        keeps = T * B * activation_bytes(config, weights) <= model.activation_bytes
        yield from two_pass(
            run, objective, keeps=keeps, seen=self._see, last=handed(tables, hand_on)
        )
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
        fix = (again - fixed.flatten(0, 1)).square().sum()
        return Terms(c=C.flatten(0, 1) if config.get("grad") == "bptt" else again, fix=fix)

    def _see(self, terms: Terms) -> None:
        self.rows = probes.sample_rows(terms.c.detach(), probes.SEED_ROWS)


def batch_vectors(model: Learner, batch: Any) -> Callable[[slice, Tensor | None], Tensor]:
    """part, keep -> inputs u (T, B, q e) of those rows, read from disk or looked up."""
    reads = model.source is not None and model.source.has_rows and batch.rows is not None

    def vectors(part: slice, keep: Tensor | None) -> Tensor:
        if reads:
            assert model.source is not None
            e = model.source.packed(batch.rows[part]).to(batch.tokens.device)
        else:
            e = model.embed(batch.tokens[part])
        return model.inputs_of(e.transpose(0, 1), keep)[0]  # type: ignore[attr-defined]

    return vectors


def activation_bytes(config: Any, weights: Weights) -> int:
    """Bytes that backward keeps of one token: states wide, rectified parts in matmul dtype, twice

    for the noisy step beside the trajectory.
    """
    wide, narrow = weights.b[0].element_size(), matmul_dtype(weights.b[0]).itemsize
    return 2 * config.get("depth") * config.d * (wide + narrow)


# ---------------------------------------------------------------- one stream, sweep by sweep


class Jacobi:
    """The original's sweeps: every token one step from the vector that the sweep before stored."""

    def __init__(self, model: Learner, sweeps: Callable[[], Sweeps]) -> None:
        """sweeps: opens the state on disk, at the first step."""
        self.model, self._open = model, sweeps
        self.numbers = Numbers()
        self.place: tuple[int, int] = (0, 0)  # sweep, chunk of the last step
        seed = model.seed
        self._noise = Noise(
            model.config.d, lambda k, block: torch_generator(seed, "noise", k, block)
        )

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Step k M + j: sweep 0 yields nothing, later ones the losses of chunk j."""
        disk = self._open()
        k, j = self.place = divmod(batch.step, disk.chunks)
        stop = self.model.config.stop_at_converged
        if k > 1 and stop is not None and self._share(disk, k - 1) >= stop:
            return
        if k == 0:
            self._start(disk, j)
        else:
            yield from self._sweep(disk, k, j, batch.step)

    def _share(self, disk: Sweeps, k: int) -> float:
        """Share of tokens that had converged in sweep k; 1 when it was left out itself."""
        lines = [disk.lines.get((k, j)) for j in range(disk.chunks)]
        if any(line is None for line in lines):
            return 1.0
        ends = [disk.span(j) for j in range(disk.chunks)]
        sizes = [stop - start for start, stop in ends]
        return sum(x["converged"] * n for x, n in zip(lines, sizes, strict=True)) / sum(sizes)  # type: ignore[index]

    @torch.no_grad()
    def _start(self, disk: Sweeps, j: int) -> None:
        """Sweep 0: the true trajectory, by halo with repair (or token by token)."""
        model, config = self.model, self.model.config
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
        rho = self._rho(weights, start, stop)
        warm = warm_tokens(rho, config.halo_tol, HALO_TOKENS // HALO_ROWS)
        writer, repairs, sample = disk.writer(0, j), Repairs(), []
        for first in range(start, stop, HALO_TOKENS):
            last = min(stop, first + HALO_TOKENS)
            side, keep = self._token_side(weights, first, last)
            rows = last - first if slow else max(64, -(-(last - first) // HALO_ROWS))
            made = halo(
                c, side, last - first, weights, segment=rows, warm=warm,
                tol=config.halo_tol, keep=keep, repairs=repairs,
            )  # fmt: skip
            c = writer.put(made)[-1].to(wide)
            sample.append(
                probes.sample_rows(made, probes.SEED_ROWS * (last - first) // (stop - start) + 1)
            )
        line = {"sweep": 0, "chunk": j, "crc32": writer.finish()}
        extra = {"repaired": repairs.segments, "redone": repairs.tokens, "rho": rho}
        disk.commit(line | self._measure(torch.cat(sample)) | extra)
        disk.forget(0, j)

    def _token_side(
        self, weights: Weights, start: int, stop: int
    ) -> tuple[Callable[[Tensor], list[Tensor]], Tensor | None]:
        """(positions relative to `start`, possibly before it -> P, keep) of a stretch."""
        model, source = self.model, self.model.source
        assert source is not None
        keep = None
        if model.config.get("reset") == "document":
            keep = (~source.starts(start, stop)).to(weights.b[0].dtype)
        before = min(start, HALO_TOKENS // HALO_ROWS)
        tables, index = unique_tables(model, weights, source.ids(start - before, stop), False)
        if tables is not None:
            held = tables.values
        else:
            held, index = weights.token_side(self._inputs(start - before, stop)), None

        def side(at: Tensor) -> list[Tensor]:
            at = (at + before).clamp(min=0)
            rows = at if index is None else index[at]
            return [h.index_select(0, rows.flatten()).view(*rows.shape, -1) for h in held]

        return side, keep

    def _inputs(self, start: int, stop: int) -> Tensor:
        """u (n, q e) of tokens [start, stop)."""
        model, source = self.model, self.model.source
        assert source is not None
        before = min(start, model.config.get("input_tokens") - 1)
        first = start - before
        e = source.rows(first, stop) if source.has_rows else model.embed(source.ids(first, stop))
        keep = None
        if model.config.get("reset") == "document":
            keep = (~source.starts(first, stop)).to(e.dtype)[:, None]
        return model.inputs_of(e[:, None], keep)[0][before:, 0]  # type: ignore[attr-defined]

    def _sweep(self, disk: Sweeps, k: int, j: int, step: int) -> Iterator[Tensor]:
        model, config, source = self.model, self.model.config, self.model.source
        assert source is not None
        (weights, hand_on), (start, stop) = model.weights().apart(), disk.span(j)
        wide, micro = weights.b[0].dtype, config.micro_tokens
        ids = source.ids(start, stop)
        memory = Memory(model, step, ids)
        tables, index = unique_tables(model, weights, ids, learns=True)
        keep = None
        if config.get("reset") == "document":
            keep = (~source.starts(start, stop)).to(wide)
        targets, valid = self._ahead(memory, ids, keep)
        first = self._before(disk, k, j).to(wide)

        def run() -> Iterator[Terms]:
            before, at = first, start
            for old in disk.read(k - 1, j, micro):
                old = old.to(wide)
                here = slice(at - start, at - start + len(old))
                if tables is not None:
                    P = tables.gather(index[here])
                else:
                    P = weights.token_side(self._inputs(at, at + len(old)))
                noisy = torch.cat((before[None], old[:-1]))
                if sigma := config.get("noise"):
                    noisy = noisy + sigma * self._noise.rows(k, at, at + len(old)).to(wide)
                noisy = noisy if keep is None else noisy * keep[here, None]
                c = one_step(noisy, P, weights)
                terms = Terms(c=c, fix=(c - old).square().sum(), old=old)
                if memory.active:
                    picked = ([x[here] for x in xs] for xs in (targets, valid))
                    terms.memory = memory.loss(c, *picked)
                yield terms
                before, at = old[-1], at + len(old)

        writer, sample, converged = disk.writer(k, j), [], 0
        share = min(1.0, probes.SEED_ROWS / (stop - start))

        def seen(terms: Terms) -> None:
            nonlocal converged
            rows = terms.c.detach()
            writer.put(rows)
            assert terms.old is not None
            converged += int(((rows - terms.old).square().mean(-1) < config.converged_mse).sum())
            sample.append(probes.sample_rows(rows, max(1, round(share * len(rows)))))

        pairs = sum(int(v.sum()) for v in valid)
        objective = Objective(model, step, stop - start, pairs)

        def commit() -> None:
            line = {"sweep": k, "chunk": j, "crc32": writer.finish()}
            found = self._measure(torch.cat(sample)) | {
                "fixed_point": objective.numbers.fixed_point,
                "diversity": objective.numbers.diversity,
                "memory": objective.numbers.memory,
                "converged": converged / (stop - start),
                "rho": self._rho(weights, start, stop),
            }
            disk.commit(line | found)
            disk.forget(k, j)
            disk.forget(k - 1, j)
            self.numbers = objective.numbers

        keeps = (stop - start) * activation_bytes(config, weights) <= model.activation_bytes
        yield from two_pass(
            run, objective, keeps=keeps, seen=seen, commit=commit, last=handed(tables, hand_on)
        )

    def _before(self, disk: Sweeps, k: int, j: int) -> Tensor:
        """The vector before the chunk: what this sweep wrote last; for the first token the wrap."""
        if j:
            return disk.last_written(k, j)
        if not self.model.config.get("wrap"):
            return torch.zeros(self.model.config.d)
        return disk.row(k - 1, disk.tokens - 1)

    def _ahead(
        self, memory: Memory, ids: Tensor, keep: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Targets and masks of the memory term within the chunk, (n,) each."""
        if not memory.active:
            return [], []
        column = None if keep is None else keep[:, None]
        targets, valid = offset_targets(ids[:, None], column, memory.offsets)
        return [t[:, 0] for t in targets], [v[:, 0] for v in valid]

    def _measure(self, rows: Tensor) -> dict[str, float]:
        """Ranks of the chunk's new rows."""
        return {
            "er_seed": probes.effective_rank(rows),
            "er": probes.effective_rank(rows, centred=True),
            "rows": len(rows),
        }

    @torch.no_grad()
    def _rho(self, weights: Weights, start: int, stop: int) -> float:
        """Contraction over stretches of the chunk; UserError where the map does not contract."""
        length = min(RHO_STEPS, stop - start)
        rows = max(1, min(RHO_ROWS, (stop - start) // length))
        first = torch.linspace(start, stop - length, rows).long()
        model, source = self.model, self.model.source
        assert source is not None
        pieces = [weights.token_side(self._inputs(int(s), int(s) + length)) for s in first]
        P = [torch.stack(side, 1).to(weights.b[0].dtype) for side in zip(*pieces, strict=True)]
        draw = torch_generator(model.seed, "rho")
        v = torch.randn(rows, model.config.d, generator=draw)
        dropped = probes.DROPPED if length > 2 * probes.DROPPED else 0
        rho = probes.contraction(torch.zeros(rows, model.config.d), P, weights, dropped, v)
        if (
            rho >= 1 and dropped
        ):  # a stretch too short to turn to the leading direction says nothing
            raise UserError(
                "the context block does not contract",
                value=f"rho {rho:.3f}",
                remedy="use solver: exact, or a deeper block",
            )
        return rho
