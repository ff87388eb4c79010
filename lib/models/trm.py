"""TRM, a tiny recursive model: few blocks applied many times to a latent z and an answer y.

    x = E[t] (+ P[pos]);   f(u) = norm(block_k(... block_1(u))), the same weights in every call
    z-call: z <- f(x + y + z) or f(Wz [x; y; z]);     y-call: y <- f(y + z) or f(Wy [y; z])
    R: n z-calls then one y-call (`last`), or n times both (`every`); T_d times R is one supervision
    step, N of them are the model; each has a loss on head(y), after which y and z are detached.
Source: arXiv 2510.04871, made causal: every call attends backwards only, every position predicts.
`variant` builds twins of the same blocks: looped = u <- f(u + x) r times, plain = f once.
Invariant: with a fixed depth the state (K/V of every block application) equals the full forward.
Letters: B batch, T context, n positions of this call, V vocabulary, d width, H heads, D = d / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import UserError
from lib.core.refusal import refuse
from lib.core.rng import torch_generator
from lib.kernels.linear_cross_entropy import linear_cross_entropy
from lib.models.base import (
    STEP,
    Batch,
    Defaults,
    Family,
    Group,
    Optim,
    ReadWeights,
    require_same,
)
from lib.nn.blocks import Past, PostNorm, PreNorm
from lib.nn.linear import Table
from lib.nn.norm import rms_norm
from lib.nn.rope import Tables, rope_tables

ROPE_THETA = 10_000.0
Q_WEIGHT, Q_BIAS = 0.5, -5.0  # share of the q-head's loss; it begins by not halting


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.trm`. A twin (`match: trm`) keeps these keys and derives its own sizes."""

    variant: Literal["trm", "looped", "plain"] = "trm"
    match: Literal["trm"] | None = None  # sizes follow from the recursion described here
    equal: Literal["params", "flops"] = "flops"  # what such a twin has in common with it
    width: int = 256  # d
    heads: int = 4  # H
    depth: int = 2  # k, blocks with weights of their own
    context: int = 512  # most positions
    block: Literal["pre_norm", "post_ln"] = "pre_norm"
    join: Literal["add", "concat"] = "add"
    schedule: Literal["last", "every"] = "last"  # y-calls: after n z-calls, or after each
    init: Literal["fixed", "input"] = "fixed"  # first y, z: two drawn vectors, or x and 0
    grad: Literal["all", "last"] = "all"  # deep steps of a supervision step that get a gradient
    latent_steps: int | None = None  # n, null: 1
    deep_steps: int | None = None  # T_d, null: 2
    supervision_steps: int | None = None  # N, null: 2
    loops: int | None = None  # r of variant looped, null: 1
    out_norm: bool | None = None  # RMSNorm at the end of f, null: with pre_norm
    input_norm: bool | None = None  # RMSNorm of x, null: with pre_norm; else y and z drown it
    dropout: float = 0.0  # of what attention and MLP add
    tied: bool = True  # head = token table
    supervision_weights: Literal["uniform", "linear"] = "uniform"  # of the N losses, sum 1
    supervision_update: Literal["sum", "step"] = "sum"  # optimizer steps: one a batch, or a loss
    decay: Literal["matrices", "all"] = "matrices"  # what weight decay acts on
    halt: Literal["off", "q", "kl", "pooled"] = "off"  # pooled: the recipe's head, never acts
    halt_tau: float = 0.0  # a position stops thinking below it: 1 - q, or KL in nats; 0 = never
    act_threshold: float = 0.95  # pooled: share of right tokens that makes the label 1
    act_weight: float = 1.0  # pooled: factor of its loss
    loss_chunk: int | Literal["auto"] = "auto"  # rows whose logits exist at once in the loss

    def __post_init__(self) -> None:
        d, H = self.width, self.heads
        counts = ("width", "heads", "depth", "deep_steps", "supervision_steps", "loops")
        whole = [h for h in range(1, d + 1) if d % h == 0 and (d // h) % 2 == 0]
        near = sorted(whole, key=lambda h: abs(h - H))[:3]
        alien = ("latent_steps", "deep_steps", "supervision_steps")
        set_alien = self.variant != "trm" and self.match is None
        refuse(
            *((x is not None and x < 1, n, x, "use 1 or more")
              for n, x in ((n, getattr(self, n)) for n in counts)),
            (self.context < 2, "context", self.context, "use 2 or more"),
            ((self.latent_steps or 0) < 0, "latent_steps", self.latent_steps, "use 0 or more"),
            (self.latent_steps == 0 and self.schedule == "every", "latent_steps", 0,
             "use 1 or more with schedule every"),
            (self.latent_steps == 0 and self.init == "fixed", "latent_steps", 0,
             "use init input: no z-call would ever read x"),
            (H > 0 and H not in whole, "heads", H,
             f"width {d} splits into heads of even width; nearest: {', '.join(map(str, near))}"),
            *((set_alien and getattr(self, n) is not None, n, getattr(self, n),
               f"set null: variant {self.variant} has none") for n in alien),
            (self.loops is not None and (self.variant != "looped" or self.match is not None),
             "loops", self.loops, "set null: only variant looped without match has loops"),
            (self.variant == "trm" and self.match is not None, "match", self.match,
             "set null: only variants looped and plain are twins"),
            (self.halt != "off" and set_alien, "halt", self.halt, "use off"),
            (not 0 <= self.dropout < 1, "dropout", self.dropout, "use 0 <= x < 1"),
            (self.halt_tau < 0, "halt_tau", self.halt_tau, "use 0 (never) or more"),
            (self.loss_chunk != "auto" and self.loss_chunk < 1, "loss_chunk", self.loss_chunk,
             "use auto, or 1 or more"),
        )  # fmt: skip

    @property
    def counts(self) -> tuple[int, int, int]:
        """(n, T_d, N) of the recursion."""
        n, T_d, N = self.latent_steps, self.deep_steps, self.supervision_steps
        return 1 if n is None else n, 2 if T_d is None else T_d, 2 if N is None else N

    @property
    def joins(self) -> tuple[int, int]:
        """(z-calls, y-calls) of one supervision step."""
        n, T_d, _ = self.counts
        return T_d * n, T_d * (n if self.schedule == "every" else 1)

    @property
    def recursion(self) -> Config:
        """What a twin is a twin of; anything else is itself."""
        return replace(self, variant="trm", match=None) if self.match else self

    @property
    def calls(self) -> int:
        """C, applications of f in the whole model."""
        if self.variant == "plain":
            return 1
        if self.variant == "looped" and self.match is None:
            return self.loops or 1
        return self.counts[2] * sum(self.joins)

    @property
    def steps(self) -> int:
        """Depth of thought as trained: supervision steps, a twin's likewise; else loops."""
        if self.variant == "plain":
            return 1
        return self.counts[2] if self.variant == "trm" or self.match else self.calls

    @property
    def blocks(self) -> int:
        """Blocks with weights of their own."""
        every = self.variant == "plain" and self.match is not None and self.equal == "flops"
        return self.depth * self.recursion.calls if every else self.depth

    @property
    def applications(self) -> int:
        """A, applications of a block in the whole model."""
        return self.calls * self.blocks

    @property
    def gradients(self) -> int:
        """A_g, applications that are differentiated."""
        truncated = self.variant == "trm" and self.grad == "last"
        return self.applications // (self.counts[1] if truncated else 1)

    @property
    def inner(self) -> int:
        """Width of the MLP: 4d or 64 ceil(8d / 192); a twin's grows by what the joins cost."""
        d, post = self.width, self.block == "post_ln"
        usual = 4 * d if post else 64 * -(-8 * d // 192)
        if self.match is None or self.join == "add":
            return usual
        if self.equal == "params":
            extra, unit = 5 * d * d + 2 * d * post, (2 * d + 1 if post else 3 * d)
        else:
            z, y = self.joins
            extra, unit = (3 * z + 2 * y) * d * d / (z + y), (2 * d if post else 3 * d)
        return usual + round(extra / self.depth / unit)

    @property
    def normed(self) -> bool:
        """Whether f ends with a norm."""
        return self.block == "pre_norm" if self.out_norm is None else self.out_norm

    @property
    def normed_input(self) -> bool:
        """Whether x is normed."""
        return self.block == "pre_norm" if self.input_norm is None else self.input_norm


# ---------------------------------------------------------------- accounts, pure


def forward_flops(config: Config, T: int) -> int:
    """FLOPs a token of all A block applications and joins: 2 a weight, 2 T d for attention."""
    d = config.width
    mlp = (2 if config.block == "post_ln" else 3) * d * config.inner
    total = config.applications * (2 * (4 * d * d + mlp) + 2 * T * d)
    if config.variant == "trm" and config.join == "concat":
        z, y = config.joins
        total += config.counts[2] * 2 * (3 * z + 2 * y) * d * d
    return total


def inference_flops(config: Config, T: int, V: int) -> int:
    """A c + h: one head, after the last step."""
    return forward_flops(config, T) + 2 * V * config.width


def training_flops(config: Config, T: int, V: int) -> int:
    """A c + N h + 2 (A_g c + N h) FLOPs a token."""
    body, losses = forward_flops(config, T), config.counts[2] if config.variant == "trm" else 1
    heads = losses * 2 * V * config.width
    return body + heads + 2 * (body * config.gradients // config.applications + heads)


# ---------------------------------------------------------------- state


class State(NamedTuple):
    """Rows so far: their length, the depth they were computed at, k and v of each application."""

    position: int
    depth: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Tape:
    """One pass over n positions: K/V by block application, in order, those of `state` before it."""

    def __init__(self, rope: Tables | None, state: State | None = None, keep: bool = False) -> None:
        self.rope, self.state, self.keep = rope, state, keep
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.halted: Tensor | None = None  # (B, n), positions that have stopped thinking

    def past(self, blocks: int, step: int) -> list[Past]:
        """What the next `blocks` applications meet; step: applications of one supervision step."""
        found, first = [], len(self.kept)
        for i in range(first, first + blocks):
            before = (self.state.keys[i], self.state.values[i]) if self.state else (None, None)
            own = None
            if self.halted is not None:
                n = self.halted.shape[1]
                k, v = self.kept[i - step]
                own = k[:, :, -n:], v[:, :, -n:]
            found.append(Past(*before, self.halted, own))
        return found

    def add(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        """K/V of applications that were just made."""
        if self.keep:
            self.kept += kept

    def repeat_last(self, step: int) -> None:
        """Every position has stopped: K/V of the last supervision step stand in for the next."""
        for i in range(len(self.kept) - step, len(self.kept)):
            k, v = self.kept[i]
            if self.state:  # the past of the later applications is their own
                new = slice(self.state.position, None)
                k = torch.cat((self.state.keys[i + step], k[:, :, new]), dim=2)
                v = torch.cat((self.state.values[i + step], v[:, :, new]), dim=2)
            self.kept.append((k, v))

    def ended(self, position: int, depth: int) -> State:
        """The state that continues the rows."""
        keys, values = zip(*self.kept, strict=True)
        return State(position, depth, keys, values)


# ---------------------------------------------------------------- the model


class Model(Family):
    """Table -> recursion, loops or one pass of the same blocks -> head."""

    compiled = ("f",)
    y0: Tensor
    z0: Tensor
    join_z: nn.Linear
    join_y: nn.Linear

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_context = config, vocab_size, config.context
        d, post = config.width, config.block == "post_ln"
        self.table = Table(vocab_size, d)
        self.positions = Table(config.context, d) if post else None
        kind = PostNorm if post else PreNorm
        sizes = (d, config.heads, config.inner, config.dropout)
        self.blocks = nn.ModuleList(kind(*sizes) for _ in range(config.blocks))
        self.head = None if config.tied else nn.Linear(d, vocab_size, bias=False)
        recursive = config.variant == "trm"
        if recursive and config.join == "concat":
            self.join_z = nn.Linear(3 * d, d, bias=post)
            self.join_y = nn.Linear(2 * d, d, bias=post)
        if recursive and config.init == "fixed":
            self.register_buffer("y0", torch.empty(d))
            self.register_buffer("z0", torch.empty(d))
        if recursive and config.halt in ("q", "pooled"):
            self.halt_head = nn.Linear(d, 1)
        if recursive and config.halt == "pooled":
            self.halt_norm = nn.LayerNorm(d)
        self.depth = self.trained_depth = config.steps  # at use the first may be another number
        self._losses: list[Tensor] = []  # unweighted, of the last batch
        self._thought = [0.0, 0, 0.0]  # since `set_depth`: exit steps, positions, heads beside one

    # ------------------------------------------------------------ the recursion

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """x (B, n, d) of tokens at positions from `start` on."""
        x = self.table(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + tokens.shape[1]]
        return rms_norm(x) if self.config.normed_input else x

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and z before the first step; looped begins at 0, so that its first call is f(x)."""
        if self.config.variant != "trm":
            return torch.zeros_like(x), x
        if self.config.init == "input":
            return x, torch.zeros_like(x)
        return self.y0.to(x.dtype).expand_as(x), self.z0.to(x.dtype).expand_as(x)

    def f(
        self, u: Tensor, rope: Tables | None, past: list[Past] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All blocks once, u (B, n, d) -> the same, and k, v of each block."""
        kept = []
        for i, block in enumerate(self.blocks):
            u, k, v = self.run_block(block, u, rope, past[i] if past else Past())
            kept.append((k, v))
        return (rms_norm(u) if self.config.normed else u), kept

    def call(self, u: Tensor, tape: Tape) -> Tensor:
        """f(u) with its K/V on the tape."""
        past = tape.past(len(self.blocks), self._per_step) if tape.keep else None
        u, kept = self.f(u, tape.rope, past)
        tape.add(kept)
        return u

    def improve(self, x: Tensor, y: Tensor, z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """R: z from x, y and z, and y from both, in the order of the schedule."""
        concat, n = self.config.join == "concat", self.config.counts[0]
        every = self.config.schedule == "every"
        for i in range(max(n, 1)):
            if n:
                z = self.call(self.join_z(torch.cat((x, y, z), -1)) if concat else x + y + z, tape)
            if every or i == max(n, 1) - 1:
                y = self.call(self.join_y(torch.cat((y, z), -1)) if concat else y + z, tape)
        return y, z

    def advance(self, x: Tensor, y: Tensor, z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """One supervision step: T_d times R; a twin makes as many calls (z plays no part there)."""
        if self.config.variant != "trm":
            for _ in range(self.config.calls // self.trained_depth):
                y = self.call(y + x, tape)
            return y, z
        T_d, truncated = self.config.counts[1], self.config.grad == "last"
        for t in range(T_d):
            wanted = torch.is_grad_enabled() and (not truncated or t == T_d - 1)
            with torch.set_grad_enabled(wanted):
                y, z = self.improve(x, y, z, tape)
        return y, z

    def rope(self, start: int, n: int, x: Tensor) -> Tables | None:
        """Rotary tables of pre_norm blocks for positions from `start` on."""
        if self.positions is not None:
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        head = self.config.width // self.config.heads
        return rope_tables(start, n, head, ROPE_THETA, x.device, dtype)

    def logits(self, y: Tensor) -> Tensor:
        """y (B, n, d) -> logits (B, n, V) in fp32, in fp64 for fp64 weights."""
        z = F.linear(y, self.head_weight)
        return z if z.dtype == torch.float64 else z.float()

    @property
    def head_weight(self) -> Tensor:
        """(V, d), the token table where it is tied."""
        return self.table.weight if self.head is None else self.head.weight

    # ------------------------------------------------------------ using it

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, n) int64 -> logits (B, n, V) of the last step, and the state.

        UserError for a state of another depth, or for positions beyond the context.
        """
        start, n = state.position if state else 0, tokens.shape[1]
        if state and state.depth != self.depth:
            raise UserError(
                "state of another depth", value=f"made at {state.depth}, used at {self.depth}",
                remedy="begin the text anew after set_depth",
            )  # fmt: skip
        self._require_room(start + n)
        x = self.embed(tokens, start)
        (y, z), tape = self.first(x), Tape(self.rope(start, n, x), state, keep=True)
        halting = not self.training and self.config.halt_tau > 0 and self._halts
        before: Tensor | None = None
        for s in range(1, self.depth + 1):
            if tape.halted is not None and bool(tape.halted.all()):
                tape.repeat_last(self._per_step)
                continue
            new_y, new_z = self.advance(x, y, z, tape)
            if tape.halted is not None:
                stays = tape.halted[..., None]
                new_y, new_z = torch.where(stays, y, new_y), torch.where(stays, z, new_z)
            y, z = new_y, new_z
            if halting:
                done, before = self._done(y, before)
                tape.halted = done if tape.halted is None else tape.halted | done
                self._thought[0] += float((~tape.halted).sum()) if s < self.depth else 0.0
        self._thought[0] += tokens.numel() * (1 if halting else self.depth)
        self._thought[1] += tokens.numel()
        return self.logits(y), tape.ended(start + n, self.depth)

    def _require_room(self, positions: int) -> None:
        if positions > self.config.context:
            raise UserError(
                "longer than the model's context",
                value=f"{positions} positions, {self.config.context} fit",
                remedy="give a shorter text",
            )

    @property
    def _per_step(self) -> int:
        """Block applications of one step."""
        return self.config.applications // self.trained_depth

    @property
    def _halts(self) -> bool:
        return self.config.variant == "trm" and self.config.halt in ("q", "kl")

    def _done(self, y: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(positions (B, n) that may stop after this step, log-probabilities for the next one)."""
        tau = self.config.halt_tau
        if self.config.halt == "q":
            return torch.sigmoid(-self._q(y)) < tau, None  # 1 - q
        now = self.logits(y).log_softmax(-1)
        if before is None:
            return torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device), now
        return (now.exp() * (now - before)).sum(-1).clamp(min=0) < tau, now

    def _q(self, y: Tensor) -> Tensor:
        """Logit (B, n) of the q-head: w . rms(y) + b."""
        return self.halt_head(rms_norm(y)).squeeze(-1)

    @torch.no_grad()
    def exit_logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Logits after every step up to twice the trained depth, in one pass."""
        self._require_room(tokens.shape[1])
        x = self.embed(tokens)
        (y, z), tape = self.first(x), Tape(self.rope(0, tokens.shape[1], x))
        for _ in self.exit_flops(tokens.shape[1]):
            y, z = self.advance(x, y, z, tape)
            yield self.logits(y)

    def exit_flops(self, T: int) -> list[int]:
        """Inference FLOPs a token at each exit."""
        steps = 1 if self.config.variant == "plain" else 2 * self.trained_depth
        one = forward_flops(self.config, T) // self.trained_depth
        return [s * one + 2 * self.vocab_size * self.config.width for s in range(1, steps + 1)]

    def set_depth(self, depth: int) -> None:
        """Think `depth` steps from now on; UserError where it cannot."""
        if depth < 1 or self.config.variant == "plain":
            raise UserError(
                "not possible", value=f"depth is {depth}",
                remedy="use 1 or more" if depth < 1 else "drop it: this model thinks once",
            )  # fmt: skip
        self.depth, self._thought = depth, [0.0, 0, 0.0]

    # ------------------------------------------------------------ losses

    def losses(self, batch: Batch) -> Iterator[Any]:
        """One weighted loss a supervision step, sum of weights 1; y and z go on detached.

        x is computed again in each: every loss frees its graph, memory does not grow with N.
        """
        weights, tokens, targets = self.loss_weights(), batch.tokens, batch.targets
        self._losses, y, z, x = [], None, None, None
        for s, weight in enumerate(weights):
            if x is None:
                x = self.embed(tokens)
                rope = self.rope(0, tokens.shape[1], x)
            if y is None or z is None:
                y, z = self.first(x)
            y, z = self.advance(x, y, z, Tape(rope))
            if not weight:  # a twin's gradient goes through all of its loops
                continue
            loss = self._cross_entropy(y, targets, "mean")
            self._losses.append(loss.detach())
            penalty = self.halt_loss(y.detach(), targets)
            yield weight * (loss if penalty is None else loss + (penalty - penalty.detach()))
            y, z, x = y.detach(), z.detach(), None
            if self.config.supervision_update == "step" and s + 1 < len(weights):
                yield STEP

    def loss_weights(self) -> list[float]:
        """w_s; the steps of a twin have one loss, at the end."""
        if self.config.variant != "trm":
            return [0.0] * (self.trained_depth - 1) + [1.0]
        N, linear = self.config.counts[2], self.config.supervision_weights == "linear"
        return [2 * s / (N * (N + 1)) if linear else 1 / N for s in range(1, N + 1)]

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy by position (B, T) after the last step, without the logits of all."""
        x = self.embed(tokens)
        (y, z), tape = self.first(x), Tape(self.rope(0, tokens.shape[1], x))
        for _ in range(self.depth):
            y, z = self.advance(x, y, z, tape)
        return self._cross_entropy(y, targets, "none")

    def _cross_entropy(self, y: Tensor, targets: Tensor, reduction: Any) -> Tensor:
        return linear_cross_entropy(
            y, self.head_weight, targets, reduction=reduction, chunk=self.config.loss_chunk
        )

    def halt_loss(self, y: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Binary cross-entropy of the halting head, times its factor; None where it has none.

        y (B, n, d). q: per token on detached y, label = the most probable id is the target. pooled:
        per row over `mask` (B, n; None: all), label = the share of right ids reaches the threshold.
        """
        if self.config.variant != "trm" or self.config.halt not in ("q", "pooled"):
            return None
        right = self.best_ids(y.detach()) == targets
        if self.config.halt == "q":
            raw = F.binary_cross_entropy_with_logits(
                self._q(y), right.to(y.dtype), reduction="none"
            )
            valid = targets >= 0
            return Q_WEIGHT * (raw * valid).sum() / valid.sum().clamp(min=1)
        seen = torch.ones_like(right) if mask is None else mask.bool()
        sizes = seen.sum(1).clamp(min=1)
        label = (right & seen).sum(1) / sizes >= self.config.act_threshold
        q = self.pooled_logit(y, seen)
        return self.config.act_weight * F.binary_cross_entropy_with_logits(q, label.to(q.dtype))

    def pooled_logit(self, y: Tensor, mask: Tensor) -> Tensor:
        """Logit (B,) of the recipe's head on the mean of y over `mask`: it sees the future."""
        mean = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.halt_head(self.halt_norm(mean)).squeeze(-1)

    @torch.no_grad()
    def best_ids(self, y: Tensor, rows: int = 1024) -> Tensor:
        """Most probable id of every position (B, n), in blocks of rows."""
        best = [self.logits(part).argmax(-1) for part in y.flatten(0, 1).split(rows)]
        return torch.cat(best).view(y.shape[:2])

    # ------------------------------------------------------------ weights

    def init_weights(self, seed: int) -> None:
        """As the base class; y0 and z0 are drawn here, since they lie in the state dict."""
        super().init_weights(seed)
        for name, buffer in self.named_buffers():
            draw = torch_generator(seed, "weights", name)
            nn.init.trunc_normal_(buffer, generator=draw)

    def init_buffers(self) -> None:
        """Nothing: y0 and z0 come with the weights, drawn or loaded."""

    def initial(self, name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
        """N(0, 0.02^2); what adds to the stream is smaller by sqrt(2 A); norms 1, biases 0."""
        if name.startswith("halt_head") and self.config.halt == "q":
            return torch.full(shape, Q_BIAS if name.endswith("bias") else 0.0)
        value = super().initial(name, shape, draw)
        adds = name.endswith((".o.weight", ".down.weight"))
        return value / math.sqrt(2 * self.config.applications) if adds else value

    def take_weights(self, config: Config, read: ReadWeights) -> None:
        """Those of the same network, whatever it was trained by."""
        free = {"context", "supervision_steps", "grad", "dropout", "supervision_weights", "decay"}
        free |= {"supervision_update", "halt_tau", "act_threshold", "act_weight", "loss_chunk"}
        require_same(asdict(self.config), asdict(config), free)
        super().take_weights(config, read)

    # ------------------------------------------------------------ optimisation and accounts

    def defaults(self) -> Defaults:
        """Warm-up, then linear decay to 0."""
        return Defaults(schedule="linear", grad_clip=1.0)

    def param_groups(self, optim: Optim) -> list[Group]:
        """Decay on matrices, or on everything as the recipe has it."""
        groups = super().param_groups(optim)
        if self.config.decay == "matrices":
            return groups
        return [replace(group, weight_decay=optim.weight_decay) for group in groups]

    def matched_steps(self, steps: int | None, T: int) -> int | None:
        """A twin of equal FLOPs trains as long as `steps` of the recursion cost."""
        config = self.config
        if config.match is None or config.equal == "params":
            return steps
        if steps is None:
            raise UserError("a twin needs a length", value="steps is null", remedy="set its steps")
        theirs = training_flops(config.recursion, T, self.vocab_size)
        return max(1, round(steps * theirs / training_flops(config, T, self.vocab_size)))

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs of one token, inner steps and a head for each loss included."""
        return training_flops(self.config, T, self.vocab_size)

    def notes(self) -> list[str]:
        """The counts of the recursion."""
        c = self.config
        return [
            f"{c.variant}: {c.calls} calls of {c.blocks} blocks, {c.applications} applications, "
            f"{c.gradients} with gradient; MLP {c.inner}"
        ]

    def log_scalars(self) -> dict[str, float]:
        """Training: the loss of every supervision step. In use: depth, mean exit, FLOPs saved."""
        if self.training:
            if len(self._losses) < 2:
                return {}
            return {f"loss_{s}": float(x) for s, x in enumerate(self._losses, 1)}
        steps, positions, _ = self._thought
        if self.config.variant == "plain" or not positions:
            return {}
        told = {"depth": float(self.depth), "trained_depth": float(self.trained_depth)}
        if self._halts and self.config.halt_tau > 0:
            told["mean_exit"] = steps / positions
            told["flops_saved"] = self._saved(steps / positions)
        return told

    def _saved(self, mean_exit: float) -> float:
        """Share of the FLOPs a token that stopping early leaves out; kl pays a head a step."""
        h = 2 * self.vocab_size * self.config.width
        one = forward_flops(self.config, self.config.context) / self.trained_depth
        heads = mean_exit if self.config.halt == "kl" else 1
        return 1 - (mean_exit * one + heads * h) / (self.depth * one + h)
