"""What checks and benchmarks know about the dense linear cross-entropy."""

from __future__ import annotations

from lib.kernels.check import Case, Draw, Operator
from lib.kernels.linear_cross_entropy import linear_cross_entropy


def make(
    draw: Draw, n: int, d: int, V: int, softcap: float = 15.0, chunk: int = 0, ignored: int = 1,
    reduction: str = "mean",
) -> Case:  # fmt: skip
    """n rows of width d, V columns and 3 of padding; logits O(1); `ignored` targets are -1."""
    targets = draw.ids(n, below=V)
    targets[n - ignored :] = -1
    targets[:1] = V - 1  # the last column that counts
    tensors = {"h": draw.half(n, d), "weight": draw.half(V + 3, d, std=d**-0.5)}
    options = {"vocab_size": V, "softcap": softcap, "reduction": reduction}
    return Case({**tensors, "targets": targets}, {**options, "chunk": chunk or "auto"})


OPERATOR = Operator(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    make=make,
    small=(
        {"n": 17, "d": 24, "V": 31, "chunk": 8},
        {"n": 5, "d": 16, "V": 1_100, "softcap": 0, "reduction": "none"},
    ),
    production={"n": 8_192, "d": 2_048, "V": 50_304, "softcap": 0},
    compiled={"n": 8, "d": 64, "V": 8_192},
    bounds={"": (1e-5, 1.2e-2), "out0": (1e-6, 2e-3)},
)
