"""`python -m lib.core.launch MODULE ARGUMENTS`: the same command line on one process or many.

KUMIKI_LAUNCHER  python (default): becomes the module. torchrun: KUMIKI_NPROC processes here, over
                 KUMIKI_NNODES nodes that meet at KUMIKI_RDZV or MASTER_ADDR. slurm: a job of
                 `sbatch --wait`, with KUMIKI_SBATCH's options, inside which the others run.
Rule:  which it is never enters a parameter or dvc.lock, so neither changes with the machine.
Codes: rank 0 leaves its exit code in a file named by KUMIKI_EXIT_FILE, for torchrun turns every
       failure into 1. A stop signal goes to the workers, who commit; after `runtime.stop_grace_s`
       they are killed.
Note:  a Slurm job that is still queued or running is attached to, never submitted twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.core import files
from lib.core.errors import InputError, Interrupted, KumikiError, UserError, report_lines
from lib.core.params import load
from lib.core.process import die_with_parent
from lib.core.ranks import EXIT_FILE
from lib.core.run_settings import Runtime

STATE = Path(".kumiki")  # git-ignored: exit codes and job ids of launchers
SPARE_S = 10.0  # in which torchrun kills its workers and ends
POLL_S = 2.0  # between looks at a job that was submitted before


def main(argv: list[str] | None = None) -> int:
    """Run MODULE under the launcher that the environment names; returns the module's exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if not words or words[0].startswith("-"):
            raise UserError("no module to launch", remedy="python -m lib.core.launch MODULE ...")
        name = os.environ.get("KUMIKI_LAUNCHER") or "python"
        if name == "python":
            os.execv(sys.executable, [sys.executable, "-m", *words])  # noqa: S606  # it is our own
        runtime = load().runtime
        die_with_parent()
        if name == "torchrun":
            return _torchrun(words, runtime)
        if name == "slurm":
            return _slurm(words, runtime)
        raise UserError(
            "unknown launcher",
            value=f"KUMIKI_LAUNCHER={name}",
            remedy="use python, torchrun, slurm",
        )
    except KumikiError as error:
        sys.stderr.write("\n".join(report_lines(error)) + "\n")
        return error.code


# ---------------------------------------------------------------- torchrun


def torchrun_command(words: list[str], environment: dict[str, str], grace_s: float) -> list[str]:
    """The command line of torch.distributed.run for `words` = MODULE ARGUMENTS."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", environment.get("KUMIKI_NPROC", "auto")]
    command += ["--shutdown-timeout", str(int(grace_s))]  # between its SIGTERM and SIGKILL
    nodes = environment.get("KUMIKI_NNODES", "1")
    if nodes == "1":
        command += ["--standalone"]
    elif "KUMIKI_RDZV" in environment:
        endpoint = environment["KUMIKI_RDZV"]
        command += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    elif "MASTER_ADDR" in environment and "RANK" in environment:  # RANK of the node, here
        command += ["--nnodes", nodes, "--node-rank", environment["RANK"]]
        command += ["--master-addr", environment["MASTER_ADDR"]]
        command += ["--master-port", environment.get("MASTER_PORT", "29500")]
    else:
        raise UserError(
            "several nodes and no meeting point",
            value=f"KUMIKI_NNODES={nodes}",
            remedy="set KUMIKI_RDZV=host:port, or MASTER_ADDR and RANK",
        )
    return [*command, "-m", "--", *words]  # without -- it would read MODULE's options as its own


def _torchrun(words: list[str], runtime: Runtime) -> int:
    environment = dict(os.environ)
    command = torchrun_command(words, environment, runtime.stop_grace_s)
    environment.setdefault("OMP_NUM_THREADS", str(runtime.threads))
    if EXIT_FILE in environment:  # inside a Slurm job, whose launcher waits for it
        return _supervise(command, environment, Path(environment[EXIT_FILE]), runtime)
    path = STATE / f"exit_{os.getpid()}"
    environment[EXIT_FILE] = str(path.absolute())
    try:
        return _supervise(command, environment, path, runtime)
    finally:
        path.unlink(missing_ok=True)


def _supervise(
    command: list[str], environment: dict[str, str], code: Path, runtime: Runtime
) -> int:
    """Run `command` in a session of its own: a terminal's Ctrl-C reaches it through here only."""
    code.unlink(missing_ok=True)
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    with _on_stop(process.terminate, process.kill, runtime) as asked:
        status = _wait(process)
    return _read_code(code, Interrupted.code if asked and status else status)


def _wait(process: subprocess.Popen) -> int:
    status = process.wait()
    return status if status >= 0 else 128 - status


def _read_code(path: Path, otherwise: int) -> int:
    """What rank 0 has left, or `otherwise` where it was killed before it could."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return otherwise


@contextlib.contextmanager
def _on_stop(
    stop: Callable[[], Any], kill: Callable[[], Any], runtime: Runtime
) -> Iterator[list[int]]:
    """SIGTERM and SIGINT call `stop`, and `kill` long after the grace, if the block still runs.

    Yields the list of signals that came.
    """
    asked: list[int] = []
    turns = itertools.count()  # its next() is one step: a second signal may come within the first

    def handle(number: int, frame: object) -> None:
        asked.append(number)
        if next(turns) == 0:
            timer.start()
        stop()

    timer = threading.Timer(runtime.stop_grace_s + SPARE_S, kill)
    timer.daemon = True
    old = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        timer.cancel()
        for number, handler in old.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- slurm


def _slurm(words: list[str], runtime: Runtime) -> int:
    if shutil.which("sbatch") is None:
        raise UserError(
            "launcher is absent", value="sbatch", remedy="use KUMIKI_LAUNCHER=torchrun or python"
        )
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
    job_file, code = STATE / f"slurm_{key}.json", STATE / f"slurm_{key}.exit"
    job = files.read_json(job_file)["job"] if job_file.is_file() else None
    if job is not None and _is_queued(job):
        sys.stderr.write(f"attached to Slurm job {job}, which was submitted before\n")
        status = _attach(job, runtime)
    else:
        status = _submit(words, job_file, code, runtime)
    job_file.unlink(missing_ok=True)
    try:
        return _read_code(code, status)
    finally:
        code.unlink(missing_ok=True)


def sbatch_command(words: list[str], environment: dict[str, str], grace_s: float) -> list[str]:
    """The command line of sbatch: the job runs this launcher again, without Slurm."""
    inner = "torchrun" if "KUMIKI_NPROC" in environment else "python"
    again = shlex.join([sys.executable, "-m", "lib.core.launch", *words])
    return [
        "sbatch", "--parsable", "--wait", "--export=ALL", f"--job-name=kumiki_{words[0]}",
        f"--signal=B:TERM@{int(grace_s)}",  # before the time limit: commit, exit 75
        *shlex.split(environment.get("KUMIKI_SBATCH", "")),
        "--wrap", f"export KUMIKI_LAUNCHER={inner}; exec {again}",
    ]  # fmt: skip


def _submit(words: list[str], job_file: Path, code: Path, runtime: Runtime) -> int:
    code.unlink(missing_ok=True)
    environment = {**os.environ, EXIT_FILE: str(code.absolute())}
    files.make_folder(STATE)
    command = sbatch_command(words, environment, runtime.stop_grace_s)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    job = process.stdout.readline().strip().split(";")[0]
    if not job:
        process.wait()
        raise InputError(
            "sbatch took no job", value=shlex.join(command), remedy="mend KUMIKI_SBATCH"
        )
    files.write_json(job_file, {"job": job})
    with _on_stop(lambda: _cancel(job), lambda: None, runtime) as asked:
        process.stdout.read()
        status = _wait(process)
    return Interrupted.code if asked and status else status


def _attach(job: str, runtime: Runtime) -> int:
    with _on_stop(lambda: _cancel(job), lambda: None, runtime) as asked:
        while _is_queued(job):
            threading.Event().wait(POLL_S)
    return Interrupted.code if asked else 1


def _is_queued(job: str) -> bool:
    found = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False)
    return found.returncode == 0 and bool(found.stdout.strip())


def _cancel(job: str) -> None:
    """The job gets SIGTERM, commits and ends; Slurm kills it after its own KillWait."""
    subprocess.run(["scancel", job], check=False)


if __name__ == "__main__":
    raise SystemExit(main())
