"""CVFP: golden training, solvers against each other, hand-over between the phases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import golden
from tests.models.streams import Stream, make, run_steps, stored_rows

D, N = 16, 50


def golden_model(depth: int, folder, *, chunk: int, sweeps: int, reads: bool = False, **more):
    stream = Stream(torch.arange(N), golden.wide(700, (N, D), 1), reads=reads)
    model = make(
        stream, folder, seed_compat=True, depth=depth, chunk_tokens=chunk, sweeps=sweeps,
        noise=0.0, diversity=0.9, store_dtype="float64", micro_tokens=7, keep_contexts=True,
        seed_defects=("length_weight",), **more,
    )  # fmt: skip
    with torch.no_grad():
        for i, layer in enumerate(model.context_block):
            layer.weight.copy_(golden.wide(720 + 4 * i, (D, 2 * D), 0.25))
            layer.bias.copy_(golden.wide(721 + 4 * i, (D,), 0.05))
            layer.norm.weight.copy_(golden.wide(722 + 4 * i, (D,), 0.1, 1))
            layer.norm.bias.copy_(golden.wide(723 + 4 * i, (D,), 0.05))
    return model


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("reads", [False, True])
def test_training_in_one_chunk_gives_the_golden_contexts_and_log(shared, depth, reads, tmp_path, monkeypatch):
    """The whole algorithm: sequential pass, wrapped sweeps, losses, Adam, clipping."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    arrays = np.load(shared / "golden/cvfp.npz")
    case = next(c for c in golden.read(shared, "cvfp.json")["cases"] if c["layers"] == depth)
    model = golden_model(depth, tmp_path, chunk=N, sweeps=4, reads=reads)
    totals = run_steps(model, range(4))
    log = np.array(case["training_in_memory"]["log"])
    assert np.allclose(totals, log[:, 2], atol=1e-8)
    lines = [model._sweeps.lines[k, 0] for k in (1, 2, 3)]
    for name, column in (("fixed_point", 0), ("diversity", 1), ("converged", 4)):
        assert np.allclose([line[name] for line in lines], log[:, column], atol=1e-8), name
    found = stored_rows(model, 3).numpy()
    assert np.abs(found - arrays[f"train_memory_contexts_{depth}"]).max() < 1e-8


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("layout", ["double", "slots"])
def test_training_by_chunks_gives_the_golden_contexts_and_log(shared, depth, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    arrays = np.load(shared / "golden/cvfp.npz")
    case = next(c for c in golden.read(shared, "cvfp.json")["cases"] if c["layers"] == depth)
    model = golden_model(depth, tmp_path, chunk=20, sweeps=3, buffers=layout)
    totals = run_steps(model, range(9))
    log = np.array(case["training_disk_rule"]["log"])
    assert np.allclose(totals, log[:, 5], atol=1e-8)
    found = stored_rows(model, 2).numpy()
    assert np.abs(found - arrays[f"train_disk_contexts_{depth}"]).max() < 1e-8
