"""Every stage at a terminal: header, bar, summary; Ctrl-C is one line; logs hold no controls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults import toy
from tests.project import run_module
from tests.terminal import CTRL_C, drive, lines

pytestmark = pytest.mark.faults
# Every data stage, the training of every run, and one model's further stages.
NAMES = [n for n in toy.STEPS if not n.startswith(("evaluate_", "export_"))]
NAMES += ["evaluate_gpt", "export_gpt", "report"]
NO_LOOP = ("download", "export_gpt", "report")
# Bars at once, however short the work; `hold` stops after the header, for a key to be pressed.
SCRIPT = """
import runpy, sys, time
from lib.core import progress, stage
progress.DELAY_S, mode, announce = 0.0, sys.argv.pop(), stage._announce
def slowly(run, settings):
    announce(run, settings)
    time.sleep(60.0 if mode == "hold" and not run.stage.defer_stop else 0.0)
stage._announce = slowly
del sys.argv[0]
runpy.run_module("stages." + sys.argv[0], run_name="__main__")
"""


PREPARE = """
import sys
from pathlib import Path
from tests.faults import toy
toy.prepare(Path(sys.argv[1]), *sys.argv[2:])
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A project in which everything has been made, by a process of its own: toy forks."""
    folder = tmp_path_factory.mktemp("terminal")
    steps = [name for name in NAMES if name != "report"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PREPARE, str(folder), *steps]
    subprocess.run(words, cwd=ROOT, env=environment, check=True)
    return folder / "prepared"


def words_of(name: str) -> tuple[str, ...]:
    return ("report",) if name == "report" else toy.STEPS[name].words


def forget(project: Path, name: str) -> None:
    """The stage has never run here."""
    words = words_of(name)
    item = words[2] if len(words) > 2 else ""
    title = f"{words[0]}_{item}" if item else words[0]
    places = [f"data/work/{title}", f"checkpoints/*/work/{title}"]
    places += ["scratch/embeddings"] if name == "embed" else []
    for place in (found for pattern in places for found in project.glob(pattern)):
        shutil.rmtree(place)


@pytest.mark.parametrize("name", NAMES)
def test_header_bar_summary_and_ctrl_c(start, tmp_path, name):
    project = tmp_path / "p"
    shutil.copytree(start, project, symlinks=True)
    forget(project, name)
    words = [sys.executable, "-c", SCRIPT, *words_of(name)]
    code, text = drive([*words, "hold"], project, until=" -> ", keys=CTRL_C)
    shown = lines(text)
    assert code == 75, text
    assert shown[-1].startswith("interrupted") and "run the same command" in shown[-1], text
    assert sum("interrupted" in line for line in shown) == 1 and "Traceback" not in text
    code, text = drive([*words, "go"], project)
    shown = lines(text)
    assert code == 0, text
    assert " -> " in shown[0] and ", key " in shown[0], text
    assert " bytes in " in shown[-1] and shown[-1].split(": ")[-1], text
    assert ("%|" in text) == (name not in NO_LOOP), text
    assert not any("%|" in line for line in shown), "a bar leaves nothing behind"
    forget(project, name)
    done = run_module(project, f"stages.{words_of(name)[0]}", *words_of(name)[1:])
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and not {"\r", "\x1b"} & set(told), told
