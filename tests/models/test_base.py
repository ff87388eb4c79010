"""The defaults of the contract, on a bigram model that defines nothing but what is required."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lib.core.errors import UserError
from lib.models import families, load_family
from lib.models.base import Family, Optim, build


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 8


class Model(Family):
    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocab_size)

    def forward(self, tokens, state=None):
        return self.head(self.norm(self.table(tokens))), state


BIGRAM = ModuleType("bigram")
BIGRAM.Model = Model  # type: ignore[attr-defined]


def test_a_family_of_two_methods_trains_with_the_defaults():
    model = build(BIGRAM, Config(), 50, seed=1)
    assert model.norm.weight.tolist() == [1.0] * 8  # type: ignore[union-attr]
    assert model.head.bias.abs().max() == 0  # type: ignore[union-attr]
    tokens = torch.arange(12).view(2, 6)
    targets = torch.tensor([[1, 2, 3, 4, 5, -1]] * 2)
    (loss,) = model.losses(SimpleNamespace(tokens=tokens, targets=targets, step=0))
    each = model.token_losses(tokens, targets)
    assert loss.item() == pytest.approx(math.log(50), rel=0.05)
    assert loss.item() == pytest.approx(each.sum().item() / 10)
    assert each[:, -1].tolist() == [0, 0]
    matrices, rest = model.param_groups(Optim(lr=0.1, weight_decay=0.2))
    assert (matrices.weight_decay, rest.weight_decay) == (0.2, 0.0)
    assert set(matrices.params) == {"table.weight", "head.weight"}
    assert model.flops_per_token(6) == 6 * 50 * 8, "the table is looked up, not multiplied"


def test_weights_follow_seed_and_name_alone():
    """A parameter drawn before them changes none of the others; another seed changes them."""

    class Larger(Model):
        def __init__(self, config, vocab_size):
            super().__init__(config, vocab_size)
            own = dict(self.named_children())
            for name in own:  # so that the new one comes first
                delattr(self, name)
            self.first = nn.Linear(3, 3)
            for name, child in own.items():
                self.add_module(name, child)

    larger = ModuleType("larger")
    larger.Model = Larger  # type: ignore[attr-defined]
    own, more, other = (
        build(m, Config(), 5, seed=s).state_dict()
        for m, s in ((BIGRAM, 1), (larger, 1), (BIGRAM, 2))
    )
    assert all(torch.equal(own[n], more[n]) for n in own)
    assert not torch.equal(own["table.weight"], other["table.weight"])


def test_unfilled_buffers_are_caught():
    class Forgetful(Model):
        def __init__(self, config, vocab_size):
            super().__init__(config, vocab_size)
            self.register_buffer("mask", torch.ones(3))

    module = ModuleType("forgetful")
    module.Model = Forgetful  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="mask"):
        build(module, Config(), 5, seed=0)


def test_states_of_any_nesting_are_repeated():
    class State(NamedTuple):
        n: int
        parts: tuple

    state = State(3, (torch.arange(6).view(2, 3), {"a": [torch.ones(1, 2)], "b": None}))
    out = Model(Config(), 3).repeat_state(state, 4)
    assert isinstance(out, State)
    assert out.n == 3
    assert out.parts[0].tolist() == [[0, 1, 2]] * 4
    assert out.parts[1]["a"][0].shape == (4, 2)


def test_an_unknown_family_names_the_nearest():
    name = families()[0]
    assert load_family(name).Model
    with pytest.raises(UserError, match=f"did you mean {name}"):
        load_family(name + "x")
