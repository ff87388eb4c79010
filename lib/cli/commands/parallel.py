"""`kumiki parallel`: stages side by side, each in a git worktree of its own (pipeline.md 12).

Order: shared upstream here -> a worktree a stage, with this tree's changes, cache, scratch and
       working state -> `dvc repro` there -> `dvc repro` here, which collects through the run-cache.
Note:  DVC has no parallel repro, and two in one tree lock each other out. Ctrl-C lets every stage
       commit; the same command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from lib.cli import pipeline, tables, worktrees
from lib.cli.console import note
from lib.core import artifact, params
from lib.core.errors import EnvError, Interrupted, UserError

PLACE = Path(".kumiki/wt")
FAILED = 255  # what dvc makes of every failure of a stage


class Running:
    """The processes under way; a stop reaches each of them, whenever it was begun."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._lock = threading.RLock()  # a second signal may come while the first is handled
        self.asked = 0  # stops so far

    def start(self, words: Sequence[str], **options: Any) -> subprocess.Popen[str] | None:
        """Begin one in a session of its own; None where a stop was asked before."""
        with self._lock:  # a stop comes before it, or finds it
            if self.asked:
                return None
            process = subprocess.Popen(words, text=True, start_new_session=True, **options)
            self._processes.append(process)
            return process

    def ended(self, process: subprocess.Popen[str]) -> None:
        """It needs no stop any more."""
        with self._lock:
            self._processes.remove(process)

    def stop(self) -> None:
        """Ask all to commit and end; the second time, kill them."""
        with self._lock:
            self.asked += 1
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT if self.asked == 1 else signal.SIGKILL)


@dataclass
class Job:
    """One stage in its worktree."""

    stage: str
    folder: Path
    gpu: str | None
    code: int | None = None


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Prepare, run side by side, collect; the exit code is that of the worst."""
    if arguments.jobs < 1:
        raise UserError("no jobs", value=f"--jobs {arguments.jobs}", remedy="use 1 or more")
    wanted, upstream = targets(arguments.stages)
    if upstream:
        note(f"shared upstream first: {', '.join(upstream)}")
        if code := _dvc(["repro", *upstream], Path()):
            raise _failure(code, upstream)
    gpus = arguments.gpus.split(",") if arguments.gpus else []
    if gpus and len(gpus) < min(arguments.jobs, len(wanted)):
        raise UserError(
            "fewer GPUs than jobs", value=arguments.gpus, remedy=f"add --jobs {len(gpus)}"
        )
    free: Queue[str | None] = Queue()
    for gpu in gpus or [None] * arguments.jobs:
        free.put(gpu)
    running = Running()
    jobs = [Job(stage, PLACE / stage.replace("@", "_"), None) for stage in wanted]
    for job in jobs:
        worktrees.prepare(job.folder, job.stage)
    with _stopping(running):
        threads = [threading.Thread(target=_work, args=(job, free, running)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finish(jobs, bool(running.asked), arguments.json)


def targets(stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """(stages to run side by side, those that must be there before), both in the DAG's order.

    A named stage that another named one depends on runs in that one's worktree.
    """
    bodies = dict(pipeline.expand(params.read_yaml(Path(params.PARAMS))))
    unknown = [stage for stage in stages if stage not in bodies]
    if unknown:
        raise UserError(
            "unknown stage", value=unknown[0], remedy=f"choose one of {', '.join(bodies)}"
        )
    makers = {out: n for n, b in bodies.items() for out in pipeline.outputs(b)}

    def above(stage: str) -> set[str]:
        near = {makers[d] for d in bodies[stage].get("deps", []) if d in makers}
        return near.union(*(above(n) for n in near))

    every = {stage: above(stage) for stage in stages}
    ends = [s for s in stages if not any(s in every[other] for other in stages)]
    shared = set().union(*every.values()) - set(stages)
    return ends, [name for name in bodies if name in shared]


# ---------------------------------------------------------------- running


def _work(job: Job, free: Queue[str | None], running: Running) -> None:
    job.gpu = free.get()
    try:
        environment = {**os.environ, "KUMIKI_SCRATCH": str(artifact.scratch_root().absolute())}
        if job.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = job.gpu
        process = running.start(
            [sys.executable, "-m", "dvc", "repro", job.stage], cwd=job.folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if process is None:
            job.code = Interrupted.code
            return
        assert process.stdout is not None
        for line in process.stdout:
            note(f"{job.stage} | {line.rstrip()}")
        job.code = process.wait()
        running.ended(process)
    finally:
        free.put(job.gpu)


@contextlib.contextmanager
def _stopping(running: Running) -> Iterator[None]:
    """Ctrl-C and SIGTERM reach every stage, which commits and ends; a second one kills."""

    def handle(number: int, frame: object) -> None:
        running.stop()

    old = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def finish(jobs: Sequence[Job], asked: bool, as_json: bool) -> None:
    """Collect what is done, remove its worktree, print how each stage ended, tell the rest."""
    done = [job for job in jobs if job.code == 0]
    failed = [job for job in jobs if job.code != 0]
    if done and not asked:
        code = _dvc(["repro", *(job.stage for job in done)], Path())
        if code:
            raise _failure(code, [job.stage for job in done])
    for job in done:
        worktrees.remove(job.folder)
    ends = [(job.stage, "done" if job.code == 0 else f"code {job.code}") for job in jobs]
    if as_json:
        tables.put_json({"stages": [{"stage": job.stage, "code": job.code} for job in jobs]})
    else:
        tables.put(tables.lines(ends, ("stage", "ended")))
    if asked:
        raise Interrupted("interrupted, finished work is kept; run the same command to continue")
    if failed:
        raise _failure(max(job.code or 0 for job in failed), [job.stage for job in failed])


def _dvc(words: Sequence[str], folder: Path) -> int:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, check=False,
                          stdout=sys.stderr)  # fmt: skip
    return done.returncode


def _failure(code: int, stages: Sequence[str]) -> EnvError:
    return EnvError(
        "stages failed", value=f"{', '.join(stages)} (code {code})",
        remedy="the lines above tell why; the same command continues",
    )  # fmt: skip
