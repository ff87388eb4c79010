"""The order of a streamed pass: which copy, which computation, on which lane, waiting for what.

In:    `Shape` (units, their applications in forward order, slots, micro-batches G) and what the
       places hold.   Out: `Plan`, a list of operations in the order in which they are issued.
Words: a unit is what moves together, the ends (tables, last norm, head) are one more unit, always
       resident; a place is a device buffer for a unit: a shared slot, or a resident unit's own.
Law:   operations of a lane run in order; across lanes an operation waits for those in `waits`, and
       no wait is implied by the others. Waits follow from what each reads and writes.
Pure:  no torch, no clock; the estimator gives durations to the same operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal[
    "EVICT", "LOAD", "EMBED", "FWD", "SAVE", "HEAD", "SCALE",
    "FETCH", "BWD", "ENDS_BWD", "GRAD_OUT", "ACC",
]  # fmt: skip
Lane = Literal["in", "compute", "out", "host"]
LANES: tuple[Lane, ...] = ("in", "compute", "out", "host")
LANE_OF: dict[Kind, Lane] = {
    "EVICT": "in", "LOAD": "in", "FETCH": "in", "SAVE": "out", "GRAD_OUT": "out", "ACC": "host",
}  # fmt: skip
HOST_RING = 3  # group buffers of boundaries when the boundaries lie in host memory
STAGES = 2  # host buffers through which gradients leave
Held = tuple[int | None, ...]  # unit in each place, in the version of now


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is planned. Units are 0 .. units - 1, the ends are unit number `units`."""

    applications: tuple[int, ...]  # unit of each application, in forward order
    units: int
    micro: int = 1  # G: micro-batches that one load serves
    slots: int = 3  # shared places, at least 2
    resident: frozenset[int] = frozenset()  # units with a place of their own
    host: bool = False  # boundaries wait in host memory
    pieces: tuple[int, ...] = ()  # by unit, ends last: parts in which a gradient leaves, 0 = frozen

    @property
    def ends(self) -> int:
        """Number of the unit that holds the ends."""
        return self.units

    @property
    def places(self) -> int:
        """Shared slots, resident units, the ends."""
        return self.slots + len(self.resident) + 1

    @property
    def buffers(self) -> int:
        """Group buffers of boundaries on the device."""
        return HOST_RING if self.host else len(self.applications) + 1

    def own_place(self, unit: int) -> int | None:
        """The place that belongs to a resident unit or the ends, None for a streamed one."""
        if unit == self.ends:
            return self.places - 1
        return self.slots + sorted(self.resident).index(unit) if unit in self.resident else None

    def piece_count(self, unit: int) -> int:
        """Parts in which the gradient of `unit` leaves the device."""
        return self.pieces[unit] if self.pieces else 1

    def nothing_held(self) -> Held:
        """Every place empty."""
        return (None,) * self.places


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. Fields that its kind does not use are -1."""

    kind: Kind
    unit: int = -1
    application: int = -1
    micro: int = -1
    place: int = -1  # of the unit's weights
    source: int = -1  # group buffer that is read: FWD, BWD, SAVE, HEAD
    target: int = -1  # group buffer that is written (BWD, HEAD, SCALE: holds the gradient)
    gradient: int = -1  # device gradient buffer
    stage: int = -1  # host buffer of GRAD_OUT and ACC
    piece: int = -1
    first: bool = False  # BWD: the gradient buffer is filled, not added to
    waits: tuple[int, ...] = ()

    @property
    def lane(self) -> Lane:
        """Where it runs."""
        return LANE_OF.get(self.kind, "compute")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Operations in issue order; `border` is where forward ends and backward begins."""

    shape: Shape
    ops: tuple[Op, ...]
    border: int
    held: Held  # afterwards
    gradients: int  # device gradient buffers, the ends' own not counted

    def loads(self) -> list[int]:
        """Units loaded, in order."""
        return [op.unit for op in self.ops if op.kind == "LOAD"]


@dataclass
class _Board:
    """Emits operations and derives their waits: the scoreboard of a processor, over lanes."""

    ops: list[Op] = field(default_factory=list)
    _writer: dict[Hashable, int] = field(default_factory=dict)
    _readers: dict[Hashable, list[int]] = field(default_factory=lambda: defaultdict(list))
    _clocks: list[dict[Lane, int]] = field(
        default_factory=list
    )  # newest op of each lane known past
    _last: dict[Lane, int] = field(default_factory=dict)

    def emit(self, op: Op, reads: Sequence[Hashable] = (), writes: Sequence[Hashable] = ()) -> None:
        number = len(self.ops)
        needed = {self._writer[r] for r in (*reads, *writes) if r in self._writer}
        for resource in writes:
            needed.update(self._readers.pop(resource, ()))
        clock = dict(self._clocks[self._last[op.lane]]) if op.lane in self._last else {}
        waits = []
        for other in sorted(needed, reverse=True):  # the newest may imply older ones
            if clock.get(self.ops[other].lane, -1) < other:
                waits.append(other)
                for lane, seen in self._clocks[other].items():
                    clock[lane] = max(clock.get(lane, -1), seen)
        clock[op.lane] = number
        self._clocks.append(clock)
        self._last[op.lane] = number
        self.ops.append(replace(op, waits=tuple(sorted(waits))))
        for resource in reads:
            self._readers[resource].append(number)
        for resource in writes:
            self._writer[resource] = number


class _Places:
    """Which unit is in which place along the known order of uses: the farthest next use leaves."""

    def __init__(self, shape: Shape, held: Held, uses: Sequence[int], then: Sequence[int]) -> None:
        self.shape, self.held, self.uses = shape, list(held), list(uses)
        self._order = [*uses, *then]  # the next pass begins like a forward pass
        self._last_use: dict[int, int] = {}  # place -> newest position that read it
        # position after which they are issued -> (place, new unit, old unit), in order
        self.loads: dict[int, list[tuple[int, int, int | None]]] = defaultdict(list)
        self.place_at = [self._use(position, unit) for position, unit in enumerate(uses)]

    def _use(self, position: int, unit: int) -> int:
        place = self.shape.own_place(unit)
        if place is None:
            streamed = self.held[: self.shape.slots]
            place = streamed.index(unit) if unit in streamed else self._victim(position)
        if self.held[place] != unit:
            after = self._last_use.get(place, -1)  # free from then on
            self.loads[after].append((place, unit, self.held[place]))
            self.held[place] = unit
        self._last_use[place] = position
        return place

    def _victim(self, position: int) -> int:
        def next_use(place: int) -> float:
            unit = self.held[place]
            if unit is None:
                return float("inf")
            rest = self._order[position:]
            return rest.index(unit) if unit in rest else float("inf")

        return max(range(self.shape.slots), key=lambda place: (next_use(place), -place))


def make_pass(shape: Shape, held: Held) -> Plan:
    """Forward, head and backward of one group of micro-batches (ramgpt.md 4.6)."""
    n, G, ends = len(shape.applications), shape.micro, shape.ends
    uses = [*shape.applications, *reversed(shape.applications)]
    board, home = _Board(), shape.own_place(ends) or 0
    places = _Places(shape, held, uses, shape.applications)
    if held[home] != ends:
        board.emit(Op(kind="LOAD", unit=ends, place=home), writes=[("place", home)])
    _issue_loads(board, places, -1)
    buffer = {a: a % HOST_RING if shape.host else a for a in range(n + 1)}
    for j in range(G):
        op = Op(kind="EMBED", unit=ends, micro=j, place=home, target=buffer[0])
        board.emit(op, [("place", home)], [("x", buffer[0], j)])
        _save(board, shape, buffer, 0, j)
    for a, unit in enumerate(shape.applications):
        place, source, target = places.place_at[a], buffer[a], buffer[a + 1]
        for j in range(G):
            op = Op(
                kind="FWD", unit=unit, application=a, micro=j, place=place, source=source,
                target=target,
            )  # fmt: skip
            board.emit(op, [("place", place), ("x", source, j)], [("x", target, j)])
            _save(board, shape, buffer, a + 1, j)
        _issue_loads(board, places, a)
    back = buffer[n]  # holds the gradient by the boundary, application after application
    for j in range(G):
        op = Op(kind="HEAD", unit=ends, micro=j, place=home, source=back, target=back)
        board.emit(op, [("place", home)], [("x", back, j), ("grad", "ends")])
    border = len(board.ops)
    board.emit(Op(kind="SCALE", target=back), writes=[*(("x", back, j) for j in range(G)),
                                                      ("grad", "ends")])  # fmt: skip
    gradients = _backward(board, shape, places, buffer, back)
    for j in range(G):
        op = Op(kind="ENDS_BWD", unit=ends, micro=j, place=home, target=back)
        board.emit(op, [("place", home), ("x", back, j)], [("grad", "ends")])
    _leave(board, shape, ends, "ends")
    kept = list(places.held)
    kept[home] = ends
    return Plan(
        shape=shape, ops=tuple(board.ops), border=border, held=tuple(kept), gradients=gradients
    )


def _issue_loads(board: _Board, places: _Places, after: int) -> None:
    """LOADs of the places that became free with the use at position `after`."""
    for place, unit, old in places.loads[after]:
        if old is not None:
            board.emit(Op(kind="EVICT", unit=old, place=place), writes=[("place", place)])
        board.emit(Op(kind="LOAD", unit=unit, place=place), writes=[("place", place)])


def _save(board: _Board, shape: Shape, buffer: dict[int, int], a: int, j: int) -> None:
    """Boundary a of micro-batch j to the host, unless the device still holds it in backward."""
    if shape.host and a <= len(shape.applications) - HOST_RING:
        op = Op(kind="SAVE", application=a, micro=j, source=buffer[a])
        board.emit(op, [("x", buffer[a], j)], [("saved", a, j)])


def _backward(
    board: _Board, shape: Shape, places: _Places, buffer: dict[int, int], back: int
) -> int:
    """BWD over applications descending, gradients leaving as they become whole."""
    n = len(shape.applications)
    first_of = {unit: a for a, unit in reversed([*enumerate(shape.applications)])}
    held: dict[int, int] = {}  # unit -> its gradient buffer, while it is summed
    free, count, x_buffer = [0, 1], 2, dict(buffer)
    for a in reversed(range(n)):
        unit, position = shape.applications[a], 2 * n - 1 - a
        place, fresh = places.place_at[position], unit not in held
        if fresh and shape.piece_count(unit):
            if not free:
                free, count = [count], count + 1
            held[unit] = free.pop(0)
        k = held.get(unit, -1)
        for j in range(shape.micro):
            op = Op(
                kind="BWD", unit=unit, application=a, micro=j, place=place, source=x_buffer[a],
                target=back, gradient=k, first=fresh and j == 0,
            )  # fmt: skip
            writes = [("x", back, j), *([("grad", k)] if k >= 0 else [])]
            board.emit(op, [("place", place), ("x", x_buffer[a], j)], writes)
            if shape.host and a - 2 in range(n - 2):  # its buffer is free for the one after next
                x_buffer[a - 2] = x_buffer[a]
                op = Op(kind="FETCH", application=a - 2, micro=j, target=x_buffer[a])
                board.emit(op, [("saved", a - 2, j)], [("x", x_buffer[a], j)])
        if k >= 0 and first_of[unit] == a:
            _leave(board, shape, unit, k)
            free.append(held.pop(unit))
        _issue_loads(board, places, position)
    return count


def _leave(board: _Board, shape: Shape, unit: int, gradient: int | str) -> None:
    """The gradient of `unit`, whole, to the host in pieces, each added there."""
    k = gradient if isinstance(gradient, int) else -1
    for piece in range(shape.piece_count(unit)):
        stage = sum(op.kind == "GRAD_OUT" for op in board.ops) % STAGES
        op = Op(kind="GRAD_OUT", unit=unit, gradient=k, stage=stage, piece=piece)
        board.emit(op, [("grad", gradient)], [("stage", stage)])
        op = Op(kind="ACC", unit=unit, stage=stage, piece=piece)
        board.emit(op, [("stage", stage)], [("host gradient", unit, piece)])


def make_walk(shape: Shape, held: Held) -> Plan:
    """One forward sweep for inference: LOADs, and a FWD where the caller computes."""
    board, home = _Board(), shape.own_place(shape.ends) or 0
    places = _Places(shape, held, shape.applications, shape.applications)
    if held[home] != shape.ends:
        board.emit(Op(kind="LOAD", unit=shape.ends, place=home), writes=[("place", home)])
    board.emit(Op(kind="EMBED", unit=shape.ends, place=home), reads=[("place", home)])
    _issue_loads(board, places, -1)
    for a, unit in enumerate(shape.applications):
        place = places.place_at[a]
        op = Op(kind="FWD", unit=unit, application=a, place=place)
        board.emit(op, [("place", place)])
        _issue_loads(board, places, a)
    kept = list(places.held)
    kept[home] = shape.ends
    ops = tuple(board.ops)
    return Plan(shape=shape, ops=ops, border=len(ops), held=tuple(kept), gradients=0)
