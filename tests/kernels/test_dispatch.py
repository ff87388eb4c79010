"""Kernel or reference: what is asked for, what is there, and what the process says about it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lib import kernels
from lib.core import kernel_choice
from lib.core.errors import EnvError, UserError
from lib.core.kernel_choice import OPERATORS, choice_of, require
from lib.kernels import Decision
from tests.kernels.conftest import wrong_order

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    kernel_choice.interpreting(), reason="what a process without the interpreter decides"
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("KUMIKI_KERNELS", raising=False)
    yield
    monkeypatch.undo()
    kernels.configure("auto", "this run", CPU)


def usable(monkeypatch, error: float = 0.1) -> list:
    """Pretend that kernels run here, and that their self-test finds `error` tolerances."""
    calls: list = []
    monkeypatch.setattr(kernels, "unusable", lambda device, dtype=None: "")

    def selftest(op, device, dtype, width=0):
        calls.append(op)
        reason = "" if error <= 1 else f"self-test is off by {error:.1e} times its tolerance"
        return Decision(op, not reason, reason, error, 1e-5)

    monkeypatch.setattr(kernels, "selftest", selftest)
    return calls


def test_the_operators_are_the_folders():
    from pathlib import Path

    folders = {p.parent.name for p in Path(kernels.__file__).parent.glob("*/reference.py")}
    assert folders == set(OPERATORS)
    for op in OPERATORS:
        names = {p.name for p in (Path(kernels.__file__).parent / op).glob("*.py")}
        assert names == {"__init__.py", "reference.py", "triton.py", "configs.py", "check.py"}, op


def test_importing_kernels_imports_neither_triton_nor_an_operator():
    code = (
        "import sys, lib.kernels\n"
        "assert 'triton' not in sys.modules\n"
        "import lib.models.gpt, lib.train.optim\n"
        "bad = [m for m in sys.modules if m.startswith('lib.') and m.endswith('.triton')]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": "."})


def test_choices_by_operator_and_the_kill_switch(monkeypatch):
    choices = {"default": "reference", "scan": "triton"}
    assert choice_of(choices, "scan") == "triton"
    assert choice_of(choices, "gla") == "reference"
    assert choice_of({"scan": "triton"}, "gla") == "auto"
    monkeypatch.setenv("KUMIKI_KERNELS", "reference")
    assert choice_of(choices, "scan") == "reference"
    monkeypatch.setenv("KUMIKI_KERNELS", "refrence")
    with pytest.raises(UserError, match="KUMIKI_KERNELS: refrence"):
        choice_of(choices, "scan")


def test_auto_on_a_cpu_is_the_reference_and_one_line():
    kernels.configure("auto", "a test", CPU)
    for op in ("rms_norm", "gla"):
        assert not kernels.decide(op, CPU, torch.float32)
    assert kernels.news().startswith("kernels: reference (")
    assert kernels.news() == ""
    assert kernels.stack(CPU) == "reference"


def test_triton_asked_for_and_unusable_is_a_users_error():
    for choices in ("triton", {"default": "auto", "scan": "triton"}):
        with pytest.raises(
            UserError, match=r"kernels not available for .*runtime.kernels is triton"
        ) as e:
            kernels.configure(choices, "pretrain phase7", CPU)
        assert e.value.code == 2
        assert str(e.value).endswith("pip install -e '.[triton]', or kernels: reference")
        assert "\n" not in str(e.value)


def test_without_triton_the_wish_ends_a_stage_before_torch(monkeypatch):
    """In a process of its own, with the package out of sight."""
    code = (
        "import sys\n"
        "from lib.core import kernel_choice\n"
        "from lib.core.errors import UserError\n"
        "kernel_choice.importlib.util.find_spec = lambda name: None\n"
        "try:\n    kernel_choice.require('triton', 'pretrain gpt')\n"
        "except UserError as error:\n    assert 'triton is not installed' in str(error), error\n"
        "else:\n    raise SystemExit('accepted')\n"
        "kernel_choice.require('auto', 'pretrain gpt')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": "."})


def test_another_version_is_not_the_pinned_one(monkeypatch):
    monkeypatch.setattr(kernel_choice.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernel_choice, "version", lambda name: "2.1.0")
    assert kernel_choice.missing() == "triton is 2.1.0, pinned is 3.7.1"


def test_training_with_interpreted_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET") as caught:
        require("auto", "pretrain gpt")
    assert caught.value.code == 2


def test_the_self_test_runs_once_per_key(monkeypatch):
    calls = usable(monkeypatch)
    kernels.configure("auto", "a test", CPU)
    for width in (32, 32, 64):
        assert kernels.decide("gla", CPU, torch.float32, "", width)
    assert calls == ["gla", "gla"]
    assert "gla=triton" in kernels.news()


def test_shapes_out_of_reach_are_named(monkeypatch):
    usable(monkeypatch)
    kernels.configure("auto", "a test", CPU)
    assert not kernels.decide("lorentz_attention", CPU, torch.float32, "head width 80", 80)
    assert kernels.decide("rms_norm", CPU, torch.float32)
    assert "lorentz_attention=reference(head width 80) rms_norm=triton" in kernels.news()
    kernels.configure("triton", "a test", CPU)
    with pytest.raises(UserError, match="head width 80"):
        kernels.decide("lorentz_attention", CPU, torch.float32, "head width 80", 80)


def test_a_failed_self_test_warns_once_or_exits_4(monkeypatch, capsys):
    usable(monkeypatch, error=7.0)
    kernels.configure("auto", "a test", CPU)
    for _ in range(2):
        assert not kernels.decide("scan", CPU, torch.float32)
    assert capsys.readouterr().err.count("off by 7.0e+00 times") == 1
    kernels.configure({"scan": "triton"}, "a test", CPU)
    with pytest.raises(EnvError, match="scan is wrong on this device") as caught:
        kernels.decide("scan", CPU, torch.float32)
    assert caught.value.code == 4


def test_a_decision_is_a_constant_of_a_compiled_graph(monkeypatch):
    from lib.kernels.rms_norm import rms_norm

    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, None, 1e-6), rms_norm(x, None, 1e-6))


def test_an_exported_copy_runs_on_references():
    """The file of the flat folder has another name, whatever device it meets."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("lib_kernels", Path(kernels.__file__))
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules["lib_kernels"] = copy
    try:
        spec.loader.exec_module(copy)
        assert copy.unusable(torch.device("cuda")) == "an exported copy"
    finally:
        del sys.modules["lib_kernels"]
    assert "import triton" not in Path(kernels.__file__).read_text(encoding="utf-8")


def test_runtime_kernels_is_checked_by_name_and_value():
    from lib.core.refusal import Refused
    from lib.core.run_settings import Runtime

    assert Runtime(kernels={"default": "auto", "scan": "reference"}).kernels["scan"] == "reference"
    for wrong in ({"scn": "auto"}, {"scan": "tritn"}):
        with pytest.raises(Refused, match=r"kernels\.sc"):
            Runtime(kernels=wrong)


def test_a_checkpoint_records_what_was_asked_and_what_ran(monkeypatch):
    from lib.train.state import stack_of

    kernels.configure("auto", "a test", CPU)
    assert stack_of(CPU, torch.float32)["kernels"] == "reference"
    usable(monkeypatch)
    monkeypatch.setattr(kernels, "_triton", lambda: type("T", (), {"__version__": "3.7.1"}))
    assert stack_of(CPU, torch.float32)["kernels"] == "auto, triton 3.7.1"
    kernels.configure({"scan": "reference"}, "a test", CPU)
    assert "scan=reference" in stack_of(CPU, torch.float32)["kernels"]
    assert not kernels.decide("scan", CPU, torch.float32)
    assert kernels.summary() == "reference (asked for)"


def test_report_has_a_row_for_every_operator():
    rows = kernels.report(CPU, torch.float32)
    assert [row.operator for row in rows] == list(OPERATORS)
    assert all(row.reason and not row.kernel for row in rows)


def test_the_conftest_refuses_a_wrong_order():
    class Loaded:
        class knobs:
            class runtime:
                interpret = False

    assert "make test-interpret" in wrong_order(True, {"triton": Loaded})
    assert wrong_order(False, {"triton": Loaded}) == ""
    assert wrong_order(True, {}) == ""
