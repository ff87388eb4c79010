"""Memory that sweeps over a stream take, from sizes alone (cvfp.md 15.1); imports no torch."""

from __future__ import annotations

PROCESS_BYTES = 0.45e9  # Python, torch, buffers
FIRST_BLOCK = 131_072  # tokens that sweep 0 holds at once


def graph_bytes(depth: int, width: int, wide: int = 4, narrow: int = 4) -> int:
    """Of one token of a learning step: LN's inputs wide, two more in the matmul's type."""
    return depth * width * (wide + 2 * narrow)


def sweep_bytes(
    *,
    vocab_size: int,
    width: int,
    context_width: int,
    depth: int,
    chunk_tokens: int,
    memmap: bool,
    activation_bytes: int,
) -> float:
    """Peak resident bytes of Jacobi sweeps; the number of tokens has no part in it."""
    d = context_width
    params = depth * (d * (d + width) + 3 * d)
    ids = 0 if memmap else min(vocab_size, chunk_tokens)
    tables = ids * depth * d * 8  # values and gradients, fp32
    vectors = vocab_size * width * 4 * 2  # the model's and the source's
    chunk = 60 * chunk_tokens  # ids and their table rows, read ahead
    start = FIRST_BLOCK * d * 8  # the block that sweep 0 holds, and its copy
    graphs = chunk_tokens * graph_bytes(depth, d)
    graphs = graphs if graphs <= activation_bytes else 0
    return PROCESS_BYTES + 20 * params + tables + vectors + chunk + max(start, graphs)
