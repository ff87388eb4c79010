"""Shared by all tests: where the real data lies, and a network that reaches the loopback only.

Rule:  neither the clock nor what ran before in this process decides what a test sees. Examples that
       are drawn are the same in every run; `--hypothesis-profile search` draws new ones.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

ROOT = Path(__file__).resolve().parents[1]
HANG_S = 600  # a process that takes longer hangs: a bound for slow machines, not a speed
SHARED = Path(os.environ.get("KUMIKI_SHARED") or ROOT.parent / "shared")

os.environ.setdefault("DVC_NO_ANALYTICS", "1")  # or every dvc leaves a process that asks a host

# A deadline an example, and a limit for drawing one, would measure the machine's load.
settings.register_profile(
    "search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("fixed", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("fixed")
if hasattr(providers, "_get_local_constants"):
    # Numbers and texts of whatever modules happen to be imported would be drawn, too.
    providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Modes of files, generators and torch's switches are the same before every test's fixtures.

    torch seeds itself from the system's noise; a run in this process leaves its threads and modes.
    """
    os.umask(0o022)
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)  # a forked child must not inherit a pool that is gone
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


def is_alive(pid: int) -> bool:
    """Whether the process runs; it may be gone between any two looks, so this is one."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def cpu_seconds(code: str) -> float:
    """What `python -c code` costs, user and system; for bounds as ratios to a peer's."""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, code
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and reference results; absent on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is absent: {SHARED.name}/ does not lie beside the project")
    return SHARED


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A fresh folder, in memory where there is one: thousands of trees and fsyncs cost seconds."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="kumiki-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the loopback is out of reach: a test that needs a host is a defect."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        loopback = str(host).startswith("127.") or host in ("::1", "localhost")
        if self.family != socket.AF_UNIX and not loopback:
            raise AssertionError(f"a test connects to {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
