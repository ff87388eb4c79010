"""What a streamed run costs before it begins: memory, seconds a step, days; which group to take.

In:   sizes of a model and a run, a card.   Out: bytes and seconds, the binding term, the knob.
Form: the plan that would run is played with durations in place of work (ramgpt.md 5); memory is a
      sum of the buffers that the engine allocates and of what one unit computes.
Note: a card of the table has textbook rates and says so; measured ones replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lib.nn.stream.plan import HOST_RING, LANES, STAGES, Lane, Op, Plan, Shape, make_pass

CONTEXT_BYTES = 0.5e9  # of the driver and the libraries' workspaces on a card
ACTIVATION_BYTES = 34  # a token and channel of one unit in bf16 (arXiv 2205.05198, fused attention)
CHECKPOINT_BYTES = 12  # a parameter: weights and two moments
OPTIMIZER_BYTES, CAST_BYTES = 28, 6  # traffic of AdamW and of writing the wire, a parameter


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device and the machine around it."""

    name: str
    memory: float  # bytes
    flops: float  # sustained by a model's matmuls, FLOP/s
    in_rate: float  # host to device, bytes/s
    out_rate: float
    ram_rate: float = 40e9  # bytes/s of host memory
    measured: bool = False

    @property
    def source(self) -> str:
        """Where the rates are from."""
        return "measured" if self.measured else "from table, not measured"


# Dense bf16 peak x 0.4, one-way rates of the bus (textbook; ramgpt.md 5.2).
CARDS = {
    "rtx3050-6gb": Card(name="RTX 3050 6 GB", memory=6e9, flops=5.4e12, in_rate=13e9,
                        out_rate=13e9),
    "rtx3090": Card(name="RTX 3090", memory=24e9, flops=28.4e12, in_rate=25e9, out_rate=25e9),
    "rtx4090": Card(name="RTX 4090", memory=24e9, flops=66e12, in_rate=25e9, out_rate=25e9),
    "a100-pcie": Card(name="A100 PCIe", memory=40e9, flops=124.8e12, in_rate=25e9, out_rate=25e9),
    "h100": Card(name="H100", memory=80e9, flops=395.6e12, in_rate=52e9, out_rate=52e9),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Load:
    """A model and a step, as numbers."""

    unit_sizes: tuple[int, ...]  # parameters of each unit
    applications: tuple[int, ...]  # unit of each application
    ends: int  # parameters of tables, last norm and head
    vocab_size: int
    width: int
    context: int
    rows: int  # b, of a micro-batch
    accumulation: int = 1  # A, micro-batches of a step
    group: int = 1  # G
    slots: int = 3
    resident: frozenset[int] = frozenset()
    host: bool = False  # boundaries in host memory
    wire_bytes: int = 2  # w
    gradient_bytes: int = 4  # g
    master_bytes: int = 4
    moment_bytes: int = 8  # of both

    @property
    def parameters(self) -> int:
        """N with the ends."""
        return sum(self.unit_sizes) + self.ends

    @property
    def load_tokens(self) -> int:
        """T_L, tokens that one load serves."""
        return self.group * self.rows * self.context

    def shape(self) -> Shape:
        """As the planner wants it."""
        pieces = -(-self.ends // max(self.unit_sizes))
        return Shape(
            applications=self.applications, units=len(self.unit_sizes), micro=self.group,
            slots=self.slots, resident=self.resident, host=self.host,
            pieces=(*[1] * len(self.unit_sizes), pieces),
        )  # fmt: skip


def device_bytes(load: Load, *, context: float = CONTEXT_BYTES) -> float:
    """Device memory of a streamed pass; the terms of ramgpt.md 5.3.

    Beyond that page: the ends stay fp32, as autocast reads tables, and the head's gradient and its
    cast weights exist once more while a micro-batch passes it.
    """
    largest, tokens = max(load.unit_sizes), load.rows * load.context
    buffers = HOST_RING if load.host else len(load.applications) + 1
    resident = sum(load.unit_sizes[i] for i in load.resident)
    head = load.vocab_size * load.width
    return (
        (load.slots * largest + resident) * load.wire_bytes
        + 2 * 4 * largest  # gradient buffers
        + 8 * load.ends  # weights and gradient, fp32
        + (4 + load.wire_bytes) * head
        + buffers * load.group * tokens * load.width * load.wire_bytes
        + (ACTIVATION_BYTES * load.wire_bytes // 2) * tokens * load.width
        + 2 * load.wire_bytes * largest  # one unit's gradients as autograd hands them over
        + 8 * 256 * load.vocab_size  # a chunk of logits and its gradient
        + context
    )


def resident_bytes(load: Load, *, checkpointing: bool, context: float = CONTEXT_BYTES) -> float:
    """Device memory of the same run without streaming: 16 bytes a parameter, and activations."""
    tokens = load.rows * load.context
    units = 1 if checkpointing else len(load.applications)
    kept = len(load.applications) * tokens * load.width * load.wire_bytes if checkpointing else 0
    activations = units * (ACTIVATION_BYTES * load.wire_bytes // 2) * tokens * load.width + kept
    return 16 * load.parameters + activations + 8 * 256 * load.vocab_size + context


def inference_bytes(load: Load, *, streamed: bool, context: float = CONTEXT_BYTES) -> float:
    """Device memory of a model that only reads: weights, cached keys and values, one block's work.

    load.rows: texts at once. Weights are held as they cross: in the dtype of the matmuls.
    """
    largest, tokens = max(load.unit_sizes), load.rows * load.context
    resident = sum(load.unit_sizes[i] for i in load.resident) if streamed else load.parameters
    weights = load.slots * largest + resident + load.ends if streamed else resident
    cache = 2 * len(load.applications) * tokens * load.width
    work = (ACTIVATION_BYTES // 2) * tokens * load.width + 2 * load.rows * load.vocab_size
    return load.wire_bytes * (weights + cache + work) + context


def host_bytes(load: Load) -> float:
    """Host memory: masters, gradients, two moments, wires, stages, boundaries (ramgpt.md 5.4)."""
    streamed = sum(load.unit_sizes)
    boundaries = len(load.applications) * load.load_tokens * load.width * load.wire_bytes
    held = 2 * load.master_bytes + load.moment_bytes  # weight, gradient, moments
    return (
        (held + load.wire_bytes) * streamed
        + (held + load.master_bytes) * load.ends
        + STAGES * load.gradient_bytes * max(load.unit_sizes)
        + (boundaries if load.host else 0)
    )


def break_even(load: Load, card: Card) -> float:
    """Tokens a load from which copies hide behind forward: w F / (2 BW)."""
    return load.wire_bytes * card.flops / (2 * card.in_rate)


def step_bytes(load: Load) -> tuple[float, float]:
    """(to the device, from it) of one optimizer step, weights and gradients."""
    plans = list(_plans(load))
    sizes = [load.wire_bytes * n for n in load.unit_sizes] + [load.master_bytes * load.ends]
    inward = sum(count * sum(sizes[u] for u in plan.loads()) for count, plan in plans)
    passes = load.accumulation // load.group
    return inward, passes * load.gradient_bytes * load.parameters


def _plans(load: Load) -> Iterator[tuple[int, Plan]]:
    """(how often in a step, plan): the first pass after an update, and the others."""
    shape, passes = load.shape(), load.accumulation // load.group
    first = make_pass(shape, shape.nothing_held())
    yield 1, first
    if passes > 1:
        yield passes - 1, make_pass(shape, first.held)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Predicted seconds of one optimizer step, and what they go to."""

    seconds: float
    compute_s: float
    in_s: float
    out_s: float
    exposed_s: float  # the optimizer's time that nothing covers

    @property
    def binding(self) -> str:
        """The term that decides."""
        copies = max(self.in_s, self.out_s)
        if self.exposed_s > max(self.compute_s, copies):
            return "optimizer"
        if self.compute_s >= copies:
            return "compute"
        return "copies in" if self.in_s >= self.out_s else "copies out"

    @property
    def knob(self) -> str:
        """What would help."""
        return {
            "compute": "a faster card, or fewer steps",
            "optimizer": "larger batch_tokens",
        }.get(self.binding, "a larger runtime.stream_group or device_batch_size")

    @property
    def hidden(self) -> float:
        """Share of the copies' time behind which something was computed."""
        copies = self.in_s + self.out_s
        waited = max(0.0, self.seconds - self.exposed_s - self.compute_s)
        return max(0.0, 1 - waited / copies) if copies else 1.0


def _durations(load: Load, card: Card) -> Callable[[Op], float]:
    """Seconds of each operation of the load's plan on the card."""
    tokens, T, d, largest = load.rows * load.context, load.context, load.width, max(load.unit_sizes)

    def duration(op: Op) -> float:
        is_unit = 0 <= op.unit < len(load.unit_sizes)
        size = load.unit_sizes[op.unit] if is_unit else load.ends
        match op.kind:
            case "LOAD":
                return (load.wire_bytes if is_unit else load.master_bytes) * size / card.in_rate
            case "GRAD_OUT":
                return load.gradient_bytes * min(size, largest) / card.out_rate
            case "ACC":  # two reads and a write
                return 12 * min(size, largest) / card.ram_rate
            case "SAVE" | "FETCH":
                rate = card.out_rate if op.kind == "SAVE" else card.in_rate
                return tokens * d * load.wire_bytes / rate
            case "FWD":
                return (2 * size + 2 * T * d) * tokens / card.flops
            case "BWD":
                return (6 * size + 6 * T * d) * tokens / card.flops
            case "HEAD":
                return 6 * load.vocab_size * d * tokens / card.flops
        return 0.0

    return duration


def step_seconds(load: Load, card: Card, *, overlap: bool = True) -> Step:
    """The plan of a step, played with the card's rates."""
    tokens, duration = load.rows * load.context, _durations(load, card)
    total = busy_compute = busy_in = busy_out = 0.0
    for count, plan in _plans(load):
        seconds, busy = simulate(plan.ops, duration)
        total += count * seconds
        busy_compute += count * busy["compute"]
        busy_in += count * busy["in"]
        busy_out += count * busy["out"]
    t_opt = (OPTIMIZER_BYTES + CAST_BYTES) * load.parameters / card.ram_rate
    exposed = t_opt
    if overlap:  # the ends and the first unit, then what the forward sweep does not cover
        first = t_opt * (load.ends + load.unit_sizes[0]) / load.parameters
        forward = len(load.applications) * load.group * 2 * load.unit_sizes[0] * tokens / card.flops
        exposed = max(first, t_opt - forward)
    return Step(
        seconds=total + exposed, compute_s=busy_compute, in_s=busy_in, out_s=busy_out,
        exposed_s=exposed,
    )  # fmt: skip


def simulate(ops: Sequence[Op], duration: Callable[[Op], float]) -> tuple[float, dict[Lane, float]]:
    """(seconds until all is done, busy seconds of each lane) when every operation takes its time.

    Every lane starts an operation as soon as the one before it and all that it waits for are over.
    """
    ends: list[float] = []
    free = dict.fromkeys(LANES, 0.0)
    busy = dict.fromkeys(LANES, 0.0)
    for op in ops:
        took = duration(op)
        start = max([free[op.lane], *(ends[w] for w in op.waits)])
        free[op.lane] = start + took
        busy[op.lane] += took
        ends.append(start + took)
    return max(free.values()), busy


def choose_group(load: Load, free: float, card: Card | None) -> tuple[Load, str | None]:
    """`load` with G, and boundaries where `auto` puts them; a warning where copies cannot hide.

    The largest divisor of A that fits 0.85 of the free memory with boundaries on the device; where
    that is below 1.5 x break-even, boundaries move to the host and G grows.
    """

    def largest(host: bool) -> Load:
        divisors = [g for g in range(1, load.accumulation + 1) if load.accumulation % g == 0]
        tried = [replace(load, group=g, host=host) for g in divisors]
        return [one for one in tried if device_bytes(one) <= 0.85 * free or one.group == 1][-1]

    found = largest(load.host)
    if card is None:
        return found, None
    need = 1.5 * break_even(load, card)
    if found.load_tokens < need and not load.host:
        other = largest(True)
        found = other if other.load_tokens > found.load_tokens else found
    if found.load_tokens < need:
        return found, (
            f"a load serves {found.load_tokens:,} tokens, copies hide from {need:,.0f} on "
            f"({card.source}); raise batch_tokens or device_batch_size"
        )
    return found, None
