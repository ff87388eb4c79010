"""Bits per byte by depth of thought: every exit of one model scored in one pass.

In:    a model, validation documents, their tokenizer.   Out: depth.csv, a row for each exit.
Note:  a family without exits has one row, its ordinary result; so curves and points of all runs
       share their axes. FLOPs are those of inference, relative to the depth that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.core import files
from lib.eval.bpb import Document, Measured, encode_checked, take_prefix
from lib.eval.scorer import Scorer, bits_per_byte, sum_rows

TEXT_BYTES = 500_000  # of validation text, first documents: twice the depth costs twice the time
COLUMNS = ("depth", "flops", "relative", "bpb")


@dataclass(kw_only=True)
class ExitScorer(Scorer):
    """A scorer that keeps the nats of every exit; what it returns are those of the last."""

    nats: list[list[float]] = field(default_factory=list)  # by exit, one number a window

    def _losses(self, tokens: Tensor, targets: Tensor) -> np.ndarray:
        device, found = torch.device(self.device), []
        with torch.no_grad(), torch.autocast(device.type, self.dtype, self.dtype != torch.float32):
            for logits in self.model.exit_logits(tokens.to(device)):  # type: ignore[attr-defined]  # Family
                z = logits[..., : self.rules.vocab_size].flatten(0, 1)
                z = z if z.dtype == torch.float64 else z.float()
                wanted = targets.to(device).flatten()
                losses = F.cross_entropy(z, wanted, ignore_index=-1, reduction="none")
                found.append(losses.view_as(targets).cpu().numpy())
        self.nats = self.nats or [[] for _ in found]
        for kept, losses in zip(self.nats, found, strict=True):
            kept += sum_rows(losses, targets.numpy(), self.token_bytes)[0].tolist()
        return found[-1]


def exit_bpb(scorer: ExitScorer, documents: Iterable[Document], tokenizer: Any) -> list[float]:
    """Bits per byte of the first documents at every exit of the scorer's model."""
    prefix = take_prefix(documents, TEXT_BYTES)
    ids = [encode_checked(document, tokenizer) for document in prefix]
    scorer(ids, [name for name, _ in prefix])
    total = sum(len(text.encode()) for _, text in prefix)
    # Without a boundary nothing stands before x_1: it costs ln V at any depth.
    free = 0.0 if scorer.rules.boundary_id is not None else math.log(scorer.rules.vocab_size)
    start = free * sum(len(one) > 0 for one in ids)
    return [bits_per_byte(math.fsum([start, *nats]), total) for nats in scorer.nats]


def write_depth(
    path: Path,
    measured: Measured,
    scorer: ExitScorer,
    documents: Iterable[Document],
    tokenizer: Any,
) -> None:
    """depth.csv of a model; a lossy tokenizer has no bits per byte, so that column stays empty."""
    model: Any = scorer.model
    flops = model.exit_flops(scorer.rules.context)
    if measured.bpb is None:
        told = [""] * len(flops)
    elif len(flops) == 1:
        told = [f"{measured.bpb:.10g}"]
    else:
        told = [f"{bpb:.10g}" for bpb in exit_bpb(scorer, documents, tokenizer)]
    trained = flops[min(model.trained_depth, len(flops)) - 1]
    rows = [
        f"{depth},{cost},{cost / trained:.6g},{bpb}"
        for depth, (cost, bpb) in enumerate(zip(flops, told, strict=True), 1)
    ]
    files.write_bytes(path, "\n".join([",".join(COLUMNS), *rows, ""]).encode())
