"""Two ranks against one: the same losses up to the order of additions, in every mode."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lib.train.checkpoint import read_tensors
from lib.train.parallel import global_norm
from tests.conftest import HANG_S, ROOT
from tests.faults.crash import tree
from tests.train.ranks_script import RAMPED, gpt_job
from tests.train.test_trainer import log_of, losses_of, run
from tests.train.tiny import BASE, Rows, make_model, train


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder in which two processes have made all runs of the script."""
    folder = tmp_path_factory.mktemp("ranks")
    words = ["--standalone", "--nproc-per-node", "2", "-m", "tests.train.ranks_script", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder / "adamw", model=make_model(dropout=0.0))
    muon = replace(BASE, optimizer="muon", lr=0.01)
    run(folder / "muon", settings=muon, model=make_model(dropout=0.0))
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_train_like_one(two, one, mode):
    """Seen 1e-7 relative over 9 steps; bound: a few fp32 roundings."""
    assert losses_of(two / mode) == pytest.approx(losses_of(one / "adamw"), rel=2e-6)
    for name, tensor in read_tensors(two / mode / "step_9/model.safetensors").items():
        wanted = read_tensors(one / "adamw/step_9/model.safetensors")[name]
        assert torch.allclose(tensor, wanted, atol=2e-6), name


@pytest.mark.parametrize("name", ["base", "modern", "ramped"])
def test_a_gpt_on_two_ranks_follows_one_for_20_steps(two, tmp_path, name):
    """gpt.md 14.7: the same first weights, then the same curve. Seen 0, 0 and 1.2e-7 relative."""
    variant, switches = ("base", RAMPED) if name == "ramped" else (name, {})
    train(gpt_job(tmp_path, variant, switches))

    def curve(folder):
        return [record["loss"] for record in log_of(folder) if "loss" in record]

    found, wanted = curve(two / f"gpt_{name}"), curve(tmp_path)
    assert len(found) == 20 and found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found == pytest.approx(wanted, rel=2e-6)
    assert wanted[-1] < wanted[0]


def test_a_checkpoint_of_fsdp_is_like_any_other(two):
    """Names, shapes and groups follow neither the number of ranks nor how they cut the model."""
    for group in ("model", "optimizer", "ema"):
        ddp, fsdp = (read_tensors(two / m / f"step_9/{group}.safetensors") for m in ("ddp", "fsdp"))
        assert {n: t.shape for n, t in ddp.items()} == {n: t.shape for n, t in fsdp.items()}


def test_a_sharded_optimizer_changes_no_bit(two):
    def skip(name: str) -> bool:
        return name.endswith("training_log.jsonl")

    assert tree(two / "muon_none", skip) == tree(two / "muon_optimizer", skip)


def test_muon_on_two_ranks_follows_one(two, one):
    found = read_tensors(two / "muon_none/step_9/model.safetensors")
    wanted = read_tensors(one / "muon/step_9/model.safetensors")
    assert all(torch.allclose(found[n], t, atol=1e-3) for n, t in wanted.items())


def test_all_ranks_stop_at_the_step_on_which_one_was_asked(two):
    said = [(two / f"said_{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "interrupted at step" in said[0]


def test_a_run_of_two_ranks_goes_on_with_one(two, one):
    """World size is not in the identity; only rounding follows it."""
    said: list[str] = []
    run(two / "two_then_one", model=make_model(dropout=0.0), said=said)
    assert any("ranks was 2, is 1" in line for line in said)
    assert losses_of(two / "two_then_one") == pytest.approx(losses_of(one / "adamw"), rel=2e-6)


def test_every_ranks_random_states_are_kept(two):
    states = read_tensors(two / "with_dropout/step_9/rng.safetensors")
    assert sorted(states) == ["cpu.0", "cpu.1"]
    assert not torch.equal(states["cpu.0"], states["cpu.1"]), "ranks must not share dropout masks"


def test_a_nan_on_one_rank_stops_both_and_is_named_by_both(two):
    numbers = Rows().row_numbers(3, 1, 2)
    for rank in (0, 1):
        text = (two / f"poisoned/error_{rank}").read_text()
        assert "not finite at step 4" in text
        assert f"micro-batch 0 of rank 1, rows {' '.join(map(str, numbers))}" in text


def test_the_global_norm_is_that_of_all_gradients_together():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    wanted = torch.cat([t.flatten() for t in tensors]).norm()
    assert torch.allclose(global_norm(tensors), wanted)
    assert global_norm([]).item() == 0
