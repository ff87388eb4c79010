"""The epilogue of a context block, forward and backward; formulas in reference.py.

Forward: every program takes groups of ROWS rows, P-th by P-th; reads P, z and the id's table row,
writes z', mean and 1/deviation (4 n d e bytes), and one partial of each statistic. Backward makes
y again: with x = (y - mean) r and dx = dz' gamma, dy = r (dx - mean(dx) - x mean(dx x)) is dz and,
where P + table[ids] > 0, dP (6 n d e); dtable adds rows of dP by sorted id. No atomics.
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
from lib.kernels.scatter_triton import add_rows

PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def before_norm(P, z, table, ids, row, col, n, d, P_row, z_row, table_row, ACC: tl.constexpr):
    """y = z + relu(P + table[ids]) (ROWS, BD), which elements the relu passed, which exist."""
    seen = (row < n)[:, None] & (col < d)[None, :]
    token = tl.load(ids + row, mask=row < n, other=0)
    added = tl.load(P + row[:, None] * P_row + col[None, :], mask=seen, other=0.0).to(ACC)
    place = table + token[:, None] * table_row + col[None, :]
    added += tl.load(place, mask=seen, other=0.0).to(ACC)
    y = tl.load(z + row[:, None] * z_row + col[None, :], mask=seen, other=0.0).to(ACC)
    return y + tl.where(added > 0.0, added, 0.0), added > 0.0, seen


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    P, z, table, ids, gamma, beta, old, out, mean, rstd, close, sums, n, d, eps, tau,
    P_row, z_row, table_row, old_row,
    STATS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (n, d) contiguous, mean and rstd (n,); close (programs,), sums (programs, d)."""
    col = tl.arange(0, BD)
    scale = tl.load(gamma + col, mask=col < d, other=0.0).to(ACC)
    shift = tl.load(beta + col, mask=col < d, other=0.0).to(ACC)
    total = tl.zeros((BD,), ACC)
    still = tl.zeros((ROWS,), ACC)
    for group in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        y, _, seen = before_norm(P, z, table, ids, row, col, n, d, P_row, z_row, table_row, ACC)
        middle = tl.sum(y, axis=1) / d
        centred = tl.where(seen, y - middle[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / d + eps)
        new = centred * r[:, None] * scale[None, :] + shift[None, :]
        tl.store(out + row[:, None] * d + col[None, :], new.to(out.dtype.element_ty), mask=seen)
        tl.store(mean + row, middle, mask=row < n)
        tl.store(rstd + row, r, mask=row < n)
        if STATS:
            before = tl.load(old + row[:, None] * old_row + col[None, :], mask=seen, other=0.0)
            gap = tl.where(seen, new - before.to(ACC), 0.0)
            moved = tl.sum(gap * gap, axis=1) / d
            still += tl.where((row < n) & (moved < tau), 1.0, 0.0)
            total += tl.sum(tl.where(seen, new, 0.0), axis=0)
    if STATS:
        tl.store(close + tl.program_id(0), tl.sum(still, axis=0))
        tl.store(sums + tl.program_id(0).to(tl.int64) * d + col, total, mask=col < d)


@triton.jit(do_not_specialize=["n"])
def backward_kernel(
    up, P, z, table, ids, gamma, mean, rstd, dP, dz, dgamma, dbeta, n, d,
    up_row, P_row, z_row, table_row,
    ROWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dP, dz (n, d) contiguous; dgamma, dbeta (programs, d): each program's share."""
    col = tl.arange(0, BD)
    scale = tl.load(gamma + col, mask=col < d, other=0.0).to(ACC)
    g_total = tl.zeros((BD,), ACC)
    b_total = tl.zeros((BD,), ACC)
    for group in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        y, passed, seen = before_norm(
            P, z, table, ids, row, col, n, d, P_row, z_row, table_row, ACC
        )
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


def _common(P: Tensor, z: Tensor, table: Tensor, ids: Tensor, gamma: Tensor) -> dict:
    (n, d), (P, z, table) = z.shape, (unit(x) for x in (P, z, table))
    return {
        "P": P, "z": z, "table": table, "ids": ids.contiguous(), "gamma": gamma.contiguous(),
        "n": n, "d": d, "P_row": P.stride(0), "z_row": z.stride(0), "table_row": table.stride(0),
        "BD": triton.next_power_of_2(d), "ACC": acc(z),
    }  # fmt: skip


@torch.library.custom_op("kumiki::cvfp_epilogue", mutates_args=())
def forward(
    P: Tensor, z: Tensor, table: Tensor, ids: Tensor, gamma: Tensor, beta: Tensor,
    z_old: Tensor | None, tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """z', mean and rstd of rows, share of rows close to z_old, column sums (empty without it)."""
    (n, d), (config, programs), stats = z.shape, _grid(z), z_old is not None
    kind = {"dtype": wide(z), "device": z.device}
    out = torch.empty(n, d, dtype=z.dtype, device=z.device)
    mean, rstd = (torch.empty(n, **kind) for _ in range(2))
    close = torch.empty(programs if stats else 0, **kind)
    sums = torch.empty(programs if stats else 0, d, **kind)
    old = z if z_old is None else unit(z_old)
    launch(
        forward_kernel, (programs,), config, **_common(P, z, table, ids, gamma),
        beta=beta.contiguous(), old=old, out=out, mean=mean, rstd=rstd, close=close, sums=sums,
        eps=EPS, tau=tau, old_row=old.stride(0), STATS=stats,
    )  # fmt: skip
    return out, mean, rstd, close.sum() / max(n, 1), sums.sum(0)


@torch.library.custom_op("kumiki::cvfp_epilogue_backward", mutates_args=())
def backward(
    up: Tensor, P: Tensor, z: Tensor, table: Tensor, ids: Tensor, gamma: Tensor, mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of P, z, table, gamma, beta."""
    (n, d), (config, programs), up = z.shape, _grid(z), unit(up)
    dP = torch.empty(n, d, dtype=P.dtype, device=z.device)
    dz = torch.empty(n, d, dtype=z.dtype, device=z.device)
    kind = {"dtype": wide(z), "device": z.device}
    dgamma, dbeta = (torch.empty(programs, d, **kind) for _ in range(2))
    launch(
        backward_kernel, (programs,), config, **_common(P, z, table, ids, gamma),
        up=up, mean=mean, rstd=rstd, dP=dP, dz=dz, dgamma=dgamma, dbeta=dbeta,
        up_row=up.stride(0),
    )  # fmt: skip
    dtable = add_rows(dP, ids, len(table), table.dtype)
    return dP, dz, dtable, dgamma.sum(0).to(gamma.dtype), dbeta.sum(0).to(gamma.dtype)


@forward.register_fake
def _(P, z, table, ids, gamma, beta, z_old, tau):
    (n, d), kind = z.shape, wide(z)
    rows = [z.new_empty(n, dtype=kind) for _ in range(2)]
    return z.new_empty(n, d), *rows, z.new_empty((), dtype=kind), z.new_empty(d, dtype=kind)


@backward.register_fake
def _(up, P, z, table, ids, gamma, mean, rstd):
    return tuple(x.new_empty(x.shape) for x in (P, z, table, gamma, gamma))


def _save(ctx, inputs, output) -> None:
    P, z, table, ids, gamma, _, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(P, z, table, ids, gamma, *output[1:3])


def _backward(ctx, up, *_):
    dP, dz, dtable, dgamma, dbeta = backward(up, *ctx.saved_tensors)
    return dP, dz, dtable, None, dgamma, dbeta, None, None


forward.register_autograd(_backward, setup_context=_save)
