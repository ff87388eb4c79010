"""Negative controls: kernels broken in one place each must fail the comparison and the self-test.

A control edits the source, so it also fails when its place is no longer there.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from lib import kernels
from lib.core.errors import EnvError
from lib.kernels.rms_norm import rms_norm
from tests.kernels.harness import DEVICE, F32, case_of, layer, worst

pytestmark = layer
_count = itertools.count()

MASK = "mask=seen, other=0.0).to(ACC)\n    rstd"
STORE_Y = "tl.store(y + row[:, None] * d + col[None, :], out.to(y.dtype.element_ty), mask=seen"
BROKEN = [
    # missing mask
    ("rms_norm", MASK, "mask=row[:, None] < n).to(ACC)\n    rstd"),
    (
        "lorentz_attention",
        "(age >= 0) & (age < W) & (j < T)[None, :]\n        s",
        "age >= 0\n        s",
    ),
    ("gla", "tl.where(i[:, None] >= i[None, :], g", "tl.where(i[:, None] >= 0, g"),
    # wrong tile bound
    ("lorentz_attention", "tl.minimum(first + BN + W, T), BM", "tl.minimum(first + W, T), BM"),
    ("relu2_mlp", "for first in range(0, K, BK)", "for first in range(0, K - BK, BK)"),
    ("scan", "for first in range(0, T, BT)", "for first in range(0, T - 1, BT)"),
    ("linear_cross_entropy", "range(0, vocab_size, BV)", "range(0, vocab_size - 40, BV)"),
    # unwritten tail
    ("rms_norm", STORE_Y, STORE_Y + " & (col < d - 1)[None, :]"),
    ("tt_gather", "(column < width)\n    tl.store(out", "(column < width - 1)\n    tl.store(out"),
    ("xxt", "tl.store(base + col[None, :] * n + row[:, None], out, mask=upper)", "pass"),
    # swapped or wrong gradient
    ("scan", "tl.store(db + place, delta", "tl.store(db + place, pulled"),
    ("cvfp_epilogue", "tl.where(passed, grad, 0.0)", "grad"),
    ("relu2_mlp", "total = 2.0 * active * total", "total = active * total"),
    ("tt_linear_cross_entropy", "(p - tl.where(col == target, 1.0, 0.0))", "p"),
    ("gla", "qs.to(ACC) * gq - ks.to(ACC) * gk", "qs.to(ACC) * gq"),
    # returns zeros
    ("lorentz_attention", "out = out / total[:, None]", "out = out * 0.0"),
    ("cvfp_epilogue", "new = centred * r[:, None] * scale[None, :]", "new = 0.0 * scale[None, :]"),
]
NAMES = [f"{control[0]}-{i}" for i, control in enumerate(BROKEN)]


def break_kernels(op: str, old: str, new: str, folder: Path, monkeypatch) -> None:
    """Put the kernels of an edited copy in the place of the real ones."""
    real, number = kernels.load(op), next(_count)
    text = Path(str(real.__file__)).read_text(encoding="utf-8")
    assert old in text, f"{op}: the control's place is gone: {old}"
    text = text.replace(old, new).replace("kumiki::", f"broken{number}::")
    path = folder / f"broken_{number}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, copy)
    spec.loader.exec_module(copy)
    for name in vars(real):
        if name.endswith("_kernel"):
            monkeypatch.setattr(real, name, getattr(copy, name))


@pytest.mark.parametrize(("op", "old", "new"), BROKEN, ids=NAMES)
def test_a_broken_kernel_is_found(op, old, new, tmp_path, monkeypatch):
    operator = kernels.operator(op)
    assert worst(op, case_of(op, F32), F32) <= 1, "whole, it passes"
    break_kernels(op, old, new, tmp_path, monkeypatch)
    assert max(worst(op, case_of(op, F32, sizes), F32) for sizes in operator.small) > 1
    found = kernels.selftest(op, torch.device(DEVICE), F32)
    assert not found.kernel
    assert "self-test is off by" in found.reason


def test_a_missing_gradient_is_found(monkeypatch):
    """None where a gradient belongs: autograd would train on without a word."""
    real = kernels.load("rms_norm")

    def forgetful(ctx, dy, _dr):
        x, weight, r = ctx.saved_tensors
        return real.backward(dy, x, weight, r)[0], None, None

    namespace = "forgetful"
    copy = torch.library.custom_op(f"{namespace}::rms_norm", real.forward._init_fn, mutates_args=())
    copy.register_autograd(forgetful, setup_context=real._save)
    monkeypatch.setattr(torch.ops.kumiki, "rms_norm", getattr(torch.ops, namespace).rms_norm)
    found = kernels.selftest("rms_norm", torch.device(DEVICE), F32)
    assert not found.kernel
    assert "no gradient for weight" in found.reason


def test_auto_falls_back_once_and_triton_exits_4(tmp_path, monkeypatch, capsys):
    break_kernels("rms_norm", "value * rstd[:, None]", "value", tmp_path, monkeypatch)
    device = torch.device(DEVICE)
    kernels.configure("auto", "a test", device)
    x = torch.randn(3, 5, device=device)
    for _ in range(2):
        assert torch.allclose(
            rms_norm(x, None, 1e-6).square().mean(-1), torch.ones(3, device=device)
        )
    assert capsys.readouterr().err.count("warning: kernel rms_norm is left out") == 1
    assert "reference (self-test is off" in kernels.news()
    kernels.configure("triton", "a test", device)
    with pytest.raises(EnvError, match="rms_norm is wrong") as caught:
        kernels.decide("rms_norm", device, F32)
    assert caught.value.code == 4
