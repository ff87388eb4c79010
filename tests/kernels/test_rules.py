"""What kernel code may not contain (kernels.md 4.5): each line stands for a silent wrong number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "lib" / "kernels"
FORBIDDEN = (
    r"make_block_ptr", r"\.advance\(", r"libdevice", r"inline_asm", r"tl\.flip", r"tl\.histogram",
    r"device_assert", r"tl\.math\.tanh", r"atomic_", r"tl\.rand", r"triton\.autotune",
)  # fmt: skip


# A masked load with its arguments, brackets nested twice.
LOAD = r"tl\.load\((?:[^()]|\([^()]*\))*mask=(?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"


def offences(text: str) -> list[str]:
    found = [p for p in FORBIDDEN if re.search(p, text)]
    loads = re.findall(LOAD, text)
    return found + [f"masked load without other: {x}" for x in loads if "other=" not in x]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*triton.py")), ids=lambda p: p.parent.name)
def test_forbidden_constructs_do_not_occur(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line", ["tl.atomic_add(x, y)", "tl.load(x, mask=m)", "tl.math.tanh(z)", "x = tl.flip(y)"]
)
def test_the_rule_finds_an_offence(line):
    assert offences(line)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*triton.py")), ids=lambda p: p.parent.name)
def test_products_state_their_precision(path):
    text = path.read_text(encoding="utf-8")
    calls = re.findall(r"tl\.dot\(.*", text)
    stated = text.count('input_precision="ieee", out_dtype=ACC')
    assert len([c for c in calls if "`" not in c]) == stated
