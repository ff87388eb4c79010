"""Token vectors that see their past: the first blocks of a finished model, their weights fixed.

A vector is the LN of the residual stream after `layer` blocks, in windows of `context` tokens from
a document's start, positions from 0 in each. In: a model whose blocks can be applied one by one,
as lib.nn.stream asks for. State: the ids of the window so far, so a window is computed again for
every piece of it: simple, and short beside training, where rows are read from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.nn.contexts.context import EPS


class Frozen(nn.Module):
    """Blocks [0, layer) of `body`; never in training mode, never learning."""

    def __init__(self, body: Any, layer: int, context: int) -> None:
        super().__init__()
        body.stream_units()  # UserError for a form whose blocks need more than x
        body.blocks = body.blocks[:layer]
        self.body, self.layer, self.context = body.requires_grad_(False), layer, context
        super().train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays as it is."""
        return self

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """ids (S, n) at positions 0 .. n - 1 -> (S, n, e), n <= context."""
        x = self.body.embed(ids, (0, 0))
        for number in range(self.layer):
            x = self.body.apply_unit(number, x, (0, 0))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(x, x.shape[-1:], eps=EPS)

    def windows(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Vectors of whole windows of ids (n,), each from position 0."""
        if not pieces:
            return []
        ids = nn.utils.rnn.pad_sequence(
            list(pieces), batch_first=True
        )  # no window sees its padding
        return [row[: len(piece)] for row, piece in zip(self(ids), pieces, strict=True)]

    def rows(
        self, tokens: Tensor, begins: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """tokens (B, T), begins (B, T) a document's first -> (B, T, e), and what continues them.

        That is the ids of the windows so far (B, context) and how many there are (B,).
        """
        B, T = tokens.shape
        zero = tokens.new_zeros(B, self.context), tokens.new_zeros(B)
        held, filled = state or zero
        kept, count = torch.zeros_like(held), torch.zeros_like(filled)
        pieces, places = [], []
        for b in range(B):
            old = int(filled[b])
            ids = torch.cat((held[b, :old], tokens[b]))
            starts = window_starts(begins[b].tolist(), old, self.context)
            for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
                if stop > old:  # else only what was held, and it has ended
                    pieces.append(ids[start:stop])
                    places.append((b, max(0, start - old), stop - old))
            last = ids[starts[-1] :]
            kept[b, : len(last)], count[b] = last, len(last)
        found = self.windows(pieces)
        out = found[0].new_empty(B, T, found[0].shape[-1])
        for (b, start, stop), vectors in zip(places, found, strict=True):
            out[b, start:stop] = vectors[start - stop :]
        return out, (kept, count)


def window_starts(begins: Sequence[bool], held: int, context: int) -> list[int]:
    """Where windows begin in `held` ids followed by one id for each of `begins`."""
    starts = [0]
    for i, begin in enumerate(begins, start=held):
        if i > starts[-1] and (begin or i - starts[-1] == context):
            starts.append(i)
    return starts
