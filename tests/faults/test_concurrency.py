"""A10 to A12 with real processes: dvc killed alone, one stage started many times, no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT, is_alive
from tests.faults.tally import tally
from tests.faults.toy import write_project

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
FULL = os.environ.get("KUMIKI_FAULTS_EVERY") == "1"
TOY = """
import os, sys, time
from pathlib import Path
from lib.core import files, stage

def body(run):
    with Path("starts").open("a") as out:
        out.write(f"{os.getpid()}\\n")
    while Path("hold").exists():
        Path("beat").touch()
        if run.stop.asked:
            raise KeyboardInterrupt
        time.sleep(0.02)
    files.write_bytes(run.result, b"done")

STAGE = stage.Stage(name="toy", about="x", sections=(), inputs={}, out="out/result",
                    work="work")
if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, lambda run: {"x": 1}))
"""
DVC = """
stages:
  toy:
    cmd: exec python toy.py
    outs: [out/result]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git-less DVC project with one stage that runs until the file `hold` is gone."""
    write_project(tmp_path / "p")
    (tmp_path / "p/toy.py").write_text(TOY)
    (tmp_path / "p/dvc.yaml").write_text(DVC)
    (tmp_path / "p/hold").touch()
    return tmp_path / "p"


def environment(shell: str | None = None) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k != "SHELL"}
    own |= {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    return own | ({"SHELL": shell} if shell else {})


def start(project: Path, *command: str, shell: str | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=project, env=environment(shell), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def started(project: Path, count: int, limit_s: float = HANG_S) -> list[int]:
    """Process ids of the bodies that began, once there are `count`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        path = project / "starts"
        found = path.read_text().split() if path.exists() else []
        if len(found) >= count:
            return [int(pid) for pid in found]
        time.sleep(0.05)
    raise AssertionError("the stage did not begin")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/dash", None] if FULL else ["/bin/dash"])
def test_a11_a_killed_dvc_leaves_no_stage_behind(project, shell, number):
    """`exec` and the death signal: without either a trainer would write on as an orphan."""
    if shell and not Path(shell).exists():
        pytest.skip(f"{shell} is not installed")
    subprocess.run(["dvc", "init", "--no-scm", "-q"], cwd=project, env=environment(), check=True)
    dvc = start(project, "dvc", "repro", "-q", shell=shell)
    (pid,) = started(project, 1)
    dvc.send_signal(number)
    began = time.monotonic()
    while is_alive(pid) and time.monotonic() - began < HANG_S:
        time.sleep(0.02)
    assert not is_alive(pid), "an orphan writes on"
    dvc.kill()
    dvc.communicate()
    for lock in project.glob(".dvc/tmp/rwlock*"):
        lock.unlink()  # dvc's own, which it leaves where it was killed
    (project / "hold").unlink()
    again = start(project, "dvc", "repro", "-q", shell=shell)
    said, _ = again.communicate(timeout=HANG_S)
    assert again.returncode == 0, said
    assert (project / "out/result").read_bytes() == b"done"
    tally("A11", f"{number.name} of dvc alone", 1, "the stage is gone, the next repro ends well")


def test_control_without_the_death_signal_the_stage_lives_on(project):
    text = (project / "toy.py").read_text()
    lonely = text.replace("def body", "stage.die_with_parent = lambda: None\n\ndef body")
    (project / "toy.py").write_text(lonely)
    parent = start(
        project, sys.executable, "-c",
        "import subprocess, sys; subprocess.Popen([sys.executable, 'toy.py']).wait()",
    )  # fmt: skip
    (pid,) = started(project, 1)
    parent.kill()
    parent.wait()
    for _ in range(5):  # the first may have been on its way
        (project / "beat").unlink(missing_ok=True)
        while not (project / "beat").exists():
            assert is_alive(pid)
            time.sleep(0.02)
    (project / "hold").unlink()
    while is_alive(pid):
        time.sleep(0.02)


def test_a12_started_many_times_at_one_moment_exactly_one_runs(project):
    """The others end with 4 at once and name the holder; the lock goes with a killed holder."""
    times = 50 if FULL else 6
    first = start(project, sys.executable, "toy.py")
    (holder,) = started(project, 1)

    def try_once(_: int) -> tuple[int, str]:
        process = start(project, sys.executable, "toy.py")
        said, _err = process.communicate(timeout=HANG_S)
        return process.returncode, said

    with ThreadPoolExecutor(4) as pool:
        for code, said in pool.map(try_once, range(times)):
            assert code == 4 and f"pid {holder}" in said, said
    first.kill()
    first.wait()
    (project / "hold").unlink()
    assert try_once(0)[0] == 0
    assert len(started(project, 2)) == 2, "a second body ran beside the first"
    tally("A12", "the same stage started beside itself", times, "exit 4 with the holder's pid")
