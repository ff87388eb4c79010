"""From the fixed-point phase to the predicting one: weights by name, the original's names too."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lib.core.errors import UserError

ABSENT = ("token_block", "head")  # of the first phase
SURPLUS = ("memory_head", *ABSENT)  # for the second
NAMES = (  # theirs -> ours
    ("context_block.layers.", "context_block."), ("token_block.layers.", "token_block."),
    (".fnn.0.", "."), (".context_norm.", ".norm."), (".token_norm.", ".norm."),
    ("token_embedding.", "embedding."), ("token_output.", "head."),
)  # fmt: skip


def seed_name(name: str) -> str:
    """Our name of a tensor that may bear the original's."""
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def take_phase1(model: Any, found: Mapping[str, Tensor]) -> None:
    """Weights of the fixed-point phase into `model`: token block and head may be missing, memory

    heads be surplus, all else must be there. UserError otherwise, or for other token vectors.
    """
    found = {seed_name(name): tensor for name, tensor in found.items()}
    own = model.state_dict()
    mine = {n for n in own if not n.startswith(ABSENT)}
    theirs = {n for n in found if not n.startswith(SURPLUS)}
    wrong = [n for n in sorted(mine ^ theirs) if n not in ("leaky.weight", "reset_id")]
    wrong += [n for n in sorted(mine & theirs) if own[n].shape != found[n].shape]
    if wrong:
        held = tuple(found[wrong[0]].shape) if wrong[0] in found else "absent"
        needs = tuple(own[wrong[0]].shape) if wrong[0] in own else "none"
        raise UserError(
            "weights of the first phase do not fit",
            value=f"{wrong[0]}: {held}, the model has {needs}",
            remedy="train train_phase1_cvfp with the same model.cvfp",
        )
    table, held = own["embedding.weight"], found["embedding.weight"]
    if model.source is not None and not torch.equal(held.float(), table.float()):
        raise UserError(  # a model without a source takes what comes
            "the first phase was trained on other token vectors",
            value=f"{_print_of(held)}, not {_print_of(table)}",
            remedy="run `dvc repro train_phase1_cvfp` again",
        )
    with torch.no_grad():
        for name in sorted(mine & theirs):
            own[name].copy_(found[name])


def _print_of(table: Tensor) -> str:
    """A short fingerprint of a table, for messages."""
    return f"{zlib.crc32(table.detach().float().cpu().contiguous().numpy().tobytes()):08x}"
