"""Schedules against the published runs' values, and the laws that every schedule keeps."""

from __future__ import annotations

import math

import pytest

from lib.core.errors import UserError
from lib.train.schedule import SCHEDULES, Schedule, auto_batch, horizon, make_schedule
from tests import golden

NEWEST = {"momentum": (0.85, 0.97, 0.90), "momentum_ramp": 400, "cosine_decay": True}


@pytest.mark.parametrize("case", ["newest_N100", "newest_N1000", "seed_era_N100", "seed_era_N1000"])
def test_schedules_equal_the_published_training_scripts(shared, case):
    """Golden values to 1e-10; the formulas carry no toy clamp, so N = 100 has 40 warm-up steps."""
    want = golden.read(shared, "schedules.json")[case]
    steps = want["num_iterations"]
    falling = round(want["warmdown_ratio"] * steps)
    s = Schedule(steps=steps, decay=falling, final=want["final_lr_frac"], momentum_ramp=300)
    if case.startswith("newest"):
        s = Schedule(
            steps=steps, decay=falling, final=0.05, warmup=want["warmup_steps"], **NEWEST
        )  # fmt: skip
    for i, step in enumerate(want["steps"]):
        assert s.lr(step) == pytest.approx(want["lr_mult"][i], abs=1e-10), step
        assert s.momentum_at(step) == pytest.approx(want["muon_momentum"][i], abs=1e-10), step
        if case.startswith("newest"):
            decay = want["weight_decay_scaled"] * s.weight_decay(step)
            assert decay == pytest.approx(want["muon_weight_decay"][i], abs=1e-10), step


def test_base_and_modern_have_the_values_of_their_page():
    base, modern = make_schedule("base", 21_400), make_schedule("modern", 2_520)
    rates = [base.lr(i) for i in (0, 17_120, 19_260, 21_399)]
    assert rates == pytest.approx([1, 1, 0.5, 1 / 4280])
    assert [base.momentum_at(i) for i in (0, 150, 300, 21_399)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    rates = [modern.lr(i) for i in (0, 39, 882, 1_701, 2_519)]
    assert rates == pytest.approx([0.025, 1, 1, 0.525, 0.05058], abs=1e-5)
    momenta = [modern.momentum_at(i) for i in (0, 200, 400, 882, 1_701)]
    assert momenta == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935])
    assert modern.at(1_260).weight_decay == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1_600, 21_400])
def test_rates_rise_then_fall_and_never_end_at_zero(name, steps):
    """An inverted schedule trains, silently and badly: the whole shape is checked."""
    warmup = 0 if name in ("base", "modern") else steps // 10
    s = make_schedule(name, steps, warmup=warmup)
    rates = [s.lr(i) for i in range(steps)]
    top = rates.index(max(rates))
    assert all(0 <= r <= 1 for r in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] > 0 or name == "triangle", "the one whose recipe ends at zero"
    assert all(0.85 <= s.momentum_at(i) <= 0.97 for i in range(steps))


def test_toy_clamps_act_below_1600_steps_only():
    for steps in (1_600, 2_520, 21_400):
        modern, base = make_schedule("modern", steps), make_schedule("base", steps)
        assert (modern.warmup, modern.momentum_ramp, base.momentum_ramp) == (40, 400, 300)
    assert make_schedule("modern", 100).warmup == 10
    assert make_schedule("modern", 100).momentum_ramp == 25
    assert make_schedule("base", 3).momentum_at(0) == 0.95, "no ramp = its end value"


def test_cosine_and_linear_follow_their_formulas():
    cosine = make_schedule("cosine", 100, warmup=10, final=0.1)
    linear = make_schedule("linear", 100, warmup=10)
    for step in range(10, 100):
        x = (step - 10) / 90
        assert cosine.lr(step) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * x)))
        assert linear.lr(step) == pytest.approx(1 - x)
    assert cosine.lr(0) == linear.lr(0) == pytest.approx(0.1), "the first step is not at full rate"


def test_the_rates_of_a_guide_are_those_of_the_log():
    """3e-4 after 2,000 steps of warm-up, a tenth at the end; step n of the log is update n - 1."""
    rates = make_schedule("cosine", 30_000, warmup=2000, final=0.1)
    told = [f"{3e-4 * rates.lr(n - 1):.2e}" for n in (1, 1000, 2000, 30_000)]
    assert told == ["1.50e-07", "1.50e-04", "3.00e-04", "3.00e-05"]


def test_bad_schedules_are_refused_with_a_remedy():
    for name, steps, warmup in (("cosin", 10, 0), ("cosine", 0, 0), ("linear", 10, 11)):
        with pytest.raises(UserError, match=r"; (choose|use|at most)"):
            make_schedule(name, steps, warmup=warmup)


def test_horizon_takes_steps_before_flops_before_ratio():
    size = {"batch_tokens": 524_288, "params": 560_988_160, "flops_per_token": 3_491_758_080}
    assert horizon(**size, param_data_ratio=20) == 21_400
    flops = 100.4 * 524_288 * 3_491_758_080
    assert horizon(**size, param_data_ratio=20, target_flops=flops) == 100
    assert horizon(**size, param_data_ratio=20, target_flops=flops, num_iterations=7) == 7


def test_a_run_without_length_is_refused():
    size = {"batch_tokens": 1_024, "params": 10, "flops_per_token": 60}
    with pytest.raises(UserError, match="no length"):
        horizon(**size)
    with pytest.raises(UserError, match="batch_tokens of 200 or less"):
        horizon(**size, param_data_ratio=20)


def test_automatic_batch_leaves_256_steps_and_whole_rows():
    assert auto_batch(1e12, 1e12, 2048) == 2**19
    assert auto_batch(1e6, 1e12, 256) == 2048, "1e6 / 256 = 3906, rounded down to a power of two"
    assert auto_batch(100, 1e12, 256) == 256, "at least one row"
    assert auto_batch(1e12, 1e12, 768) % 768 == 0
