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


def test_adamw_is_due_every_nth_step_and_in_the_last():
    """Or the gradients of an odd run's end would be lost."""
    plan = plan_of(adamw_every=2)
    assert [plan.at(step).adamw for step in range(9)] == [False, True] * 4 + [True]


@pytest.mark.parametrize("passed", [1, 2])
def test_adamw_sees_the_sum_of_the_gradients_it_passed_over_and_muon_each_of_them(passed):
    """Moments are compared: AdamW's first step hardly knows a gradient's size."""
    draw = torch.Generator().manual_seed(1)
    start = {name: torch.randn(3, 2, generator=draw) for name in ("adam", "muon")}
    grads = [{n: torch.randn(3, 2, generator=draw) for n in start} for _ in range(passed + 1)]

    def optimizer(gathers: bool):
        own = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        groups = [
            Group(name="rest", params={"adam": own["adam"]}, lr=0.1),
            Group(name="matrices", params={"muon": own["muon"]}, lr=0.1, rule="muon"),
        ]
        return own, build_optimizer(groups, gathers=gathers)

    def step(own, optimizer, grads, due=True):
        for name, grad in grads.items():
            own[name].grad = grad.clone()
        optimizer.step(Multipliers(adamw=due))

    (own, gathering), (plain_own, plain) = optimizer(True), optimizer(False)
    for grad in grads[:-1]:
        step(own, gathering, grad, due=False)
        step(plain_own, plain, {"muon": grad["muon"]})
    assert torch.equal(own["adam"], start["adam"])
    (again, resumed) = optimizer(True)
    for name, parameter in again.items():
        parameter.data.copy_(own[name])
    resumed.load_state_tensors({n: t.clone() for n, t in gathering.state_tensors().items()})
    step(own, gathering, grads[-1])
    step(again, resumed, grads[-1])
    total = grads[0]["adam"].clone()
    for grad in grads[1:]:  # in the order of the steps, for the bits
        total += grad["adam"]
    step(plain_own, plain, {"adam": total, "muon": grads[-1]["muon"]})
    wanted, found = plain.state_tensors(), gathering.state_tensors()
    assert not found.pop("adam.gathered").any()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(resumed.state_tensors()[name], tensor), name
    for name, parameter in plain_own.items():
        assert torch.equal(own[name], parameter) and torch.equal(again[name], parameter), name


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
