"""The self-check of a model: all families pass at tiny sizes, and each check can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib.cli.selfcheck import verify
from lib.models import families, load_family, phase7
from tests.test_family_contract import TINY

V = 61


def check(name: str) -> dict[str, Any]:
    return verify(name, load_family(name).Config(**TINY[name][0]), V)


@pytest.mark.parametrize("name", families())
def test_a_good_model_passes(name):
    assert set(check(name).values()) == {True}


def test_each_check_can_fail(monkeypatch):
    exact = phase7.Model.forward

    def peeking(self, tokens, state=None):
        logits, state = exact(self, tokens, state)
        return logits + logits.sum(1, keepdim=True) * 1e-3, state

    monkeypatch.setattr(phase7.Model, "forward", peeking)
    found = check("phase7")
    assert "editing token 1" in str(found["causality"])
    assert "in chunks of 1" in str(found["decoding"])
    monkeypatch.undo()
    monkeypatch.setattr(phase7.Model, "_betas", lambda self: self.beta.detach() + 1)
    assert "beta" in str(check("phase7")["gradients"])
    monkeypatch.undo()

    def broken(self, config):
        other = phase7.Model(config, V)
        other.load_state_dict(self.state_dict())
        torch.nn.init.zeros_(other.norm.weight)
        return config, other

    monkeypatch.setattr(phase7.Model, "exported", broken)
    assert "logits of the export" in str(check("phase7")["export"])
