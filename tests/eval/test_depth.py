"""The curve of depth: one pass over all exits gives what each depth gives by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.eval.bpb import measure
from lib.eval.depth import ExitScorer, exit_bpb, write_depth
from lib.eval.scorer import Rules, Scorer
from lib.models import trm
from lib.models.base import Family, build
from tests.standins import ByteTokenizer, Causal

TEXTS = [("a", "雨の日に傘を持って歩く。" * 3), ("b", "x"), ("c", "plain text, " * 9), ("d", "")]
TOKENIZER = ByteTokenizer()


def scorer(kind, model, boundary: str = "bos"):
    rules = Rules.of(TOKENIZER, boundary, 16)
    return kind(model=model, rules=rules, token_bytes=np.asarray(TOKENIZER.token_bytes))


@pytest.mark.parametrize("boundary", ["bos", "none"])
@pytest.mark.parametrize("variant", ["trm", "looped"])
def test_every_exit_scores_as_its_depth_alone(variant, boundary):
    match = None if variant == "trm" else "trm"
    config = trm.Config(width=16, heads=2, context=16, variant=variant, match=match)
    model = build(trm, config, 258, seed=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    found = exit_bpb(scorer(ExitScorer, model, boundary), TEXTS, TOKENIZER)
    assert len(found) == 4
    for depth, bpb in enumerate(found, 1):
        model.set_depth(depth)
        alone = measure(TEXTS, TOKENIZER, scorer(Scorer, model, boundary)).bpb
        assert bpb == pytest.approx(alone, rel=1e-6), depth


class Once(Family):
    """A family without depth."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Causal(258)

    def forward(self, tokens, state=None):
        return self.inner(tokens, state)

    def flops_per_token(self, T: int) -> int:
        return 30 * T


def test_a_family_without_depth_has_one_point(tmp_path):
    model = Once()
    measured = measure(TEXTS, TOKENIZER, scorer(Scorer, model))
    write_depth(tmp_path / "d.csv", measured, scorer(ExitScorer, model), TEXTS, TOKENIZER)
    lines = (tmp_path / "d.csv").read_text().splitlines()
    assert lines == ["depth,flops,relative,bpb", f"1,160,1,{measured.bpb:.10g}"]
