"""Moments in bf16: rounding without a bias, noise from (seed, name, step) alone, 4 bytes less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib.core.errors import Interrupted, UserError
from lib.core.rng import torch_generator
from lib.train import rounding
from lib.train.checkpoint import read_tensors
from lib.train.rounding import round_stochastically
from tests.train.test_streamed import SETTINGS, run, same
from tests.train.tiny import BASE, RUNTIME, Stop

ROUNDED = replace(SETTINGS, moments="bfloat16")


def noise(shape, number: int = 0) -> torch.Tensor:
    draw = torch_generator(1, "noise of a test", number)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=draw)


def test_the_mean_of_many_roundings_is_the_value():
    """Between two neighbours of bf16, 2^-8 apart, both come; the mean is the value to 4 sigma."""
    x = torch.tensor([1.0, 1.001, 1.003, -1.001, -3e-20, 0.0]).repeat(20_000, 1)
    found = round_stochastically(x, noise(x.shape)).float()
    units = torch.tensor([2**-7, 2**-7, 2**-7, 2**-7, 2**-72, 1e-45])
    gap = (found.mean(0) - x[0]).abs()
    assert bool((gap <= 4 * units / 2 / 20_000**0.5).all()), gap
    assert bool((found[:, 0] == 1).all()) and bool((found[:, 5] == 0).all())
    assert len(found[:, 1].unique()) == 2
    nearest = x[:, 1].bfloat16().float().mean() - 1.001
    assert abs(nearest) > 9e-4, "to nearest, the value would be lost"


def test_a_slow_average_moves_as_in_fp32():
    """beta 0.999: a step changes it by less than half a unit, and rounding to nearest halts it."""
    target, steps = torch.full((4096,), 1.0), 3000
    kept, stuck = (torch.full((4096,), 0.5, dtype=torch.bfloat16) for _ in range(2))
    for step in range(steps):
        moved = kept.float().lerp_(target, 1e-3)
        kept = round_stochastically(moved, noise(moved.shape, step))
        stuck = stuck.float().lerp_(target, 1e-3).bfloat16()
    exact = 1 - 0.5 * 0.999**steps
    assert abs(kept.float().mean().item() - exact) < 2e-3  # seen 1e-4
    assert abs(stuck.float().mean().item() - exact) > 0.1


@pytest.mark.parametrize("on", [False, True])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, on):
    """Resumed between two steps, streamed or not: the noise follows the step, not the process."""
    runtime = {"stream": "on", "stream_group": 1} if on else {}
    whole = run(tmp_path / "whole", ROUNDED)
    with pytest.raises(Interrupted):
        run(tmp_path / "w", ROUNDED, stop=Stop(2), **runtime)
    assert same(run(tmp_path / "w", ROUNDED, **runtime), whole)
    assert not same(run(tmp_path / "exact"), whole), "rounding changes something"


def test_moments_take_half_and_stay_half_in_a_checkpoint(tmp_path):
    run(tmp_path, ROUNDED)
    (folder,) = tmp_path.glob("step_*")
    state = read_tensors(folder / "optimizer.safetensors")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items()}
    assert kinds == {
        "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "step": torch.float32,
    }  # fmt: skip


def test_another_seed_draws_other_noise():
    state = {"step": torch.ones(()), "exp_avg": torch.zeros(999, dtype=torch.bfloat16),
             "exp_avg_sq": torch.zeros(999, dtype=torch.bfloat16)}  # fmt: skip
    found = []
    for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b")):
        with rounding.RoundedMoments(seed).widened(name, state) as wide:
            wide["exp_avg"].fill_(1.001)
            wide["exp_avg_sq"].fill_(1.001)
        found.append((state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[3][0])
    assert not torch.equal(*found[0]), "both moments of a parameter have noise of their own"


def test_weights_cut_over_ranks_are_refused():
    assert rounding.of_run(BASE, RUNTIME, 1) is None
    with pytest.raises(UserError, match="shard: fsdp"):
        rounding.of_run(ROUNDED, replace(RUNTIME, shard="fsdp"), 1)
