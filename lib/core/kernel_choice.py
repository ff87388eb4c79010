"""Which operators run as Triton kernels: what may be asked for, and what is missing to get it.

Torch-free, so that a wish that cannot be met ends a stage in its first second. The decision itself
(device, dtype, self-test) is lib.kernels'.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from lib.core.errors import UserError

Choice = Literal["auto", "triton", "reference"]
Choices = Choice | Mapping[str, str]  # one for all, or by operator with `default`
CHOICES = ("auto", "triton", "reference")
OPERATORS = (
    "rms_norm", "linear_cross_entropy", "tt_linear_cross_entropy", "relu2_mlp",
    "lorentz_attention", "scan", "gla", "tt_gather", "xxt", "cvfp_epilogue",
)  # fmt: skip
PIN = "3.7.1"  # of triton, the one that torch 2.13 was built with
OVERRIDE = "KUMIKI_KERNELS"  # environment: one choice for all operators, above runtime.kernels
REMEDY = "pip install -e '.[triton]', or kernels: reference"


def choice_of(choices: Choices, operator: str) -> str:
    """`auto`, `triton` or `reference` for one operator. UserError for another override."""
    override = os.environ.get(OVERRIDE)
    if override:
        if override not in CHOICES:
            raise UserError(
                "unknown kernel choice", file=OVERRIDE, value=override, remedy="auto or reference"
            )
        return override
    if isinstance(choices, str):
        return choices
    return choices.get(operator, choices.get("default", "auto"))


def interpreting() -> bool:
    """Whether Triton was told to run kernels on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing() -> str:
    """Why no kernel can run in this environment, whatever the device; empty where one might."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:
        found = "unknown"
    return "" if found.split("+")[0] == PIN else f"triton is {found}, pinned is {PIN}"


def require(choices: Choices, run: str) -> None:
    """UserError where `run` must train with kernels that are not installed, or interpreted ones."""
    if interpreting():
        raise UserError(
            f"kernels not available for {run}",
            value="TRITON_INTERPRET is 1, and interpreted kernels are for tests",
            remedy="unset TRITON_INTERPRET",
        )
    if any(choice_of(choices, name) == "triton" for name in OPERATORS) and (reason := missing()):
        raise unavailable(run, reason)


def unavailable(run: str, reason: str) -> UserError:
    """Triton was asked for and cannot be had."""
    value = f"runtime.kernels is triton, {reason}"
    return UserError(f"kernels not available for {run}", value=value, remedy=REMEDY)
