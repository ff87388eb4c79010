"""Laws of the planner over random models: what is read was loaded, nothing is overwritten early."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lib.nn.stream.estimate import simulate
from lib.nn.stream.plan import LANES, Op, Plan, Shape, make_pass, make_walk


@st.composite
def shapes(draw) -> Shape:
    units = draw(st.integers(1, 7))
    loops = draw(st.integers(1, 3))
    order = list(range(units)) * loops if draw(st.booleans()) else list(range(units))
    if draw(st.booleans()):  # any order, repeats and neighbours included
        order += draw(st.lists(st.integers(0, units - 1), max_size=4))
    frozen = draw(st.sets(st.integers(0, units), max_size=2))
    pieces = [0 if u in frozen else 1 for u in range(units + 1)]
    if pieces[units]:
        pieces[units] = draw(st.integers(1, 4))
    return Shape(
        applications=tuple(order), units=units, micro=draw(st.integers(1, 4)),
        slots=draw(st.integers(2, 6)), pieces=tuple(pieces), host=draw(st.booleans()),
        resident=frozenset(draw(st.sets(st.integers(0, units - 1), max_size=units))),
    )  # fmt: skip


def plans(shape: Shape) -> list[Plan]:
    """The first pass after an update, and one that finds what that left."""
    first = make_pass(shape, shape.nothing_held())
    return [first, make_pass(shape, first.held)]


def before(plan: Plan) -> list[set[int]]:
    """By operation: all that must be over when it starts, by its lane and its waits alone."""
    past: list[set[int]] = []
    last: dict[str, int] = {}
    for number, op in enumerate(plan.ops):
        seen: set[int] = set()
        for other in (*op.waits, *([last[op.lane]] if op.lane in last else [])):
            assert other < number, "the graph of waits has a cycle"
            seen |= past[other] | {other}
        past.append(seen)
        last[op.lane] = number
    return past


def resources(op: Op, shape: Shape) -> tuple[set, set]:
    """(read, written) by an operation: stated here again, so that the planner's own list is tested.

    A frozen unit's BWD writes no gradient; SCALE touches all micro-batches.
    """
    n = len(shape.applications)
    ends, x = "ends gradient", lambda buffer, j: ("x", buffer, j)
    match op.kind:
        case "EVICT" | "LOAD":
            return set(), {("place", op.place)}
        case "EMBED":
            return {("place", op.place)}, {x(op.target, op.micro)}
        case "FWD":
            return {("place", op.place), x(op.source, op.micro)}, {x(op.target, op.micro)}
        case "SAVE":
            return {x(op.source, op.micro)}, {("saved", op.application, op.micro)}
        case "FETCH":
            return {("saved", op.application, op.micro)}, {x(op.target, op.micro)}
        case "HEAD":
            return {("place", op.place)}, {x(op.target, op.micro), ends}
        case "SCALE":
            return set(), {ends, *(x(op.target, j) for j in range(shape.micro))}
        case "BWD":
            k = {("gradient", op.gradient)} if op.gradient >= 0 else set()
            reads = {("place", op.place), x(op.source, op.micro)}
            return reads, {x(op.target, op.micro), *k}
        case "ENDS_BWD":
            return {("place", op.place), x(op.target, op.micro)}, {ends}
        case "GRAD_OUT":
            k = ("gradient", op.gradient) if op.gradient >= 0 else ends
            return {k}, {("stage", op.stage)}
        case "ACC":
            return {("stage", op.stage)}, {("host", op.unit)}
    raise AssertionError((op.kind, n))


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_no_operation_meets_a_buffer_that_another_is_changing(shape):
    """Every two operations of which one writes what the other touches are ordered."""
    for plan in plans(shape):
        past = before(plan)
        touched = [resources(op, shape) for op in plan.ops]
        for b, (reads, writes) in enumerate(touched):
            for a in range(b):
                r, w = touched[a]
                if w & (reads | writes) or r & writes:
                    assert a in past[b], (plan.ops[a], plan.ops[b])


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_what_is_read_is_there_and_each_micro_batch_meets_each_application_once(shape):
    held = list(shape.nothing_held())
    for plan in plans(shape):
        boundary: dict[
            tuple[int, int], int
        ] = {}  # (buffer, micro) -> application whose input it is
        saved, met = set(), Counter()
        for op in plan.ops:
            if op.kind == "EVICT":
                assert held[op.place] == op.unit
                held[op.place] = None
            elif op.kind == "LOAD":
                assert held[op.place] is None
                held[op.place] = op.unit
            elif op.place >= 0:
                assert held[op.place] == op.unit, op
            if op.kind == "EMBED":
                boundary[op.target, op.micro] = 0
            elif op.kind == "FWD":
                assert boundary[op.source, op.micro] == op.application
                boundary[op.target, op.micro] = op.application + 1
            elif op.kind == "SAVE":
                assert boundary[op.source, op.micro] == op.application
                saved.add((op.application, op.micro))
            elif op.kind == "FETCH":
                assert (op.application, op.micro) in saved
                boundary[op.target, op.micro] = op.application
            elif op.kind == "BWD":
                assert boundary[op.source, op.micro] == op.application
                assert op.source != op.target
            met[op.kind, op.application, op.micro] += op.kind in ("FWD", "BWD", "HEAD", "ENDS_BWD")
        for j in range(shape.micro):
            for a in range(len(shape.applications)):
                assert met["FWD", a, j] == met["BWD", a, j] == 1
            assert met["HEAD", -1, j] == met["ENDS_BWD", -1, j] == 1
        assert len([u for u in held if u is not None]) <= shape.places
        assert tuple(held) == plan.held


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_a_gradient_leaves_once_whole_and_is_added_once(shape):
    for plan in plans(shape):
        out = Counter((op.unit, op.piece) for op in plan.ops if op.kind == "GRAD_OUT")
        added = Counter((op.unit, op.piece) for op in plan.ops if op.kind == "ACC")
        used = {*shape.applications, shape.ends}
        wanted = {(u, p) for u in used for p in range(shape.piece_count(u))}
        assert out == added == Counter(wanted), "frozen units send nothing, the others all, once"
        last = {op.unit: n for n, op in enumerate(plan.ops) if op.kind == "BWD"}
        filled: dict[int, int] = {}
        for n, op in enumerate(plan.ops):
            if op.kind == "GRAD_OUT" and op.unit != shape.ends:
                assert n > last[op.unit]
                assert filled[op.gradient] == op.unit
            if op.kind == "BWD" and op.gradient >= 0:
                if op.first:
                    filled[op.gradient] = op.unit
                assert filled[op.gradient] == op.unit, "two units share a gradient buffer"
                assert op.gradient < plan.gradients


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_no_wait_is_implied_by_the_others(shape):
    """Else a lost wait could hide behind another one; see the mutants in test_adversary.py."""
    plan = make_pass(shape, shape.nothing_held())
    past = before(plan)
    last: dict[str, int] = {}
    for number, op in enumerate(plan.ops):
        for wait in op.waits:
            others = {o for o in op.waits if o != wait} | {last.get(op.lane, -1)} - {-1}
            assert all(wait != o and wait not in past[o] for o in others), (number, wait)
            assert plan.ops[wait].lane != op.lane
        last[op.lane] = number


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(1, 4))
def test_bytes_are_the_closed_form(units, slots, micro):
    """After an update every unit is loaded, then only what the slots do not hold, on both ways."""
    shape = Shape(applications=tuple(range(units)), units=units, slots=slots, micro=micro)
    first, second = plans(shape)
    missing = max(0, units - slots)
    assert len(first.loads()) == 1 + units + missing  # 1: the ends
    assert len(second.loads()) == 2 * missing
    assert first.gradients == 2


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_a_sweep_loads_before_it_uses(shape):
    plan = make_walk(shape, shape.nothing_held())
    held = list(shape.nothing_held())
    past = before(plan)
    for n, op in enumerate(plan.ops):
        if op.kind in ("EVICT", "LOAD"):
            held[op.place] = op.unit if op.kind == "LOAD" else None
        else:
            assert held[op.place] == op.unit
            loads = [m for m, o in enumerate(plan.ops[:n]) if o.kind == "LOAD"]
            newest = [m for m in loads if plan.ops[m].place == op.place][-1:]
            assert set(newest) <= past[n]
    assert tuple(held) == plan.held


def test_copies_hide_behind_computation_when_that_takes_longer():
    shape = Shape(applications=tuple(range(8)), units=8, micro=4)
    plan = make_pass(shape, shape.nothing_held())
    took = {"FWD": 1.0, "BWD": 3.0, "LOAD": 2.0, "GRAD_OUT": 2.0}
    total, busy = simulate(plan.ops, lambda op: took.get(op.kind, 0.0))
    assert busy["compute"] == 8 * 4 * 4.0
    assert total <= busy["compute"] + 4 * 2.0  # ends and first unit in, both gradients out
    slow, busy = simulate(plan.ops, lambda op: {"LOAD": 20.0}.get(op.kind, 1.0))
    assert slow >= busy["in"] > busy["compute"]
    assert set(busy) == set(LANES)
