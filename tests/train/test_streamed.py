"""The trainer over streamed weights: the same bytes, resumed across modes, masks kept on resume."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from lib.core.errors import Interrupted, UserError
from lib.models import ramgpt
from lib.nn.stream import Streaming, open_stream
from lib.train.session import require_wire
from lib.train.trainer import train
from tests.train.tiny import BASE, CONTEXT, RUNTIME, VOCAB, Stop, make_job

SETTINGS = replace(BASE, lr=0.01, ema_decay=0.0)


def model_of(runtime, dropout: float = 0.0, averaged: bool = False) -> ramgpt.Model:
    config = ramgpt.Config(depth=2, width=16, heads=2, context=CONTEXT, dropout=dropout)
    model = ramgpt.Model(config, VOCAB)
    model.init_weights(4)
    request = Streaming(runtime=runtime, context=CONTEXT, averaged=averaged)
    model.streamer = partial(open_stream, request=request)
    model.place("cpu", torch.float32)
    return model


def run(work, settings=SETTINGS, dropout: float = 0.0, said=None, stop=None, **runtime):
    changed = replace(RUNTIME, **runtime)
    model = model_of(changed, dropout, settings.ema_decay > 0)
    said = [] if said is None else said
    job = make_job(work, settings, changed, model=model, said=said, stop=stop or Stop())
    try:
        return train(job)
    finally:
        model.close()


def same(one, other) -> bool:
    a, b = one.weights, other.weights
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_streamed_and_resident_runs_end_with_the_same_bytes(tmp_path, dropout, ema):
    """runtime.stream: on, stream_group: 1 gives the bytes of off (ramgpt.md 11.1)."""
    before = set(threading.enumerate())
    settings, said = replace(SETTINGS, ema_decay=ema), []
    off = run(tmp_path / "off", settings, dropout)
    on = run(tmp_path / "on", settings, dropout, said, stream="on", stream_group=1)
    assert same(on, off)
    assert any(line.startswith("stream: CPU executor") for line in said)
    assert any("stream: on | 2 units, 2 slots, group 1 of 2" in line for line in said)
    ours = set(threading.enumerate()) - before
    assert not [t for t in ours if t.name.startswith("stream")]


def test_matrices_under_muon_stream_with_the_same_bytes(tmp_path):
    """Its updates change masters behind the engine's back, beside those of the other parameters."""
    settings = replace(SETTINGS, optimizer="normuon")
    off = run(tmp_path / "off", settings)
    assert same(run(tmp_path / "on", settings, stream="on", stream_group=1), off)
    assert not same(run(tmp_path / "adamw"), off)


def test_a_checkpoint_written_streamed_resumes_resident_and_back(tmp_path):
    """Killed twice, in another mode each time, with another number of slots: the same bytes."""
    whole = run(tmp_path / "whole", dropout=0.1)
    said: list[str] = []
    on = {"stream": "on", "stream_group": 1}
    with pytest.raises(Interrupted):
        run(tmp_path / "w", dropout=0.1, said=said, stop=Stop(2), **on)
    with pytest.raises(Interrupted):
        run(tmp_path / "w", dropout=0.1, said=said, stop=Stop(2))
    again = run(tmp_path / "w", dropout=0.1, said=said, stream_slots=4, **on)
    assert same(again, whole)
    assert any("stream was cpu, group 1, 2 slots, is off" in line for line in said)


def test_a_group_of_all_micro_batches_differs_by_rounding_only(tmp_path):
    one = run(tmp_path / "one", device_batch_size=1)
    group = run(tmp_path / "all", device_batch_size=1, stream="on", stream_group=4)
    for name in one.weights:
        assert torch.allclose(one.weights[name], group.weights[name], atol=2e-3), name


def test_masks_keep_the_micro_batch_of_the_checkpoint(tmp_path):
    """With dropout another device_batch_size is another run; a resumed one keeps what it had."""
    whole, said = run(tmp_path / "whole", dropout=0.1), []
    with pytest.raises(Interrupted):
        run(tmp_path / "w", dropout=0.1, stop=Stop(2))
    again = run(tmp_path / "w", dropout=0.1, said=said, device_batch_size=4)
    assert same(again, whole)
    assert any("keeps micro-batches of 2 rows" in line for line in said)
    other = run(tmp_path / "other", dropout=0.1, device_batch_size=4)
    assert not same(other, whole)


def test_a_rounded_gradient_needs_a_bus(tmp_path):
    rounded = replace(SETTINGS, grad_wire="bfloat16")
    with pytest.raises(UserError, match="grad_wire"):
        require_wire(rounded, model_of(RUNTIME))
    model = model_of(replace(RUNTIME, stream="on"))
    require_wire(rounded, model)
    model.close()


def test_the_log_tells_what_crossed_the_bus(tmp_path):
    import json

    run(tmp_path / "on", stream="on", stream_group=1)
    lines = (tmp_path / "on/training_log.jsonl").read_text().splitlines()
    step = next(row for row in map(json.loads, lines) if "loss" in row)
    assert step["h2d_bytes"] > 0 and step["d2h_bytes"] > 0
    assert step["pinned_bytes"] == 0
