"""Controls: arms at equal tokens and seeds, each done once, and a start that is worth nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib.core.errors import UserError
from lib.core.run_settings import Controls
from lib.nn.contexts.arms import verdict
from lib.train.controls import table, train_controls
from tests.train.tiny import BASE, CONTEXT, VOCAB, make_job, make_model

ARMS = {"none": "none", "untrained": "plain", "phase1": "plain"}
module: Any = SimpleNamespace(
    controls=lambda config: ARMS, starts_from_weights=lambda arm: arm == "phase1", verdict=verdict
)


def job_of(tmp_path, built: list, arms: tuple[str, ...] | None = None):
    """Its arms' models count as built; a start from weights changes nothing here: useless."""
    ids = torch.arange(4 * (CONTEXT + 1)).view(4, -1) % VOCAB

    def build(config, seed, started):
        built.append((config, seed, started))
        model = make_model(seed)
        model.config = config
        return model

    @torch.no_grad()
    def validate(model):
        return float(model.token_losses(ids[:, :-1], ids[:, 1:]).mean())

    model = make_model()
    model.config = "whole"
    settings = replace(BASE, controls=Controls(tokens=72, seeds=2, arms=arms))
    return make_job(
        tmp_path, settings, model=model, build=build, validate=validate, val_bytes_per_token=3.0,
        diagnostic_rows=lambda count: ids.numpy(),
    )  # fmt: skip


def test_arms_take_equal_tokens_and_a_useless_start_makes_no_difference(tmp_path):
    built: list = []
    found = train_controls(job_of(tmp_path, built), module)
    assert built == [
        ("none", 5, False), ("plain", 5, False), ("plain", 5, True),
        ("none", 6, False), ("plain", 6, False), ("plain", 6, True),
    ]  # fmt: skip
    rows = {row["arm"]: row for row in found["rows"]}
    assert {row["tokens"] for row in rows.values()} == {72}
    assert rows["phase1"]["bpb"] == rows["untrained"]["bpb"]
    assert rows["none"]["bpb_sd"] > 0 and rows["none"]["seeds"] == 2
    assert found["verdict"].endswith("no difference")
    assert len(table(found["rows"])) == 4


def test_an_arm_that_is_done_is_not_trained_again(tmp_path):
    """Killed in the fourth run: the first three are read, with the same result in the end."""
    whole = train_controls(job_of(tmp_path / "a", []), module)
    built: list = []
    job = job_of(tmp_path / "b", built)
    last = job.build

    def killed(config, seed, started):
        if len(built) == 3:
            raise KeyboardInterrupt
        return last(config, seed, started)

    with pytest.raises(KeyboardInterrupt):
        train_controls(replace(job, build=killed), module)
    built.clear()
    assert train_controls(job, module) == whole
    assert len(built) == 3


def test_an_unknown_arm_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="choose of none, untrained, phase1"):
        train_controls(job_of(tmp_path, [], ("nonsense",)), module)
