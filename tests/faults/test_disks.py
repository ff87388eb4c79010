"""Real file systems that are full, read-only or failing (B1 to B5), and writers in C++ and Rust.

tmpfs in a mount namespace of its own; `strace` makes the Nth system call of a native writer fail.
Where the machine has no user namespaces or no strace the tests are skipped, with that reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.crash import tree
from tests.faults.native import WRITERS
from tests.faults.tally import tally
from tests.faults.toy import STEPS, skip

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
FULL = os.environ.get("KUMIKI_FAULTS_EVERY") == "1"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "KUMIKI_SCRATCH": "",
}  # fmt: skip
CALLS = (1, 2) if FULL else (1,)  # which of a writer's calls fails
TENTHS = (1, 5, 9) if FULL else (5,)
CHAIN = ["download", "extract", "bpe", "encode", "train_gpt", "evaluate_gpt", "export_gpt"]
CHOSEN = CHAIN if FULL else ["extract", "train_gpt"]
only_full = pytest.mark.skipif(not FULL, reason="every stage again: `make faults`")


def has_namespaces() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not shutil.which("unshare") or not has_namespaces(), reason="no user namespaces here"
)
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """step -> (the project before it, the project after it), each made once in fresh processes."""
    folder, made = tmp_path_factory.mktemp("projects"), {}
    writer = "from pathlib import Path; from tests.faults.toy import write_project as w; import sys"
    before = folder / "0"
    subprocess.run(
        [sys.executable, "-c", f"{writer}; w(Path(sys.argv[1]))", str(before)],
        cwd=ROOT, env=ENVIRONMENT, check=True,
    )  # fmt: skip
    for number, step in enumerate(CHAIN, start=1):
        after = folder / str(number)
        subprocess.run(["cp", "-a", str(before), str(after)], check=True)  # hard links stay
        found = subprocess.run(
            [sys.executable, "-m", f"stages.{STEPS[step].words[0]}", *STEPS[step].words[1:]],
            cwd=after, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        made[step], before = (before, after), after
    return made


def bytes_of(project: Path) -> int:
    """What the project takes on a tmpfs: whole pages of every file, however many names it has."""
    sizes = {p.lstat().st_ino: p.lstat().st_size for p in project.rglob("*") if p.is_file()}
    return sum(-(-size // 4096) * 4096 for size in sizes.values())


def kept(project: Path) -> dict[str, str]:
    return {n: h for n, h in tree(project, skip).items() if n.startswith(("data/", "checkp"))}


def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """A shell script with its own mounts; $PY is this interpreter."""
    environment = ENVIRONMENT | {"PY": sys.executable}
    command = ["unshare", "-rm", "sh", "-c", script, "sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


FULL_DISK = """
set -e
place=$1; before=$2; size=$3; after=$4; shift 4
mount -t tmpfs -o "$size" none "$place"
cp -a "$before/." "$place/"
cd "$place"
set +e
$PY -m "$@" > /dev/null 2> /dev/shm/kumiki-$$.err; code=$?
set -e
tail -n 1 /dev/shm/kumiki-$$.err; rm /dev/shm/kumiki-$$.err
mount -o remount,size=200m,nr_inodes=100k "$place"
$PY -m "$@" > /dev/null 2>&1
cp -a "$place/." "$after/"
echo "code $code"
"""


@needs_namespaces
@pytest.mark.parametrize("step", CHOSEN)
def test_b01_a_disk_that_fills_up_is_exit_4_and_never_a_signal(projects, tmp_path, step):
    before, whole = projects[step]
    words = [f"stages.{STEPS[step].words[0]}", *STEPS[step].words[1:]]
    start, end = bytes_of(before), bytes_of(whole)
    full = 0
    for tenth in TENTHS:
        size = (start + (end - start) * tenth // 10) // 1024 + 4
        place, after = tmp_path / f"disk{tenth}", tmp_path / f"after{tenth}"
        place.mkdir()
        after.mkdir()
        room = f"size={size}k"
        found = in_namespace(FULL_DISK, str(place), str(before), room, str(after), *words)
        assert found.returncode == 0, (tenth, found.stdout, found.stderr)
        said, code = found.stdout.splitlines()[-2:]
        assert code in ("code 0", "code 4"), (tenth, found.stdout)
        if code == "code 4":
            full += 1
            assert said.startswith("error: disk ") and "need" in said, said
        assert kept(after) == kept(whole), tenth
    assert full, "the disk was never full"
    tally("B1", f"tmpfs full in {step}", full, "exit 4 with the numbers; then equal bytes")


READ_ONLY = """
set -e
place=$1; before=$2; shift 2
mount -t tmpfs none "$place"
cp -a "$before/." "$place/"
mount -o remount,ro "$place"
cd "$place"
$PY -m "$@"
"""


@needs_namespaces
@pytest.mark.parametrize("step", CHOSEN)
def test_b04_a_read_only_project_is_exit_4_before_work(projects, tmp_path, step):
    words = [f"stages.{STEPS[step].words[0]}", *STEPS[step].words[1:]]
    found = in_namespace(READ_ONLY, str(tmp_path), str(projects[step][0]), *words)
    assert found.returncode == 4, found.stderr
    assert "error: read-only file system in" in found.stderr and "Traceback" not in found.stderr
    tally("B4", f"read-only disk in {step}", 1, "exit 4 before work")


@needs_strace
@pytest.mark.parametrize("writer", WRITERS if FULL else ["safetensors"])
def test_b03_native_writers_end_with_4_or_die_and_leave_no_final_name(tmp_path, writer):
    """The Nth call of the library itself fails, or kills: the final name is whole or absent."""
    whole = tmp_path / "whole"
    assert traced(whole, writer).returncode == 0
    expected = contents(whole)
    faults = [
        (call, f"error={error}", when)
        for call, error in (
            ("write", "ENOSPC"), ("pwrite64", "ENOSPC"), ("ftruncate", "ENOSPC"),
            ("fsync", "EIO"),
        )
        for when in CALLS
    ] + [(call, "signal=KILL", when) for call in ("rename,renameat,renameat2", "fsync")
         for when in CALLS]  # fmt: skip
    struck = 0
    for number, (calls, fault, when) in enumerate(faults):
        folder = tmp_path / str(number)
        found = traced(folder, writer, f"inject={calls}:{fault}:when={when}")
        if found.returncode == 0:
            continue  # the writer makes fewer of these calls
        struck += 1
        killed = found.returncode in (-9, 137)
        assert killed or found.returncode == 4, (calls, fault, when, found.stderr[-800:])
        left = {n: h for n, h in contents(folder).items() if ".part" not in n and ".tmp" not in n}
        assert left.items() <= expected.items(), (calls, fault, when)
        assert traced(folder, writer).returncode == 0, "the same command again"
        found_again = {n: h for n, h in contents(folder).items() if ".tmp" not in n}
        assert found_again == expected
    assert struck >= 3
    tally("B3", f"strace on {writer}", struck, "exit 4 or killed; whole or absent; then equal")


def traced(folder: Path, writer: str, inject: str | None = None) -> subprocess.CompletedProcess:
    """The writer under strace, which looks at calls on files below `folder` only."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.faults.native", writer, str(folder / "x")]
    if inject:
        paths = [
            folder,
            folder / "x",
            *(folder / f"x{end}" for end in (".part", "/spm.model.part")),
        ]
        only = [word for path in paths for word in ("-P", str(path))]
        command = ["strace", "-f", "-qq", "-o", "/dev/null", *only, "-e", inject, *command]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, str]:
    return tree(folder)


def test_b05_names_with_spaces_other_scripts_and_200_characters(projects, tmp_path):
    before, whole = projects["extract"]
    for name in ("with space", "木組み", "x" * 200, "quote'\"; $HOME"):
        project = tmp_path / name
        shutil.copytree(before, project, symlinks=True)
        found = subprocess.run(
            [sys.executable, "-m", "stages.extract_texts"], cwd=project, env=ENVIRONMENT,
            capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert kept(project) == kept(whole)
    tally("B5", "awkward names of the project folder", 4, "equal bytes")


@needs_namespaces
def test_b05_a_disk_without_inodes_is_exit_4_and_the_same_command_ends_well(projects, tmp_path):
    before, whole = projects["extract"]
    names = sum(1 for _ in before.rglob("*"))
    place, after = tmp_path / "disk", tmp_path / "after"
    place.mkdir()
    after.mkdir()
    room = f"size=200m,nr_inodes={names + 8}"
    words = ["stages.extract_texts"]
    found = in_namespace(FULL_DISK, str(place), str(before), room, str(after), *words)
    assert found.returncode == 0, (found.stdout, found.stderr)
    said, code = found.stdout.splitlines()[-2:]
    assert code == "code 4" and said.startswith("error: disk "), found.stdout
    assert kept(after) == kept(whole)
    tally("B5", "no inodes left", 1, "exit 4; then equal bytes")


def test_b05_too_few_descriptors_is_a_sentence(projects, tmp_path):
    before, _ = projects["extract"]
    seen = []
    for limit in (9, 12, 16, 24):
        project = tmp_path / str(limit)
        shutil.copytree(before, project, symlinks=True)
        found = subprocess.run(
            ["sh", "-c", f"ulimit -n {limit}; exec {sys.executable} -m stages.extract_texts"],
            cwd=project, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        seen.append(found.returncode)
        if found.returncode:
            assert found.returncode == 4 or not list(project.glob("data/documents")), found.stderr
    tally("B5", "descriptor limits", len(seen), f"exit codes {sorted(set(seen))}")


@only_full
@needs_namespaces
def test_a15_moved_and_copied_projects_and_an_older_clock_change_nothing(projects, tmp_path):
    """Nothing is keyed by time, path or host: all stages are up to date, none runs again."""
    project = tmp_path / "moved"
    shutil.copytree(projects["export_gpt"][1], project, symlinks=True)
    yesterday = 1_700_000_000
    for path in project.rglob("*"):
        os.utime(path, (yesterday, yesterday), follow_symlinks=False)
    elsewhere = ["unshare", "-ru", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]
    for step in CHAIN:
        words = STEPS[step].words
        found = subprocess.run(
            [*elsewhere, sys.executable, "-m", f"stages.{words[0]}", *words[1:]],
            cwd=project, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert "up to date" in found.stderr, (step, found.stderr)
    tally(
        "A15",
        "project copied elsewhere, clock set back, another host name",
        len(CHAIN),
        "every stage up to date",
    )


@only_full
def test_a13_finished_stages_touch_no_file(projects, tmp_path):
    project = tmp_path / "again"
    shutil.copytree(projects["export_gpt"][1], project, symlinks=True)
    for step in CHAIN:
        words = STEPS[step].words
        before = mtimes(project)
        found = subprocess.run(
            [sys.executable, "-m", f"stages.{words[0]}", *words[1:]],
            cwd=project, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        changed = {n for n, when in mtimes(project).items() if before.get(n) != when}
        assert not changed, (step, changed)
    tally("A13", "finished stages run again", len(CHAIN), "no file touched")


def mtimes(project: Path) -> dict[str, int]:
    """Of every file but locks, the stage's own log and stamps of hashes."""
    spared = (".lock", "stage.log", ".stamps.json")
    return {
        p.relative_to(project).as_posix(): p.stat().st_mtime_ns
        for p in project.rglob("*")
        if p.is_file() and not p.name.endswith(spared)
    }
