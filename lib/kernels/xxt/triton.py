"""Y = alpha X X^T + beta A by the tiles on and above the diagonal, each stored twice.

Half the FLOP of a dense product, n^2 m. A diagonal tile stores its upper triangle and that
triangle's mirror image, so that Y = Y^T bit for bit. fp32 operands are multiplied as such (ieee).
Letters: X (b, n, m), BN the side of a tile, BK of the inner blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, dot, launch, name_of, unit
from lib.kernels.xxt.configs import CANDIDATES, TUNED


@triton.jit
def xxt_kernel(
    X, A, Y, n, m, alpha, beta, X_b, X_n, A_b, A_n,
    AFFINE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Y (b, n, n) contiguous; grid (tiles, tiles, b), of which those below the diagonal return."""
    if tl.program_id(0) <= tl.program_id(1):
        b = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        col = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
        total = tl.zeros((BN, BN), ACC)
        for first in range(0, m, BK):
            k = first + tl.arange(0, BK)
            left = tl.load(
                X + b * X_b + row[:, None] * X_n + k[None, :],
                mask=(row < n)[:, None] & (k < m)[None, :],
                other=0.0,
            )
            right = tl.load(
                X + b * X_b + col[None, :] * X_n + k[:, None],
                mask=(col < n)[None, :] & (k < m)[:, None],
                other=0.0,
            )
            total += tl.dot(left.to(DOT), right.to(DOT), input_precision="ieee", out_dtype=ACC)
        total = total * alpha
        upper = (row[:, None] <= col[None, :]) & (col < n)[None, :]
        if AFFINE:
            place = A + b * A_b + row[:, None] * A_n + col[None, :]
            total += beta * tl.load(place, mask=upper, other=0.0).to(ACC)
        out = total.to(Y.dtype.element_ty)
        base = Y + b * n * n
        tl.store(base + row[:, None] * n + col[None, :], out, mask=upper)
        tl.store(base + col[None, :] * n + row[:, None], out, mask=upper)


@torch.library.custom_op("kumiki::xxt", mutates_args=())
def forward(X: Tensor, alpha: float, beta: float, A: Tensor | None) -> Tensor:
    """X (b, n, m), A (b, n, n) or None -> (b, n, n) in X's dtype."""
    X, other = unit(X), unit(X if A is None else A)
    (b, n, m), Y = (
        X.shape,
        torch.empty(X.shape[0], X.shape[1], X.shape[1], dtype=X.dtype, device=X.device),
    )
    config = configs.pick(CANDIDATES, TUNED, "xxt", m, X.device, name_of(X.dtype))
    tiles = triton.cdiv(n, config["BN"])
    launch(
        xxt_kernel, (tiles, tiles, b), config,
        X=X, A=other, Y=Y, n=n, m=m, alpha=alpha, beta=beta, X_b=X.stride(0), X_n=X.stride(1),
        A_b=other.stride(0), A_n=other.stride(1), AFFINE=A is not None, ACC=acc(X), DOT=dot(X),
    )  # fmt: skip
    return Y


@forward.register_fake
def _(X, alpha, beta, A):
    return X.new_empty(X.shape[0], X.shape[1], X.shape[1])
