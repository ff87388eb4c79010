"""Chunked linear attention: states of chunks, their recurrence, outputs; formulas in reference.py.

Forward: `chunk_state` makes what each chunk adds to the state, `state_scan` turns these in place
into the state before each chunk (fp32), `chunk_out` reads it. Backward mirrors them: the same
`chunk_state` on (q, dO), `state_scan` from the end, then `chunk_dv` and `chunk_dqk`; dlog_a is a
sum from the end (phase7.md 7.5). Programs are chunks x heads, not heads: enough at small batch.
FLOP: T B H (2 C (Dk + Dv) + 4 Dk Dv) forward, about 2.5 times that backward.
Letters: T length, N chunks of C steps, Dk, Dv widths, BV value columns of a program, z = B x H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.gla.configs import CANDIDATES, TUNED
from lib.kernels.gla.reference import CHUNK
from lib.kernels.launch import acc, dot, launch, name_of, unit, wide


@triton.jit
def rows(x, t, T, stride, col):
    """Columns `col` of rows t of (T, width) in x's own dtype; zero beyond T."""
    place = x + t.to(tl.int64)[:, None] * stride + col[None, :]
    return tl.load(place, mask=(t < T)[:, None], other=0.0)


@triton.jit
def decays(log_a, z, t, T, ACC: tl.constexpr):
    """g = cumsum(log a) within the chunk (C,), and its last value; padding decays nothing."""
    la = tl.load(log_a + z * T + t, mask=t < T, other=0.0).to(ACC)
    return tl.cumsum(la, axis=0), tl.sum(la, axis=0)


@triton.jit
def lower(g, C: tl.constexpr):
    """M_ij = exp(g_i - g_j) for i >= j, else 0: the mask stands before the exponential."""
    i = tl.arange(0, C)
    gap = tl.where(i[:, None] >= i[None, :], g[:, None] - g[None, :], float("-inf"))
    return tl.exp(gap)


@triton.jit
def state_tile(states, z, n, N, col, Dk: tl.constexpr, Dv: tl.constexpr):
    """Pointers to columns `col` of state n of head z, (Dk, columns)."""
    row = tl.arange(0, Dk)
    return states + (z * N + n) * Dk * Dv + row[:, None] * Dv + col[None, :]


@triton.jit(do_not_specialize=["T", "N"])
def chunk_state_kernel(
    x, y, log_a, states, ends, T, N, H, x_b, x_h, x_t, y_b, y_h, y_t,
    FROM_START: tl.constexpr, C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr,
    BV: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """states (B H, N, Dk, Dv) = (x w)^T y with w = e^g FROM_START, else e^(g_C - g).

    ends (B H, N): g_C. Grid (N, B H, Dv / BV).
    """
    n, z = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    t = tl.program_id(0) * C + tl.arange(0, C)
    col = tl.program_id(2) * BV + tl.arange(0, BV)
    g, end = decays(log_a, z, t, T, ACC)
    xs = rows(x + b * x_b + h * x_h, t, T, x_t, tl.arange(0, Dk)).to(ACC)
    ys = rows(y + b * y_b + h * y_h, t, T, y_t, col)
    weight = tl.exp(g) if FROM_START else tl.exp(end - g)
    scaled = tl.trans(xs * weight[:, None]).to(DOT)
    added = tl.dot(scaled, ys.to(DOT), input_precision="ieee", out_dtype=ACC)
    tl.store(state_tile(states, z, n, N, col, Dk, Dv), added)
    if tl.program_id(2) == 0:
        tl.store(ends + z * N + n, end)


@triton.jit(do_not_specialize=["N"])
def state_scan_kernel(
    states, ends, first, last, N,
    REVERSE: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place: what chunk n adds becomes the state before it (REVERSE: behind it).

    S <- e^(g_C) S + added, from first (B H, SIZE) to last; grid (B H, ceil(SIZE / BS)).
    """
    z = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BS + tl.arange(0, BS)
    seen = place < SIZE
    S = tl.load(first + z * SIZE + place, mask=seen, other=0.0).to(ACC)
    for step in range(0, N):
        n = tl.cast(N - 1 - step if REVERSE else step, tl.int64)
        here = states + (z * N + n) * SIZE + place
        added = tl.load(here, mask=seen, other=0.0)
        tl.store(here, S, mask=seen)
        S = tl.exp(tl.load(ends + z * N + n)) * S + added
    tl.store(last + z * SIZE + place, S, mask=seen)


@triton.jit(do_not_specialize=["T", "N"])
def chunk_out_kernel(
    q, k, v, log_a, before, o, T, N, H, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o (B, H, T, Dv) contiguous = ((q k^T) M) v + (q e^g) S; grid (N, B H, Dv / BV)."""
    n, z = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    t = tl.program_id(0) * C + tl.arange(0, C)
    col, key = tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, Dk)
    g, _ = decays(log_a, z, t, T, ACC)
    qs = rows(q + b * q_b + h * q_h, t, T, q_t, key)
    ks = rows(k + b * k_b + h * k_h, t, T, k_t, key)
    vs = rows(v + b * v_b + h * v_h, t, T, v_t, col)
    A = tl.dot(qs.to(DOT), tl.trans(ks.to(DOT)), input_precision="ieee", out_dtype=ACC)
    A = (A * lower(g, C)).to(DOT)
    out = tl.dot(A, vs.to(DOT), input_precision="ieee", out_dtype=ACC)
    S = tl.load(state_tile(before, z, n, N, col, Dk, Dv)).to(DOT)
    carried = (qs.to(ACC) * tl.exp(g)[:, None]).to(DOT)
    out += tl.dot(carried, S, input_precision="ieee", out_dtype=ACC)
    place = o + (z * T + t[:, None]) * Dv + col[None, :]
    tl.store(place, out.to(o.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["T", "N"])
def chunk_dv_kernel(
    q, k, do, log_a, later, dv, T, N, H, q_b, q_h, q_t, k_b, k_h, k_t, do_b, do_h, do_t,
    C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dv (B, H, T, Dv) contiguous = ((q k^T) M)^T dO + (k e^(g_C - g)) dS behind the chunk."""
    n, z = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    t = tl.program_id(0) * C + tl.arange(0, C)
    col, key = tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, Dk)
    g, end = decays(log_a, z, t, T, ACC)
    qs = rows(q + b * q_b + h * q_h, t, T, q_t, key)
    ks = rows(k + b * k_b + h * k_h, t, T, k_t, key)
    up = rows(do + b * do_b + h * do_h, t, T, do_t, col)
    A = tl.dot(qs.to(DOT), tl.trans(ks.to(DOT)), input_precision="ieee", out_dtype=ACC)
    A = tl.trans(A * lower(g, C)).to(DOT)
    out = tl.dot(A, up.to(DOT), input_precision="ieee", out_dtype=ACC)
    dS = tl.load(state_tile(later, z, n, N, col, Dk, Dv)).to(DOT)
    scaled = (ks.to(ACC) * tl.exp(end - g)[:, None]).to(DOT)
    out += tl.dot(scaled, dS, input_precision="ieee", out_dtype=ACC)
    place = dv + (z * T + t[:, None]) * Dv + col[None, :]
    tl.store(place, out.to(dv.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["T", "N"])
def chunk_dqk_kernel(
    q, k, v, do, log_a, before, later, dq, dk, each, T, N, H,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    C: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq, dk (B, H, T, Dk) contiguous; each (B H, T) = q.dq - k.dk before rounding; grid (N, B H).

    P = (dO v^T) M;  dq = P k + e^g dO S^T;  dk = P^T q + e^(g_C - g) v dS^T.
    """
    n, z = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    t = tl.program_id(0) * C + tl.arange(0, C)
    key = tl.arange(0, Dk)
    g, end = decays(log_a, z, t, T, ACC)
    P = tl.zeros((C, C), ACC)
    gq = tl.zeros((C, Dk), ACC)
    gk = tl.zeros((C, Dk), ACC)
    for first in range(0, Dv, BV):
        col = first + tl.arange(0, BV)
        up = rows(do + b * do_b + h * do_h, t, T, do_t, col).to(DOT)
        vs = rows(v + b * v_b + h * v_h, t, T, v_t, col).to(DOT)
        P += tl.dot(up, tl.trans(vs), input_precision="ieee", out_dtype=ACC)
        S = tl.load(state_tile(before, z, n, N, col, Dk, Dv)).to(DOT)
        gq += tl.dot(up, tl.trans(S), input_precision="ieee", out_dtype=ACC)
        dS = tl.load(state_tile(later, z, n, N, col, Dk, Dv)).to(DOT)
        gk += tl.dot(vs, tl.trans(dS), input_precision="ieee", out_dtype=ACC)
    P = P * lower(g, C)
    ks = rows(k + b * k_b + h * k_h, t, T, k_t, key)
    gq = gq * tl.exp(g)[:, None]
    gq += tl.dot(P.to(DOT), ks.to(DOT), input_precision="ieee", out_dtype=ACC)
    qs = rows(q + b * q_b + h * q_h, t, T, q_t, key)
    gk = gk * tl.exp(end - g)[:, None]
    gk += tl.dot(tl.trans(P).to(DOT), qs.to(DOT), input_precision="ieee", out_dtype=ACC)
    seen = (t < T)[:, None]
    place = (z * T + t[:, None]) * Dk + key[None, :]
    tl.store(dq + place, gq.to(dq.dtype.element_ty), mask=seen)
    tl.store(dk + place, gk.to(dk.dtype.element_ty), mask=seen)
    difference = tl.sum(qs.to(ACC) * gq - ks.to(ACC) * gk, axis=1)
    tl.store(each + z * T + t, difference, mask=t < T)


@triton.jit(do_not_specialize=["T"])
def reverse_sum_kernel(each, tail, out, T, BT: tl.constexpr, ACC: tl.constexpr):
    """out_t = tail + sum of each from t to T - 1, for every row; grid (rows,)."""
    z = tl.program_id(0).to(tl.int64)
    carry = tl.load(tail + z).to(ACC)
    tiles = tl.cdiv(T, BT)
    for step in range(0, tiles):
        t = (tiles - 1 - step) * BT + tl.arange(0, BT)
        value = tl.load(each + z * T + t, mask=t < T, other=0.0).to(ACC)
        tl.store(out + z * T + t, carry + tl.cumsum(value, axis=0, reverse=True), mask=t < T)
        carry += tl.sum(value, axis=0)


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{n}_{a}": x.stride(i) for n, x in tensors.items() for i, a in enumerate("bht")}


def _config(kernel: str, q: Tensor, width: int) -> configs.Config:
    return configs.pick(CANDIDATES, TUNED, kernel, width, q.device, name_of(q.dtype))


def _columns(config: configs.Config, Dv: int) -> configs.Config:
    """BV within Dv: a narrow head has one block of columns."""
    return configs.tile(config.warps, config.stages, BV=min(config["BV"], Dv))


def _states(
    x: Tensor, y: Tensor, log_a: Tensor, first: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States before (behind, if reverse) each chunk (B H, N, Dk, Dv), and the last one."""
    (B, H, T, Dk), Dv, kind = x.shape, y.shape[3], wide(x)
    N, C = triton.cdiv(T, CHUNK), CHUNK
    states = torch.empty(B * H, N, Dk, Dv, dtype=kind, device=x.device)
    ends = torch.empty(B * H, N, dtype=kind, device=x.device)
    last = torch.empty(B, H, Dk, Dv, dtype=kind, device=x.device)
    config = _columns(_config("chunk_state", x, Dk), Dv)
    launch(
        chunk_state_kernel, (N, B * H, Dv // config["BV"]), config,
        x=x, y=y, log_a=log_a, states=states, ends=ends, T=T, N=N, H=H, **_strides(x=x, y=y),
        FROM_START=reverse, C=C, Dk=Dk, Dv=Dv, ACC=acc(x), DOT=dot(x),
    )  # fmt: skip
    config = _config("state_scan", x, Dk * Dv)
    launch(
        state_scan_kernel, (B * H, triton.cdiv(Dk * Dv, config["BS"])), config,
        states=states, ends=ends, first=first.contiguous(), last=last, N=N,
        REVERSE=reverse, SIZE=Dk * Dv, ACC=acc(x),
    )  # fmt: skip
    return states, last


@torch.library.custom_op("kumiki::gla", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, H, T, Dv) in v's dtype, s_T (B, H, Dk, Dv) fp32, states before chunks (B H, N, ...)."""
    (B, H, T, Dk), Dv = q.shape, v.shape[3]
    q, k, v, log_a = unit(q), unit(k), unit(v), log_a.contiguous()
    before, last = _states(k, v, log_a, s0, reverse=False)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    config = _columns(_config("chunk_out", q, Dk), Dv)
    N = before.shape[1]
    launch(
        chunk_out_kernel, (N, B * H, Dv // config["BV"]), config,
        q=q, k=k, v=v, log_a=log_a, before=before, o=o, T=T, N=N, H=H, **_strides(q=q, k=k, v=v),
        C=CHUNK, Dk=Dk, Dv=Dv, ACC=acc(q), DOT=dot(q),
    )  # fmt: skip
    return o, last, before


@torch.library.custom_op("kumiki::gla_backward", mutates_args=())
def backward(
    do: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, last: Tensor,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_a, s0; dlast: of the last state."""
    (B, H, T, Dk), Dv, N = q.shape, v.shape[3], before.shape[1]
    do, q, k, v, log_a = unit(do), unit(q), unit(k), unit(v), log_a.contiguous()
    later, ds0 = _states(q, do, log_a, dlast, reverse=True)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    each = torch.empty(B, H, T, dtype=last.dtype, device=q.device)
    dlog_a = torch.empty(B, H, T, dtype=log_a.dtype, device=q.device)
    common = {
        "q": q, "k": k, "do": do, "log_a": log_a, "later": later, "T": T, "N": N, "H": H,
        **_strides(q=q, k=k, do=do), "C": CHUNK, "Dk": Dk, "Dv": Dv, "ACC": acc(q), "DOT": dot(q),
    }  # fmt: skip
    config = _columns(_config("chunk_dv", q, Dk), Dv)
    launch(chunk_dv_kernel, (N, B * H, Dv // config["BV"]), config, dv=dv, **common)
    config = _columns(_config("chunk_dqk", q, Dk), Dv)
    launch(
        chunk_dqk_kernel, (N, B * H), config,
        v=v, before=before, dq=dq, dk=dk, each=each, **_strides(v=v), **common,
    )  # fmt: skip
    tail = (dlast * last).sum((-2, -1))
    config = _config("reverse_sum", q, T)
    launch(reverse_sum_kernel, (B * H,), config, each=each, tail=tail, out=dlog_a, T=T, ACC=acc(q))
    return dq, dk, dv, dlog_a, ds0


@forward.register_fake
def _(q, k, v, log_a, s0):
    (B, H, T, Dk), Dv = q.shape, v.shape[3]
    states = s0.new_empty(B * H, (T + CHUNK - 1) // CHUNK, Dk, Dv, dtype=wide(q))
    return v.new_empty(v.shape), s0.new_empty(s0.shape, dtype=wide(q)), states


@backward.register_fake
def _(do, dlast, q, k, v, log_a, last, before):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_a, last))


def _save(ctx, inputs, output) -> None:
    q, k, v, log_a, _ = inputs
    ctx.save_for_backward(q, k, v, log_a, *output[1:])


def _backward(ctx, do, dlast, _dbefore):
    return backward(do, dlast, *ctx.saved_tensors)


forward.register_autograd(_backward, setup_context=_save)
