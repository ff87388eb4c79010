"""Exports of phase7 and phase8: pruned and folded weights, our own code, equal logits elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib.export import hf
from lib.export.generate import Sampling, generate
from lib.models import load_family
from lib.models.base import build
from tests.export.test_hf import TOKENS, opened, tokenizer_folder  # noqa: F401  # a fixture

SIZES: dict[str, dict[str, Any]] = {
    "phase7": {
        "width": 16, "depth": 2, "heads": 2, "d_ff": 24, "context": 64, "window": 8,
        "ssm_rank": 16, "tt_rank": 8, "tt_phase": True,
    },
    "phase8": {
        "width": 16, "depth": 2, "heads": 2, "key_width": 8, "d_ff": 24, "context": 64,
        "tt_rank": 8, "tt_phase": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_strangers_folder_gives_the_same_logits(name, tokenizer_folder, tmp_path):  # noqa: F811
    """The curvature of the schedule travels with the weights; loading must not start it anew."""
    from lib.data.vocab.tokenizer import load_tokenizer

    tokenizer, family = load_tokenizer(tokenizer_folder), load_family(name)
    config = family.Config(**SIZES[name])
    trained: Any = build(family, config, tokenizer.vocab_size, seed=1).eval()
    if name == "phase7":
        with torch.no_grad():
            trained.c_sched.fill_(0.6)
            trained.alpha[0, :9] = -1.0
    config, model = trained.exported(config)
    what = hf.Exportable(
        family=name, config=config, model=model, tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder, boundary="bos", framed=False, facts={},
    )  # fmt: skip
    assert hf.export(what, tmp_path).startswith("auto_map")
    if name == "phase7":
        assert hf.read_names(tmp_path)["config"]["ssm_rank"] == [7, 16]
    elsewhere = opened(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        want = trained(TOKENS)[0]
        got = elsewhere(TOKENS).logits
    assert torch.equal(got, model(TOKENS)[0])
    assert (got - want).norm() / want.norm() < 1e-6
    made = elsewhere.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    mine = generate(model, TOKENS[0].tolist(), Sampling(temperature=0), max_new_tokens=8)
    assert made[0, TOKENS.shape[1] :].tolist()[: len(mine[0].ids)] == mine[0].ids[:8]
