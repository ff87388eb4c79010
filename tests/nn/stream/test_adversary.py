"""Against a device of ill will the streamed model is right; each lapse of the plan is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib.nn.stream.memory import HostUnit
from lib.nn.stream.plan import Op, Plan, make_pass
from tests.nn.stream.adversary import Adversary
from tests.nn.stream.models import gradients, ids, losses_of, make

CASES = [
    {"kind": "gpt2", "stream_slots": 2},
    {"kind": "gpt2", "stream_boundaries": "host", "config": {"depth": 5}},
    {"kind": "looped", "stream_slots": 2, "config": {"dropout": 0.1}},
    {"kind": "gpt2", "stream_resident": 0.34, "config": {"depth": 4, "tie": False}},
]


def streamed(case: dict, adversary: Adversary):
    model = make(executor=adversary, stream_overlap_optimizer="off", **case)
    adversary.engine = model.engine
    return model


def reference(case: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two groups of two micro-batches by the executor that runs in order."""
    model = make(**case)
    losses = losses_of(model, ids(8), 4)
    return torch.stack(losses), gradients(model)


def equal(model, wanted) -> bool:
    losses = torch.stack(losses_of(model, ids(8), 4))
    found = gradients(model)
    return torch.equal(losses, wanted[0]) and all(
        torch.equal(found[n], wanted[1][n]) for n in found
    )


@pytest.mark.parametrize("number", range(len(CASES)))
def test_any_order_that_the_waits_allow_gives_the_same_bits(number):
    """50 seeds a case; the reference is what the plain loop gives, by test_parity.py."""
    case = CASES[number]
    wanted = reference(case)
    model = streamed(case, Adversary())
    for seed in range(50):
        adversary = Adversary(seed)
        adversary.engine, model.engine.executor = model.engine, adversary
        for parameter in model.parameters():
            parameter.grad = None
        assert equal(model, wanted), f"seed {seed}"
        with torch.no_grad():
            assert model(ids(1)[:, :-1])[0].isfinite().all(), f"a sweep, seed {seed}"


# ---------------------------------------------------------------- mutants that must be seen


def fails(case: dict, plan_of, adversary: Adversary, wanted) -> bool:
    """Whether one group with the mutated plan is wrong, or does not even run."""
    model = streamed(case, adversary)
    model.engine._plan = lambda kind, micro: plan_of
    try:
        losses = losses_of(model, ids(4), 4)
    except (IndexError, AssertionError):  # of a buffer that is not there yet
        return True
    found = gradients(model)
    same = torch.equal(torch.stack(losses), wanted[0]) and all(
        torch.equal(found[n], wanted[1][n]) for n in found
    )
    return not same


def one_group(case: dict):
    model = make(**case)
    losses = losses_of(model, ids(4), 4)
    return model.engine.shape, torch.stack(losses), gradients(model)


def adverse(early: int, late: int, plan: Plan) -> Adversary:
    """Runs operation `early` as soon as it can, what it no longer waits for as late as it can."""
    lane_early, lane_late = plan.ops[early].lane, plan.ops[late].lane

    def prefer(ready: list[int]) -> int:
        def rank(number: int) -> tuple[int, int]:
            lane = plan.ops[number].lane
            if lane == lane_early and number <= early:
                return (0, number)
            return (2 if lane == lane_late and number <= late else 1, number)

        return min(ready, key=rank)

    return Adversary(prefer=prefer)


def with_op(plan: Plan, number: int, op: Op) -> Plan:
    ops = list(plan.ops)
    ops[number] = op
    return replace(plan, ops=tuple(ops))


@pytest.mark.parametrize("number", range(2))
def test_every_wait_is_needed(number):
    """Each wait removed in turn: the result changes or is NaN."""
    case = CASES[number]
    shape, losses, grads = one_group(case)
    plan = make_pass(replace(shape, micro=2), shape.nothing_held())
    waits = [(n, w) for n, op in enumerate(plan.ops) for w in op.waits]
    assert len(waits) >= 15
    for n, gone in waits:
        op = plan.ops[n]
        mutant = with_op(plan, n, replace(op, waits=tuple(w for w in op.waits if w != gone)))
        seen = fails(case, mutant, adverse(n, gone, mutant), (losses, grads))
        assert seen, f"{op} without waiting for {plan.ops[gone]}"


def test_an_eviction_one_operation_early_is_seen():
    case = CASES[0]
    shape, *wanted = one_group(case)
    plan = make_pass(replace(shape, micro=2), shape.nothing_held())
    compute = [n for n, op in enumerate(plan.ops) if op.lane == "compute"]
    evictions = [n for n, op in enumerate(plan.ops) if op.kind == "EVICT"]
    assert evictions
    for n in evictions:
        reader = plan.ops[n].waits[-1]
        earlier = compute[compute.index(reader) - 1]
        mutant = with_op(plan, n, replace(plan.ops[n], waits=(earlier,)))
        assert fails(case, mutant, adverse(n, reader, mutant), wanted)


def test_sums_kept_by_place_instead_of_by_parameter_are_seen():
    """Three blocks applied twice through two slots: a place serves several parameters."""
    case = {"kind": "looped", "stream_slots": 2}
    shape, *wanted = one_group(case)
    plan = make_pass(replace(shape, micro=2), shape.nothing_held())
    place_of, ops = {}, []
    for op in plan.ops:
        if op.kind == "BWD":
            place_of[op.unit] = op.place
            op = replace(op, gradient=op.place)
        elif op.kind == "GRAD_OUT" and op.unit != shape.ends:
            op = replace(op, gradient=place_of[op.unit])
        ops.append(op)
    assert fails(case, replace(plan, ops=tuple(ops)), Adversary(), wanted)


def test_a_stale_version_is_seen(monkeypatch):
    """Wires that are not written again after an update: the next loss is another one."""
    from tests.nn.stream.test_parity import FP32, three_steps

    right, _ = three_steps(make(stream_overlap_optimizer="off"), 2, FP32)
    once = HostUnit.write_wire

    def write_once(self):
        if self._written < 0:
            once(self)

    monkeypatch.setattr(HostUnit, "write_wire", write_once)
    wrong, _ = three_steps(make(stream_overlap_optimizer="off"), 2, FP32)
    assert torch.equal(right[0][0], wrong[0][0])
    assert not torch.equal(right[1][0], wrong[1][0])


def test_the_order_of_the_head_matters(monkeypatch):
    """Gradients of the ends begin with the head's; a fresh sum at each micro-batch is seen."""
    case = CASES[0]
    shape, *wanted = one_group(case)
    plan = make_pass(replace(shape, micro=2), shape.nothing_held())
    heads = [n for n, op in enumerate(plan.ops) if op.kind == "HEAD"]
    swapped = list(plan.ops)
    swapped[heads[0]], swapped[heads[1]] = swapped[heads[1]], swapped[heads[0]]
    assert fails(case, replace(plan, ops=tuple(swapped)), Adversary(), wanted)
