"""The family contract: what trainer, evaluator, generator and exporter may ask of a model.

A family file exports `Config` (frozen dataclass) and `Model`. Required of a Model:
`__init__(config, vocab_size)` and `forward(tokens, state=None) -> (logits, state)`. Everything else
has a working default in `Family`, which a Model inherits from. The head of a family file, down to
the end of `Config`, uses the standard library and lib.core only: parameters are checked before
torch is imported.

Invariant: initial weights depend on (seed, parameter name) alone, not on device, rank, dtype or
order.
Letters: B batch, T context, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lib.core.errors import UserError
from lib.core.rng import torch_generator
from lib.models import families, load_family

__all__ = [
    "STEP", "Batch", "Defaults", "Family", "Group", "Native", "Optim", "ReadWeights", "build",
    "families", "load_family", "require_same",
]  # fmt: skip

# Shapes by name (None: whatever is there) -> tensors; UserError unless names and shapes agree.
ReadWeights = Callable[[Mapping[str, tuple] | None], dict[str, Tensor]]


class _Step:
    """The type of `STEP`."""


STEP = _Step()  # what `losses` yields where the optimizer is to step before the next loss


class Batch(Protocol):
    """What `losses` reads: ids in, ids wanted (-1 = ignored), and their optimizer step."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    step: int
    first_row: int  # number of its first row in the step, over all ranks
    rows: Any  # numbers of the packed rows, (B,); None where the batch is none of those


@dataclass(frozen=True, kw_only=True)
class Optim:
    """What the trainer knows when it asks a family for its parameter groups."""

    lr: float = 3e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices
    optimizer: Literal["adamw", "adamw8bit", "muon", "normuon"] = "adamw"  # of the matrices
    batch_tokens: int = 2**19  # tokens of one optimizer step over all ranks
    steps: int = 1  # steps of the whole run
    tokens: int | None = None  # of the whole run; None: steps * batch_tokens
    param_data_ratio: float | None = None  # tokens per scaling parameter, where the run sets it
    compute_dtype: torch.dtype = torch.float32  # of the matmuls


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters under one rule. `lr` is the peak: the schedule multiplies it.

    adamw: decoupled decay, epsilon after the bias correction; adamw8bit: its moments in a byte
    each, by an optional library. muon, normuon: lib.train.optim; `betas[1]` is normuon's, the
    momentum comes from the schedule, `weight_decay` is scheduled too.
    """

    name: str
    params: Mapping[str, nn.Parameter]
    rule: Literal["adamw", "adamw8bit", "muon", "normuon"] = "adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    iteration_dtype: torch.dtype = torch.bfloat16  # in which muon orthogonalises
    scheduled: bool = True  # False: `lr` holds throughout (rule adamw only)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a family wants where the run's settings say nothing."""

    schedule: str = "cosine"  # a name of lib.train.schedule
    grad_clip: float = 1.0  # global norm, 0 = off
    param_data_ratio: float = 20.0  # tokens per scaling parameter (arXiv 2203.15556)
    batch_tokens: int | Literal["auto"] = 2**19
    steps: int | None = None  # where the family's own state decides the length of a run


@dataclass(frozen=True, kw_only=True)
class Native:
    """A class that transformers has for the model: its config, and where our tensors stand there.

    rows: our name -> rows that are written, where ours are padded. transposed: our names of
    matrices that are stored (in, out) there.
    """

    config: Mapping[str, Any]
    names: Mapping[str, str]  # theirs -> ours
    rows: Mapping[str, int] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()


class Family(nn.Module):
    """Working defaults of every optional method; a Model overrides what it does differently."""

    inputs: Literal["tokens", "embeddings", "contexts"] = (
        "tokens"  # the artefact a batch is read from
    )
    vocab_size: int = 0  # V; set by whoever builds the model
    compiled: tuple[str, ...] = ("forward",)  # methods that the trainer may wrap in torch.compile
    attention: str = "auto"  # engine, runtime.attention; set before `place`
    activation_checkpointing = False  # recompute blocks in backward; set by the trainer
    max_context: int | None = None  # longest row it may be given, None = any
    rows_share_draws = False  # masks follow the rows of a micro-batch, so a resumed run keeps those
    # (model, device, dtype) -> engine over weights that stay in host memory, or None: they fit.
    # Set before `place`; for families that offer lib.nn.stream's Streamable.
    streamer: Callable[[Any, torch.device, torch.dtype], Any] | None = None
    engine: Any = None
    stream_reason = ""  # what the decision was made by
    predicts = True  # its loss is cross-entropy in nats; False: no PPL, no bits per byte
    whole_steps = False  # `losses` gets all rows of a rank's step at once and cuts them itself
    stream_rows: int | None = None  # tokens of a step that reads the corpus as one stream
    activation_bytes = 2**30  # graphs of one step that it may keep, runtime.activation_bytes
    trained_depth = 1  # of thought: the exit that training aims at

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """As every module's; torch's own imports sympy on the way, half a second of every stage."""
        return self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), recurse)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens (B, T) int64 -> logits (B, T, V), and an opaque state that continues the rows."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: Any = None, keep: bool = True
    ) -> tuple[Tensor, Any]:
        """Logits (N, V) of the N positions that `where` (B, n) bool marks, in row order; the state.

        keep: False where nobody goes on from it; then it may be anything. A family with a large
        head overrides this, so that no other logits are computed.
        """
        logits, state = self(tokens, state)
        return logits[where], state

    def reads_rows(self) -> bool:
        """Whether a batch must say which packed rows it holds."""
        return self.inputs != "tokens" and self.stream_rows is None

    def read_from(self, source: Any) -> None:
        """Take what an embeddings artefact gives (lib.data.embeddings), before the first step."""
        raise TypeError(f"{type(self).__name__} reads tokens only")

    # ------------------------------------------------------------ losses

    def losses(self, batch: Batch) -> Iterator[Tensor | _Step]:
        """Scalar losses, one by one, each backpropagated before the next is asked for.

        `STEP` between them: the trainer updates the weights before it goes on, within one batch.
        """
        losses = self.token_losses(batch.tokens, batch.targets)
        yield losses.sum() / (batch.targets >= 0).sum().clamp(min=1)

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every position in nats, (B, T) fp32; 0 where the target is -1."""
        logits, _ = self(tokens)
        flat = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
        )
        return flat.view_as(targets)

    def exit_logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Logits (B, T, V) at every depth of thought at which the model may stop, in one pass."""
        yield self(tokens)[0]

    def exit_flops(self, T: int) -> list[int]:
        """Inference FLOPs of one token at each of these depths."""
        return [self.flops_per_token(T) // 3]

    # ------------------------------------------------------------ weights and place

    def init_weights(self, seed: int) -> None:
        """Fill every parameter from `initial`, then buffers; the same values on any device."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                draw = torch_generator(seed, "weights", name)
                parameter.copy_(self.initial(name, parameter.shape, draw))
            self.init_buffers()

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """First value of a parameter, fp32 on the CPU: N(0, 0.02^2), vectors 1, biases 0."""
        if len(shape) >= 2:
            return torch.empty(shape).normal_(0, 0.02, generator=draw)
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)

    def init_buffers(self) -> None:
        """Fill buffers: a family that registers some overrides this, meta tensors hold nothing."""
        names = [name for name, _ in self.named_buffers()]
        assert not names, f"{type(self).__name__} must fill its buffers {names} in init_buffers"

    def take_weights(self, config: Any, read: ReadWeights) -> None:
        """Begin with another run's weights, trained under `config`; read(shapes) gives them.

        UserError unless names and shapes fit. The one hook of `init_from`: a family refuses here
        what means another model with equal shapes, and holds what would start anew.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        self.load_state_dict(read(own))

    def place(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move to `device`; `dtype` is that of the trainer's autocast, weights keep their own."""
        if self.streamer is not None:
            self.engine = self.streamer(self, torch.device(device), dtype)
        if self.engine is None:
            self.to(device)

    @contextmanager
    def in_place(self) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
        """For inference: yields unit(a), inside which application a finds its weights."""
        if self.engine is None:
            yield nullcontext
        else:
            with self.engine.sweep() as unit:
                yield unit

    def exported(self, config: Any) -> tuple[Any, Family]:
        """(Config, model) as an export writes them, without what only training needs."""
        return config, self

    def calibrated(
        self, weights: Mapping[str, Tensor], bpb: Callable[[Family], float | None]
    ) -> dict[str, Any]:
        """Keys of its config that only the finished weights decide; bpb is that of validation text.

        Called after the last step, when the model's own weights are not needed any more.
        """
        return {}

    def run_block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """block(*inputs), recomputed in backward where activation checkpointing is on."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    # ------------------------------------------------------------ optimisation and accounts

    def matched_steps(self, steps: int | None, T: int) -> int | None:
        """Steps of the run where its settings say `steps`; a twin of equal FLOPs takes others."""
        return steps

    def param_groups(self, optim: Optim) -> list[Group]:
        """Matrices with decay, everything else without; each parameter exactly once."""
        named = dict(self.named_parameters())
        matrices = {name: p for name, p in named.items() if p.ndim >= 2}
        rest = {name: p for name, p in named.items() if p.ndim < 2}
        common = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        decay = {"weight_decay": optim.weight_decay, "rule": optim.optimizer}
        groups = [
            Group(name="matrices", params=matrices, **common, **decay),
            Group(name="rest", params=rest, **common),
        ]
        return [group for group in groups if group.params]

    def defaults(self) -> Defaults:
        """Schedule, clipping, horizon and batch where the run's settings leave them open."""
        return Defaults()

    def group_rows(self, rows: int, share: int) -> int:
        """Rows given to `losses` at once where a micro-batch has `rows` and a rank's step `share`.

        A family that streams takes several micro-batches together and divides them itself.
        """
        return rows if self.engine is None else self.engine.group_rows(rows, share)

    def run_updates(self, updates: Sequence[tuple[Sequence[str], Callable[[], None]]]) -> None:
        """Make the updates of a step: names of parameters, and what changes them, in this order."""
        if self.engine is not None:
            self.engine.run_updates(updates)
            return
        for _, update in updates:
            update()

    def update_parts(self) -> Sequence[Sequence[str]]:
        """Names of parameters that are updated by one call each, in order; () = all by one."""
        return () if self.engine is None else self.engine.update_parts()

    def scaling_params(self) -> int:
        """Parameters that the horizon (tokens per parameter) counts."""
        return sum(p.numel() for p in self.parameters())

    def reference_params(self) -> int:
        """`scaling_params` of the size at which the family's batch and decay were tuned."""
        return self.scaling_params()

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs of one token: 6 a weight, embedding tables apart (arXiv 2204.02311)."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return 6 * sum(p.numel() for p in self.parameters() if p.ndim >= 2 and id(p) not in tables)

    def notes(self) -> list[str]:
        """Lines for the log before the first step, such as the attention engine in use."""
        return []

    def engine_notes(self) -> list[str]:
        """Lines on where the weights lie; no part of the result, which it does not change."""
        if self.engine is not None:
            return self.engine.notes()
        return [f"stream: off | {self.stream_reason}"] if self.stream_reason else []

    def engine_facts(self) -> dict[str, str]:
        """What a checkpoint records of the engine in use; a change is told on resume."""
        return {"stream": "off" if self.engine is None else self.engine.describe()}

    def log_scalars(self) -> dict[str, float]:
        """Extra numbers by name: for the log line of this step, or a generation's footer."""
        return {} if self.engine is None else self.engine.log_scalars()

    def progress(self) -> str | None:
        """The family's own progress lines, printed below the step line."""
        return None

    def statistics(self) -> dict[str, Any]:
        """What final/stats.json holds of the run; empty: no such file."""
        return {}

    def diagnostics(self, tokens: Tensor, only: Sequence[str] = ()) -> dict[str, float]:
        """Numbers about the model's inside on rows of training tokens (B, T), by name.

        only: names that are asked for, empty for all; what else costs nothing may come, too.
        """
        return {}

    # ------------------------------------------------------------ state

    def repeat_state(self, state: Any, n: int) -> Any:
        """`state` with row 0 copied to n rows; tensors are expected to be batch first."""
        if isinstance(state, Tensor):
            return state[:1].expand(n, *state.shape[1:]).contiguous() if state.ndim else state
        if isinstance(state, Mapping):
            return {key: self.repeat_state(value, n) for key, value in state.items()}
        if isinstance(state, tuple | list):
            items = [self.repeat_state(value, n) for value in state]
            return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
        return state

    def planned_bytes(self) -> float:
        """Peak resident bytes of a run on a CPU, held against runtime.memory_limit; 0: no plan."""
        return 0

    def attach(self, folder: Path) -> None:
        """Open or create state that lives on disk beside the weights."""

    def describe(self) -> dict[str, Any]:
        """What the checkpoint's manifest records of the state on disk."""
        return {}

    def flush(self) -> None:
        """Make the state on disk durable, and updates whole, before a manifest names them."""
        if self.engine is not None:
            self.engine.flush()

    def close(self) -> None:
        """End what runs beside the model, when nobody needs it any more."""
        if self.engine is not None:
            self.engine.close()

    def sweep_end(self) -> bool:
        """Called after every step. True: commit a checkpoint before the next one."""
        return False

    def finish(self) -> None:
        """The result is written: remove state on disk that nobody needs any more."""


def require_same(
    own: Mapping[str, Any], theirs: Mapping[str, Any], free: Collection[str] = ()
) -> None:
    """UserError with both values of every setting in which weights belong to another model."""
    told = [f"{n} {theirs[n]}, here {own[n]}" for n in own if n not in free and own[n] != theirs[n]]
    if told:
        raise UserError(
            "weights of another model", value="; ".join(told), remedy="make the keys equal"
        )


def read_in_pieces(
    model: Any, tokens: Tensor, state: Any = None, *, piece: int
) -> tuple[Tensor, Any]:
    """Logits (1, V) after the last of tokens (1, n), and the state; `piece` ids go in at a time.

    So a long beginning costs the memory of a short one, and no logits but those asked for.
    """
    n, logits = tokens.shape[1], None
    for start in range(0, n, piece):
        part = tokens[:, start : start + piece]
        where = torch.zeros_like(part, dtype=torch.bool)
        where[:, -1] = start + piece >= n
        logits, state = model.logits_at(part, where, state)
    assert logits is not None, "there is no id to read"
    return logits, state


def build(
    family: ModuleType,
    config: Any,
    vocab_size: int,
    *,
    seed: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    streamer: Callable[[Any, torch.device, torch.dtype], Any] | None = None,
) -> Family:
    """A model on `device` with first weights of `seed`, or with `weights`, its whole state dict.

    Built on the meta device first, so nothing is computed twice and nothing depends on construction
    order.
    """
    with torch.device("meta"):
        model = family.Model(config, vocab_size)
    model.vocab_size = vocab_size
    model.to_empty(device="cpu")
    if weights is not None:
        model.load_state_dict(weights)
    else:
        assert seed is not None, "give a seed or weights"
        model.init_weights(seed)
    model.streamer = streamer
    model.place(device, dtype)
    return model
