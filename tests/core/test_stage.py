"""The stage frame around a toy stage, as a real process: codes, locks, signals, resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT, is_alive

PARAMS = """
profile: small
seed: 7
profiles:
  small: {}
"""

TOY = """
import sys, time
from pathlib import Path
from lib.core import files
from lib.core.errors import InputError
from lib.core.stage import Stage, main

STAGE = Stage(
    name="toy", about="A toy.", sections=("seed",), inputs={"source": "in.txt"}, out="out/result"
)

def body(run):
    run.log("begins")
    files.write_bytes(run.units / "one", b"1")
    mode = Path(run.inputs["source"]).read_text().strip()
    if mode != "pool":
        Path("running").touch()
    if mode == "sleep":
        time.sleep(60)
    if mode == "busy":
        while True:
            pass
    if mode == "bug":
        raise RuntimeError("oops")
    if mode == "full":
        raise OSError(28, "No space left on device", "x")
    if mode == "input":
        raise InputError("damaged", file="x", value="y", remedy="again")
    if mode == "pool":
        with run.pool() as pool_map:
            list(pool_map(work_on, [60, 60]))
    with files.atomic_folder(run.result) as part:
        files.write_json(part / "manifest.json", {"seed": run.settings.seed})
        files.write_bytes(part / "data", b"d" * 1000)

def work_on(seconds):
    Path("running").touch()
    time.sleep(seconds)

def identity(run):
    return {"seed": run.settings.seed, "source": run.inputs["source"].read_text()}

if __name__ == "__main__":
    raise SystemExit(main(STAGE, body, identity))
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "in.txt").write_text("ok")
    return tmp_path


def command(project: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "toy.py", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(project: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    process = command(project, *arguments, **environment)
    _, err = process.communicate(timeout=HANG_S)
    return process.returncode, err


def wait_for(path: Path) -> None:
    limit = time.monotonic() + HANG_S
    while not path.exists():
        assert time.monotonic() < limit, f"{path.name} never appeared"
        time.sleep(0.01)


def only_work(project: Path) -> Path:
    (work,) = (p for p in (project / "data/work/toy").iterdir() if p.is_dir())
    return work


def test_a_run_publishes_once_and_a_second_run_touches_nothing(project):
    """A13: a finished stage is a no-op; its output's mtime stays."""
    code, err = outcome(project)
    assert code == 0, err
    out = project / "out/result"
    assert json.loads((out / "manifest.json").read_text()) == {"seed": 7}
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    code, err = outcome(project)
    assert (code, "up to date" in err) == (0, True), err
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    work = only_work(project)
    assert not (work / "units").exists()
    assert json.loads((work / "receipt.json").read_text())["peak_memory_bytes"] > 0


def test_outputs_that_dvc_removed_are_published_again_without_work(project):
    outcome(project)
    import shutil

    shutil.rmtree(project / "out")
    code, err = outcome(project)
    assert code == 0 and "published again" in err and "begins" not in err
    assert (project / "out/result/data").read_bytes() == b"d" * 1000


def test_a_damaged_finished_result_is_made_again(project):
    """A flipped byte in the working state must never be published."""
    outcome(project)
    path = only_work(project) / "result/result/data"
    path.chmod(0o644)
    path.unlink()
    path.write_bytes(b"x" * 1000)
    code, err = outcome(project)
    assert code == 0 and "damaged" in err
    assert (project / "out/result/data").read_bytes() == b"d" * 1000


def test_changing_an_identity_parameter_and_back_recomputes_nothing(project):
    """E7: versions live side by side."""
    outcome(project)
    code, err = outcome(project, "--set", "seed=8")
    assert code == 0 and "begins" in err
    code, err = outcome(project)
    assert code == 0 and "begins" not in err
    assert json.loads((project / "out/result/manifest.json").read_text()) == {"seed": 7}


@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [
        ("bug", 1, "this is a bug in kumiki"),
        ("full", 4, "error: disk full in"),
        ("input", 3, "error: damaged in x: y; again"),
    ],
)
def test_each_failure_has_its_code_and_no_output(project, mode, code, words):
    (project / "in.txt").write_text(mode)
    found, err = outcome(project)
    assert (found, words in err) == (code, True), err
    assert ("Traceback" in err) == (code == 1)
    assert not (project / "out/result").exists()


def test_user_errors_are_one_line(project):
    """E6: a typo, a missing input and a bad argument: exit 2 before any work."""
    (project / "params.yaml").write_text(PARAMS.replace("seed: 7", "sede: 7"))
    code, err = outcome(project)
    assert code == 2 and "unknown key in params.yaml: sede; did you mean seed?" in err
    (project / "params.yaml").write_text(PARAMS)
    code, err = outcome(project, "--source", "nowhere")
    assert (code, err.count("\n")) == (2, 1) and "nowhere" in err
    code, err = outcome(project, "--sorce", "x")
    assert code == 2 and "unrecognized" in err
    code, err = outcome(project, "--set", "seed=8", DVC_STAGE="toy")
    assert code == 2 and "--set under dvc" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", ["sleep", "busy", "pool"])
def test_a10_a_first_signal_ends_with_75_and_leaves_no_process(project, mode, number):
    (project / "in.txt").write_text(mode)
    process = command(project)
    wait_for(project / "running")
    process.send_signal(number)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 75, err
    assert "run the same command to continue" in err
    assert not (project / "out/result").exists()
    (project / "in.txt").write_text("ok")
    assert outcome(project)[0] == 0


SLOW_END = """
import os, signal, sys, time
from lib.core import process
process.DROP_GRACE_S = 0.2
stop = process.StopRequest("interrupted")
try:
    with stop.installed():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except process.Interrupted:
    os.write(2, b"interrupted\\n")
    time.sleep(60)
"""


def test_a10_an_interruption_is_told_once_however_long_the_end_takes():
    """Where the end takes longer than the grace the watcher ends it; it said so a second time."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW_END], cwd=ROOT, capture_output=True, timeout=HANG_S
    )
    assert (done.returncode, done.stderr) == (75, b"interrupted\n")


def test_a11_a_stage_dies_with_its_parent(project):
    """Killing `dvc` alone must not leave a trainer behind: the death signal is the only notice."""
    (project / "in.txt").write_text("sleep")
    parent_code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, 'toy.py'])\n"
        "print(p.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(project / "running")
    parent.kill()
    parent.wait()
    limit = time.monotonic() + HANG_S
    while is_alive(child):
        assert time.monotonic() < limit, "an orphan is alive"
        time.sleep(0.02)


def test_a12_the_same_stage_twice_at_once_runs_once(project):
    (project / "in.txt").write_text("sleep")
    first = command(project)
    wait_for(project / "running")
    code, err = outcome(project)
    assert code == 4 and f"pid {first.pid}" in err and "busy" in err
    first.kill()
    first.wait()
    (project / "in.txt").write_text("ok")
    assert outcome(project)[0] == 0


def test_work_of_another_manifest_version_is_left_beside_and_begun_anew(project):
    """Manifests are refused with "run the stage again": the same folder would refuse for ever."""
    (project / "in.txt").write_text("input")
    toy = project / "toy.py"
    toy.write_text("from lib.core import artifact\nartifact.VERSION = 1\n" + TOY)
    assert outcome(project)[0] == 3
    before = only_work(project)
    toy.write_text(TOY)
    assert outcome(project)[0] == 3
    works = {p for p in before.parent.iterdir() if p.is_dir()}
    assert before in works and len(works) == 2


def test_changed_code_under_unfinished_work_needs_a_decision(project, monkeypatch, tmp_path):
    """pipeline.md 6: mixing units of two code versions would be silently wrong."""
    (project / "in.txt").write_text("input")
    assert outcome(project)[0] == 3
    state = only_work(project) / "state.json"
    state.write_text(json.dumps({"code": {"lib/data/clean.py": "0" * 16}}))
    code, err = outcome(project)
    assert code == 2 and "lib/data/clean.py" in err and "KUMIKI_CODE_CHANGE" in err
    assert outcome(project, KUMIKI_CODE_CHANGE="continue")[0] == 3
    state.write_text(json.dumps({"code": {"lib/data/clean.py": "0" * 16}}))
    assert outcome(project, KUMIKI_CODE_CHANGE="restart")[0] == 3
    assert json.loads(state.read_text())["code"] == {}
