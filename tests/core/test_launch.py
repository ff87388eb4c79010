"""The launcher: the same words on every machine, rank 0's exit code, stop signals handed on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.core import launch as launcher
from lib.core.errors import UserError
from lib.core.launch import sbatch_command, torchrun_command
from lib.core.run_settings import Runtime
from tests.conftest import HANG_S, ROOT, is_alive

# Whoever reads `seen` may send a signal at once: it is whole, and the signal is handled by then.
MODULE = """
import os, sys, time
from pathlib import Path
from lib.core import ranks
from lib.core.process import StopRequest

stop = StopRequest("stopped", defer=True)
code = int(sys.argv[1])
with stop.installed():
    seen = Path(f"seen_{ranks.rank()}")
    part = seen.with_suffix(".part")
    part.write_text(f"{ranks.world_size()} {os.getpid()} {sys.argv[1:]}")
    part.rename(seen)
    while code == 75 and not stop.asked:
        time.sleep(0.01)
if stop.asked:
    Path(f"asked_{ranks.rank()}").touch()
ranks.leave_code(code)
sys.exit(code if ranks.rank() == 0 else 0)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "params.yaml").write_text("profile: small\nprofiles: {small: {}}\n")
    (tmp_path / "toy.py").write_text(MODULE)
    return tmp_path


def launch(project: Path, *words: str, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([str(project), str(ROOT)])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KUMIKI_")}
    return subprocess.Popen(
        [sys.executable, "-m", "lib.core.launch", *words],
        cwd=project,
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=HANG_S)
    return process.returncode, err


def wait_for(path: Path) -> None:
    limit = time.monotonic() + HANG_S
    while not path.exists():
        assert time.monotonic() < limit, f"{path.name} never appeared"
        time.sleep(0.01)


def test_python_becomes_the_module(project):
    """No launcher stays between DVC and the stage, whose death signal watches its parent."""
    process = launch(project, "toy", "3", "--x", "a b")
    assert finish(process)[0] == 3
    world, pid, words = (project / "seen_0").read_text().split(" ", 2)
    assert (world, int(pid), words) == ("1", process.pid, "['3', '--x', 'a b']")


def test_torchrun_hands_on_rank_0s_code_and_the_words(project):
    """torchrun turns every failure into 1; --run must not be read as an option of its own."""
    process = launch(
        project, "toy", "4", "--run", "x", KUMIKI_LAUNCHER="torchrun", KUMIKI_NPROC="2"
    )
    code, err = finish(process)
    assert code == 4, err
    for rank in (0, 1):
        world, _, words = (project / f"seen_{rank}").read_text().split(" ", 2)
        assert (world, words) == ("2", "['4', '--run', 'x']")
    assert list((project / ".kumiki").iterdir()) == []


def test_a10_a_stop_reaches_every_worker_and_the_code_is_75(project):
    process = launch(project, "toy", "75", KUMIKI_LAUNCHER="torchrun", KUMIKI_NPROC="2")
    for rank in (0, 1):
        wait_for(project / f"seen_{rank}")
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    assert (project / "asked_0").exists() and (project / "asked_1").exists()


def test_a10_a_second_signal_within_the_first_still_ends_in_a_kill(monkeypatch):
    """A handler is interrupted by the next signal; the kill after the grace was then never set."""
    monkeypatch.setattr(launcher, "SPARE_S", 0.0)
    killed, left = threading.Event(), [signal.SIGINT]

    def stop() -> None:
        if left:
            os.kill(os.getpid(), left.pop())

    with launcher._on_stop(stop, killed.set, Runtime(stop_grace_s=0)) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert killed.wait(30)
    assert asked == [signal.SIGTERM, signal.SIGINT]


def test_a11_workers_die_with_a_killed_launcher(project):
    """PR_SET_PDEATHSIG along the chain launcher, torchrun, workers."""
    process = launch(project, "toy", "75", KUMIKI_LAUNCHER="torchrun", KUMIKI_NPROC="1")
    wait_for(project / "seen_0")
    pid = int((project / "seen_0").read_text().split()[1])
    process.kill()
    process.communicate()
    limit = time.monotonic() + HANG_S
    while is_alive(pid):
        assert time.monotonic() < limit, "the worker lives on"
        time.sleep(0.05)


def test_several_nodes_need_a_meeting_point():
    with pytest.raises(UserError, match="KUMIKI_RDZV"):
        torchrun_command(["m"], {"KUMIKI_NNODES": "2"}, 60)
    found = torchrun_command(["m", "--a"], {"KUMIKI_NNODES": "2", "KUMIKI_RDZV": "h:1"}, 60)
    assert found[-3:] == ["--", "m", "--a"] and "h:1" in found and "--standalone" not in found
    by_rank = {"KUMIKI_NNODES": "2", "MASTER_ADDR": "h", "RANK": "1", "KUMIKI_NPROC": "8"}
    found = torchrun_command(["m"], by_rank, 60)
    assert found[found.index("--node-rank") + 1] == "1"
    assert found[found.index("--nproc-per-node") + 1] == "8"


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ([], {}, "no module to launch"),
        (["toy"], {"KUMIKI_LAUNCHER": "mpi"}, "unknown launcher: KUMIKI_LAUNCHER=mpi"),
        (["toy"], {"KUMIKI_LAUNCHER": "slurm", "PATH": "/nowhere"}, "launcher is absent: sbatch"),
    ],
)
def test_what_cannot_be_launched_is_a_sentence(project, words, environment, said):
    code, err = finish(launch(project, *words, **environment))
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


# ---------------------------------------------------------------- slurm, by doubles of its commands

SBATCH = """#!/bin/sh
echo "$@" > sbatch_words
for last; do :; done
echo 4711
exec sh -c "$last"
"""
SQUEUE = """#!/bin/sh
[ -f queued ] && echo 4711
exit 0
"""


@pytest.fixture
def slurm(project):
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (project / name).write_text(text)
        (project / name).chmod(0o755)
    path = f"{project}{os.pathsep}{os.environ['PATH']}"
    return {"KUMIKI_LAUNCHER": "slurm", "PATH": path}


def test_a_slurm_job_runs_the_same_words_and_gives_its_code(project, slurm):
    options = {"KUMIKI_SBATCH": "--gpus=8 --comment='two words'"}
    code, err = finish(launch(project, "toy", "3", "a b", **slurm, **options))
    assert code == 3, err
    assert "--gpus=8 --comment=two words" in (project / "sbatch_words").read_text()
    assert (project / "seen_0").read_text().endswith("['3', 'a b']")
    assert list((project / ".kumiki").iterdir()) == []


def test_a_job_that_is_still_queued_is_attached_to(project, slurm):
    """A second submission would be a second trainer."""
    import hashlib

    key = hashlib.sha256(b"toy\x003").hexdigest()[:12]
    (project / ".kumiki").mkdir()
    (project / f".kumiki/slurm_{key}.json").write_text('{"job": "4711"}')
    (project / "queued").touch()
    process = launch(project, "toy", "3", **slurm)
    assert process.stderr is not None
    assert "attached to Slurm job 4711" in process.stderr.readline()
    (project / f".kumiki/slurm_{key}.exit").write_text("3")
    (project / "queued").unlink()
    assert finish(process)[0] == 3
    assert not (project / "sbatch_words").exists()


def test_inside_a_job_torchrun_is_used_where_processes_are_asked_for():
    words = sbatch_command(["m", "--a"], {"KUMIKI_NPROC": "8"}, 60)
    assert "KUMIKI_LAUNCHER=torchrun" in words[-1] and words[-1].endswith("lib.core.launch m --a")
    assert "KUMIKI_LAUNCHER=python" in sbatch_command(["m"], {}, 60)[-1]


# ---------------------------------------------------------------- the stage frame on several ranks

STAGE = """
from pathlib import Path
from lib.core import files, ranks
from lib.core.stage import Stage, main

STAGE = Stage(name="shared", about="A toy.", sections=("seed",), out="out/result",
              beside={"curves": "curves"})

def body(run):
    Path(f"body_{ranks.rank()}").write_text(run.fingerprint)
    if ranks.rank() == 0:
        files.write_bytes(run.result, b"x")
        files.write_bytes(run.files_beside("curves") / "a.csv", b"1")

if __name__ == "__main__":
    raise SystemExit(main(STAGE, body, lambda run: {"seed": run.settings.seed}))
"""


def on_two_ranks(project: Path) -> list[tuple[int, str]]:
    """(code, stderr) of both ranks of the stage, without torchrun's own start."""
    path = os.pathsep.join([str(project), str(ROOT)])
    with socket.socket() as held:  # not listening: rank 0 may, and nobody else is given the port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "shared"],
                cwd=project,
                env={**os.environ, **common, "RANK": str(rank), "PYTHONPATH": path},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        texts = [process.communicate(timeout=HANG_S)[1] for process in processes]
    return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]


def test_ranks_share_a_stage_and_none_waits_when_it_is_finished(project):
    """Rank 0 alone locks and publishes; a finished run must not leave rank 1 at a rendezvous."""
    (project / "shared.py").write_text(STAGE)
    (project / "curves").mkdir()
    (project / "curves/other.json").write_text("{}")
    first = on_two_ranks(project)
    assert [code for code, _ in first] == [0, 0], first
    assert (project / "body_0").read_text() == (project / "body_1").read_text()
    assert (project / "out/result").read_bytes() == b"x"
    assert sorted(p.name for p in (project / "curves").iterdir()) == ["a.csv", "other.json"]
    for rank in (0, 1):
        (project / f"body_{rank}").unlink()
    (project / "curves/a.csv").unlink()
    (code, err), (other, silence) = on_two_ranks(project)
    assert (code, other, "published again" in err, silence) == (0, 0, True, ""), (err, silence)
    assert not (project / "body_0").exists() and not (project / "body_1").exists()
    assert (project / "curves/a.csv").read_bytes() == b"1"


SLOW = """
import time
store = ranks.store

class Slow:
    def __getattr__(self, name):
        return getattr(store(), name)

    def get(self, key):
        joined = store()  # rank 0 waits for that much by itself
        time.sleep(3)
        return joined.get(key)

if ranks.rank() == 1:
    ranks.store = Slow
"""


def test_a_rank_that_asks_late_still_hears_that_all_is_finished(project):
    """Rank 0 holds the store and has nothing to do: it once ended before the others had asked."""
    before, after = STAGE.split("def body")
    (project / "shared.py").write_text(before + SLOW + "\ndef body" + after)
    for _ in range(2):  # made, then finished before
        found = on_two_ranks(project)
        assert [code for code, _ in found] == [0, 0], found
