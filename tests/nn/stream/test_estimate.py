"""The estimator against closed forms, published arithmetic, and the bytes that the engine moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib.core.run_settings import Runtime
from lib.models import ramgpt
from lib.nn.stream import Streaming, estimate
from lib.nn.stream.decide import load_of
from lib.nn.stream.estimate import CARDS, Load
from tests.nn.stream.models import ids, losses_of, make

RTX3050 = CARDS["rtx3050-6gb"]


def published(profile: str, **changes) -> Load:
    """GPT-2 of the two published sizes with the 50,257 words of GPT-2's tokenizer."""
    L, d, T, rows, A = {"1b": (36, 1536, 1024, 1, 192), "0p1b": (18, 768, 768, 2, 64)}[profile]
    V = 50257
    load = Load(
        unit_sizes=(12 * d * d + 13 * d,) * L, applications=tuple(range(L)),
        ends=V * d + T * d + 2 * d, vocab_size=V, width=d, context=T, rows=rows, accumulation=A,
    )  # fmt: skip
    return replace(load, **changes)


def test_sizes_of_the_published_models():
    """Parameters, state of a resident run, a checkpoint, host memory (ramgpt.md 2.4, 5.4)."""
    load = published("1b")
    assert load.parameters == 1_098_705_408
    assert 16 * load.parameters == pytest.approx(17.6e9, rel=2e-3)
    assert estimate.CHECKPOINT_BYTES * load.parameters == pytest.approx(13.2e9, rel=2e-3)
    assert estimate.host_bytes(load) == pytest.approx(19.8e9 + 0.4e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("rtx3050-6gb", 415), ("rtx3090", 1136), ("rtx4090", 2640), ("a100-pcie", 4992),
     ("h100", 7608)],
)  # fmt: skip
def test_break_even_of_known_cards(name, tokens):
    """w F / (2 BW) at 40 % of the textbook peak; an fp32 wire doubles it (ramgpt.md 5.2)."""
    load = published("1b")
    assert estimate.break_even(load, CARDS[name]) == pytest.approx(tokens, rel=2e-3)
    double = estimate.break_even(replace(load, wire_bytes=4), CARDS[name])
    assert double == 2 * estimate.break_even(load, CARDS[name])


def test_the_published_schedule_takes_years():
    """300,000 steps of 196,608 tokens on an RTX 3050: 1,147 days by FLOPs alone (3.4)."""
    load, _ = estimate.choose_group(published("1b"), RTX3050.memory, RTX3050)
    days = 300_000 * estimate.step_seconds(load, RTX3050).seconds / 86400
    assert 1147 < days < 1.02 * 1147
    step = estimate.step_seconds(load, RTX3050)
    assert step.binding == "compute" and step.hidden > 0.9


def test_the_group_is_the_largest_that_fits():
    load, warning = estimate.choose_group(published("1b"), 6e9, RTX3050)
    assert warning is None and not load.host
    assert load.accumulation % load.group == 0
    assert estimate.device_bytes(load) <= 0.85 * 6e9
    larger = [g for g in range(load.group + 1, 193) if 192 % g == 0]
    assert all(estimate.device_bytes(replace(load, group=g)) > 0.85 * 6e9 for g in larger)


def test_boundaries_move_to_the_host_where_copies_would_show():
    """A fast card with little memory needs more tokens a load than its boundaries allow."""
    small = replace(CARDS["h100"], memory=3.6e9)
    load, _ = estimate.choose_group(published("1b"), small.memory, small)
    assert load.host and load.group > 8
    starved = replace(published("1b"), accumulation=2)
    _, warning = estimate.choose_group(starved, 80e9, CARDS["h100"])
    assert warning is not None and "from table, not measured" in warning


def test_transfer_bound_runs_are_called_so():
    slow = replace(RTX3050, in_rate=0.5e9)
    step = estimate.step_seconds(published("1b", group=1), slow)
    assert step.binding == "copies in" and "stream_group" in step.knob
    assert step.seconds > step.compute_s


def test_host_boundaries_do_not_grow_with_depth():
    load = published("1b", group=24, host=True)
    deeper = replace(load, unit_sizes=load.unit_sizes * 2, applications=tuple(range(72)))
    assert estimate.device_bytes(deeper) == estimate.device_bytes(load)


@pytest.mark.parametrize("slots", [2, 3])
def test_bytes_of_a_step_are_what_the_engine_moves(slots):
    """Two groups of two micro-batches, after an update: the estimator's plan is the executor's."""
    model = make(stream_slots=slots, stream_group=2, config={"depth": 5})
    engine = model.engine
    assert engine.group_rows(2, 8) == 4
    losses_of(model, ids(8), 4)
    inward, outward = estimate.step_bytes(engine.load)
    gaps = 1.02  # tensors are aligned on the wire
    assert inward <= engine.bytes_in <= gaps * inward
    assert outward <= engine.bytes_out <= gaps * outward


def test_the_loads_numbers_are_the_models():
    config = ramgpt.Config(depth=2, width=32, heads=4, context=12)
    model = make(config={"depth": 2})
    load = model.engine.load
    assert load.parameters == sum(p.numel() for p in model.parameters())
    assert load.unit_sizes[0] == 12 * config.width**2 + 13 * config.width
    assert load.wire_bytes == 4 and make(dtype=torch.bfloat16).engine.load.wire_bytes == 2


def test_bf16_moments_save_four_bytes_a_parameter():
    model = make()
    asked = Streaming(runtime=Runtime(stream="on"), context=12)
    plain = load_of(model, torch.bfloat16, asked)
    half = load_of(model, torch.bfloat16, replace(asked, moment_dtype=torch.bfloat16))
    assert estimate.host_bytes(plain) - estimate.host_bytes(half) == 4 * plain.parameters
