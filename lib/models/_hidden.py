"""Frozen blocks of another family inside CVFP: built from its section, filled from an artefact."""

from __future__ import annotations

from typing import Any

from lib.core.errors import UserError
from lib.core.typed import typed
from lib.models import load_family
from lib.nn.contexts.frozen import Frozen


def typed_model(family: str, section: Any) -> Any:
    """Another family's Config from its section."""
    return typed(load_family(family).Config, section or {}, "model.cvfp.hidden.model")


def frozen_of(hidden: Any, vocab_size: int) -> Frozen:
    """The blocks that `hidden` (cvfp.Hidden) names, weights not yet filled."""
    body = load_family(hidden.family).Model(typed_model(hidden.family, hidden.model), vocab_size)
    body.vocab_size = vocab_size
    return Frozen(body, hidden.layer, hidden.context)


def take_blocks(model: Any, source: Any) -> None:
    """Weights of the blocks behind `source`; UserError where the config knows others, or none."""
    own, theirs = model.config.hidden, source.hidden
    if own is not None and theirs is not None and own.family == theirs["family"]:
        mine = typed_model(own.family, own.model), own.layer, own.context
        held = typed_model(own.family, theirs["model"]), theirs["layer"], theirs["context"]
        if mine == held:
            model.frozen.load_state_dict(source.blocks())
            return
    names = ("family", "layer", "context")
    theirs = theirs and {name: theirs[name] for name in names}
    own = own and {name: getattr(own, name) for name in names}
    raise UserError(
        "token vectors are of other hidden states", value=f"embeddings {theirs}, model {own}",
        remedy="set model.cvfp.hidden to that, and its `model` to the section of the family",
    )  # fmt: skip
