"""What a run tells: training_log.jsonl, the console line, a progress bar, curves.

In:    numbers of each step, validations, samples. Out: `training_log.jsonl` (every log step and
       every validation), `curve.csv` and `loss.csv` at the end, lines on stdout, trackers
       (sinks.py).
Rule:  logs are cut to the position that a checkpoint remembers (lines, not bytes: times vary), so
       no step is missing or doubled after a kill. Curves come from points that do not follow
       `runtime.log_every`, hence are equal for equal parameters.
Note:  only rank 0 speaks and writes; the observers of the others are `quiet`.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lib import kernels
from lib.core import files, growing, progress
from lib.core.errors import InputError, redact
from lib.core.run_settings import Runtime
from lib.train.sinks import Trackers

LOG, POINTS = "training_log.jsonl", "points.jsonl"
CURVE_COLUMNS = ("step", "tokens", "bytes", "flops", "bpb")
LOSS_COLUMNS = ("step", "tokens", "flops", "loss", "lr", "grad")
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
        self._bar: Any = None
        self._trackers = Trackers(() if quiet else runtime.trackers, warn)
        if quiet:
            return
        self._log, self._points = (
            growing.AppendLog(folder / LOG),
            growing.AppendLog(folder / POINTS),
        )
        self._trackers.open(folder, run, runtime.wandb, config or {})

    # ------------------------------------------------------------ positions

    def cut(self, position: Mapping[str, int] | None) -> None:
        """Forget what came after the checkpoint at `position`; everything, when there is none."""
        if self.quiet:
            return
        for name, log in (("log", self._log), ("points", self._points)):
            wanted = position[name] if position else 0
            if log.position < wanted:
                self.warn(f"{log.path.name} has {log.position} lines, the checkpoint saw {wanted}")
            lines = log.path.read_bytes().splitlines(keepends=True)
            log.truncate(sum(len(line) for line in lines[:wanted]))

    def position(self) -> dict[str, int]:
        """Lines written so far, made durable: a checkpoint remembers them."""
        if self.quiet:
            return {}
        self._log.sync()
        self._points.sync()
        return {"log": self._log.position, "points": self._points.position}

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
            self._points.append(_sealed(dict(zip(LOSS_COLUMNS, row, strict=True))))
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
        row = (step, tokens, read, tokens * self.flops_per_token, bpb)
        self._points.append(_sealed(dict(zip(CURVE_COLUMNS, row, strict=True))))
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
        self._points.close()

    # ------------------------------------------------------------ curves

    def write_curves(self, folder: Path) -> None:
        """`curve.csv` (validations) and `loss.csv` (at most 2,000 rows) of the whole run."""
        path = self.folder / POINTS
        points = [_opened(line, path) for line in path.read_bytes().splitlines()]
        for name, columns, mark in (
            ("curve", CURVE_COLUMNS, "bpb"),
            ("loss", LOSS_COLUMNS, "loss"),
        ):
            rows = [[p[c] for c in columns] for p in points if mark in p]
            text = "\n".join([",".join(columns), *(",".join(map(_number, row)) for row in rows)])
            files.write_bytes(folder / f"{name}.csv", (text + "\n").encode())


def _sealed(point: dict[str, Any]) -> dict[str, Any]:
    """A point with a checksum: the curves are made from these lines, perhaps days later."""
    return {**point, "crc": zlib.crc32(json.dumps(point).encode())}


def _opened(line: bytes, path: Path) -> dict[str, Any]:
    """The point of one line; InputError when a byte of it has changed."""
    try:
        point = json.loads(line)
        if point.pop("crc") == zlib.crc32(json.dumps(point).encode()):
            return point
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    remedy = "remove it and run the same command; the curves then lack what it held"
    raise InputError("damaged line", file=path, value=line[:40].decode("latin-1"), remedy=remedy)


def _number(value: float) -> str:
    """10 significant digits, integers in full."""
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def printable(text: str) -> str:
    """`text` on one line without control characters: a sample may hold terminal escapes."""
    return "".join(c if c.isprintable() else " " for c in text)
