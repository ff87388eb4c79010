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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import UserError
from lib.core.refusal import refuse
from lib.core.rng import torch_generator
from lib.kernels.linear_cross_entropy import linear_cross_entropy
from lib.models._trm_sizes import Counts, forward_flops, training_flops
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
from lib.nn.halting import Q_BIAS, Halting, largest_tau
from lib.nn.linear import Table
from lib.nn.norm import rms_norm
from lib.nn.rope import Tables, rope_tables
from lib.nn.tape import State, Tape

ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Config(Counts):
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
    # a position stops thinking below it: 1 - q, or KL in nats; 0 = never. auto: the finished model
    # gets the largest that costs 0.1 % of bits per byte at most
    halt_tau: float | Literal["auto"] = 0.0
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
            self,
            *((x is not None and x < 1, n, "use 1 or more")
              for n, x in ((n, getattr(self, n)) for n in counts)),
            (self.context < 2, "context", "use 2 or more"),
            ((self.latent_steps or 0) < 0, "latent_steps", "use 0 or more"),
            (self.latent_steps == 0 and self.schedule == "every", "latent_steps",
             "use 1 or more with schedule every"),
            (self.latent_steps == 0 and self.init == "fixed", "latent_steps",
             "use init input: no z-call would ever read x"),
            (H > 0 and H not in whole, "heads",
             f"width {d} splits into heads of even width; nearest: {', '.join(map(str, near))}"),
            *((set_alien and getattr(self, n) is not None, n,
               f"set null: variant {self.variant} has none") for n in alien),
            (self.loops is not None and (self.variant != "looped" or self.match is not None),
             "loops", "set null: only variant looped without match has loops"),
            (self.variant == "trm" and self.match is not None, "match",
             "set null: only variants looped and plain are twins"),
            (self.halt != "off" and set_alien, "halt", "use off"),
            (not 0 <= self.dropout < 1, "dropout", "use 0 <= x < 1"),
            (self.halt_tau != "auto" and self.halt_tau < 0, "halt_tau",
             "use 0 (never) or more, or auto"),
            (self.halt_tau == "auto" and self.halt not in ("q", "kl"), "halt_tau",
             "set halt: q or kl"),
            (self.loss_chunk != "auto" and self.loss_chunk < 1, "loss_chunk",
             "use auto, or 1 or more"),
        )  # fmt: skip


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
        if recursive and config.halt != "off":
            self.halting = Halting(config.halt, d, config.act_threshold, config.act_weight)
        self.depth = self.trained_depth = config.steps  # at use the first may be another number
        self._losses: list[Tensor] = []  # unweighted, of the last batch
        self._thought = [0, 0]  # since `set_depth`: exit steps, positions

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
        """y (..., d) -> logits (..., V) in fp32, in fp64 for fp64 weights."""
        z = F.linear(y, self.head_weight)
        return z if z.dtype == torch.float64 else z.float()

    @property
    def head_weight(self) -> Tensor:
        """(V, d), the token table where it is tied."""
        return self.table.weight if self.head is None else self.head.weight

    # ------------------------------------------------------------ using it

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, n) int64 -> logits (B, n, V) of the last step, and the state."""
        y, state = self.think(tokens, state)
        return self.logits(y), state

    def logits_at(
        self, tokens: Tensor, where: Tensor, state: State | None = None, keep: bool = True
    ) -> tuple[Tensor, State]:
        """Logits (N, V) of the marked positions (B, n) alone: a small d makes the head dear."""
        y, state = self.think(tokens, state)
        return self.logits(y[where]), state

    def think(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """tokens (B, n) -> y (B, n, d) after the last step, and the state.

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
        before: Tensor | None = None
        for s in range(1, self.depth + 1):
            if tape.all_halted:
                tape.repeat_last(self._per_step)
                continue
            new_y, new_z = self.advance(x, y, z, tape)
            y, z = tape.held(y, new_y), tape.held(z, new_z)
            if self._tau:
                done, before = self.halting.done(y, self._tau, self.logits, before)
                going_on = tape.halt(done)
                self._thought[0] += going_on if s < self.depth else 0
        self._thought[0] += tokens.numel() * (1 if self._tau else self.depth)
        self._thought[1] += tokens.numel()
        return y, tape.ended(start + n, self.depth)

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
    def _tau(self) -> float:
        """Below it a position stops, 0: none does; training always thinks to the end."""
        tau, config = self.config.halt_tau, self.config
        if self.training or tau == "auto" or config.variant != "trm":
            return 0.0
        return tau if config.halt in ("q", "kl") else 0.0

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
        self.depth, self._thought = depth, [0, 0]

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
        """Loss of the halting head on y (B, n, d), or None; mask: see `Halting.loss`."""
        if self.config.variant != "trm" or self.config.halt not in ("q", "pooled"):
            return None
        right = self.best_ids(y.detach()) == targets
        return self.halting.loss(y, right, targets >= 0, mask)

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
        if name.startswith("halting.head") and self.config.halt == "q":
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

    def calibrated(
        self, weights: Mapping[str, Tensor], bpb: Callable[[Family], float | None]
    ) -> dict[str, Any]:
        """`halt_tau: auto` as a number; UserError where a lossy tokenizer has no bits per byte."""
        if self.config.halt_tau != "auto":
            return {}
        self.load_state_dict(weights)

        def at(tau: float) -> float:
            self.config = replace(self.config, halt_tau=tau)
            found = bpb(self.eval())
            if found is None:
                raise UserError(
                    "no bits per byte to calibrate by", value="halt_tau is auto",
                    remedy="give it a number, or use a lossless tokenizer",
                )  # fmt: skip
            return found

        return {"halt_tau": largest_tau(at)}

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
        steps, positions = self._thought
        if self.config.variant == "plain" or not positions:
            return {}
        told = {"depth": float(self.depth), "trained_depth": float(self.trained_depth)}
        if self._tau:
            told["mean_exit"] = steps / positions
            told["flops_saved"] = self._saved(steps / positions)
        return told

    def _saved(self, mean_exit: float) -> float:
        """Share of the FLOPs a token that stopping early leaves out; kl pays a head a step."""
        h = 2 * self.vocab_size * self.config.width
        one = forward_flops(self.config, self.config.context) / self.trained_depth
        heads = mean_exit if self.config.halt == "kl" else 1
        return 1 - (mean_exit * one + heads * h) / (self.depth * one + h)
