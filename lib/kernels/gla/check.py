"""What checks and benchmarks know about chunked linear attention."""

from __future__ import annotations

import torch

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.gla import gla


def make(draw: Draw, B: int, H: int, T: int, Dk: int, Dv: int = 0, decay: float = 0.1) -> Case:
    """Queries and keys of norm about 1, decays exp(-decay |normal|); Dv 0: as Dk."""
    q, k = (draw.half(B, H, T, Dk, std=Dk**-0.5) for _ in range(2))
    v, s0 = draw.half(B, H, T, Dv or Dk), draw.wide(B, H, Dk, Dv or Dk)
    with torch.no_grad():
        log_a = -decay * draw.wide(B, H, T).abs()
    return Case({"q": q, "k": k, "v": v, "log_a": log_a.requires_grad_(), "s0": s0})


OPERATOR = Operator(
    name="gla",
    function=gla,
    make=make,
    small=(
        {"B": 1, "H": 2, "T": 65, "Dk": 32, "Dv": 16},
        {"B": 2, "H": 1, "T": 130, "Dk": 32, "Dv": 32},
    ),
    production={"B": 8, "H": 16, "T": 4_096, "Dk": 64, "Dv": 128},
    compiled={"B": 1, "H": 2, "T": 256, "Dk": 64, "Dv": 128},
    bounds={"": (1e-5, 1e-2)},
    width="Dk",
)
