"""Shared by all tests: where the real data lies, and a network that reaches the loopback only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HANG_S = 600  # a process that takes longer hangs: a bound for slow machines, not a speed
SHARED = Path(os.environ.get("KUMIKI_SHARED") or ROOT.parent / "shared")


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
