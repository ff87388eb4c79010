"""Everything of a run that changes, and its way into a checkpoint and back.

Held:  weights and buffers, optimizer, average, loss scale, random states of every rank, position,
       position of the log, curves, what a family keeps on disk. Schedule and data need no more than
       the step.
Law:   resuming from the checkpoint after step n gives the bits that an undisturbed run has after
       step n.
Note:  tensors cut over ranks are put together before they are written, so a checkpoint fits any
       number of ranks; all ranks call `commit`, rank 0 writes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib import kernels
from lib.core import files, ranks
from lib.core.errors import InputError
from lib.core.rng import seed_global
from lib.core.run_settings import Train
from lib.models.base import Family
from lib.train import parallel, safety
from lib.train.checkpoint import Checkpoint, Checkpoints
from lib.train.ema import Ema
from lib.train.observe import Observer
from lib.train.optim import Optimizer
from lib.train.precision import LossScaler, autocast


@dataclass
class Position:
    """What a checkpoint remembers beside tensors."""

    step: int = 0  # finished updates; batch(step) comes next
    best: dict[str, float] | None = None  # {"step", "bpb"} of the best validation so far
    micro_rows: int = 0  # rows of a micro-batch, 0 before the first step
    skipped: int = 0  # updates left out for a non-finite gradient
    code_changes: list[str] = field(default_factory=list)  # files changed since it began

    def end(self, steps: int, settings: Train) -> int:
        """The step that the run ends with: `steps`, or this one where `patience` is spent."""
        if settings.patience is None or self.best is None or not settings.looks_at(self.step):
            return steps
        since = self.step - self.best["step"]
        return self.step if since >= settings.patience * settings.eval_every else steps


def stack_of(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """On what the numbers were computed: equal stacks give equal bits."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "device": kind,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype),
        "ranks": str(ranks.world_size()),
        "kernels": kernels.stack(device),
    }


@dataclass(kw_only=True)
class RunState:
    """The changing parts of one run, on one rank."""

    model: Family
    optimizer: Optimizer
    ema: Ema | None
    scaler: LossScaler
    device: torch.device
    position: Position
    checkpoints: Checkpoints
    stack: Mapping[str, str]
    extra: Mapping[str, Any]  # written into every checkpoint: code, parents
    narrow: frozenset[str] = frozenset()  # weights that are bf16 while the run goes on

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights, where the run keeps an average."""
        with self.ema.swapped_in() if self.ema else nullcontext(), self.computing():
            yield

    def weights(self) -> dict[str, Tensor]:
        """The state dict that others get: averaged, whole, on the CPU. All ranks must call."""
        with self.averaged():
            found = {n: parallel.whole(t).cpu() for n, t in self.model.state_dict().items()}
            return {n: t.float() if n in self.narrow else t.clone() for n, t in found.items()}

    def computing(self) -> AbstractContextManager[None]:
        """Inside, products with weights in bf16 are taken as those of a step are."""
        return autocast(self.device, torch.bfloat16) if self.narrow else nullcontext()

    @property
    def predicts(self) -> bool:
        """Whether the loss is cross-entropy in nats."""
        return self.model.predicts

    def leave_out(self) -> int:
        """Count an update that is not made; how many there were that no loss scale explains."""
        self.position.skipped += 1
        self.scaler.overflowed()
        return self.position.skipped - self.scaler.skipped

    def log_scalars(self) -> dict[str, float]:
        """Numbers of a log step beside the loss: the family's own, and how training goes."""
        with self.computing():
            found = {**self.model.log_scalars(), "skipped": self.position.skipped}
        if self.scaler.active:
            found["loss_scale"] = self.scaler.scale
        if self.device.type == "cuda":
            found["peak_vram_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return found

    def progress(self) -> str | None:
        """The family's own lines below that of a step."""
        return self.model.progress()

    def total_bytes(self) -> int:
        """Bytes of one checkpoint's tensors."""
        groups = [self.model.state_dict(), self.optimizer.state_tensors()]
        groups += [self.ema.state_tensors()] if self.ema else []
        return sum(tensor.nbytes for group in groups for tensor in group.values())

    def check_space(self) -> None:
        """EnvError where the disk has no room for all that are kept at once."""
        together = self.checkpoints.keep + 2  # the one being written, and the best
        files.check_space(self.checkpoints.folder, together * self.total_bytes())

    def commit(self, observer: Observer) -> None:
        """Commit a checkpoint at this position; afterwards it is durable and has been re-read."""
        self.model.flush()
        groups = {name: _whole(tensors) for name, tensors in self._tensors().items()}
        if ranks.rank() == 0:
            note = {
                **asdict(self.position),
                "scaler": self.scaler.state(),
                "told": observer.position(),
                "stack": dict(self.stack),
                "kernels": kernels.summary(),
                "attached": self.model.describe(),
                **self.extra,
            }
            self.checkpoints.commit(self.position.step, groups, note)
            best = self.position.best
            self.checkpoints.set_best(int(best["step"]) if best else None)
        parallel.barrier()

    def resume(self, seed: int, log: Callable[[str], None]) -> dict[str, Any] | None:
        """Take up the newest good checkpoint; returns what it told, None at a beginning."""
        found = self._find()
        if found is None:
            seed_global(seed, "train", ranks.rank())
            return None
        note = found.state
        own = self._tensors()
        shapes = {n: tuple(t.shape) for n, t in own["model"].items()}
        loaded = parallel.cut_like(found.tensors("model", shapes), own["model"])
        with torch.no_grad():
            for name, tensor in own["model"].items():
                tensor.copy_(loaded[name])
        saved = found.tensors("optimizer")
        self.optimizer.load_state_tensors(parallel.cut_like(saved, own["optimizer"]))
        if self.ema:
            self.ema.load_state_tensors(parallel.cut_like(found.tensors("ema"), own["ema"]))
        self.scaler.load(note["scaler"])
        self._check_attached(found)
        self._restore_random(found, seed)
        self.position = Position(**{key: note[key] for key in asdict(self.position)})
        then, now = note.get("code", {}), self.extra.get("code", {})
        changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
        self.position.code_changes = sorted(changed.union(self.position.code_changes))
        log(f"continues after step {found.step}")
        theirs = note["stack"]
        for key in sorted(n for n in self.stack if theirs.get(n) != self.stack[n]):
            log(
                f"{key} was {theirs.get(key)}, is {self.stack[key]}: equal to rounding, not bitwise"
            )
        if ranks.rank() == 0:  # a best/ of steps that will be made again goes until they are
            best = self.position.best
            self.checkpoints.set_best(int(best["step"]) if best else None)
        return note["told"]

    def keep_micro_rows(self, wanted: int, log: Callable[[str], None]) -> int:
        """Rows of a micro-batch: `wanted`, or what a resumed run had where masks follow them."""
        had = self.position.micro_rows
        if self.model.rows_share_draws and had not in (0, wanted):
            log(f"keeps micro-batches of {had} rows: the masks follow them")
            return had
        self.position.micro_rows = wanted
        return wanted

    def finish(self) -> None:
        """The run is over: the last checkpoint and the best stay, the rest goes."""
        if ranks.rank() == 0:
            self.checkpoints.retire(1)
        parallel.barrier()

    def _find(self) -> Checkpoint | None:
        """Rank 0 verifies and tells the step, the others read that one."""
        if ranks.world_size() == 1:
            return self.checkpoints.newest_good()
        found = self.checkpoints.newest_good() if ranks.rank() == 0 else None
        told = torch.tensor([found.step if found else -1.0] if ranks.rank() == 0 else [0.0])
        step = int(parallel.sum_over_ranks(told.to(self.device)).item())
        return found if ranks.rank() == 0 or step < 0 else self.checkpoints.read(step)

    def _check_attached(self, found: Checkpoint) -> None:
        """What the family keeps on disk must be of this checkpoint, not of a later one."""
        needs, holds = found.state["attached"], self.model.describe()
        if needs != holds:
            raise InputError(
                "state on disk is not of this checkpoint",
                file=found.path,
                value=f"needs {needs}, holds {holds}",
                remedy="its weights alone can go on (init_from); remove the folder to begin anew",
            )

    def _restore_random(self, found: Checkpoint, seed: int) -> None:
        rank = ranks.rank()
        states = {
            n.split(".")[0]: t for n, t in found.tensors("rng").items() if n.endswith(f".{rank}")
        }
        if states:
            safety.restore_random_states(states, self.device)
        else:  # a rank that the run did not have before
            seed_global(seed, "train", rank, found.step)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All groups; model and optimizer tensors are the live ones. All ranks must call."""
        random: dict[str, Tensor] = {}
        for name, state in safety.random_states(self.device).items():
            for rank, one in enumerate(parallel.gather_bytes(state, self.device)):
                random[f"{name}.{rank}"] = one
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_tensors(),
            "ema": self.ema.state_tensors() if self.ema else {},
            "rng": random,
        }


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parallel.whole(tensor) for name, tensor in tensors.items()}
