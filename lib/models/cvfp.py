"""CVFP: context vectors as the fixed point of a recurrence, and a token model that reads them.

One Model for both phases. `fixed_point`: the context block learns without targets, from
fixed-point, diversity and memory terms (lib/nn/contexts/objective.py). `predict`: token block and
head on its vectors. forward is the exact recurrence from its state; None = zeros.
In: ids (B, T). Out: logits (B, T, V).
Invariant: any split of a sequence into chunks gives the same logits.
Letters: B rows, T time, V vocabulary, e token width, d context width, L depth, K token layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import UserError
from lib.core.refusal import refuse
from lib.core.rng import torch_generator
from lib.models._hidden import frozen_of, take_blocks
from lib.models.base import Batch, Defaults, Family, Group, Optim, ReadWeights
from lib.nn.contexts.arms import (
    controls,
    given_instead,
    given_width,
    starts_from_weights,
    verdict,
)
from lib.nn.contexts.context import EPS, Layer, Weights, initial, shifts, trajectory
from lib.nn.contexts.handover import take_phase1
from lib.nn.contexts.predicting import Head, TiedHead, TokenBlock
from lib.nn.contexts.probes import contraction, look
from lib.nn.contexts.solver import Solved, Solver
from lib.nn.linear import Table

__all__ = ["Config", "Model", "controls", "starts_from_weights", "verdict"]

# What null stands for: (the project's value, the original's under seed_compat; cvfp.md 2, 5, 8).
CHOICES: dict[str, tuple[Any, Any]] = {
    "solver": ("exact", "jacobi"),
    "reset": ("document", "never"),
    "depth": (1, 6),
    "last_affine": (False, True),
    "activation": ("relu", "relu"),
    "input_tokens": (1, 1),
    "history": (0, 0),
    "head": ("untied", "untied"),
    "kind": ("logdet", "mcdl"),
    "fixed_point": (0.1, 0.5),
    "diversity": (0.01, 0.5),
    "memory": (1.0, 0.0),
    "noise": (0.1, 0.1),
    "grad": ("bptt", "stale"),
    "sweeps": (None, 10),
    "chunk_tokens": (1_000_000, 1_000_000),
    "wrap": (True, True),
    "buffers": ("double", "double"),
    "train_context": (True, False),
}
# Free under seed_compat; every other key that contradicts it is refused.
FREE = ("depth", "sweeps", "chunk_tokens", "diversity", "noise", "buffers", "train_context")
RHO_ROWS = 64  # rows whose contraction is followed
DEFECTS = ("ln_skew", "length_weight", "bf16_state", "sequential_start")


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Frozen blocks that make token vectors: those behind embeddings of source `hidden`."""

    family: str = "gpt"  # one whose weights may be streamed: blocks that take x alone
    model: Any = None  # that family's section
    layer: int = 1  # blocks passed
    context: int = 256  # tokens of a window


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.cvfp`; a run overlays its phase. Null has the value of CHOICES."""

    phase: Literal["fixed_point", "predict"] = "predict"
    width: int = 128  # e, of token vectors: that of the embeddings the run reads
    context_width: int | None = None  # d; null: e
    depth: int | None = None  # L
    token_depth: int | None = None  # K; null: L. Beyond L layers read z^L
    context: int | None = None  # longest row, null: the recurrence has no limit
    activation: Literal["relu", "gelu"] | None = None
    input_tokens: int | None = None  # token vectors that a step reads
    history: int | None = None  # earlier contexts that the token block reads
    last_affine: bool | None = None  # gain and offset in the last LN; inflates diversity
    head: Literal["untied", "tied"] | None = None  # tied: U = E P
    reset: Literal["document", "never"] | None = None  # where the state is 0
    # What the token block is given as z; all but `context` are controls (cvfp.md 14).
    given: Literal["context", "none", "previous", "leaky"] = "context"
    previous: int = 1  # token vectors of `previous`
    train_context: bool | None = None  # the predicting phase goes on training f
    train_embedding: bool = False
    hidden: Hidden | None = None  # null: a vector is a function of its id
    seed_compat: bool = False  # the original's algorithm, without its defects
    seed_defects: tuple[str, ...] = ()  # of ln_skew, length_weight, bf16_state, sequential_start
    # the fixed-point phase
    solver: Literal["exact", "jacobi", "deer"] | None = None
    grad: Literal["bptt", "stale"] | None = None
    fixed_point: float | None = None  # weights of the three terms
    diversity: float | None = None
    memory: float | None = None
    kind: Literal["mcdl", "oacd", "vicreg", "logdet", "sigreg"] | None = None
    memory_kind: Literal["predict", "recall"] = "predict"
    horizons: tuple[int, ...] = (1, 2)  # predict: tokens ahead
    lags: tuple[int, ...] = (1, 2, 4)  # recall: tokens back
    noise: float | None = None  # sigma
    micro_tokens: int = 1024  # tokens of a Jacobi micro-batch; fixes the order of sums
    sweeps: int | None = None  # jacobi: sweep 0 without learning, the others with
    chunk_tokens: int | None = None  # jacobi: tokens of one step
    wrap: bool | None = None  # jacobi: the first token follows the last one
    buffers: Literal["double", "slots"] | None = None
    spare_chunks: int = 1  # of slots
    store_dtype: Literal["float16", "bfloat16", "float32", "float64", "int8"] = "float16"
    halo_tol: float = 1e-6  # rms, of sweep 0; the matmuls' rounding where that is larger
    converged_mse: float = 0.03  # a token has converged below it
    stop_at_converged: float | None = None  # share of tokens at which sweeps end
    keep_contexts: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.hidden, Mapping):  # as JSON gives it
            object.__setattr__(self, "hidden", Hidden(**self.hidden))
        get, own = self.get, {n: getattr(self, n) for n in CHOICES}
        fixed = [n for n in CHOICES if n not in FREE]
        sizes = ("width", "context_width", "depth", "token_depth", "context", "input_tokens")
        counts = ("previous", "micro_tokens", "chunk_tokens", "spare_chunks")
        weights = ("fixed_point", "diversity", "memory", "noise")
        jacobi, first = get("solver") == "jacobi", self.phase == "fixed_point"
        refuse(
            self,
            *(
                (self.seed_compat and own[n] not in (None, CHOICES[n][1]), n,
                 f"contradicts seed_compat, whose {n} is {CHOICES[n][1]}")
                for n in fixed
            ),
            *(((getattr(self, n) or 1) < 1, n, "use 1 or more") for n in (*sizes, *counts)),
            *((get(n) < 0, n, "use 0 or more") for n in weights),
            (get("history") not in (0, 1, 2), "history", "use 0, 1 or 2"),
            *((x not in DEFECTS, "seed_defects", x, f"choose of {', '.join(DEFECTS)}")
              for x in self.seed_defects),
            (bool(self.seed_defects) and not self.seed_compat, "seed_defects",
             ", ".join(self.seed_defects), "only with seed_compat: true"),
            (self.solver == "deer", "solver", "it is not built; use exact or jacobi"),
            (get("solver") == "exact" and get("reset") == "never" and first, "solver",
             "one stream (reset: never) has no documents to step in parallel; use jacobi"),
            (jacobi and own["grad"] == "bptt", "grad",
             "jacobi's gradient is one step long; use grad: stale or solver: exact"),
            (not jacobi and own["sweeps"] is not None, "sweeps",
             "sweeps are jacobi's; give steps, or solver: jacobi"),
            (jacobi and first and (get("sweeps") or 0) < 2, "sweeps", "use 2 or more"),
            (first and not any(get(n) > 0 for n in weights[:3]), "fixed_point, diversity, memory",
             0, "one weight must be above 0"),
            (first and self.given != "context", "given",
             "a control of the predicting phase; the first one learns contexts"),
            (self.memory_kind == "predict" and not self.horizons, "horizons", "[]", "name one"),
            *((x < 1, "horizons", x, "use 1 or more") for x in self.horizons),
            *((x < 1, "lags", x, "use 1 or more") for x in self.lags),
            (self.hidden is not None and self.train_embedding, "train_embedding",
             "hidden states have no table to learn"),
            (not 0 < self.halo_tol < 1, "halo_tol", "use 0 < x < 1"),
        )  # fmt: skip

    def get(self, name: str) -> Any:
        """The value of a key, null resolved."""
        own = getattr(self, name)
        return CHOICES[name][self.seed_compat] if own is None else own

    @property
    def d(self) -> int:
        """Context width."""
        return self.context_width or self.width

    @property
    def layers(self) -> int:
        """K, token layers."""
        return int(self.token_depth or self.get("depth"))


class Model(Solved, Family):  # type: ignore[misc]  # stream_rows is the solver's
    """Token table -> context block -> token block -> head; which of them depends on the phase."""

    activation_bytes = 2**30  # graphs of a step that may be kept, runtime.activation_bytes
    seed = 0
    reset_id: Tensor
    head: Head | TiedHead
    solver: Solver

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_context = config, vocab_size, config.context
        self.learns_contexts = config.phase == "fixed_point"
        self.whole_steps, self.predicts = self.learns_contexts, not self.learns_contexts
        get, e, d = config.get, config.width, config.d
        dtype = torch.bfloat16 if "bf16_state" in config.seed_defects else None
        self.source: Any = None
        self.solver = Solver()
        self.embedding = Table(vocab_size, e)
        self.embedding.weight.requires_grad_(config.train_embedding and self.predicts)
        if config.hidden is not None:
            self.frozen = frozen_of(config.hidden, vocab_size)
        self.register_buffer("reset_id", torch.empty((), dtype=torch.int64))  # -1: none
        L = get("depth") if config.given == "context" else 0
        self.context_block = nn.ModuleList(
            Layer(d, d + get("input_tokens") * e, get("last_affine") or i < L - 1, dtype)
            for i in range(L)
        )
        if self.predicts and not get("train_context"):
            self.context_block.requires_grad_(False)
        if config.given == "leaky":
            self.leaky = nn.Linear(e, d, bias=False).requires_grad_(False)
        self.memory_head = nn.ModuleList()
        self.token_block = TokenBlock()
        if self.learns_contexts:
            ahead = config.horizons if config.memory_kind == "predict" else config.lags
            heads = ahead if get("memory") > 0 else ()
            self.memory_head.extend(nn.Linear(d, e, bias=False) for _ in heads)
            self.solver = self._solver()
            return
        width = given_width(config)
        self.token_block.extend(Layer(e, width + e, dtype=dtype) for _ in range(config.layers))
        self.head = (Head if get("head") == "untied" else TiedHead)(e, vocab_size)

    def _solver(self) -> Solver:
        """What learns without targets; imported here, an export is without it."""
        if self.config.get("solver") == "jacobi":
            from lib.nn.contexts.jacobi import Jacobi

            return Jacobi(self)
        from lib.nn.contexts.exact import Exact

        return Exact(self)

    # ------------------------------------------------------------ tokens and contexts

    @property
    def inputs(self) -> Literal["tokens", "embeddings", "contexts"]:  # type: ignore[override]  # by what was opened
        """Rows are read where the artefact holds one for each token, or contexts are frozen."""
        if self.source is None:
            return "tokens"
        if self.solver.has_contexts:
            return "contexts"
        return "embeddings" if self.source.has_rows else "tokens"

    def read_from(self, source: Any) -> None:
        """Take the table and the reset id of an embeddings artefact, and read from it."""
        table, self.source = source.table(), source
        if table.shape[1] != self.config.width:
            raise UserError(
                "token vectors are of another width",
                value=f"embeddings {table.shape[1]}, model.cvfp.width {self.config.width}",
                remedy=f"set model.cvfp.width: {table.shape[1]}",
            )
        if self.config.hidden is not None or source.hidden is not None:
            take_blocks(self, source)
        frozen = self.predicts and not self.config.get("train_context")
        if frozen and self.config.given == "context" and self.config.get("reset") == "never":
            from lib.nn.contexts.stream_contexts import StreamContexts

            self.solver = StreamContexts(self)
        with torch.no_grad():
            self.reset_id.fill_(-1 if source.reset_id is None else source.reset_id)
            self.embedding.weight.copy_(table)

    def contextual(
        self, tokens: Tensor, state: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Vectors (T, B, e) of rows of ids (T, B), and what continues them."""
        if self.config.hidden is None:
            return self.embed(tokens), {}
        tokens, before = tokens.t(), (state or {}).get("window")
        e, window = self.frozen.rows(tokens, tokens == self.reset_id, before)
        return self.seen(e.to(self.embedding.weight.dtype)).transpose(0, 1), {"window": window}

    def embed(self, tokens: Tensor) -> Tensor:
        """Vectors (..., e) of ids by themselves: the one way in both phases, but for `hidden`."""
        return self.seen(F.embedding(tokens, self.embedding.weight))

    def seen(self, e: Tensor) -> Tensor:
        """Vectors as this phase sees them; the original's second one normed them again."""
        if self.predicts and "ln_skew" in self.config.seed_defects:
            return F.layer_norm(e, e.shape[-1:], eps=EPS)
        return e

    def weights(self) -> Weights:
        """The context block as the solvers take it."""
        return Weights.of(self.context_block, self.config.get("activation") == "gelu")

    def keep_of(self, tokens: Tensor) -> Tensor | None:
        """0 where a document begins, tokens (T, B); None where nothing is ever reset."""
        if self.config.get("reset") == "never":
            return None
        return tokens.ne(self.reset_id).to(self.embedding.weight.dtype)

    def inputs_of(
        self, e: Tensor, keep: Tensor | None, last: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """u (T, B, q e) = [e_t; e_{t-1}; ..] and what continues it; e (T, B, e)."""
        count = self.config.get("input_tokens") - 1
        last = last or tuple(e.new_zeros(e.shape[1:]) for _ in range(count))
        earlier, after = shifts(e, keep, last)
        return torch.cat((e, *earlier), -1), after

    def given(
        self, e: Tensor, keep: Tensor | None, state: Mapping[str, Any], before: Tensor | None = None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """z of every layer of the token block, L or 1 of (T, B, width), and the new state.

        before (T, B, d): the true c_{t-1} where they are known, so that nothing is stepped over.
        """
        config, B = self.config, e.shape[1]
        if config.given != "context":
            R = self.leaky.weight if config.given == "leaky" else None
            return given_instead(config, e, keep, state, R)
        c = state["c"] if state else e.new_zeros(B, config.d)
        u, tokens = self.inputs_of(e, keep, state.get("tokens"))
        weights = self.weights()
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.get("train_context")):
            P = weights.token_side(u)
            if before is None:
                Z = trajectory(c, P, weights, keep)
            else:  # every token is a row of one step
                flat = [p.flatten(0, 1)[None] for p in P]
                Z = [z.view_as(before) for z in trajectory(before.flatten(0, 1), flat, weights)]
        p = config.get("history")
        last = state.get("contexts") or (e.new_zeros(B, config.d),) * p
        earlier, contexts = shifts(Z[-1], keep, last)
        # the last context itself is c: the next step's reset decides whether it counts
        after = {"c": Z[-1][-1], "tokens": tuple(tokens), "contexts": tuple(contexts)}
        return [torch.cat((z, *earlier), -1) if p else z for z in Z], after

    def hidden(
        self,
        tokens: Tensor,
        state: Mapping[str, Any] | None = None,
        e: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """tokens (B, T) -> h^K (B, T, e) and the state that continues the rows."""
        tokens = tokens.t()
        window = {}
        if e is None:
            e, window = self.contextual(tokens, state)
        else:
            e = e.transpose(0, 1)
        keep = self.keep_of(tokens)
        Z, after = self.given(e, keep, state or {}, before)
        h = self.token_block(e, Z)
        return h.transpose(0, 1), after | window

    def forward(
        self, tokens: Tensor, state: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """tokens (B, T) int64 -> logits (B, T, V), and the state that continues the rows."""
        if self.learns_contexts:  # no head yet: uniform
            return self.embedding.weight.new_zeros(*tokens.shape, self.vocab_size), {}
        h, after = self.hidden(tokens, state)
        return self.head.logits(h, self.embedding.weight), after

    def logits_at(
        self,
        tokens: Tensor,
        where: Tensor,
        state: Mapping[str, Any] | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (N, V) of the marked positions (B, T) alone, and the state."""
        if self.learns_contexts:
            return super().logits_at(tokens, where, state)
        h, after = self.hidden(tokens, state)
        return self.head.logits(h[where], self.embedding.weight), after

    # ------------------------------------------------------------ losses

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """The fixed-point terms, or one loss: mean cross-entropy of the batch's targets."""
        if self.learns_contexts:
            yield from self.solver.losses(batch)
            return
        e, before = self._read(batch)
        yield self._cross_entropy(batch.tokens, batch.targets, "mean", e, before)

    def _read(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Token vectors (B, T, e) and the contexts before (T, B, d), where they lie on disk."""
        if self.inputs == "tokens" or batch.rows is None:
            return None, None
        e = before = None
        if self.source.has_rows:
            e = self.seen(self.source.packed(batch.rows)).to(batch.tokens.device)
        if self.solver.has_contexts:
            before = self.solver.before(batch.rows).to(batch.tokens.device)
        return e, before

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy by position (B, T); ln V everywhere while there is no head."""
        if self.learns_contexts:
            return super().token_losses(tokens, targets)
        return self._cross_entropy(tokens, targets, "none")

    def _cross_entropy(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: Any,
        e: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        h, _ = self.hidden(tokens, e=e, before=before)
        return self.head.losses(h, self.embedding.weight, targets, reduction)

    # ------------------------------------------------------------ weights

    def init_weights(self, seed: int) -> None:
        """As the contract says; the seed also decides noise and candidates."""
        self.seed = seed
        super().init_weights(seed)

    def init_buffers(self) -> None:
        """No reset id until an artefact names one."""
        self.reset_id.fill_(-1)
        if self.config.hidden is not None:
            self.frozen.body.init_buffers()

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """Blocks as `context` does; LN of N(0, 1) rows as table; head 0; R, Q ~ N(0, 1 / in)."""
        if name.startswith(("context_block", "token_block")):
            return initial(name, shape, draw)
        if name.startswith("frozen.body."):
            return self.frozen.body.initial(name.removeprefix("frozen.body."), shape, draw)
        if name.startswith("head"):
            return torch.zeros(shape)
        values = torch.empty(shape).normal_(0, 1, generator=draw)
        if name.startswith("embedding"):
            return F.layer_norm(values, values.shape[-1:], eps=EPS)
        return values / shape[1] ** 0.5

    def take_weights(self, config: Any, read: ReadWeights) -> None:
        """Those of the first phase, or of a whole model of ours."""
        found = read(None)
        if any(name.startswith(("head", "token_output")) for name in found):
            super().take_weights(config, read)
        else:
            take_phase1(self, found)

    def load_phase1(self, folder: Path) -> None:
        """`take_phase1` of a finished model's folder."""
        from safetensors.torch import load_file

        take_phase1(self, load_file(folder / "model.safetensors"))

    def param_groups(self, optim: Optim) -> list[Group]:
        """What learns; contexts and the original know no decay, and Adam's usual betas."""
        named = {n: p for n, p in self.named_parameters() if p.requires_grad}
        common: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        if self.config.seed_compat:
            common |= {"betas": (0.9, 0.999), "eps": 1e-8}
        if self.learns_contexts or self.config.seed_compat:
            return [Group(name="all", params=named, **common)]
        matrices = {n: p for n, p in named.items() if p.ndim >= 2}
        rest = {n: p for n, p in named.items() if p.ndim < 2}
        decay = {"weight_decay": optim.weight_decay, "rule": optim.optimizer}
        groups = [Group(name="matrices", params=matrices, **common, **decay)]
        groups.append(Group(name="rest", params=rest, **common))
        return [group for group in groups if group.params]

    def defaults(self) -> Defaults:
        """Constant rate; Jacobi's steps are its sweeps over the chunks of the corpus."""
        chunk = self.stream_rows
        if chunk is None:
            return Defaults(schedule="constant" if self.learns_contexts else "cosine")
        chunks = -(-self.source.tokens // chunk)
        return Defaults(
            schedule="constant", batch_tokens=chunk, steps=chunks * self.config.get("sweeps")
        )

    def flops_per_token(self, T: int) -> int:
        """6 a weight that a token passes; the table's factorisation is not credited."""
        own = (self.context_block, self.token_block, self.memory_head)
        weights = sum(p.numel() for part in own for p in part.parameters() if p.ndim == 2)
        weights += 0 if self.learns_contexts else self.head.weight.numel()
        tied = 0 if self.learns_contexts or self.config.get("head") == "untied" else 1
        return 6 * (weights + tied * self.embedding.weight.numel())

    # ------------------------------------------------------------ what it tells

    @torch.no_grad()
    def diagnostics(self, tokens: Tensor, only: Sequence[str] = ()) -> dict[str, float]:
        """Ranks, contraction and memory of the vectors that the token block reads, rows (B, T)."""
        tokens = tokens.t()
        e, keep = self.contextual(tokens)[0], self.keep_of(tokens)
        if self.config.given == "none":
            return {}
        Z = self.given(e, keep, {})[0][-1]
        mask = torch.ones_like(e[..., 0]) if keep is None else keep
        found = look(Z, e, mask, only)
        if self.config.given == "context" and (not only or "rho" in only):
            rows = min(RHO_ROWS, tokens.shape[1])
            u = self.inputs_of(e[:, :rows], None if keep is None else keep[:, :rows])[0]
            weights = self.weights()
            P, start = weights.token_side(u), torch.zeros_like(Z[0, :rows, : self.config.d])
            v = torch.randn(start.shape, generator=torch_generator(self.seed, "rho")).to(start)
            found["rho"] = contraction(start, P, weights, draw=v)
        return found
