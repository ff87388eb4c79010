"""Defects that a recursive model invites, planted one by one: a test must turn red on each."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from torch.nn import functional as F

from lib.models import trm
from lib.nn import blocks, tape
from tests.models import test_trm
from tests.train import tiny

MUTANTS = {
    "one call attends both ways": (
        "kind = PostNorm if post else PreNorm",
        "kind = one_open_call(PostNorm if post else PreNorm)",
        lambda: test_trm.test_a_token_changes_no_logit_before_it_and_some_from_it_on(False),
    ),
    "detach forgotten": (
        "y, z, x = y.detach(), z.detach(), None",
        "x = None",
        lambda: test_trm.test_memory_does_not_grow_with_supervision_steps(test_trm.SMALL),
    ),
    "x not read again": (
        "else x + y + z, tape)",
        "else y + z, tape)",
        lambda: test_trm.test_a_token_changes_no_logit_before_it_and_some_from_it_on(False),
    ),
    "y0 from the batch": (
        "return self.y0.to(x.dtype).expand_as(x), self",
        "return x.mean((0, 1)).expand_as(x), self",
        test_trm.test_first_vectors_follow_the_seed_and_lie_in_the_state_dict,
    ),
    "cache by block": (
        "before = (self.state.keys[i], self.state.values[i])",
        "before = (self.state.keys[i % blocks], self.state.values[i % blocks])",
        lambda: test_trm.test_the_cache_is_exact_at_every_depth(test_trm.SMALL),
    ),
}
ELSEWHERE = {"cache by block": tape}  # whose lines a mutant changes, if not the family's own


def one_open_call(kind: type) -> type:
    """The block, but every fourth of its calls attends both ways."""

    class Open(kind):
        made = 0

        def forward(self, *given):
            type(self).made += 1
            attend = blocks.causal_attention
            if type(self).made % 4 == 0:
                blocks.causal_attention = lambda q, k, v, window, scale: (
                    F.scaled_dot_product_attention(q, k, v, scale=scale)
                )
            try:
                return super().forward(*given)
            finally:
                blocks.causal_attention = attend

    return Open


def mutate(module: types.ModuleType, old: str, new: str, monkeypatch) -> types.ModuleType:
    """The module with one of its lines changed, under another name."""
    text = Path(module.__file__ or "").read_text()
    assert text.count(old) == 1, "the line that the mutant changes is gone"
    mutant = types.ModuleType(f"{module.__name__}_mutant")
    monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
    mutant.__dict__["one_open_call"] = one_open_call
    exec(compile(text.replace(old, new), mutant.__name__, "exec"), mutant.__dict__)
    return mutant


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_defect_is_found(name, monkeypatch):
    old, new, check = MUTANTS[name]
    check()
    changed = mutate(ELSEWHERE.get(name, trm), old, new, monkeypatch)
    if changed.__name__.startswith(tape.__name__):
        monkeypatch.setattr(trm, "Tape", changed.Tape)
    else:
        monkeypatch.setattr(test_trm, "trm", changed)
        monkeypatch.setattr(test_trm, "Model", changed.Model)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_an_average_that_is_not_saved_is_found(tmp_path, monkeypatch):
    """A resumed run would go on from the weights of the moment."""
    from lib.core.errors import Interrupted
    from lib.train.ema import Ema

    whole = tiny.train(tiny.make_job(tmp_path / "a"))
    monkeypatch.setattr(Ema, "state_tensors", lambda self: {})
    monkeypatch.setattr(Ema, "load_state_tensors", lambda self, tensors: None)
    with pytest.raises(Interrupted):
        tiny.train(tiny.make_job(tmp_path / "b", stop=tiny.Stop(at=4)))
    fresh = tiny.train(tiny.make_job(tmp_path / "b"))
    name = "head.weight"
    assert not (fresh.weights[name] == whole.weights[name]).all()
