"""The average against its formula; swapping in and out; state that continues."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.core.errors import InputError
from lib.train.ema import Ema


def model_of(dtype=torch.float32) -> nn.Linear:
    return nn.Linear(3, 2, dtype=dtype)


def move(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)


def test_shadow_follows_the_formula_and_resumes():
    model = model_of()
    move(model, 0)
    ema = Ema(model, 0.9)
    want = 0.0
    for step in range(1, 6):
        move(model, step)
        ema.update()
        want = 0.9 * want + 0.1 * step
    other = Ema(model_of(), 0.9)
    other.load_state_tensors(ema.state_tensors())
    for state in (ema.state_tensors(), other.state_tensors()):
        assert torch.allclose(state["weight"], torch.full((2, 3), want))


def test_swapping_gives_the_models_own_bits_back_even_after_an_error():
    model = model_of(torch.bfloat16)
    ema = Ema(model, 0.5)
    move(model, 7)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError), ema.swapped_in():
        assert not torch.equal(model.weight, own["weight"])
        raise RuntimeError
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())


def test_small_steps_reach_a_bf16_models_shadow():
    """decay 0.9999: in bf16 the shadow would stand still for ever."""
    model = model_of(torch.bfloat16)
    move(model, 1)
    ema = Ema(model, 0.9999)
    move(model, 2)
    for _ in range(10):
        ema.update()
    assert ema.state_tensors()["weight"].min() > 1.0009


def test_another_models_state_is_refused():
    with pytest.raises(InputError, match="does not fit"):
        Ema(model_of(), 0.9).load_state_tensors({"x": torch.zeros(1)})
