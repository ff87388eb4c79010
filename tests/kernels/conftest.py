"""Which layer runs: interpreted kernels, compiled ones, or references alone; and clean memory."""

from __future__ import annotations

import sys

import pytest

from lib.core.kernel_choice import interpreting, missing


def wrong_order(asked: bool, modules: dict) -> str:
    """Why the interpreter is not what the environment asks for; empty where it is."""
    triton = modules.get("triton")
    if triton is None or bool(triton.knobs.runtime.interpret) == asked:
        return ""
    return "triton was imported before TRITON_INTERPRET was set; use make test-interpret"


def pytest_configure() -> None:
    if reason := wrong_order(interpreting(), sys.modules):
        pytest.exit(reason, returncode=2)


@pytest.fixture(scope="session")
def triton_present() -> None:
    if reason := missing():
        pytest.skip(reason)
