"""One product with two epilogues: a, a^2 = relu(x W1^T) forward, dp = 2 a (dy W2) backward.

A program makes a (BM, BN) tile of the product in fp32; the activation is applied before it leaves
the registers: three passes over (n, F) forward (a and a^2 out, a^2 in), two backward. The remaining
products are the library's. 2 n d F FLOP each. Letters: n rows, K inner, F columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, dot, launch, name_of, rows_of
from lib.kernels.relu2_mlp.configs import CANDIDATES, TUNED


@triton.jit(do_not_specialize=["n"])
def product_kernel(
    x, w, a, out, n, F, K, x_row, w_k, w_col,
    BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """p = x w, x (n, K), w (K, F) by strides. Forward: a = relu(p), out = a^2, both (n, F).

    BACKWARD: out = 2 a p with a read. Grid ceil(n / BM) * ceil(F / BN), columns first: programs
    that run together share rows of x.
    """
    columns = tl.cdiv(F, BN)
    row = (tl.program_id(0) // columns).to(tl.int64) * BM + tl.arange(0, BM)
    col = (tl.program_id(0) % columns).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), ACC)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        xs = tl.load(
            x + row[:, None] * x_row + k[None, :],
            mask=(row < n)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        ws = tl.load(
            w + k.to(tl.int64)[:, None] * w_k + col[None, :] * w_col,
            mask=(k < K)[:, None] & (col < F)[None, :],
            other=0.0,
        )
        total += tl.dot(xs.to(DOT), ws.to(DOT), input_precision="ieee", out_dtype=ACC)
    place = row[:, None] * F + col[None, :]
    seen = (row < n)[:, None] & (col < F)[None, :]
    if BACKWARD:
        active = tl.load(a + place, mask=seen, other=0.0).to(ACC)
        total = 2.0 * active * total
    else:
        total = tl.where(total > 0.0, total, 0.0)
        tl.store(a + place, total.to(a.dtype.element_ty), mask=seen)
        total = total * total
    tl.store(out + place, total.to(out.dtype.element_ty), mask=seen)


def _product(x: Tensor, w: Tensor, a: Tensor, out: Tensor, *, backward: bool) -> None:
    """x (n, K), w (K, F) of any strides; a and out (n, F) contiguous."""
    (n, K), F = x.shape, w.shape[1]
    config = configs.pick(CANDIDATES, TUNED, "product", K, x.device, name_of(x.dtype))
    launch(
        product_kernel, (triton.cdiv(n, config["BM"]) * triton.cdiv(F, config["BN"]),), config,
        x=x, w=w, a=a, out=out, n=n, F=F, K=K, x_row=x.stride(0), w_k=w.stride(0),
        w_col=w.stride(1), BACKWARD=backward, ACC=acc(x), DOT=dot(x),
    )  # fmt: skip


@torch.library.custom_op("kumiki::relu2_mlp", mutates_args=())
def forward(x: Tensor, W1: Tensor, W2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., out), and a, a^2 (n, F) for the gradients; all of one dtype."""
    rows = rows_of(x)
    a, squared = (x.new_empty(len(rows), W1.shape[0]) for _ in range(2))
    _product(rows, W1.mT, a, squared, backward=False)
    return (squared @ W2.mT).view(*x.shape[:-1], W2.shape[0]), a, squared


@torch.library.custom_op("kumiki::relu2_mlp_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, W1: Tensor, W2: Tensor, a: Tensor, squared: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, W1, W2."""
    rows, ups, dp = rows_of(x), rows_of(dy), torch.empty_like(a)
    _product(ups, W2, a, dp, backward=True)
    return (dp @ W1).view(x.shape), dp.mT @ rows, ups.mT @ squared


@forward.register_fake
def _(x, W1, W2):
    a = x.new_empty(x.numel() // max(1, x.shape[-1]), W1.shape[0])
    return x.new_empty(*x.shape[:-1], W2.shape[0]), a, torch.empty_like(a)


@backward.register_fake
def _(dy, x, W1, W2, a, squared):
    return x.new_empty(x.shape), W1.new_empty(W1.shape), W2.new_empty(W2.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, dy, _da, _dsquared):
    return backward(dy, *ctx.saved_tensors)


forward.register_autograd(_backward, setup_context=_save)
