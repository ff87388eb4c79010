"""The streamed model has the resident model's bits: losses, gradients, weights, in every mode."""

from __future__ import annotations

import pytest
import torch

from lib.models.base import Optim
from lib.nn.stream import for_reading
from lib.nn.stream.execute import Lanes
from lib.train.optim import build_optimizer
from lib.train.schedule import make_schedule
from tests.nn.stream.models import gradients, ids, losses_of, make, relative

FP32, BF16 = torch.float32, torch.bfloat16


def three_steps(model, rows: int, dtype: torch.dtype):
    """Losses, gradients of each step, weights: two micro-batches of `rows` or their group."""
    optimizer = build_optimizer(
        model.param_groups(Optim(lr=1e-2, steps=3)), model=model
    )  # fmt: skip
    schedule, seen = make_schedule("constant", 3), []
    for step in range(3):
        losses = losses_of(model, ids(4, seed=step), rows, step, dtype)
        seen.append((torch.stack(losses), gradients(model)))
        optimizer.step(schedule.at(step))
        optimizer.zero_grad()
    model.flush()
    return seen, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("frozen", ["", "blocks.1.", "w"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["gpt2", "looped"])
@pytest.mark.parametrize("tie", [True, False])
def test_streamed_equals_resident_bit_by_bit(tie, kind, dropout, dtype, frozen):
    """Losses, gradients and weights over 3 steps of 2 micro-batches (ramgpt.md 9.1 a)."""
    config = {"tie": tie, "dropout": dropout}
    found = [
        three_steps(make(kind, stream=s, dtype=dtype, frozen=frozen, config=config), 2, dtype)
        for s in (False, True)
    ]
    (resident, weights), (streamed, its_weights) = found
    for step, ((loss, grads), (its_loss, its_grads)) in enumerate(
        zip(resident, streamed, strict=True)
    ):
        assert torch.equal(loss, its_loss), f"step {step}"
        assert grads.keys() == its_grads.keys()
        for name in grads:
            assert torch.equal(grads[name], its_grads[name]), f"step {step}, {name}"
    for name in weights:
        assert torch.equal(weights[name], its_weights[name]), name


@pytest.mark.parametrize(
    "runtime",
    [
        {"stream_boundaries": "host"},
        {"stream_resident": 0.5},
        {"stream_resident": 1.0},
        {"stream_slots": 2},
        {"stream_overlap_optimizer": "off"},
        {"stream_slots": 2, "stream_boundaries": "host", "stream_resident": 0.34},
    ],
)
@pytest.mark.parametrize("lanes", [False, True])
def test_no_operational_choice_changes_a_bit(runtime, lanes):
    """Neither where things lie nor who carries them: threads on lanes do as the reference."""
    executor = Lanes(torch.device("cpu")) if lanes else None
    config = {"dropout": 0.1, "depth": 5}
    model = make(executor=executor, config=config, **runtime)
    seen, weights = three_steps(model, 2, FP32)
    model.close()
    wanted, its = three_steps(make(stream=False, config=config), 2, FP32)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen, wanted, strict=True))
    assert all(torch.equal(weights[n], its[n]) for n in its)


def test_activation_checkpointing_has_the_same_bits():
    resident, recomputed = (make(stream=False, config={"dropout": 0.1}) for _ in range(2))
    recomputed.activation_checkpointing = True
    a, b = (three_steps(m, 2, FP32) for m in (resident, recomputed))
    assert all(torch.equal(a[1][n], b[1][n]) for n in a[1])


@pytest.mark.parametrize("host", ["gpu", "host"])
@pytest.mark.parametrize("kind", ["gpt2", "looped"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_group_equals_its_micro_batches(kind, tie, host):
    """G = A: exact where a parameter is used once, else a sum in another order (9.1 b)."""
    config = {"tie": tie, "dropout": 0.1}
    resident, streamed = (
        make(kind, stream=False, config=config),
        make(kind, config=config, stream_boundaries=host),
    )
    losses = losses_of(resident, ids(8), 2)
    together = losses_of(streamed, ids(8), 8)
    assert torch.equal(torch.stack(losses).sum() / 4, together[0])
    a, b = gradients(streamed), gradients(resident)
    if tie or kind == "looped":
        assert relative(a, b) <= 1e-6  # seen 1.2e-7
    else:
        assert all(torch.equal(a[n], b[n]) for n in b)


def test_groups_between_one_and_all():
    resident, streamed = make(stream=False), make()
    losses_of(resident, ids(8), 2)
    losses_of(streamed, ids(8), 4)
    assert relative(gradients(streamed), gradients(resident)) <= 1e-6


def test_another_family_streams_too():
    """The nanochat-style GPT of the base era, through the same engine."""
    config = {"heads": 2}
    resident = make("gpt", stream=False, config=config)
    streamed = make("gpt", config=config)
    assert torch.equal(losses_of(resident, ids(2), 2)[0], losses_of(streamed, ids(2), 2)[0])
    a, b = gradients(resident), gradients(streamed)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    with torch.no_grad():
        one, two = (m.eval()(ids(2)[:, :-1])[0] for m in (resident, streamed))
    assert torch.equal(one, two)


def test_wire_is_autocast():
    """Matrices in the compute dtype, norms and biases fp32; the ends as they are (9.1 c)."""
    model = make(dtype=BF16)
    for unit in model.engine.units[:-1]:
        for piece in unit.wires:
            wide = len(piece.shape) < 2
            assert piece.dtype == (FP32 if wide else BF16), piece.name
            assert piece.start % 256 == 0
    assert {piece.dtype for piece in model.engine.units[-1].wires} == {FP32}


def test_frozen_parameters_cost_no_byte_and_no_addition():
    """Neither a gradient buffer nor a byte that leaves."""
    whole, part = make(), make(frozen="blocks.")
    for model in (whole, part):
        losses_of(model, ids(2), 2)
    assert part.engine.bytes_out < whole.engine.bytes_out / 2
    assert {n for n in gradients(part) if n.startswith("blocks.")} == set()
    assert all(unit.gradient_size == 0 for unit in part.engine.units[:-1])


def test_state_dict_is_the_resident_models_and_sees_every_update():
    resident, streamed = make(stream=False), make()
    a, b = resident.state_dict(), streamed.state_dict()
    assert [(n, t.shape, t.dtype) for n, t in a.items()] == [
        (n, t.shape, t.dtype) for n, t in b.items()
    ]
    tokens = ids(2)[:, :-1]
    with torch.no_grad():
        before = streamed.eval()(tokens)[0]
        streamed.state_dict()["blocks.1.up.weight"].mul_(2)  # as a resumed run does
        resident.state_dict()["blocks.1.up.weight"].mul_(2)
        after = streamed(tokens)[0]
        assert not torch.equal(before, after), "a stale copy was used"
        assert torch.equal(after, resident.eval()(tokens)[0])


def test_rounded_gradients_are_near_and_half_as_many_bytes():
    exact, rounded = make(), make(grad_dtype=BF16)
    for model in (exact, rounded):
        losses_of(model, ids(2), 2)
    assert rounded.engine.bytes_out * 2 == exact.engine.bytes_out
    error = relative(gradients(rounded), gradients(exact))
    assert 1e-4 < error < 4e-3  # bf16 keeps 8 bits: 2^-9 at most, seen 1.7e-3


def test_cached_decoding_streams():
    streamed, resident = make().eval(), make(stream=False).eval()
    tokens = ids(2)[:, :-1]
    with torch.no_grad():
        logits, state = streamed(tokens[:, :5])
        more, _ = streamed(tokens[:, 5:], state)
        assert torch.allclose(torch.cat((logits, more), 1), resident(tokens)[0], atol=1e-6)


def test_a_model_that_only_reads_keeps_no_gradient_and_marks_what_it_wants():
    """Logits at marked positions are those of the whole, and nothing is held for a backward."""
    resident = make(stream=False).eval()
    streamed = make(stream=False).eval()
    streamed.streamer = for_reading("on")
    streamed.place("cpu", torch.float32)
    engine, tokens = streamed.engine, ids(2)[:, :-1]
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[0, 3] = where[1, 7] = True
    with torch.no_grad():
        marked = resident.logits_at(tokens, where)[0]
        assert torch.equal(streamed.logits_at(tokens, where)[0], marked)
        assert torch.allclose(marked, resident(tokens)[0][where], atol=1e-6)
    assert all(unit.gradient_size == 0 for unit in engine.units) and engine._worker is None
    assert engine.bytes_in > 0 and engine.stage_size == 1
    assert not any(p.requires_grad for p in streamed.parameters())
