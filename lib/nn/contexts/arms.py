"""CVFP's controls: what its first phase has to be better than; the table in words (cvfp.md 14).

A control is another config of the same family, trained on equal tokens at equal rates. Letters: T
time, B rows, w token width, d context width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.nn.contexts.context import EPS, leaky_trace, shifts


def controls(config: Any) -> dict[str, Any]:
    """arm -> its Config."""
    base = replace(config, phase="predict", seed_defects=())
    frozen, end = replace(base, train_context=False), replace(base, train_context=True)
    return {
        "none": replace(frozen, given="none"),
        "previous_1": replace(frozen, given="previous", previous=1),
        "previous_3": replace(frozen, given="previous", previous=3),
        "untrained": frozen,
        "leaky": replace(frozen, given="leaky"),
        "phase1": frozen,
        "end_to_end": end,
        "phase1_end_to_end": end,
    }


def starts_from_weights(arm: str) -> bool:
    """Whether a control begins with the weights that the run itself began with."""
    return arm.startswith("phase1")


def given_width(config: Any) -> int:
    """Of each z that the token block reads."""
    instead = {"none": 0, "previous": config.previous * config.width, "leaky": config.d}
    return instead.get(config.given, config.d * (1 + config.get("history")))


def given_instead(
    config: Any, e: Tensor, keep: Tensor | None, state: Mapping[str, Any], R: Tensor | None
) -> tuple[list[Tensor], dict[str, Any]]:
    """z of an arm without a context block, one of (T, B, width), and the state that continues it.

    e (T, B, w), keep (T, B), 0 where a document begins; R (d, w): of the leaky trace.
    """
    B = e.shape[1]
    if config.given == "none":
        return [e[..., :0]], {}
    if config.given == "previous":
        last = state.get("tokens") or (e.new_zeros(B, config.width),) * config.previous
        earlier, after = shifts(e, keep, last)
        return [torch.cat(earlier, -1)], {"tokens": tuple(after)}
    assert R is not None, "only the leaky trace is left"
    z = leaky_trace(e, keep, state["c"] if state else e.new_zeros(B, config.d), R)
    return [F.layer_norm(z, z.shape[-1:], eps=EPS)], {"c": z[-1]}


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the table says of the first phase, in one sentence."""
    found = {row["arm"]: row for row in rows}
    mine, plain = found.get("phase1"), found.get("untrained")
    if mine is None or plain is None or mine["bpb"] is None or plain["bpb"] is None:
        return "Phase 1 is not decided: the arms phase1 and untrained have not both been scored"
    gain = plain["bpb"] - mine["bpb"]
    told = f"Phase 1 gains {gain:.4f} bpb over the untrained block"
    if mine["bpb_sd"] is None or plain["bpb_sd"] is None:
        return f"{told} (one seed): not decided"
    spread = ((mine["bpb_sd"] ** 2 + plain["bpb_sd"] ** 2) / 2) ** 0.5  # pooled
    word = "no difference" if abs(gain) <= 2 * spread else "helps" if gain > 0 else "hurts"
    return f"{told} (noise {spread:.4f}): {word}"
