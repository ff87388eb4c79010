"""CVFP: golden training, solvers against each other, hand-over between the phases."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.core.errors import EnvError, InputError, UserError
from lib.core.refusal import Refused
from lib.core.run_settings import Runtime
from lib.models import cvfp
from lib.models.base import build
from lib.nn.contexts import handover, pace, stream_contexts
from lib.nn.contexts.context import trajectory
from lib.nn.contexts.probes import apply_jacobian
from lib.train.session import require_memory
from tests import golden
from tests.models.streams import Stream, make, run_steps, stored_rows

D, N = 16, 50


def golden_model(depth: int, folder, *, chunk: int, sweeps: int, reads: bool = False, **more):
    stream = Stream(torch.arange(N), golden.wide_array(700, (N, D), 1), reads=reads)
    model = make(
        stream, folder, seed_compat=True, depth=depth, chunk_tokens=chunk, sweeps=sweeps,
        noise=0.0, diversity=0.9, store_dtype="float64", micro_tokens=7, keep_contexts=True,
        seed_defects=("length_weight",), **more,
    )  # fmt: skip
    with torch.no_grad():
        for i, layer in enumerate(model.context_block):
            layer.weight.copy_(golden.wide_array(720 + 4 * i, (D, 2 * D), 0.25))
            layer.bias.copy_(golden.wide_array(721 + 4 * i, (D,), 0.05))
            layer.norm.weight.copy_(golden.wide_array(722 + 4 * i, (D,), 0.1, 1))
            layer.norm.bias.copy_(golden.wide_array(723 + 4 * i, (D,), 0.05))
    return model


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("reads", [False, True])
def test_training_in_one_chunk_gives_the_golden_contexts_and_log(
    shared, depth, reads, tmp_path, monkeypatch
):
    """The whole algorithm: sequential pass, wrapped sweeps, losses, Adam, clipping."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    arrays = np.load(shared / "golden/cvfp.npz")
    case = next(c for c in golden.read(shared, "cvfp.json")["cases"] if c["layers"] == depth)
    model = golden_model(depth, tmp_path, chunk=N, sweeps=4, reads=reads)
    totals = run_steps(model, range(4))
    log = np.array(case["training_in_memory"]["log"])
    assert np.allclose(totals, log[:, 2], atol=1e-8)
    lines = [model.solver.state.disk.lines[k, 0] for k in (1, 2, 3)]
    for name, column in (("fixed_point", 0), ("diversity", 1), ("converged", 4)):
        assert np.allclose([line[name] for line in lines], log[:, column], atol=1e-8), name
    found = stored_rows(model, 3).numpy()
    assert np.abs(found - arrays[f"train_memory_contexts_{depth}"]).max() < 1e-8


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("layout", ["double", "slots"])
def test_training_by_chunks_gives_the_golden_contexts_and_log(
    shared, depth, layout, tmp_path, monkeypatch
):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    arrays = np.load(shared / "golden/cvfp.npz")
    case = next(c for c in golden.read(shared, "cvfp.json")["cases"] if c["layers"] == depth)
    model = golden_model(depth, tmp_path, chunk=20, sweeps=3, buffers=layout)
    totals = run_steps(model, range(9))
    log = np.array(case["training_disk_rule"]["log"])
    assert np.allclose(totals, log[:, 5], atol=1e-8)
    found = stored_rows(model, 2).numpy()
    assert np.abs(found - arrays[f"train_disk_contexts_{depth}"]).max() < 1e-8


# ---------------------------------------------------------------- the objective


def zipf(n: int, vocab: int, d: int, seed: int = 1, dtype=torch.float64, **more) -> Stream:
    """n tokens of a Zipf distribution with a random, normalised table."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(1 / torch.arange(1.0, vocab + 1), n, True, generator=draw)
    table = torch.randn(vocab, d, generator=draw, dtype=torch.float64)
    return Stream(ids, torch.nn.functional.layer_norm(table, (d,)).to(dtype), **more)


def gradients(model, step: int = 1) -> tuple[float, list[torch.Tensor]]:
    total = 0.0
    for loss in model.losses(SimpleNamespace(tokens=None, targets=None, step=step, rows=None)):
        loss.backward()
        total += loss.item()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return total, found


def one_chunk(folder, micro: int, kept: int, dtype, **more):
    """The first sweep done, then loss and gradients of 1,000 tokens in micro-batches."""
    model = make(
        zipf(1000, 50, 8, dtype=dtype), folder, dtype=dtype, solver="jacobi", reset="never",
        sweeps=2, depth=2, chunk_tokens=1000, micro_tokens=micro, store_dtype="float64", **more,
    )  # fmt: skip
    model.activation_bytes = kept
    run_steps(model, range(1))
    return gradients(model)


@pytest.mark.parametrize("kind", ["mcdl", "logdet"])
def test_two_passes_are_one_graph_whatever_the_micro_batch(kind, tmp_path, monkeypatch):
    """1, 7, 64, 1,000 rows, graphs kept or made again: the same noise, values and gradients."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    value, wanted = one_chunk(tmp_path / "whole", 1000, 2**30, torch.float64, kind=kind)
    for micro, kept in ((1, 0), (7, 0), (7, 2**30), (64, 0)):
        found = one_chunk(tmp_path / f"{micro}_{kept}", micro, kept, torch.float64, kind=kind)
        assert found[0] == pytest.approx(value, abs=1e-12)
        for one, other in zip(found[1], wanted, strict=True):
            assert (one - other).abs().max() < 1e-12, (micro, kept)


@pytest.mark.parametrize("micro", [7, 64])
def test_kept_graphs_and_two_passes_have_the_same_bits(micro, tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    runs = [one_chunk(tmp_path / str(k), micro, k, torch.float32) for k in (2**30, 0)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_rows_on_disk_and_a_table_give_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    totals = []
    for reads in (False, True):
        model = make(
            zipf(600, 40, 8, reads=reads), tmp_path / str(reads), solver="jacobi", reset="never",
            sweeps=5, depth=2, chunk_tokens=150, store_dtype="float64", micro_tokens=64,
        )  # fmt: skip
        model.attach(tmp_path / f"work{reads}")
        totals.append(run_steps(model, range(20)))
    assert np.allclose(*totals, atol=1e-12)


def documents(rows: int = 6, T: int = 40, d: int = 8, **config):
    """A model and a batch of rows of documents; id 0 begins one."""
    stream = zipf(500, 30, d, reset_id=0)
    model = make(stream, Path("unused"), seed=2, phase="fixed_point", **config)
    tokens = torch.randint(1, 30, (rows, T), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = 0
    tokens[1, 17] = 0
    return model, SimpleNamespace(tokens=tokens, targets=None, step=0, rows=None)


def test_the_exact_solver_has_no_fixed_point_loss_without_noise():
    model, batch = documents(noise=0.0, fixed_point=1.0, diversity=0.0, memory=0.0)
    assert sum(x.item() for x in model.losses(batch)) == 0


def test_with_noise_it_is_the_penalty_on_the_jacobian():
    """sigma^2 / d E |J|_F^2 at a small sigma, J by autograd; a reset state has no noise."""
    sigma = 1e-3
    model, batch = documents(rows=40, noise=sigma, fixed_point=1.0, diversity=0.0, memory=0.0)
    found = sum(x.item() for x in model.losses(batch))
    tokens = batch.tokens.t()
    weights, keep = model.weights(), model.keep_of(tokens)
    P = weights.token_side(model.embed(tokens))
    C = trajectory(torch.zeros(40, 8, dtype=torch.float64), P, weights, keep)[-1].detach()
    total = 0.0
    for v in torch.eye(8, dtype=torch.float64):
        for t in range(1, 40):
            Jv = apply_jacobian(
                C[t - 1] * keep[t, :, None], v.expand(40, 8), [p[t] for p in P], weights
            )
            total += float((Jv.detach().square().sum(-1) * keep[t]).sum())
    assert found == pytest.approx(sigma**2 / 8 * total / (40 * 40), rel=0.1)


def test_the_order_of_documents_matters_without_reset_only():
    model, batch = documents()
    other = batch.tokens.flip(0)
    whole, _ = model.given(model.embed(batch.tokens.t()), model.keep_of(batch.tokens.t()), {})
    again, _ = model.given(model.embed(other.t()), model.keep_of(other.t()), {})
    assert torch.allclose(whole[-1], again[-1].flip(1), atol=1e-12)
    row = batch.tokens[1]
    alone = row[17:][None].t()
    tail, _ = model.given(model.embed(alone), model.keep_of(alone), {})
    assert torch.allclose(whole[-1][17:, 1], tail[-1][:, 0], atol=1e-12)


def test_a_context_that_is_not_finite_stops_before_it_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    model = make(
        zipf(300, 20, 8), tmp_path, solver="jacobi", reset="never", sweeps=2, chunk_tokens=300,
        depth=2,
    )  # fmt: skip
    run_steps(model, range(1))
    with torch.no_grad():
        model.context_block[0].bias[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        run_steps(model, range(1, 2))
    assert (1, 0) not in model.solver.state.disk.lines


def test_the_first_sweep_in_half_precision_repairs_what_can_be_told_apart(tmp_path, monkeypatch):
    """Trajectories never agree below the rounding of their matmuls: it went on for 31 passes."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    rows = {}
    for half in (True, False):
        model = make(
            zipf(4000, 50, 64, dtype=torch.float32), tmp_path / str(half), dtype=torch.float32,
            seed_compat=True, sweeps=2, keep_contexts=True,
        )  # fmt: skip
        model.attach(tmp_path / f"work{half}")
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            run_steps(model, range(1))
        rows[half] = stored_rows(model, 0)
        assert model.solver.state.disk.lines[0, 0]["redone"] < 2000, "seen 429"
    assert (rows[True] - rows[False]).square().mean().sqrt() < 0.02  # seen: 0.005


def test_the_curve_of_the_original_has_its_shape(tmp_path, monkeypatch):
    """About 0 in the first learning sweep, then a rise, then a fall by a steady factor."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    model = make(
        zipf(8192, 2000, 64, dtype=torch.float32), tmp_path, dtype=torch.float32,
        seed_compat=True, noise=0.0, chunk_tokens=8192, sweeps=8,
    )  # fmt: skip
    run_steps(model, range(8))
    fix = [model.solver.state.disk.lines[k, 0]["fixed_point"] for k in range(1, 8)]
    assert fix[0] < 1e-4 and fix[2] > 50 * fix[0]
    assert all(0.2 < fix[k] / fix[k - 1] < 0.5 for k in (5, 6)), fix


# ---------------------------------------------------------------- state on disk


def small(tmp_path, name="a", **more):
    return make(
        zipf(400, 20, 8, dtype=torch.float32), tmp_path / name, dtype=torch.float32,
        **{"solver": "jacobi", "reset": "never", "sweeps": 4, "depth": 2, "chunk_tokens": 100,
           "keep_contexts": True, **more},
    )  # fmt: skip


def test_a_buffer_of_another_generation_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    run_steps(small(tmp_path), range(10))
    late = small(tmp_path)
    with pytest.raises(InputError, match="needs sweep 0 of chunk 1, holds sweep 2"):
        run_steps(late, range(5, 6))
    late.solver.state.disk.close()
    a, b = (tmp_path / f"contexts/work/context_{x}.npy" for x in "ab")
    data = bytearray(b.read_bytes())
    data[4096 + 250 * 16] ^= 1
    b.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"damaged.*chunk 2 of sweep 1"):
        run_steps(small(tmp_path), range(10, 12))
    data = a.read_bytes()
    a.write_bytes(data[:-5])
    with pytest.raises(InputError, match=r"context_a.npy"):
        run_steps(small(tmp_path), range(10, 11))


@pytest.mark.parametrize(("layout", "spare"), [("double", 1), ("slots", 1), ("slots", 2)])
def test_a_stop_after_any_chunk_ends_with_the_same_rows(layout, spare, tmp_path, monkeypatch):
    """A new process after every chunk, odd sweeps included: the parity bug of the original."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "x"))
    more = {"buffers": layout, "spare_chunks": spare}
    whole = small(tmp_path, **more)
    run_steps(whole, range(16))
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "y"))
    part, state = small(tmp_path, **more), None
    optimizer = torch.optim.Adam([p for p in part.parameters() if p.requires_grad], lr=0.002)
    for step in range(16):
        fresh = small(tmp_path, **more)
        again = torch.optim.Adam([p for p in fresh.parameters() if p.requires_grad], lr=0.002)
        if state is not None:
            fresh.load_state_dict(state[0])
            again.load_state_dict(state[1])
        optimizer = again
        run_steps(fresh, range(step, step + 1), optimizer)
        state = fresh.state_dict(), optimizer.state_dict()
        if step < 15:
            fresh.solver.state.disk.close()
    assert torch.equal(stored_rows(fresh, 3), stored_rows(whole, 3))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, state[0][name]), name


def test_progress_has_the_five_lines_of_the_guide(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    model = small(tmp_path)
    run_steps(model, range(7))
    lines = model.progress().splitlines()
    assert model.log_scalars()["chunk_s"] > 0
    first = small(tmp_path, "first")
    run_steps(first, range(1))
    assert "Loss" not in first.progress(), "the first sweep learns nothing"
    for pattern, line in zip(
        (
            r"Iteration 2/4", r"Processing chunk 3/4: 200-300",
            r"  Effective Rank: \d+\.\d% \(\d/8\)", r"  CVFP Loss: \d\.\d{4}",
            r"  Diversity Loss: -?\d\.\d{4}", r"  Converged: \d+\.\d% \| rank centred .*",
            r"  [\d,]+ tok/s \| read [\d,]+ MB/s, write [\d,]+ MB/s \| memory \d\.\d GB \| "
            r"free [\d,]+ GB \| chunk [\d.]+ s, iteration [\d.]+ s, all [\d.]+ s left",
        ),
        lines, strict=True,
    ):  # fmt: skip
        assert re.fullmatch(pattern, line), line


def test_what_is_left_is_told_in_passes_over_tokens(tmp_path, monkeypatch):
    """4 sweeps of 4 chunks: after the first one 3 passes and 12 learning chunks are left."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    model = small(tmp_path)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    run_steps(model, range(1))
    n = model.log_scalars()
    assert n["chunk_s"] == 10 and n["sweep_s"] == 40
    assert n["left_s"] == pytest.approx(30 + 120 * pace.KEPT)
    assert n["written_bytes_per_s"] == 100 * 8 * 2 / 10
    run_steps(model, range(1, 16))
    assert model.log_scalars()["left_s"] == 0


def test_a_plan_above_the_memory_limit_is_refused(tmp_path):
    """Before the first file; the exact solver has no such plan, a GPU no such limit."""
    model, cpu = small(tmp_path), torch.device("cpu")
    planned = model.planned_bytes()
    assert 0.4e9 < planned < 1e9
    require_memory(model, Runtime(memory_limit=round(planned) + 1), cpu)
    with pytest.raises(EnvError, match=r"memory_limit 0.10 GB; lower chunk_tokens"):
        require_memory(model, Runtime(memory_limit=10**8), cpu)
    require_memory(model, Runtime(memory_limit=10**8), torch.device("meta"))
    assert small(tmp_path, "b", solver="exact", reset="document", sweeps=None).planned_bytes() == 0


def test_sweeps_end_where_enough_tokens_have_converged(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    model = small(tmp_path, stop_at_converged=0.001, noise=0.0)
    assert len(run_steps(model, range(16))) == 4  # sweep 1 learned, then nothing more


# ---------------------------------------------------------------- hand-over, settings


def predictor(stream: Stream | None = None, **config):
    model = build(cvfp, cvfp.Config(width=8, depth=2, **config), 30, seed=9)
    if stream is not None:
        model.read_from(stream)
    return model


def test_the_second_phase_begins_with_the_first(tmp_path):
    stream = zipf(500, 30, 8, dtype=torch.float32, reset_id=0)
    first = make(stream, tmp_path, dtype=torch.float32, depth=2)
    weights = {n: t.clone() for n, t in first.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    by_hand = predictor()
    missing = by_hand.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    kinds = {name.split(".")[0] for name in missing.missing_keys}
    assert kinds == {"token_block", "head"}
    assert {n.split(".")[0] for n in missing.unexpected_keys} == {"memory_head"}
    strict = predictor(stream)
    strict.load_phase1(tmp_path)
    for name in by_hand.state_dict():
        if name.split(".")[0] in ("context_block", "embedding"):
            assert torch.equal(strict.state_dict()[name], weights[name]), name
    theirs = {n.replace("context_block.", "context_block.layers.").replace(
        ".norm.", ".context_norm.") for n in weights}  # fmt: skip
    assert {handover.seed_name(n) for n in theirs} == set(weights)
    with pytest.raises(UserError, match="other token vectors"):
        predictor(zipf(500, 30, 8, seed=5, dtype=torch.float32)).load_phase1(tmp_path)
    with pytest.raises(UserError, match="do not fit"):
        build(cvfp, cvfp.Config(width=8, depth=3), 30, seed=9).load_phase1(tmp_path)


@pytest.mark.parametrize("reads", [False, True])
def test_frozen_contexts_of_one_stream_come_from_disk(reads, tmp_path, monkeypatch):
    """Rows begin in mid-stream with the state that the stream has there, not with 0."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    monkeypatch.setattr(stream_contexts, "CHUNK_TOKENS", 37)
    stream = zipf(200, 30, 8, reads=reads)
    config = cvfp.Config(width=8, depth=2, reset="never", train_context=False,
                         store_dtype="float64", keep_contexts=True)  # fmt: skip

    def fresh():
        model = build(cvfp, config, 30, seed=9).double()
        model.read_from(stream)
        return model

    model, rows = fresh(), np.array([7, 0, 3])
    assert model.inputs == "contexts" and model.reads_rows()
    ids = stream.ids(0, 200)
    whole = model.hidden(ids[None])[0][0]
    tokens = torch.stack([ids[10 * n : 10 * n + 10] for n in rows])
    batch = SimpleNamespace(tokens=tokens, targets=tokens, step=0, rows=rows)
    e, before = model._read(batch)
    found = model.hidden(tokens, e=e, before=before)[0]
    for row, n in zip(found, rows, strict=True):
        assert (row - whole[10 * n : 10 * n + 10]).abs().max() < 1e-5, "halo repairs to 1e-6"
    cold = model.hidden(tokens)[0]
    assert (cold[0] - found[0]).abs().max() > 1e-3, "a row alone begins with 0"
    place = next((tmp_path / "contexts").iterdir())
    kept, journal = (place / "context_slots.npy").read_bytes(), place / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]))  # killed in the fourth chunk of six
    fresh()._read(batch)
    assert (place / "context_slots.npy").read_bytes() == kept
    assert journal.read_bytes() == b"".join(lines)


def test_rows_that_are_no_part_of_the_stream_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))
    stream = zipf(200, 30, 8, dtype=torch.float32)
    model = predictor(stream, reset="never", train_context=False)
    monkeypatch.setattr(stream, "positions", lambda rows: np.full((len(rows), 10), -1))
    with pytest.raises(UserError, match="no part of the stream"):
        model.solver.before(np.array([4]))


@pytest.mark.parametrize("learns", [True, False])
def test_the_context_block_learns_in_the_second_phase_only_where_it_may(learns):
    model = predictor(train_context=learns)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids = torch.randint(30, (4, 13), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        batch = SimpleNamespace(tokens=ids[:, :-1], targets=ids[:, 1:], step=step, rows=None)
        next(iter(model.losses(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {
        n.split(".")[0] for n, t in model.state_dict().items() if not torch.equal(t, before[n])
    }
    assert changed == {"token_block", "head"} | ({"context_block"} if learns else set())


def test_the_token_block_is_the_golden_one(shared):
    depth = 3
    model = golden_model(depth, Path("unused"), chunk=N, sweeps=2)
    z = trajectory(
        torch.zeros(1, D, dtype=torch.float64),
        [p[:, None] for p in model.weights().token_side(golden.wide_array(700, (N, D), 1))],
        model.weights(),
    )
    h = golden.wide_array(700, (N, D), 1)
    for i in range(depth):
        V = golden.wide_array(1700 + 4 * i, (D, 2 * D), 0.25)
        b = golden.wide_array(1701 + 4 * i, (D,), 0.05)
        grown = h + torch.relu(torch.cat((z[i][:, 0], h), 1) @ V.T + b)
        h = torch.nn.functional.layer_norm(grown, (D,), eps=1e-5)
    whole = build(cvfp, cvfp.Config(width=D, depth=depth, last_affine=True), N, seed=1).double()
    state = whole.state_dict()
    state |= {n: t for n, t in model.state_dict().items() if n in state}
    for i in range(depth):
        state[f"token_block.{i}.weight"] = golden.wide_array(1700 + 4 * i, (D, 2 * D), 0.25)
        state[f"token_block.{i}.bias"] = golden.wide_array(1701 + 4 * i, (D,), 0.05)
    whole.load_state_dict(state)
    found = whole.hidden(torch.arange(N)[None])[0][0]
    assert torch.allclose(found, h, atol=1e-10)
    wanted = torch.tensor([-0.793205885809, -0.669657865203, 0.272782841046], dtype=torch.float64)
    assert torch.allclose(found[49, :3], wanted, atol=1e-10)
    logits = found @ golden.wide_array(1720, (23, D), 0.5).T
    assert torch.allclose(
        logits[49, :2], torch.tensor([0.693781769742, -2.674592950678], dtype=torch.float64)
    )
    targets = torch.from_numpy(np.floor(golden.uniform(1730, N) * 23).astype(np.int64))
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(5.058402731055, abs=1e-9)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"seed_compat": True, "kind": "logdet"}, "contradicts seed_compat"),
        ({"phase": "fixed_point", "given": "leaky"}, "a control of the predicting phase"),
        ({"horizons": (0, 1)}, "horizons: 0; use 1 or more"),
        ({"solver": "deer"}, "not built"),
        ({"phase": "fixed_point", "reset": "never"}, "one stream"),
        ({"solver": "jacobi", "grad": "bptt"}, "one step long"),
        ({"sweeps": 3}, "jacobi's"),
        ({"phase": "fixed_point", "solver": "jacobi", "sweeps": 1}, "2 or more"),
        ({"phase": "fixed_point", "fixed_point": 0.0, "diversity": 0.0, "memory": 0.0}, "above 0"),
        ({"noise": -1.0}, "0 or more"),
        ({"seed_defects": ("ln_skew",)}, "only with seed_compat"),
        ({"seed_compat": True, "seed_defects": ("speed",)}, "choose of"),
    ],
)
def test_contradictions_are_refused(keys, told):
    with pytest.raises(Refused, match=told):
        cvfp.Config(**keys)


def test_lost_contexts_name_the_two_folders_whose_removal_helps(tmp_path, monkeypatch):
    """Wiped scratch, or a damaged journal, beside a run that is in mid-sweep."""
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "scratch"))
    keys: dict = {"seed_compat": True, "depth": 2, "sweeps": 3, "chunk_tokens": 30}
    fresh = lambda: make(zipf(60, 20, 8), tmp_path, dtype=torch.float64, **keys)  # noqa: E731
    run_steps(fresh(), range(3))  # sweep 0, the first chunk of sweep 1
    place = next((tmp_path / "scratch/contexts").iterdir())
    for damage in (lambda: shutil.rmtree(place),
                   lambda: (place / "journal.jsonl").write_text("{}\nx\n")):  # fmt: skip
        damage()
        with pytest.raises(InputError) as caught:
            run_steps(fresh(), range(3, 4))
        assert str(tmp_path / "work") in caught.value.remedy and str(place) in caught.value.remedy
        shutil.rmtree(place)
        run_steps(fresh(), range(3))


def test_a_narrow_state_predicts_outside_of_autocast():
    """As evaluation and an export do; only training multiplies in bf16."""
    config = cvfp.Config(width=8, depth=2, seed_compat=True, seed_defects=("bf16_state",))
    model = build(cvfp, config, 30, seed=1)
    assert model.token_block[0].weight.dtype == torch.bfloat16
    assert model(torch.arange(12)[None])[0].isfinite().all()


def test_each_defect_changes_what_it_names(tmp_path, monkeypatch):
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path))

    def run(name: str, *defects: str):
        stream = zipf(200, 20, 8, dtype=torch.float32)
        model = make(
            stream, tmp_path / (name or "none"), dtype=torch.float32, seed_compat=True, depth=2,
            chunk_tokens=150, sweeps=3, seed_defects=defects,
        )  # fmt: skip
        model.attach(tmp_path / f"work_{name}")
        totals = run_steps(model, range(6))
        return model, totals

    plain, totals = run("")
    _, by_length = run("length", "length_weight")
    assert totals[0] == pytest.approx(by_length[0]), "the first chunk has its full length"
    assert totals[1] != pytest.approx(by_length[1], rel=1e-3)
    slow, same = run("slow", "sequential_start")
    assert np.allclose(same, totals, atol=1e-4)
    assert slow.solver.state.disk.lines[0, 0]["repaired"] == 0
    half, _ = run("half", "bf16_state")
    assert (
        half.context_block[0].weight.dtype == torch.float32
    )  # `make` widens; the config asks bf16
    asked = cvfp.Model(replace(plain.config, seed_defects=("bf16_state",)), 20)
    assert asked.context_block[0].weight.dtype == torch.bfloat16
    skewed = build(
        cvfp, cvfp.Config(width=8, seed_compat=True, seed_defects=("ln_skew",)), 20, seed=1
    )
    with torch.no_grad():
        skewed.embedding.weight.mul_(3)
    e = skewed.embed(torch.arange(20))
    assert e.var(-1, correction=0).mean().item() == pytest.approx(1, abs=1e-3)
