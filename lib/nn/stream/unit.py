"""A model whose weights wait in RAM: passes, sweeps and updates over a streamed module tree.

In:    a model that offers `Streamable`.   Out: `Engine`, which the model's `losses` and `forward`
       ask.
Law:   loss, gradients and state dict are the resident model's. When backward returns, every
       gradient is in host memory and added to `.grad`; a pass that raised leaves no trace.
Note:  activations inside a unit are never kept: a pass saves the unit's input and computes the
       unit again in backward. Stale copies cannot be read: every master's version is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lib.nn.stream.decide import Streaming, choose_load, load_of, spread, this_card
from lib.nn.stream.estimate import break_even, step_bytes
from lib.nn.stream.execute import InOrder, Lanes
from lib.nn.stream.memory import ALIGN, DeviceMemory, HostUnit, Slab
from lib.nn.stream.passes import Bind, Moment, Pass
from lib.nn.stream.plan import STAGES, Op, Plan, Shape, make_pass, make_walk

Update = tuple[Sequence[str], Callable[[], None]]  # names of parameters, and what changes them


class Engine:
    """Streams `model` through `device`; made by `lib.nn.stream.open_stream`."""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, request: Streaming,
        executor: InOrder | Lanes | None = None,
    ) -> None:  # fmt: skip
        self.model, self.device, self.dtype, self.request = model, device, dtype, request
        runtime = request.runtime
        modules = list(dict.fromkeys(model.stream_units()))
        applications = tuple(modules.index(m) for m in model.stream_units())
        self.units = [HostUnit(dict(m.named_parameters()), dtype) for m in modules]
        inside = {id(p) for m in modules for p in m.parameters()}
        ends = {n: p for n, p in model.named_parameters() if id(p) not in inside}
        self.units.append(HostUnit(ends, dtype, keep=True))
        insides = [*modules, model]
        self._owners = [_owners(m, u.parameters) for m, u in zip(insides, self.units, strict=True)]
        self._unit_of = {
            id(p): n for n, unit in enumerate(self.units) for p in unit.parameters.values()
        }
        assert len(self._unit_of) == sum(len(u.parameters) for u in self.units), "units share"
        resident = spread(len(modules), runtime.stream_resident)
        streamed = [u for n, u in enumerate(self.units[:-1]) if n not in resident]
        self.stage_size = max([u.gradient_size for u in self.units[:-1]], default=1) or 1
        pieces = tuple(-(-u.gradient_size // self.stage_size) for u in self.units)
        self.shape = Shape(
            applications=applications, units=len(modules), pieces=pieces, resident=resident,
            slots=max(2, min(runtime.stream_slots, len(streamed))),
            host=runtime.stream_boundaries == "host",
        )  # fmt: skip
        pinned = runtime.stream_pinned and device.type == "cuda"
        stage_bytes = self.stage_size * request.grad_dtype.itemsize
        sizes = [u.wire_bytes for u in self.units] + [stage_bytes] * STAGES
        self.slab = Slab(sum(-(-s // ALIGN) * ALIGN for s in sizes), pinned=pinned)
        for unit in self.units:
            unit.wire = self.slab.take(unit.wire_bytes)
        self.stages = [self.slab.take(stage_bytes).view(request.grad_dtype) for _ in range(STAGES)]
        largest = max((u.wire_bytes for u in streamed), default=0)
        own = [self.units[n].wire_bytes for n in (*sorted(resident), self.shape.ends)]
        self.memory = DeviceMemory(device, [largest] * self.shape.slots + own)
        self.executor = executor or (Lanes(device) if device.type == "cuda" else InOrder())
        self.rows = 0  # of a micro-batch, 0: all that come
        self.epoch = 0
        self.load = load_of(model, dtype, request)
        self.warning: str | None = None
        self.waited_s = 0.0  # for updates, since the last log line
        self.bytes_in = self.bytes_out = 0
        self._loaded: list[tuple[int, int] | None] = [None] * self.shape.places
        self._plans: dict[Any, Plan] = {}
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        overlaps = runtime.stream_overlap_optimizer == "auto" and not request.averaged
        self._worker = ThreadPoolExecutor(1, "stream updates") if overlaps else None
        self._pending: dict[int, Future] = {}
        self._hook = model.register_state_dict_pre_hook(lambda *_: self.flush())

    # ------------------------------------------------------------ what a model calls

    def loss(self, tokens: Tensor, targets: Tensor, moment: Moment) -> Tensor:
        """Mean loss over the micro-batches of a group; its backward fills `.grad` of everything."""
        rows = self.rows if self.rows and len(tokens) % self.rows == 0 else len(tokens)
        made = Pass(self, tokens.split(rows), targets.split(rows), moment)
        return Bind.apply(self._anchor, made)  # type: ignore[return-value]  # a tensor

    @contextmanager
    def sweep(self) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
        """A forward without gradients: yields unit(a), inside which application a has its weights.

        The ends have theirs throughout.
        """
        plan, ends = self._plan("walk", 1), self.shape.ends
        numbers = {op.application: n for n, op in enumerate(plan.ops) if op.kind == "FWD"}
        embed = next(n for n, op in enumerate(plan.ops) if op.kind == "EMBED")

        @contextmanager
        def unit(a: int) -> Iterator[None]:
            op = plan.ops[numbers[a]]
            self.executor.advance(numbers[a] + 1)  # its own FWD only marks that the weights came
            with self.installed(op.unit, self.views(op.place, op.unit)):
                yield

        with torch.no_grad(), self.guarded(), self.autocast():
            self.executor.start(plan.ops, self.act)
            self.executor.advance(embed + 1)
            with self.installed(ends, self.views(self.shape.places - 1, ends)):
                yield unit
            self.executor.advance(len(plan.ops))
            self.executor.finish()

    def group_rows(self, rows: int, share: int) -> int:
        """Rows of a group when a micro-batch has `rows` and a step of this rank `share`.

        UserError where stream_group does not divide the micro-batches of a step.
        """
        load, self.warning = choose_load(
            self.model, self.device, self.dtype, self.request, rows, share // rows
        )
        self.rows, self.load = rows, load
        self.shape = replace(self.shape, host=load.host)
        return load.group * rows

    def notes(self) -> list[str]:
        """What streams, in one line, and a warning where copies cannot hide."""
        on_cpu = self.device.type == "cpu"
        lines = ["stream: CPU executor (reference, no speed benefit)"] if on_cpu else []
        if not self.request.trains:
            size = sum(u.wire_bytes for u in self.units[:-1]) / 1e9
            reason = f"{self.model.stream_reason} | " if self.model.stream_reason else ""
            units = f"{len(self.units) - 1} units, {self.shape.slots} slots"
            return [*lines, f"stream: on | {reason}{units} | {size:.2f} GB in for each token"]
        inward, outward = step_bytes(self.load)
        card = this_card(self.device)
        even = f" | break-even {break_even(self.load, card):,.0f} tokens/load" if card else ""
        reason = f"{self.model.stream_reason} | " if self.model.stream_reason else ""
        lines.append(
            f"stream: on | {reason}{len(self.units) - 1} units, {self.shape.slots} slots, group "
            f"{self.load.group} of {self.load.accumulation} | in {inward / 1e9:.2f} GB/step, out "
            f"{outward / 1e9:.2f} GB/step{even}, have {self.load.load_tokens:,}"
        )
        return lines + ([f"warning: {self.warning}"] if self.warning else [])

    def describe(self) -> str:
        """The engine in a few words, for the records of a run."""
        runtime, kind = self.request.runtime, "cuda" if self.device.type == "cuda" else "cpu"
        return f"{kind}, group {runtime.stream_group}, {self.shape.slots} slots"

    def log_scalars(self) -> dict[str, float]:
        """Bytes since the last log line, and what is pinned."""
        found = {
            "h2d_bytes": self.bytes_in, "d2h_bytes": self.bytes_out,
            "pinned_bytes": self.slab.pinned_bytes, "update_wait_s": round(self.waited_s, 4),
        }  # fmt: skip
        self.bytes_in, self.bytes_out, self.waited_s = 0, 0, 0.0
        return found

    def update_parts(self) -> list[list[str]]:
        """One part a unit, the ends first: in the order in which the next forward needs them."""
        parts: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters():
            parts.setdefault(self._unit_of[id(parameter)], []).append(name)
        return [parts[n] for n in sorted(parts, key=lambda n: -1 if n == self.shape.ends else n)]

    def run_updates(self, updates: Sequence[Update]) -> None:
        """Make the optimizer's updates in order, beside the next forward where that is allowed."""
        self.flush()
        named = dict(self.model.named_parameters())
        for names, update in updates:
            touched = sorted({self._unit_of[id(named[name])] for name in names})
            if self._worker is None:
                self._update(update, touched)
            else:
                done = self._worker.submit(self._update, update, touched)
                self._pending.update(dict.fromkeys(touched, done))

    @torch.no_grad()
    def _update(self, update: Callable[[], None], touched: Sequence[int]) -> None:
        """OPT and WIRE of the units that an update touches."""
        update()
        for number in touched:
            self.units[number].updates += 1
            self.units[number].write_wire()

    def flush(self) -> None:
        """Wait until the masters hold every update."""
        for done in self._pending.values():
            done.result()
        self._pending = {}

    def close(self) -> None:
        """End threads and registrations."""
        self._hook.remove()
        self.executor.close()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self.slab.close()

    # ------------------------------------------------------------ plans and operations

    def _plan(self, kind: str, micro: int) -> Plan:
        """The plan from what the places hold now; few different ones occur in a run."""
        held = tuple(one[0] if one and self._is_current(*one) else None for one in self._loaded)
        key = (kind, micro, held)
        if key not in self._plans:
            make = make_walk if kind == "walk" else make_pass
            self._plans[key] = make(replace(self.shape, micro=micro), held)
        return self._plans[key]

    def _is_current(self, unit: int, version: int) -> bool:
        update = self._pending.get(unit)
        return (update is None or update.done()) and self.units[unit].version == version

    def act(self, op: Op) -> None:
        """EVICT and LOAD, the operations that a pass and a sweep share; the rest computes."""
        if op.kind == "EVICT":
            self._loaded[op.place] = None
        elif op.kind == "LOAD":
            unit = self.units[op.unit]
            self._await_update(op.unit)
            if not unit.is_written():
                if self.device.type == "cuda":  # an earlier copy may still read the wire
                    torch.cuda.current_stream(self.device).synchronize()
                unit.write_wire()
            self.memory.places[op.place][: unit.wire_bytes].copy_(unit.wire, non_blocking=True)
            self._loaded[op.place] = (op.unit, unit.version)
            self.bytes_in += unit.wire_bytes

    def _await_update(self, unit: int) -> None:
        update = self._pending.get(unit)
        if update is not None and not update.done():
            began = time.monotonic()
            update.result()
            self.waited_s += time.monotonic() - began
        elif update is not None:
            update.result()

    def views(self, place: int, unit: int) -> list[Tensor]:
        """The parameters of `unit` as they lie in a place, in the order of its owners."""
        return [piece.of(self.memory.places[place]) for piece in self.units[unit].wires]

    @contextmanager
    def installed(self, unit: int, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the modules of `unit` find `tensors` where their parameters are."""
        owners = self._owners[unit]
        kept = [module._parameters[name] for module, name, _ in owners]
        try:
            for module, name, number in owners:
                module._parameters[name] = tensors[number]  # type: ignore[assignment]  # a view
            yield
        finally:
            for (module, name, _), parameter in zip(owners, kept, strict=True):
                module._parameters[name] = parameter

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever is raised inside leaves the engine as if the pass had never begun."""
        try:
            yield
        except BaseException:
            self.executor.abort()
            self._loaded = [None] * self.shape.places
            self.epoch += 1
            for parameter in self.model.parameters():
                parameter.grad = None
            raise

    def autocast(self) -> AbstractContextManager[Any]:
        """As the trainer's, on whatever thread this is."""
        on = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if on else torch.bfloat16, enabled=on)


def _owners(
    module: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> list[tuple[nn.Module, str, int]]:
    """(module, attribute, which of `parameters`) wherever one is found, tied ones several times."""
    number = {id(p): i for i, p in enumerate(parameters.values())}
    found = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in number:
            path, _, leaf = name.rpartition(".")
            found.append((module.get_submodule(path), leaf, number[id(parameter)]))
    return found
