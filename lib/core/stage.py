"""The stage frame: what every stage does around its own forty lines.

Order: arguments -> parameters -> parent's death, signals -> lock -> inputs -> fingerprint -> body
       -> publish. The body builds `run.result` in the working folder; the frame gives it its name.
State: `<work>/<fingerprint>/` lies beside the outputs (git- and dvc-ignored), since DVC deletes
       outputs before a run. Finished, same code: published again in seconds. Unfinished, same code:
       continued. Unfinished, other code: refused, KUMIKI_CODE_CHANGE decides (pipeline.md 6).
Codes: see `lib.core.errors`. `except Exception` stands here and nowhere else.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import importlib
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.core import artifact, dag, files, growing, lock, progress, ranks
from lib.core.arguments import Stage, parse
from lib.core.errors import (
    EnvError,
    InputError,
    Interrupted,
    KumikiError,
    UserError,
    redact,
    relative,
    report_lines,
)
from lib.core.params import load
from lib.core.process import PoolMap, StopRequest, die_with_parent, worker_pool
from lib.core.run_settings import Runtime
from lib.core.settings import Settings

# Part of every fingerprint: raise it when the meaning of a working state changes. The manifests'
# version is part too: what a reader of today refuses is left beside, and fresh work begins.
FORMAT_VERSION = 1
DONE, STATE = "done.json", "state.json"
# New objects between two looks for cycles. At Python's 700 torch's import and the syntax trees of
# `code_hash`, which make no garbage, took 0.5 s more of every stage (measured).
COLLECT_EVERY = 10_000


class Declared:
    """The settings, seen through the stage's declaration: an undeclared section is a bug."""

    def __init__(self, settings: Settings, sections: Sequence[str]) -> None:
        self._settings = settings
        self._allowed = {s.split(".")[0] for s in sections}

    def __getattr__(self, name: str) -> Any:
        assert name in self._allowed, f"section {name} is not declared by this stage"
        return getattr(self._settings, name)


class Run:
    """One running stage: its parameters, paths and voice."""

    def __init__(self, stage: Stage, settings: Settings, arguments: argparse.Namespace) -> None:
        self.stage = stage
        self.name: str = getattr(arguments, stage.item) if stage.item else ""
        self.task: int | None = getattr(arguments, "task", None)  # this process's share, of `of`
        self.of: int | None = getattr(arguments, "of", None)
        self.settings = Declared(settings, stage.sections)
        self.runtime: Runtime = settings.runtime
        given = {option: getattr(arguments, option) for option in (*stage.inputs, *stage.extras)}
        self.inputs = {option: Path(path) for option, path in given.items() if path is not None}
        self.out = Path(arguments.out)
        self.wishes = {option: getattr(arguments, option) for option in stage.wishes}
        self.beside = {option: Path(getattr(arguments, option)) for option in stage.beside}
        self.title = f"{stage.name}@{self.name}" if self.name else stage.name
        self.stop = StopRequest(
            f"interrupted in {self.title}, finished work is kept; run the same command to continue",
            stage.defer_stop,
        )
        self.work, self.fingerprint = Path(), ""  # set by `_find_work`
        self.code: dict[str, str] = {}  # file -> hash of what computes, set by `_open_work`
        self.started = time.time()
        self.summary = ""  # what the body has made, for the last line
        self._log: growing.AppendLog | None = None

    @property
    def result(self) -> Path:
        """Where the body builds the output, a file or a folder, through lib.core.files."""
        return self.work / "result" / self.out.name

    def files_beside(self, option: str) -> Path:
        """Folder whose files the frame publishes one by one into the folder of `option`."""
        return self.work / "beside" / option

    @property
    def units(self) -> Path:
        """Finished units of work, kept for a rerun; removed when the stage is done."""
        return self.work / "units"

    def log(self, text: str) -> None:
        """One line on stderr, and in stage.log of the working folder; rank 0 speaks for all."""
        if ranks.rank() > 0:
            return
        line = redact(f"{self.title}: {text}")
        progress.write(line)
        if self._log is not None:
            self._log.append({"time": round(time.time(), 3), "line": line})

    def warn(self, text: str) -> None:
        """A warning in the form of an error line; the stage goes on."""
        self.log(f"warning: {text}")

    @contextlib.contextmanager
    def pool(self, threads: int = 1) -> Iterator[PoolMap]:
        """Worker processes as `runtime.workers` and `runtime.executor` say; each call has a bar."""
        if self.runtime.executor == "ray":
            with _ray_pool(self.runtime.workers) as mapped:
                yield self._watched(mapped)
            return
        with worker_pool(self.runtime.workers, threads) as mapped:
            yield self._watched(mapped)

    def _watched(self, mapped: PoolMap) -> PoolMap:
        def call(function: Callable[[Any], Any], units: Iterable[Any], /) -> Iterator[Any]:
            units = list(units)
            what = f"{self.title}: {function.__name__.strip('_').replace('_', ' ')}"
            yield from self.watch(mapped(function, units), len(units), "units", what)

        return call

    def watch(
        self, items: Iterable[Any], total: float | None, unit: str, title: str = "",
        amount: Callable[[Any], float] = lambda item: 1.0,
    ) -> Iterator[Any]:  # fmt: skip
        """`items` one by one, with their progress."""
        every_s = self.runtime.log_every_s
        yield from progress.watched(items, total, unit, title or self.title, every_s=every_s,
                                    amount=amount)  # fmt: skip

    @contextlib.contextmanager
    def progress(self, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        """Yields `advance(amount)`: a bar with ETA on a terminal, else a line now and then."""
        every_s = self.runtime.log_every_s
        with progress.progress(total, unit, self.title, every_s=every_s) as advance:
            yield advance


@contextlib.contextmanager
def _ray_pool(workers: int) -> Iterator[PoolMap]:
    try:
        import ray  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise UserError(
            "executor not available",
            file="params.yaml",
            value="runtime.executor is ray",
            remedy="pip install -e '.[ray]', or executor: local",
        ) from None
    from lib.core.process import map_ray

    # RAY_ADDRESS names a cluster; without it a local one of `workers` processes is started.
    local = {"num_cpus": workers, "include_dashboard": False}
    ray.init(**({} if os.environ.get("RAY_ADDRESS") else local), log_to_driver=False)
    try:
        yield map_ray(ray, workers)
    finally:
        ray.shutdown()


# ---------------------------------------------------------------- the frame


def main(
    stage: Stage,
    body: Callable[[Run], None],
    identity: Callable[[Run], dict[str, Any]],
    *,
    check: Callable[[Run], bool] = lambda run: True,
    modules: Callable[[Run], Sequence[str]] = lambda run: (),
    after: Callable[[Run], None] = lambda run: None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run `body` as the stage; returns the exit code.

    Of several ranks only rank 0 locks, publishes and reports; the others run `body` beside it.
    modules: what the stage loads by name, such as its family, for the code hash. identity: all
    that decides the bytes (resolved parameters, hashes of inputs), hashed to the
    fingerprint. check: whether what the result names beside itself (scratch) is still right; when
    it is not, the body runs again. after: what a user asked for besides (`wishes`), done each time
    that the result is there, also where nothing was to do.
    """
    gc.set_threshold(COLLECT_EVERY)
    atexit.register(gc.freeze)  # the interpreter's last looks for cycles took a second (measured)
    code = _guarded(stage, body, identity, check, modules, after, argv)
    ranks.leave_code(code)
    return code


def _guarded(
    stage: Stage,
    body: Callable[[Run], None],
    identity: Callable[[Run], dict[str, Any]],
    check: Callable[[Run], bool],
    modules: Callable[[Run], Sequence[str]],
    after: Callable[[Run], None],
    argv: Sequence[str] | None,
) -> int:
    try:
        arguments = parse(stage, argv)
        settings = load(overrides=arguments.set)
        run = Run(stage, settings, arguments)
        _check_item(run, settings)
        die_with_parent()
        with run.stop.installed():
            if ranks.rank() > 0:
                _find_work(run, identity)
                if not ranks.agree():
                    body(run)
                return 0
            if run.task is not None:
                _run_task(run, body, identity, modules)
                return 0
            with lock.exclusive_lock(run.out):
                _run_locked(run, settings, body, identity, check, modules)
                after(run)
        return 0
    except Interrupted as error:
        return _fail(error) if ranks.rank() == 0 else 0  # a failing follower would end rank 0
    except KumikiError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted; run the same command to continue"))
    except Exception as error:
        mapped = by_cause(error)
        if mapped is not None:
            return _fail(mapped)
        traceback.print_exc()
        sys.stderr.write(f"this is a bug in kumiki ({stage.name}): {redact(repr(error))}\n")
        return 1


def _find_work(run: Run, identity: Callable) -> None:
    for option, path in run.inputs.items():
        if not path.exists():
            raise UserError("input missing", value=f"--{option} {path}", remedy="`dvc repro`")
    versions = [FORMAT_VERSION, artifact.VERSION]
    described = {"stage": run.stage.name, "item": run.name, "version": versions}
    fingerprint = artifact.key_of("work", {**described, "identity": identity(run)})
    folder = run.stage.work.replace("{name}", run.name)
    run.fingerprint = fingerprint
    run.work = Path(folder) / run.title.replace("@", "_") / fingerprint


def _run_locked(
    run: Run,
    settings: Settings,
    body: Callable,
    identity: Callable,
    check: Callable,
    modules: Callable,
) -> None:
    _find_work(run, identity)
    with lock.exclusive_lock(run.work):
        finished = _open_work(run, modules(run))
        log = growing.AppendLog(run.work / "stage.log")
        run._log = log
        try:
            if ranks.agree(finished and check(run)):
                if all(_same(source, target) for source, target in _outputs(run)):
                    run.log("up to date")
                    return
                _publish(run)
                run.log(f"finished before, published again as {run.out}")
                return
            _announce(run, settings)
            body(run)
            _commit(run)
        finally:
            run._log = None
            log.close()


def _announce(run: Run, settings: Settings) -> None:
    """The first line: from what, to what, which key, at what cost; EnvError for too little memory.

    `kumiki estimate` is loaded by name: it decides no byte, so it is no dependency of the stage.
    """
    estimate = importlib.import_module("lib.cli.estimate")
    cost = estimate.preflight(settings, run.stage.name, run.name)
    taken = ", ".join(map(relative, run.inputs.values())) or "params.yaml"
    told = f"; about {cost}" if cost else ""
    run.log(f"{taken} -> {relative(run.out)}, key {run.fingerprint[:12]}{told}")


def _run_task(run: Run, body: Callable, identity: Callable, modules: Callable) -> None:
    """One share of the units, beside others; the run without --task merges what all have made."""
    if run.of is None or not 0 <= run.task < run.of:  # type: ignore[operator]  # it is not None
        value = f"--task {run.task} --of {run.of}"
        raise UserError("not a task", value=value, remedy="use 0 <= task < of")
    _find_work(run, identity)
    with lock.exclusive_lock(run.work.parent / f"{run.fingerprint}_task_{run.task}"):
        if not _open_work(run, modules(run)):
            body(run)
        run.log(f"task {run.task} of {run.of} is done")


def require_tasks(run: Run, n_tasks: int) -> None:
    """UserError where `--of` is not the fixed division of the parameters."""
    if run.of is not None and run.of != n_tasks:
        raise UserError(
            "another division than the parameters have",
            value=f"--of {run.of}, n_tasks is {n_tasks}",
            remedy=f"use --of {n_tasks}, or change n_tasks",
        )


def _open_work(run: Run, modules: Sequence[str]) -> bool:
    """Make or continue the working folder; True when its result is finished and verifies."""
    code: dict[str, str] = {}
    for module in (f"stages.{run.stage.name}", *modules):
        code |= dag.code_hash(module, Path(__file__).resolve().parents[2])
    run.code = code
    state_path, done_path = run.work / STATE, run.work / DONE
    if state_path.is_file():
        old = _noted(state_path, "code")
        changed = sorted(n for n in old.keys() | code.keys() if old.get(n) != code.get(n))
        finished = done_path.is_file()
        choice = os.environ.get("KUMIKI_CODE_CHANGE")
        if changed and not finished and choice not in ("continue", "restart"):
            raise UserError(
                "the code has changed since this unfinished work began",
                file=run.work,
                value=", ".join(changed),
                remedy="set KUMIKI_CODE_CHANGE=continue to keep what is done, or =restart",
            )
        if changed and (finished or choice == "restart"):
            files.remove_tree(run.work)
        elif finished and not changed:
            return _verified(run, _noted(done_path, "tree"))
    files.make_folder(run.work)
    files.write_json(state_path, {"code": code})
    return False


def _tree(path: Path) -> dict[str, str]:
    if path.is_file():
        return {"": files.sha256_file(path)}
    return {
        p.relative_to(path).as_posix(): files.sha256_file(p)
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def _noted(path: Path, key: str) -> dict[str, Any]:
    """One entry of the frame's own notes; InputError where the file is not such a note."""
    raw = files.read_json(path)
    found = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(found, dict):
        remedy = "remove it and run the same command"
        raise InputError("damaged note", file=path, value=f"no {key}", remedy=remedy)
    return found


def _verified(run: Run, tree: dict[str, Any]) -> bool:
    """Whether the finished result is still what it was; a damaged one is made again, said aloud."""
    if run.result.exists() and _trees(run) == tree:
        return True
    run.warn(f"the finished result in {run.work} is damaged, it is made again")
    (run.work / DONE).unlink()
    return False


def _same(result: Path, out: Path) -> bool:
    return out.exists() and out.is_dir() == result.is_dir() and _tree(result) == _tree(out)


def _outputs(run: Run) -> list[tuple[Path, Path]]:
    """(finished, published) of the output and of every file that goes beside it."""
    pairs = [(run.result, run.out)]
    for option, folder in run.beside.items():
        made = sorted(run.files_beside(option).glob("*"))
        pairs += [(path, folder / path.name) for path in made]
    return pairs


def _trees(run: Run) -> dict[str, dict[str, str]]:
    return {made.relative_to(run.work).as_posix(): _tree(made) for made, _ in _outputs(run)}


def _publish(run: Run) -> None:
    for source, target in _outputs(run):
        files.publish(source, target)


def _commit(run: Run) -> None:
    """Publish the result and write the receipt: what varies by machine and moment, no output."""
    assert run.result.exists(), f"{run.title} built no {run.result}"
    _publish(run)
    usage = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    receipt = {
        "started": run.started,
        "seconds": round(time.time() - run.started, 3),
        "peak_memory_bytes": max(u.ru_maxrss for u in usage) * 1024,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "workers": run.runtime.workers,
        "threads": run.runtime.threads,
    }
    made = sum(p.stat().st_size for _, out in _outputs(run) for p in _files_of(out))
    told = f"{run.summary}; " if run.summary else ""
    seconds = receipt["seconds"]
    run.log(f"{told}{made:,} bytes in {seconds:,.1f} s: {relative(run.out)}")
    files.write_json(run.work / "receipt.json", receipt)
    files.write_json(run.work / DONE, {"tree": _trees(run)})
    files.remove_tree(run.units)


def _check_item(run: Run, settings: Settings) -> None:
    section = settings.train if run.stage.item == "run" else None
    section = getattr(settings, run.stage.name, section)
    if isinstance(section, dict) and run.name not in section:
        names = ", ".join(sorted(section))
        raise UserError(
            f"unknown {run.stage.item} in {run.stage.name}",
            value=run.name,
            remedy=f"choose one of {names}",
        )


def _fail(error: KumikiError) -> int:
    if os.environ.get("KUMIKI_DEBUG"):
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write("\n".join(report_lines(error)) + "\n")
    return error.code


def by_cause(error: BaseException) -> KumikiError | None:
    """The KumikiError for a library's own exception about disk or memory, by cause, not by type.

    None when nothing of the kind stands anywhere in the chain of causes: then it is a bug.
    """
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        if isinstance(link, OSError) and link.errno:
            name = Path(os.fsdecode(link.filename)) if link.filename else Path("x")
            if mapped := files.as_env_error(link, name):
                return mapped
        if files.FULL in text:
            return files.as_env_error(OSError(errno.ENOSPC, text), Path("x"))
        if isinstance(link, MemoryError) or "out of memory" in text or "Cannot allocate" in text:
            return EnvError("out of memory", value=text or None, remedy="lower runtime.workers")
        link = link.__cause__ or link.__context__
    return None


def input_hash(path: Path) -> str:
    """The identity of an input: sha256 of the file, or of the folder's manifest."""
    manifest = path / files.MANIFEST if path.is_dir() else path
    if not manifest.is_file():
        raise InputError("no manifest", file=path, remedy="run the stage that makes it again")
    return files.sha256_file(manifest)
