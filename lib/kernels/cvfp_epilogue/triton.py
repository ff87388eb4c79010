"""The epilogue of a context block, forward and backward; formulas in reference.py.

Forward: every program takes groups of ROWS rows, P-th by P-th; reads P and z, writes z', mean and
1/deviation (3 n d e bytes). Backward makes y again: with x = (y - mean) r and dx = dz' gamma,
dy = r (dx - mean(dx) - x mean(dx x)) is dz and, where P > 0, dP (5 n d e). No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.cvfp_epilogue.configs import CANDIDATES, TUNED
from lib.kernels.cvfp_epilogue.reference import EPS
from lib.kernels.launch import acc, launch, name_of, processors, unit, wide

PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def before_norm(P, z, row, col, n, d, P_row, z_row, ACC: tl.constexpr):
    """y = z + relu(P) (ROWS, BD), which elements the relu passed, which exist."""
    seen = (row < n)[:, None] & (col < d)[None, :]
    added = tl.load(P + row[:, None] * P_row + col[None, :], mask=seen, other=0.0).to(ACC)
    y = tl.load(z + row[:, None] * z_row + col[None, :], mask=seen, other=0.0).to(ACC)
    return y + tl.where(added > 0.0, added, 0.0), added > 0.0, seen


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    P, z, gamma, beta, out, mean, rstd, n, d, eps, P_row, z_row,
    ROWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (n, d) contiguous, mean and rstd (n,)."""
    col = tl.arange(0, BD)
    scale = tl.load(gamma + col, mask=col < d, other=0.0).to(ACC)
    shift = tl.load(beta + col, mask=col < d, other=0.0).to(ACC)
    for group in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        y, _, seen = before_norm(P, z, row, col, n, d, P_row, z_row, ACC)
        middle = tl.sum(y, axis=1) / d
        centred = tl.where(seen, y - middle[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / d + eps)
        new = centred * r[:, None] * scale[None, :] + shift[None, :]
        tl.store(out + row[:, None] * d + col[None, :], new.to(out.dtype.element_ty), mask=seen)
        tl.store(mean + row, middle, mask=row < n)
        tl.store(rstd + row, r, mask=row < n)


@triton.jit(do_not_specialize=["n"])
def backward_kernel(
    up, P, z, gamma, mean, rstd, dP, dz, dgamma, dbeta, n, d, up_row, P_row, z_row,
    ROWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dP, dz (n, d) contiguous; dgamma, dbeta (programs, d): each program's share."""
    col = tl.arange(0, BD)
    scale = tl.load(gamma + col, mask=col < d, other=0.0).to(ACC)
    g_total = tl.zeros((BD,), ACC)
    b_total = tl.zeros((BD,), ACC)
    for group in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        y, passed, seen = before_norm(P, z, row, col, n, d, P_row, z_row, ACC)
        middle = tl.load(mean + row, mask=row < n, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=row < n, other=0.0)[:, None]
        unit = tl.where(seen, (y - middle) * r, 0.0)
        dy = tl.load(up + row[:, None] * up_row + col[None, :], mask=seen, other=0.0).to(ACC)
        pulled = dy * scale[None, :]
        first = tl.sum(pulled, axis=1) / d
        second = tl.sum(pulled * unit, axis=1) / d
        grad = r * (pulled - first[:, None] - unit * second[:, None])
        place = row[:, None] * d + col[None, :]
        tl.store(dz + place, grad.to(dz.dtype.element_ty), mask=seen)
        tl.store(dP + place, tl.where(passed, grad, 0.0).to(dP.dtype.element_ty), mask=seen)
        g_total += tl.sum(dy * unit, axis=0)
        b_total += tl.sum(dy, axis=0)
    place = tl.program_id(0).to(tl.int64) * d + col
    tl.store(dgamma + place, g_total, mask=col < d)
    tl.store(dbeta + place, b_total, mask=col < d)


def _grid(z: Tensor) -> tuple[configs.Config, int]:
    config = configs.pick(CANDIDATES, TUNED, "rows", z.shape[1], z.device, name_of(z.dtype))
    groups = triton.cdiv(len(z), config["ROWS"])
    return config, min(groups, PROGRAMS_PER_PROCESSOR * processors(z))


def _common(P: Tensor, z: Tensor, gamma: Tensor) -> dict:
    (n, d), (P, z) = z.shape, (unit(x) for x in (P, z))
    return {
        "P": P, "z": z, "gamma": gamma.contiguous(), "n": n, "d": d, "P_row": P.stride(0),
        "z_row": z.stride(0), "BD": triton.next_power_of_2(d), "ACC": acc(z),
    }  # fmt: skip


@torch.library.custom_op("kumiki::cvfp_epilogue", mutates_args=())
def forward(P: Tensor, z: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z', mean and rstd of rows."""
    (n, d), (config, programs) = z.shape, _grid(z)
    kind = {"dtype": wide(z), "device": z.device}
    out = torch.empty(n, d, dtype=z.dtype, device=z.device)
    mean, rstd = (torch.empty(n, **kind) for _ in range(2))
    launch(
        forward_kernel, (programs,), config, **_common(P, z, gamma), beta=beta.contiguous(),
        out=out, mean=mean, rstd=rstd, eps=EPS,
    )  # fmt: skip
    return out, mean, rstd


@torch.library.custom_op("kumiki::cvfp_epilogue_backward", mutates_args=())
def backward(
    up: Tensor, P: Tensor, z: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of P, z, gamma, beta."""
    (n, d), (config, programs), up = z.shape, _grid(z), unit(up)
    dP = torch.empty(n, d, dtype=P.dtype, device=z.device)
    dz = torch.empty(n, d, dtype=z.dtype, device=z.device)
    kind = {"dtype": wide(z), "device": z.device}
    dgamma, dbeta = (torch.empty(programs, d, **kind) for _ in range(2))
    launch(
        backward_kernel, (programs,), config, **_common(P, z, gamma), up=up, mean=mean,
        rstd=rstd, dP=dP, dz=dz, dgamma=dgamma, dbeta=dbeta, up_row=up.stride(0),
    )  # fmt: skip
    return dP, dz, dgamma.sum(0).to(gamma.dtype), dbeta.sum(0).to(gamma.dtype)


@forward.register_fake
def _(P, z, gamma, beta):
    return z.new_empty(z.shape), *(z.new_empty(len(z), dtype=wide(z)) for _ in range(2))


@backward.register_fake
def _(up, P, z, gamma, mean, rstd):
    return tuple(x.new_empty(x.shape) for x in (P, z, gamma, gamma))


def _save(ctx, inputs, output) -> None:
    P, z, gamma, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(P, z, gamma, *output[1:])


def _backward(ctx, up, *_):
    return backward(up, *ctx.saved_tensors)


forward.register_autograd(_backward, setup_context=_save)
