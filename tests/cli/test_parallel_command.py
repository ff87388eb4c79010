"""Stages in worktrees: collected through the run-cache, one failure stops no other, Ctrl-C too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT
from tests.project import run_module

# Each stage says where it ran and refuses, or waits, as files beside the project tell it.
SCRIPT = """
import pathlib, sys, time
name, marks = sys.argv[1], pathlib.Path(sys.argv[2])
try:
    with (marks / "ran").open("a") as log:
        log.write(name + "\\n")
    if (marks / f"refuse_{name}").exists():
        sys.exit(4)
    while (marks / f"wait_{name}").exists():
        time.sleep(0.05)
except KeyboardInterrupt:
    (marks / "committed").touch()
    sys.exit(75)
pathlib.Path(f"{name}.txt").write_text(name)
"""
PARAMS = "profile: small\nseed: 7\nprofiles: {small: {}}\n"


@pytest.fixture
def project(tmp_path) -> Path:
    root, marks = tmp_path / "p", tmp_path / "marks"
    root.mkdir()
    marks.mkdir()
    (root / "make.py").write_text(SCRIPT)
    (root / "params.yaml").write_text(PARAMS)
    stages = ["stages:"]
    for name, dep in (("up", "make.py"), ("a", "up.txt"), ("b", "up.txt"), ("c", "a.txt")):
        stages += [f"  {name}:", f"    cmd: exec {sys.executable} make.py {name} '{marks}'",
                   f"    deps: [{dep}]", f"    outs: [{name}.txt]"]  # fmt: skip
    (root / "dvc.yaml").write_text("\n".join(stages) + "\n")
    (root / ".gitignore").write_text("/*.txt\n/.kumiki/\n/data/\n/checkpoints/\n/scratch/\n")
    (root / ".dvcignore").write_text("/.kumiki/\n")
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"],
                  ["git", "add", "-A"], ["git", "commit", "-qm", "x"]):  # fmt: skip
        subprocess.run(words, cwd=root, check=True, env={**os.environ, **WHO})
    return root


WHO = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@b", "DVC_NO_ANALYTICS": "1",
}  # fmt: skip


def ran(project: Path) -> list[str]:
    return sorted((project.parent / "marks/ran").read_text().split())


def test_two_stages_side_by_side_are_collected_and_nothing_runs_twice(project):
    done = run_module(project, "lib.cli.main", "parallel", "a", "b")
    told = done.stderr.decode()
    assert done.returncode == 0, told
    assert "shared upstream first: up" in told and "a | " in told and "b | " in told
    assert ran(project) == ["a", "b", "up"], "each stage ran once; the main tree took the cache"
    assert [(project / f"{n}.txt").read_text() for n in "ab"] == ["a", "b"]
    assert not list((project / ".kumiki/wt").iterdir()), "worktrees are gone"
    again = run_module(project, "lib.cli.main", "parallel", "a", "b", "--json")
    assert again.returncode == 0, again.stderr.decode()
    ended = json.loads(again.stdout)["stages"]
    assert ended == [{"stage": "a", "code": 0}, {"stage": "b", "code": 0}]
    assert ran(project) == ["a", "b", "up"]


def test_a_failure_stops_no_other_and_the_same_command_continues(project):
    (project.parent / "marks/refuse_b").touch()
    done = run_module(project, "lib.cli.main", "parallel", "a", "b")
    assert done.returncode == 4 and b"stages failed: b" in done.stderr
    assert done.stdout.split()[:4] == [b"stage", b"ended", b"a", b"done"]
    assert (project / "a.txt").is_file() and not (project / "b.txt").exists()
    (project.parent / "marks/refuse_b").unlink()
    done = run_module(project, "lib.cli.main", "parallel", "a", "b")
    assert done.returncode == 0, done.stderr.decode()
    assert ran(project).count("a") == 1 and (project / "b.txt").is_file()


def test_ctrl_c_reaches_the_stages_which_commit(project):
    (project.parent / "marks/wait_a").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.cli.main", "parallel", "a"], cwd=project,
        env={**os.environ, **WHO, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + HANG_S
    log = project.parent / "marks/ran"
    while "a" not in (log.read_text().split() if log.exists() else []):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 75, err.decode()
    assert (project.parent / "marks/committed").exists()
    assert err.decode().splitlines()[-1].endswith("run the same command to continue")


def test_a_stop_while_a_stage_begins_reaches_it_and_no_later_one_begins(monkeypatch):
    """Ctrl-C between the start of a process and the note of it once left that stage running."""
    from lib.cli.commands import parallel

    running, told = parallel.Running(), []
    stopper = threading.Thread(target=running.stop)

    class Begun:
        pid = 4711

        def __init__(self, words, **options) -> None:
            stopper.start()
            stopper.join(0.2)  # where it is not kept waiting it is over by now

    monkeypatch.setattr(parallel.subprocess, "Popen", Begun)
    monkeypatch.setattr(parallel.os, "killpg", lambda pid, number: told.append((pid, number)))
    assert running.start(["dvc"]) is not None
    stopper.join()
    assert told == [(4711, signal.SIGINT)]
    assert running.start(["dvc"]) is None


def test_targets_and_gpus_are_checked(project):
    done = run_module(project, "lib.cli.main", "parallel", "nobody")
    assert done.returncode == 2 and b"choose one of up, a, b, c" in done.stderr
    done = run_module(project, "lib.cli.main", "parallel", "a", "b", "--gpus", "0")
    assert done.returncode == 2 and b"--jobs 1" in done.stderr
    done = run_module(project, "lib.cli.main", "parallel", "a", "--jobs", "0")  # waited for ever
    assert done.returncode == 2 and b"use 1 or more" in done.stderr


def test_a_stage_below_another_runs_in_its_worktree(project, monkeypatch):
    from lib.cli.commands.parallel import targets

    monkeypatch.chdir(project)
    assert targets(["a", "c", "b"]) == (["c", "b"], ["up"])


def test_a_local_remote_brings_the_run_cache_to_another_clone(project):
    """pipeline.md 13: `dvc push --run-cache`, elsewhere pull and repro: nothing runs."""

    def dvc(folder: Path, *words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder,
                              capture_output=True, env={**os.environ, **WHO})  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()

    dvc(project, "repro", "-q")
    store = project.parent / "store"
    dvc(project, "remote", "add", "-d", "store", str(store))
    dvc(project, "push", "-q", "--run-cache")
    before = ran(project)
    for words in (["git", "add", "-A"], ["git", "commit", "-qm", "y"]):
        subprocess.run(words, cwd=project, check=True, env={**os.environ, **WHO})
    clone = project.parent / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(clone)], check=True)
    dvc(clone, "pull", "-q", "--run-cache")
    dvc(clone, "repro", "-q")
    assert ran(project) == before and (clone / "c.txt").read_text() == "c"
