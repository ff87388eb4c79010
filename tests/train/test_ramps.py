"""Steps of changing size, shorter rows, AdamW every second step: exact to resume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lib.core.errors import Interrupted, UserError
from lib.core.refusal import Refused
from lib.core.run_settings import Train
from lib.models.base import Group
from lib.train.optim import build_optimizer
from lib.train.plan import make_plan
from lib.train.schedule import Multipliers
from tests.train.test_trainer import losses_of, run, snapshot
from tests.train.tiny import BASE, CONTEXT, RUNTIME, Bigram, Rows, Stop, make_model

SWITCHES = {
    "batch_ramp": {"batch_ramp": (0.25, 0.5, 1.0)},
    "context_ramp": {"context_ramp": (1 / 3, 0.5, 1.0)},
    "adamw_every": {"adamw_every": 2},
    "all": {"batch_ramp": (0.5, 1.0), "context_ramp": (0.5, 1.0), "adamw_every": 2},
}
each = pytest.mark.parametrize("switch", SWITCHES)


def ramped(work, switch: str, **changes):
    settings = replace(BASE, **SWITCHES[switch])
    return run(work, settings=settings, rows=lambda plan: Rows(ramp=plan.rows_by_step), **changes)


@each
def test_a_run_stopped_at_every_step_ends_with_the_bits_of_an_undisturbed_one(tmp_path, switch):
    """Gathered gradients and the place in the rows: what an iterator would have forgotten."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ramped(whole, switch)
    for _ in range(BASE.steps or 0):
        try:
            ramped(parts, switch, stop=Stop(at=1))
        except Interrupted:
            continue
    ramped(parts, switch)
    assert snapshot(parts) == snapshot(whole)


@pytest.mark.parametrize("switch", ["batch_ramp", "adamw_every"])
def test_a_switch_changes_the_run(tmp_path, switch):
    run(tmp_path / "plain")
    ramped(tmp_path / "on", switch)
    assert losses_of(tmp_path / "on") != losses_of(tmp_path / "plain")


@pytest.mark.parametrize("rows", [1, 100])
def test_the_micro_batch_of_a_ramped_run_changes_nothing_but_rounding(tmp_path, rows):
    model = lambda: make_model(dropout=0.0)  # noqa: E731
    ramped(tmp_path / "two", "all", model=model())
    runtime = replace(RUNTIME, device_batch_size=rows)
    ramped(tmp_path / "other", "all", model=model(), runtime=runtime)
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "two"), rel=1e-5)


def plan_of(**changes):
    return make_plan(replace(BASE, **changes), make_model(), CONTEXT, torch.float32)


def test_tokens_and_rates_follow_the_batch():
    plan = plan_of(batch_ramp=(0.25, 1.0), schedule="constant", warmup=0)
    assert [plan.tokens(step) for step in (0, 1, 5, 6, 9)] == [0, 6, 30, 54, 126]
    assert [plan.at(step).lr for step in (0, 4, 5)] == [0.5, 0.5, 1.0]
    assert plan.optim.tokens == 126 and plan.rows == 1
    by_ratio = plan_of(batch_ramp=(0.5, 1.0), steps=None, param_data_ratio=20.0)
    assert by_ratio.tokens(by_ratio.steps) == pytest.approx(
        20 * make_model().scaling_params(), rel=0.01
    )


def test_ranks_that_do_not_divide_the_smallest_step_are_told_which_would():
    plan = plan_of(batch_ramp=(0.5, 1.0))
    with pytest.raises(UserError, match="2 rows, 4 ranks; use 1, 2 ranks"):
        plan.micro_rows(RUNTIME, torch.device("cpu"), 4)


def test_shorter_rows_hold_the_same_ids(tmp_path):
    """(rows, T) read as (rows * pieces, T / pieces), inputs and targets alike."""
    seen = []

    class Watching(Bigram):
        def losses(self, batch):
            seen.append((batch.step, batch.tokens, batch.targets, batch.first_row))
            yield from super().losses(batch)

    model = Watching()
    model.init_weights(0)
    ramped(tmp_path, "context_ramp", model=model)
    rows = Rows()
    for step in range(9):
        parts = [x[1:] for x in seen if x[0] == step][-2:]  # before them the dry step's
        pieces = (3, 2, 1)[step // 3]
        assert parts[0][0].shape == (2 * pieces, CONTEXT // pieces)
        assert [part[2] for part in parts] == [0, 2 * pieces]
        ids = rows.data[rows.row_numbers(step)]
        for place, want in ((0, ids[:, :-1]), (1, ids[:, 1:])):
            found = torch.cat([part[place] for part in parts])
            assert np.array_equal(found.numpy().reshape(want.shape), want), f"step {step}"


def test_adamw_every_second_step_sees_the_sum_of_both_gradients():
    """Also in the last step of an odd run, or its gradients would be lost."""
    plan = plan_of(adamw_every=2)
    assert [plan.at(step).adamw for step in range(9)] == [False, True] * 4 + [True]
    start, draw = torch.randn(3, 2), torch.Generator().manual_seed(1)
    grads = [torch.randn(3, 2, generator=draw) for _ in range(2)]

    def optimizer(gathers: bool):
        p = nn.Parameter(start.clone())
        return p, build_optimizer([Group(name="all", params={"p": p}, lr=0.1)], gathers=gathers)

    (p, gathering), (q, plain) = optimizer(True), optimizer(False)
    p.grad = grads[0].clone()
    gathering.step(Multipliers(adamw=False))
    assert torch.equal(p, start)
    (again, resumed) = optimizer(True)
    resumed.load_state_tensors({n: t.clone() for n, t in gathering.state_tensors().items()})
    for one, holder in ((p, gathering), (again, resumed)):
        one.grad = grads[1].clone()
        holder.step(Multipliers())
    q.grad = grads[0] + grads[1]
    plain.step(Multipliers())
    assert torch.equal(p, q) and torch.equal(again, q)
    assert not gathering.state_tensors()["p.gathered"].any()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_ramp": (0.3, 1.0)}, "multiples of 1/4"),
        ({"context_ramp": (0.4, 1.0)}, "no equal pieces"),
        ({"context_ramp": (0.25, 1.0)}, "no equal pieces"),
    ],
)
def test_shares_that_do_not_fit_are_refused(given, says):
    with pytest.raises(UserError) as error:
        plan_of(**given)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_ramp": (0.0, 1.0)}, "0 < x <= 1"),
        ({"context_ramp": (2.0,)}, "0 < x <= 1"),
        ({"batch_ramp": (0.5, 1.0), "skip_steps": 1}, "no one size"),
        ({"adamw_every": 0}, "1 or more"),
        ({"adamw_every": 2, "optimizer": "adamw8bit"}, "use 1 with adamw8bit"),
    ],
)
def test_contradictions_are_refused(given, says):
    with pytest.raises(Refused, match=says):
        Train(**given)


def test_families_that_size_their_own_steps_refuse_ramps():
    model = make_model()
    for name, value in (("batch_ramp", (0.5, 1.0)), ("context_ramp", (0.5, 1.0))):
        model.stream_rows = 12
        with pytest.raises(UserError, match=name):
            make_plan(replace(BASE, **{name: value}), model, CONTEXT, torch.float32)
