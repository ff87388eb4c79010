"""What a run tells: training_log.jsonl, the console line, a progress bar, curves.

In:    numbers of each step, validations, samples. Out: `training_log.jsonl` (every log step and
       every validation), `curve.csv` and `loss.csv` at the end, lines on stdout, trackers
       (sinks.py).
Rule:  the log is cut to the position that a checkpoint remembers (lines, not bytes: times vary), so
       no step is missing or doubled after a kill. Curves are published: their rows stand in the
       checkpoint itself, whose hash covers them. They do not follow `runtime.log_every`, hence are
       equal for equal parameters.
Note:  only rank 0 speaks and writes; the observers of the others are `quiet`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lib import kernels
from lib.core import files, growing, progress
from lib.core.errors import redact
from lib.core.run_settings import Runtime
from lib.train.sinks import Trackers

LOG = "training_log.jsonl"
CURVES = {
    "curve": ("step", "tokens", "bytes", "flops", "bpb"),
    "loss": ("step", "tokens", "flops", "loss", "lr", "grad"),
}
MAX_LOSS_ROWS = 2000
WARM_STEPS = 10  # left out of rates: first compilation, caches, allocators


def console_line(
    step: int, loss: float, lr: float, grad: float, seconds: float, predicts: bool = True
) -> str:
    """The line of one step; PPL is exp of the unrounded loss, where that is a cross-entropy."""
    ppl = f"{perplexity(loss):.2f}" if predicts else "-"
    return (
        f"Step {step:6d} | Loss: {loss:.4f} | PPL: {ppl} | LR: {lr:.2e} | "
        f"Grad: {grad:.3f} | Time: {seconds:.2f}s"
    )


def perplexity(loss: float) -> float:
    """exp(loss), held below infinity: JSON has none."""
    return math.exp(min(loss, 700.0))


class Speaks(Protocol):
    """What a family may add to a log step (lib.models.base)."""

    @property
    def predicts(self) -> bool: ...  # noqa: D102  its loss is cross-entropy in nats
    def log_scalars(self) -> dict[str, float]: ...  # noqa: D102
    def progress(self) -> str | None: ...  # noqa: D102


class Observer:
    """Writes and says what happens. Only rank 0 has one that speaks; the others get `quiet`.

    steps: length of the run. tokens: of its first steps. flops_per_token, bytes_per_token: make the
    curves' columns of tokens. peak_flops: of all devices together, for the share that is used; None
    where it is not known.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        *,
        run: str,
        steps: int,
        tokens: Callable[[int], int],
        flops_per_token: int,
        bytes_per_token: float,
        peak_flops: float | None = None,
        warn: Callable[[str], None],
        config: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.folder, self.runtime, self.run, self.steps = folder, runtime, run, steps
        self.tokens, self.flops_per_token = tokens, flops_per_token
        self.bytes_per_token, self.peak_flops = bytes_per_token, peak_flops
        self.warn, self.quiet = warn, quiet
        self._stride = -(-steps // MAX_LOSS_ROWS)
        self._since, self._steps_since, self._taken = time.monotonic(), 0, 0
        self._rows: dict[str, list[Sequence[float]]] = {name: [] for name in CURVES}
        self._bar: Any = None
        self._trackers = Trackers(() if quiet else runtime.trackers, warn)
        if quiet:
            return
        self._log = growing.AppendLog(folder / LOG)
        self._trackers.open(folder, run, runtime.wandb, config or {})

    # ------------------------------------------------------------ positions

    def cut(self, position: Mapping[str, Any] | None) -> None:
        """Go on from the checkpoint at `position`, forget what came after; all, if there is none.

        Lines that the log has lost are a warning: nothing is made from them.
        """
        if self.quiet:
            return
        wanted = position["log"] if position else 0
        if self._log.position < wanted:
            self.warn(f"{LOG} has {self._log.position} lines, the checkpoint saw {wanted}")
        lines = self._log.path.read_bytes().splitlines(keepends=True)
        self._log.truncate(sum(len(line) for line in lines[:wanted]))
        self._rows = {name: list(position["curves"][name]) if position else [] for name in CURVES}

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps: lines of the log, made durable, and the rows of the curves."""
        if self.quiet:
            return {}
        self._log.sync()
        return {"log": self._log.position, "curves": self._rows}

    # ------------------------------------------------------------ events

    def begin(self, step: int) -> None:
        """Training goes on after `step` steps: open the bar on a terminal, start the clock."""
        if not self.quiet and progress.on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.steps, initial=step, unit="step", leave=False, desc=self.run,
                dynamic_ncols=True,
            )  # fmt: skip
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what just happened (validation, samples, a checkpoint) out of the rates."""
        self._since, self._steps_since = time.monotonic(), 0

    def step(
        self, step: int, loss: float, lr: float, grad: float, model: Speaks, *, learned: bool = True
    ) -> None:
        """The `step`th step has been made. Logged every `runtime.log_every` steps.

        learned: False for one that had no loss, so made no update.
        """
        self._steps_since += 1
        self._taken += 1
        if self.quiet:
            return
        if decided := kernels.news():  # known once they have run
            self.say(decided)
        tokens = self.tokens(step)
        if learned and (step % self._stride == 0 or step == self.steps):
            row = (step, tokens, tokens * self.flops_per_token, loss, lr, grad)
            self._rows["loss"].append(row)
        if self._bar is not None:
            self._bar.update(1)
        if step % self.runtime.log_every and step != self.steps:
            return
        seconds = (time.monotonic() - self._since) / self._steps_since
        per_step = (tokens - self.tokens(step - self._steps_since)) / self._steps_since
        rate = per_step / seconds if seconds > 0 and self._taken > WARM_STEPS else None
        numbers = {"loss": loss, "ppl": perplexity(loss), "lr": lr, "grad": grad} if learned else {}
        if learned and not model.predicts:
            del numbers["ppl"]
        numbers |= model.log_scalars()
        timing = {"time": round(seconds, 6), "tokens_per_s": rate and round(rate, 1)}
        if rate and self.peak_flops:
            timing["mfu"] = round(self.flops_per_token * rate / self.peak_flops, 4)
        self._log.append({"step": step, "tokens": tokens, **numbers, **timing})
        if learned:
            self.say(console_line(step, loss, lr, grad, seconds, model.predicts))
        if lines := model.progress():
            self.say(lines)
        if self._bar is not None and rate:
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s")
        self._trackers.log({**numbers, **({"tokens_per_s": rate} if rate else {})}, step)
        self.restart_clock()

    def validated(self, step: int, bpb: float) -> None:
        """Validation after `step` steps gave `bpb` bits per byte."""
        if self.quiet:
            return
        if decided := kernels.news():  # known once they have run
            self.say(decided)
        tokens = self.tokens(step)
        read = round(tokens * self.bytes_per_token)
        self._rows["curve"].append((step, tokens, read, tokens * self.flops_per_token, bpb))
        self._log.append({"step": step, "tokens": tokens, "bpb": bpb})
        self.say(f"Step {step:6d} | BPB: {bpb:.4f}")
        self._trackers.log({"bpb": bpb}, step)

    def sampled(self, step: int, texts: Sequence[str]) -> None:
        """Samples of text after `step` steps."""
        if self.quiet:
            return
        self._log.append({"step": step, "samples": list(texts)})
        for text in texts:
            self.say(f"  | {printable(text)}")

    def say(self, line: str) -> None:
        """One line on stdout, above the bar if there is one."""
        if self.quiet:
            return
        progress.write(redact(line), sys.stdout)

    def close(self) -> None:
        """End the bar and the trackers."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.close()
        self._trackers.close()
        self._log.close()

    # ------------------------------------------------------------ curves

    def write_curves(self, folder: Path) -> None:
        """`curve.csv` (validations) and `loss.csv` (at most 2,000 rows) of the whole run."""
        for name, columns in CURVES.items():
            rows = (map(_number, row) for row in self._rows[name])
            text = "\n".join(map(",".join, [columns, *rows]))
            files.write_bytes(folder / f"{name}.csv", (text + "\n").encode())


def _number(value: float) -> str:
    """10 significant digits, integers in full."""
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def printable(text: str) -> str:
    """`text` on one line without control characters: a sample may hold terminal escapes."""
    return "".join(c if c.isprintable() else " " for c in text)
