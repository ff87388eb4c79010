"""Hidden states of a finished model as token vectors: what it is, and its rows of the train split.

A row is that of its document's window, positions from 0 in each, so it depends on no chunk or batch
but for rounding; a chunk is computed in one way only, so it has the same bytes whenever it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.core.artifact import plain
from lib.core.data_settings import HiddenVectors
from lib.core.errors import UserError
from lib.data.tokens import TokenStore
from lib.models.base import load_family
from lib.nn.contexts.frozen import Frozen

WINDOWS = 32  # computed at once


@dataclass(frozen=True)
class About:
    """Which blocks; all that building them needs beside weights."""

    family: str
    model: dict[str, Any]  # the family's settings
    vocab_size: int
    layer: int
    context: int

    def build(self, weights: Mapping[str, Tensor]) -> Frozen:
        """The blocks with `weights`, the state dict of a `Frozen`."""
        from lib.core.typed import typed

        family = load_family(self.family)
        config = typed(family.Config, self.model, "metadata.json")
        with torch.device("meta"):
            found = Frozen(family.Model(config, self.vocab_size), self.layer, self.context)
        found.to_empty(device="cpu")
        found.load_state_dict(dict(weights))
        return found


def open_hidden(path: Path, section: HiddenVectors) -> tuple[About, Frozen]:
    """The blocks of the finished model in `path`; UserError where it has not so many."""
    from lib.train.final import Final

    final = Final.open(path)
    model = final.model()
    depth, most = len(model.blocks), model.max_context or final.context  # type: ignore[arg-type]
    layer, context = section.layer or depth, section.context or final.context
    if layer > depth or context > most:
        raise UserError(
            "hidden states lie outside the model", file=path,
            value=f"layer {layer} of {depth}, windows of {context} of at most {most}",
            remedy="lower precompute_embeddings.hidden",
        )  # fmt: skip
    frozen = Frozen(model, layer, context)
    return About(final.family, plain(final.config), final.vocab_size, layer, context), frozen


def hidden_rows(frozen: Frozen, store: TokenStore, start: int, stop: int) -> np.ndarray:
    """Vectors of training tokens [start, stop), (n, e) fp32."""
    spans, parts = windows_of(store, start, stop, frozen.context), []
    for first in range(0, len(spans), WINDOWS):
        here = spans[first : first + WINDOWS]
        ids = [store.tokens("train", a, b - a).astype(np.int64) for a, b in here]
        found = frozen.windows([torch.from_numpy(x) for x in ids])
        for (a, b), vectors in zip(here, found, strict=True):
            parts.append(vectors[max(0, start - a) : min(b, stop) - a])
    return torch.cat(parts).numpy()


def windows_of(store: TokenStore, start: int, stop: int, context: int) -> list[tuple[int, int]]:
    """[first, last) of the windows that hold a token of [start, stop)."""
    offsets = np.asarray(store.documents("train").offsets)
    number = int(np.searchsorted(offsets, start, "right")) - 1
    found = []
    while number < len(offsets) - 1 and offsets[number] < stop:
        first, end = int(offsets[number]), int(offsets[number + 1])
        first += max(0, start - first) // context * context
        for at in range(first, min(end, stop), context):
            found.append((at, min(at + context, end)))
        number += 1
    return found
