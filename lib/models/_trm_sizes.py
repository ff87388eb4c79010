"""What follows from a TRM's Config: calls, applications, widths and FLOPs, its twins' included.

Pure arithmetic without torch, since sections are checked before it is imported (lib/core/heads.py).
A twin (`match: trm`) describes the recursion in the same keys and derives its own sizes from them.
Letters: n latent steps, T_d deep steps, N supervision steps, k blocks with weights of their own,
C calls of f, A applications of a block, A_g those with a gradient, d width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self


class Counts:
    """The part of `Config` that is derived; these are the fields that it reads."""

    variant: Literal["trm", "looped", "plain"]
    match: Literal["trm"] | None
    equal: Literal["params", "flops"]
    width: int
    depth: int
    block: Literal["pre_norm", "post_ln"]
    join: Literal["add", "concat"]
    schedule: Literal["last", "every"]
    grad: Literal["all", "last"]
    latent_steps: int | None
    deep_steps: int | None
    supervision_steps: int | None
    loops: int | None
    out_norm: bool | None
    input_norm: bool | None

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
    def recursion(self) -> Self:
        """What a twin is a twin of; anything else is itself."""
        if self.match is None:
            return self
        return replace(self, variant="trm", match=None)  # type: ignore[arg-type]  # a Config

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


def forward_flops(config: Counts, T: int) -> int:
    """FLOPs a token of all A block applications and joins: 2 a weight, 2 T d for attention."""
    d = config.width
    mlp = (2 if config.block == "post_ln" else 3) * d * config.inner
    total = config.applications * (2 * (4 * d * d + mlp) + 2 * T * d)
    if config.variant == "trm" and config.join == "concat":
        z, y = config.joins
        total += config.counts[2] * 2 * (3 * z + 2 * y) * d * d
    return total


def inference_flops(config: Counts, T: int, V: int) -> int:
    """A c + h: one head, after the last step."""
    return forward_flops(config, T) + 2 * V * config.width


def training_flops(config: Counts, T: int, V: int) -> int:
    """A c + N h + 2 (A_g c + N h) FLOPs a token."""
    body, losses = forward_flops(config, T), config.counts[2] if config.variant == "trm" else 1
    heads = losses * 2 * V * config.width
    return body + heads + 2 * (body * config.gradients // config.applications + heads)
