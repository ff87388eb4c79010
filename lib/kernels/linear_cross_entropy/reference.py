"""Softcapped linear cross-entropy, chunk by chunk: the specification of the operator.

    z = h w^T;  z <- c tanh(z / c) if c > 0;  loss_t = logsumexp(z_t) - z[t, y_t];  target -1: loss
    0 G = (softmax(z) - onehot(y)) (1 - (z / c)^2) upstream_t;  dh = G w;  dw = G^T h

n rows, d width, V vocabulary. Logits are fp32 in blocks of (chunk, V), never all (n, V): at V =
65,536 a row of 2,048 tokens would take 0.54 GB. Gradients are made in the pass that makes the loss,
while the block is there; recomputing them in backward would cost a fourth matmul of the same size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WHOLE_BYTES = 64 * 2**20  # on accelerators fp32 logits below this go in one chunk
# On CPUs a chunk of logits stays in cache: 0.84 of the time of one chunk at V 4,096, n 2,048.
CACHE_BYTES = 4 * 2**20
MIN_ROWS = 256  # below, adding up dw costs more than the cache saves: 0.85 of 64 rows at V 16,000
# Each dw of a chunk in half precision is widened before it is added: 0.83 of 256 rows there.
MIN_ROWS_HALF = 512


def chunk_rows(
    n: int, width: int, vocab_size: int, device: str = "cpu", *, half: bool = False
) -> int:
    """Rows per chunk. CPU: 4 MB of logits, 256 rows at least (512 for `half` precision operands).

    Else all rows below 64 MB of logits, and above it next_pow2(ceil(n / ceil(V / d))), a chunk
    about as large as h (arXiv 2410.10989, 3.2).
    """
    if device == "cpu":
        rows = max(1, CACHE_BYTES // (4 * vocab_size))
        return max(MIN_ROWS_HALF if half else MIN_ROWS, 1 << (rows.bit_length() - 1))
    if n * vocab_size * 4 <= WHOLE_BYTES:
        return max(1, n)
    share = -(-n // -(-vocab_size // width))
    return 1 << (share - 1).bit_length()


def sweep(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    *,
    vocab_size: int,
    softcap: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (n,) fp32; given `upstream` (n,) fp32, also d(sum upstream losses) by h and weight.

    h (n, d) in the compute dtype; weight (>= V, d), cast to it; targets (n,) int64. Without
    upstream both gradients are empty. dw is summed over chunks in weight's own dtype, whatever the
    compute dtype is.
    """
    w = weight[:vocab_size].to(h.dtype)
    losses = h.new_zeros(len(h), dtype=_wide(h))
    dh = torch.empty_like(h) if upstream is not None else h.new_empty(0)
    dw = torch.zeros_like(weight) if upstream is not None else weight.new_empty(0)
    for first in range(0, len(h), chunk):
        part = slice(first, first + chunk)
        tanh, z = _logits(h[part], w, softcap)
        valid = targets[part] >= 0
        chosen = targets[part].clamp(min=0)[:, None]
        log_p = z.log_softmax(-1)  # one fused pass: logsumexp makes two blocks of its own
        losses[part] = torch.where(valid, -log_p.gather(1, chosen).squeeze(1), 0)
        if upstream is None:
            continue
        G = log_p.exp_()  # probabilities, in the place of the logarithms
        G.scatter_add_(1, chosen, G.new_full(chosen.shape, -1.0))
        if tanh is not None:
            G.mul_(tanh.square_().neg_().add_(1))  # slope of the softcap
        G.mul_((upstream[part] * valid)[:, None])
        G = G.to(h.dtype)
        dh[part] = G @ w
        if G.dtype == dw.dtype:
            dw[:vocab_size].addmm_(G.mT, h[part])
        else:
            dw[:vocab_size] += matmul(G.mT, h[part], dw.dtype)
    return losses, dh, dw


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logits(h: Tensor, w: Tensor, softcap: float) -> tuple[Tensor | None, Tensor]:
    """(tanh(z / c) or None, softcapped logits), both (rows, V) and fp32."""
    z = matmul(h, w.mT, _wide(h))
    if softcap <= 0:
        return None, z
    tanh = z.div_(softcap).tanh_()
    return tanh, tanh * softcap


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in dtype; half operands keep their fp32 accumulator where the library lets them."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def plain(
    h: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, softcap: float = 0.0
) -> Tensor:
    """The definition by ordinary autograd, per row: what `sweep` is tested against."""
    z = (h @ weight[:vocab_size].mT).to(_wide(h))
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets, ignore_index=-1, reduction="none")
