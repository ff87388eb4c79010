"""Numbers in bf16: rounding without a bias, noise from (seed, name, step) alone, 4 bytes less."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lib.core.errors import Interrupted, UserError
from lib.core.refusal import Refused
from lib.core.rng import torch_generator
from lib.models.base import Group
from lib.nn.linear import Linear
from lib.train import rounding
from lib.train.checkpoint import read_tensors
from lib.train.optim import Optimizer
from lib.train.rounding import Rounding, of_run, round_stochastically
from lib.train.schedule import Multipliers
from lib.train.trainer import train
from tests.train.test_families_resume import made
from tests.train.test_streamed import SETTINGS, run, same
from tests.train.tiny import BASE, RUNTIME, Rows, Stop, make_job

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
        with rounding.Rounding(seed).widened(name, state) as wide:
            wide["exp_avg"].fill_(1.001)
            wide["exp_avg_sq"].fill_(1.001)
        found.append((state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[3][0])
    assert not torch.equal(*found[0]), "both moments of a parameter have noise of their own"


def test_numbers_cut_over_ranks_are_refused():
    for settings in (ROUNDED, replace(SETTINGS, weights="bf16_sr")):
        with pytest.raises(UserError, match="shard: fsdp"):
            of_run(settings, replace(RUNTIME, shard="fsdp"), 1, made("phase7"), torch.bfloat16)


# ---------------------------------------------------------------- weights

NARROW = replace(BASE, lr=0.01, weights="bf16_sr", precision="bf16", steps=6, sample_every=3)
FAMILIES = ("phase7", "phase8", "trm", "ramgpt")


def run_narrow(folder, name: str, settings=NARROW, rows=None, stop=None, said=None):
    """A family's own sizes, matmuls in bf16, one sample as the trainer takes it."""

    def sample(model) -> list[str]:
        model(torch.zeros(1, 3, dtype=torch.int64))
        return ["a text"]

    changes = {"dtype": torch.bfloat16, "sample": sample, "stop": stop or Stop()}
    job = make_job(folder, settings, model=made(name), said=[] if said is None else said, **changes)
    return train(replace(job, rows=lambda plan: rows or Rows()))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_linear_layers_are_bf16_until_the_run_ends(tmp_path, name):
    """In checkpoints too; the finished model is fp32, as every other is."""
    settings = replace(NARROW, optimizer="adamw")
    found = run_narrow(tmp_path, name, settings)
    assert {t.dtype for t in found.weights.values() if t.is_floating_point()} == {torch.float32}
    (folder,) = tmp_path.glob("step_6")
    state = read_tensors(folder / "model.safetensors")
    linear = {n for n, m in made(name).named_modules() if isinstance(m, Linear | torch.nn.Linear)}
    narrow = {n.rpartition(".")[0] for n, t in state.items() if t.dtype == torch.bfloat16}
    assert narrow == linear and len(linear) > 4
    moments = read_tensors(folder / "optimizer.safetensors")
    assert {t.dtype for t in moments.values()} == {torch.float32}


def test_a_killed_run_of_narrow_weights_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    whole = run_narrow(tmp_path / "whole", "phase7")
    with pytest.raises(Interrupted):
        run_narrow(tmp_path / "w", "phase7", stop=Stop(2))
    assert same(run_narrow(tmp_path / "w", "phase7"), whole)
    wide = run_narrow(tmp_path / "wide", "phase7", replace(NARROW, weights="fp32"))
    assert not same(wide, whole), "rounding changes something"


def test_a_weight_moves_by_steps_that_rounding_to_nearest_would_lose():
    """2^-12 a step on weights near 1, whose neighbours are 2^-8 and 2^-7 away."""
    group = {"lr": 2**-12, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    moved = {}
    for names in (frozenset({"w"}), frozenset()):
        w = torch.nn.Parameter(torch.full((4096,), 1.0, dtype=torch.bfloat16))
        rule = Optimizer(
            [Group(name="g", params={"w": w}, **group)], rounding=Rounding(1, weights=names)
        )
        for _ in range(64):
            w.grad = torch.ones_like(w)
            rule.step(Multipliers())
        moved[bool(names)] = 1 - float(w.detach().float().mean())
    assert abs(moved[True] - 64 * 2**-12) < 4e-4, moved  # seen 2e-5
    assert moved[False] == 0


def test_losses_follow_those_of_wide_weights(tmp_path):
    """The same rows, 60 steps of a tiny phase7: the two curves end alike."""
    ends = []
    for weights in ("bf16_sr", "fp32"):
        settings = replace(NARROW, weights=weights, steps=60, sample_every=0, ema_decay=0.0)
        run_narrow(tmp_path / weights, "phase7", settings)
        lines = (tmp_path / weights / "training_log.jsonl").read_text().splitlines()
        ends.append([json.loads(x)["loss"] for x in lines if "loss" in json.loads(x)][-1])
    assert ends[1] < 1.5 and abs(ends[0] - ends[1]) < 0.1, ends


def test_narrow_weights_are_refused_where_they_cannot_be(tmp_path):
    """Each in a sentence, before a step: matmuls in fp32, streamed weights, Muon's matrices."""
    bf16, model = torch.bfloat16, made("phase7")
    with pytest.raises(UserError, match="matmuls in float32"):
        of_run(NARROW, RUNTIME, 1, model, torch.float32)
    model.engine = object()
    with pytest.raises(UserError, match="streamed"):
        of_run(NARROW, RUNTIME, 1, model, bf16)
    with pytest.raises(UserError, match=r"blocks.0.attn.q.weight is Muon's"):
        run_narrow(tmp_path, "gpt")
    with pytest.raises(Refused, match="precision"):
        replace(NARROW, precision="fp32")


@pytest.mark.slow  # torch compiles the update with a C++ compiler
def test_moments_of_a_byte_round_narrow_weights_and_resume(tmp_path):
    pytest.importorskip("torchao", reason="the extra optim8bit is not installed")
    settings = replace(NARROW, optimizer="adamw8bit", ema_decay=0.0)
    whole = run_narrow(tmp_path / "whole", "phase7", settings)
    with pytest.raises(Interrupted):
        run_narrow(tmp_path / "w", "phase7", settings, stop=Stop(2))
    assert same(run_narrow(tmp_path / "w", "phase7", settings), whole)
    w = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))  # its moments are coded
    group = {"lr": 2**-12, "betas": (0.0, 0.0), "eps": 1e-12, "weight_decay": 0.0}
    coded = Group(name="g", params={"w": w}, rule="adamw8bit", **group)
    rule = Optimizer([coded], rounding=Rounding(1, weights=frozenset({"w"})))
    for _ in range(64):
        w.grad = torch.ones_like(w)
        rule.step(Multipliers())
    assert abs(1 - float(w.detach().float().mean()) - 64 * 2**-12) < 4e-4
