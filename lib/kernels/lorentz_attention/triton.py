"""Lorentz attention by tiles, forward and backward; formulas in reference.py (phase7.md 3.6).

Nothing of size (T, T) exists: scores are made again in backward from q, k and lse. Q and K come
from the same rounded values as q.k, in ACC: the difference Q K - 1 - c q.k cancels. Exponentials
are to base e, their arguments never positive. `dq` owns queries (dq, and each tile's part of dc and
dbeta), `dkv` owns keys: no atomics. Per visible pair 4 D FLOP forward, 14 D backward.
Letters: T length, D width, W window, BM queries and BN keys of a tile, z = batch x heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels import configs
from lib.kernels.launch import acc, dot, launch, name_of, unit, wide
from lib.kernels.lorentz_attention.configs import CANDIDATES, TUNED
from lib.kernels.lorentz_attention.reference import SERIES_BELOW


@triton.jit
def tile_of(x, row, T, stride, D: tl.constexpr):
    """Rows `row` of (T, D) in x's own dtype; zero beyond T."""
    place = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(place, mask=(row < T)[:, None], other=0.0)


@triton.jit
def arcosh(u, BELOW: tl.constexpr):
    """acosh(1 + u), and the root of u (u + 2) that it needs; a safe 1 where u is in the series."""
    root = tl.sqrt(tl.where(u < BELOW, 1.0, u * (u + 2.0)))
    return tl.log(1.0 + (u + root)), root


@triton.jit
def squared(u, BELOW: tl.constexpr):
    """a(u) = acosh(1 + u)^2."""
    distance, _ = arcosh(u, BELOW)
    near = u * (2.0 + u * (-0.3333333333333333 + u * (0.08888888888888889 - u / 35.0)))
    return tl.where(u < BELOW, near, distance * distance)


@triton.jit
def squared_slope(u, BELOW: tl.constexpr):
    """a'(u) = 2 acosh(1 + u) / sqrt(u (u + 2))."""
    distance, root = arcosh(u, BELOW)
    near = 2.0 + u * (-0.6666666666666666 + u * (0.26666666666666666 - u * (4.0 / 35.0)))
    return tl.where(u < BELOW, near, 2.0 * distance / root)


@triton.jit(do_not_specialize=["T", "W"])
def forward_kernel(
    q, k, v, c, beta, o, lse, T, W, H,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BELOW: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o (B, H, T, D) and lse (B, H, T), contiguous; grid (ceil(T / BM), B H)."""
    z = tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    curve, scale = tl.load(c + h).to(ACC), tl.load(beta + h).to(ACC)
    first = tl.program_id(0) * BM
    i = first + tl.arange(0, BM)
    qs = tile_of(q + b * q_b + h * q_h, i, T, q_t, D)
    q_wide = qs.to(ACC)
    Q = tl.sqrt(1.0 + curve * tl.sum(q_wide * q_wide, axis=1))
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    out = tl.zeros((BM, D), ACC)
    low = tl.maximum(first - W + 1, 0) // BN * BN
    for start in range(low, tl.minimum(first + BM, T), BN):
        j = start + tl.arange(0, BN)
        ks = tile_of(k + b * k_b + h * k_h, j, T, k_t, D)
        vs = tile_of(v + b * v_b + h * v_h, j, T, v_t, D)
        k_wide = ks.to(ACC)
        K = tl.sqrt(1.0 + curve * tl.sum(k_wide * k_wide, axis=1))
        qk = tl.dot(qs.to(DOT), tl.trans(ks.to(DOT)), input_precision="ieee", out_dtype=ACC)
        u = tl.maximum(Q[:, None] * K[None, :] - 1.0 - curve * qk, 0.0)
        age = i[:, None] - j[None, :]
        seen = (age >= 0) & (age < W) & (j < T)[None, :]
        s = tl.where(seen, -(scale / curve) * squared(u, BELOW), float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen no key yet: exp of -inf - -inf has no value.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(s - safe[:, None])
        faded = tl.exp(top - safe)
        total = total * faded + tl.sum(p, axis=1)
        out = out * faded[:, None]
        out += tl.dot(p.to(DOT), vs.to(DOT), input_precision="ieee", out_dtype=ACC)
        top = higher
    total = tl.where(total > 0.0, total, 1.0)  # rows beyond T
    out = out / total[:, None]
    place = z * T + i
    written = tl.where(i < T, place, 0)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(o + written, out.to(o.dtype.element_ty), mask=(i < T)[:, None])
    tl.store(lse + place, top + tl.log(total), mask=i < T)


@triton.jit(do_not_specialize=["T", "W"])
def dq_kernel(
    q, k, v, c, beta, lse, delta, do, dq, parts, T, W, H,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BELOW: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq (B, H, T, D) contiguous; parts (B H, tiles, 2): this tile's share of dc and dbeta.

    Grid (ceil(T / BM), B H). dq_i = c [sum_j G K_j q_i / Q_i - sum_j G k_j], G = dS ds/du.
    """
    z = tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    curve, scale = tl.load(c + h).to(ACC), tl.load(beta + h).to(ACC)
    first = tl.program_id(0) * BM
    i = first + tl.arange(0, BM)
    qs = tile_of(q + b * q_b + h * q_h, i, T, q_t, D)
    up = tile_of(do + b * do_b + h * do_h, i, T, do_t, D)
    q_wide = qs.to(ACC)
    q_squared = tl.sum(q_wide * q_wide, axis=1)
    Q = tl.sqrt(1.0 + curve * q_squared)
    norm = tl.load(lse + z * T + i, mask=i < T, other=0.0)
    mean = tl.load(delta + z * T + i, mask=i < T, other=0.0)
    gK = tl.zeros((BM,), ACC)
    gk = tl.zeros((BM, D), ACC)
    dc = tl.zeros((BM,), ACC)
    dS_s = tl.zeros((BM,), ACC)
    low = tl.maximum(first - W + 1, 0) // BN * BN
    for start in range(low, tl.minimum(first + BM, T), BN):
        j = start + tl.arange(0, BN)
        ks = tile_of(k + b * k_b + h * k_h, j, T, k_t, D)
        k_wide = ks.to(ACC)
        k_squared = tl.sum(k_wide * k_wide, axis=1)
        K = tl.sqrt(1.0 + curve * k_squared)
        qk = tl.dot(qs.to(DOT), tl.trans(ks.to(DOT)), input_precision="ieee", out_dtype=ACC)
        u = tl.maximum(Q[:, None] * K[None, :] - 1.0 - curve * qk, 0.0)
        age = i[:, None] - j[None, :]
        seen = (age >= 0) & (age < W) & (i < T)[:, None] & (j < T)[None, :]
        s = -(scale / curve) * squared(u, BELOW)
        p = tl.exp(tl.where(seen, s - norm[:, None], float("-inf")))
        vs = tile_of(v + b * v_b + h * v_h, j, T, v_t, D)
        dp = tl.dot(up.to(DOT), tl.trans(vs.to(DOT)), input_precision="ieee", out_dtype=ACC)
        dS = p * (dp - mean[:, None])
        G = dS * (-(scale / curve) * squared_slope(u, BELOW))
        gK += tl.sum(G * K[None, :], axis=1)
        gk += tl.dot(G.to(DOT), ks.to(DOT), input_precision="ieee", out_dtype=ACC)
        dS_s += tl.sum(dS * s, axis=1)
        halves = Q[:, None] * (k_squared / (2.0 * K))[None, :]
        dc += tl.sum(G * (halves - qk), axis=1)
    out = curve * ((gK / Q)[:, None] * q_wide - gk)
    written = (z * T + tl.where(i < T, i, 0))[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dq + written, out.to(dq.dtype.element_ty), mask=(i < T)[:, None])
    dc += gK * q_squared / (2.0 * Q)
    s_sum = tl.sum(dS_s, axis=0)
    place = parts + (z * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(place, tl.sum(dc, axis=0) - s_sum / curve)
    tl.store(place + 1, s_sum / scale)


@triton.jit(do_not_specialize=["T", "W"])
def dkv_kernel(
    q, k, v, c, beta, lse, delta, do, dk, dv, T, W, H,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BELOW: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk, dv (B, H, T, D) contiguous; grid (ceil(T / BN), B H); all tiles are transposed, (BN, BM).

    dk_j = c [sum_i G Q_i k_j / K_j - sum_i G q_i], dv = P^T dO.
    """
    z = tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    curve, scale = tl.load(c + h).to(ACC), tl.load(beta + h).to(ACC)
    first = tl.program_id(0) * BN
    j = first + tl.arange(0, BN)
    ks = tile_of(k + b * k_b + h * k_h, j, T, k_t, D)
    vs = tile_of(v + b * v_b + h * v_h, j, T, v_t, D)
    k_wide = ks.to(ACC)
    K = tl.sqrt(1.0 + curve * tl.sum(k_wide * k_wide, axis=1))
    gQ = tl.zeros((BN,), ACC)
    gq = tl.zeros((BN, D), ACC)
    out = tl.zeros((BN, D), ACC)
    for start in range(first // BM * BM, tl.minimum(first + BN + W, T), BM):
        i = start + tl.arange(0, BM)
        qs = tile_of(q + b * q_b + h * q_h, i, T, q_t, D)
        up = tile_of(do + b * do_b + h * do_h, i, T, do_t, D)
        q_wide = qs.to(ACC)
        Q = tl.sqrt(1.0 + curve * tl.sum(q_wide * q_wide, axis=1))
        norm = tl.load(lse + z * T + i, mask=i < T, other=0.0)
        mean = tl.load(delta + z * T + i, mask=i < T, other=0.0)
        kq = tl.dot(ks.to(DOT), tl.trans(qs.to(DOT)), input_precision="ieee", out_dtype=ACC)
        u = tl.maximum(K[:, None] * Q[None, :] - 1.0 - curve * kq, 0.0)
        age = i[None, :] - j[:, None]
        seen = (age >= 0) & (age < W) & (i < T)[None, :] & (j < T)[:, None]
        s = -(scale / curve) * squared(u, BELOW)
        p = tl.exp(tl.where(seen, s - norm[None, :], float("-inf")))
        out += tl.dot(p.to(DOT), up.to(DOT), input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(vs.to(DOT), tl.trans(up.to(DOT)), input_precision="ieee", out_dtype=ACC)
        G = p * (dp - mean[None, :]) * (-(scale / curve) * squared_slope(u, BELOW))
        gQ += tl.sum(G * Q[None, :], axis=1)
        gq += tl.dot(G.to(DOT), qs.to(DOT), input_precision="ieee", out_dtype=ACC)
    written = (z * T + tl.where(j < T, j, 0))[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dv + written, out.to(dv.dtype.element_ty), mask=(j < T)[:, None])
    pulled = curve * ((gQ / K)[:, None] * k_wide - gq)
    tl.store(dk + written, pulled.to(dk.dtype.element_ty), mask=(j < T)[:, None])


def _strides(**tensors: Tensor) -> dict[str, int]:
    """`q_b`, `q_h`, `q_t` of each tensor (B, H, T, D)."""
    return {f"{n}_{a}": x.stride(i) for n, x in tensors.items() for i, a in enumerate("bht")}


def _common(q: Tensor) -> dict:
    return {"D": q.shape[-1], "BELOW": SERIES_BELOW[wide(q)], "ACC": acc(q), "DOT": dot(q)}


def _config(kernel: str, q: Tensor) -> configs.Config:
    return configs.pick(CANDIDATES, TUNED, kernel, q.shape[-1], q.device, name_of(q.dtype))


@torch.library.custom_op("kumiki::lorentz_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, beta: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, T, D) -> o like them, contiguous, and lse (B, H, T) fp32."""
    (B, H, T, _), config = q.shape, _config("forward", q)
    q, k, v = unit(q), unit(k), unit(v)
    o = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=wide(q), device=q.device)
    launch(
        forward_kernel, (triton.cdiv(T, config["BM"]), B * H), config,
        q=q, k=k, v=v, c=c.contiguous(), beta=beta.contiguous(), o=o, lse=lse,
        T=T, W=min(window, T), H=H, **_strides(q=q, k=k, v=v), **_common(q),
    )  # fmt: skip
    return o, lse


@torch.library.custom_op("kumiki::lorentz_attention_backward", mutates_args=())
def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, c: Tensor, beta: Tensor, window: int, o: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, c, beta; the tiles' parts of dc and dbeta are added in order."""
    B, H, T, _ = q.shape
    q, k, v, do = unit(q), unit(k), unit(v), unit(do)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
    common = {
        "q": q, "k": k, "v": v, "c": c.contiguous(), "beta": beta.contiguous(), "lse": lse,
        "delta": delta, "do": do, "T": T, "W": min(window, T), "H": H,
        **_strides(q=q, k=k, v=v, do=do), **_common(q),
    }  # fmt: skip
    config = _config("dq", q)
    tiles = triton.cdiv(T, config["BM"])
    parts = torch.empty(B, H, tiles, 2, dtype=lse.dtype, device=q.device)
    launch(dq_kernel, (tiles, B * H), config, dq=dq, parts=parts, **common)
    config = _config("dkv", q)
    grid = (triton.cdiv(T, config["BN"]), B * H)
    launch(dkv_kernel, grid, config, dk=dk, dv=dv, **common)
    dc, dbeta = parts.sum((0, 2)).unbind(-1)
    return dq, dk, dv, dc.to(c.dtype, copy=True), dbeta.to(beta.dtype, copy=True)


@forward.register_fake
def _(q, k, v, c, beta, window):
    return v.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide(q))


@backward.register_fake
def _(do, q, k, v, c, beta, window, o, lse):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, c, beta))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, _dlse):
    q, k, v, c, beta, o, lse = ctx.saved_tensors
    return *backward(do, q, k, v, c, beta, ctx.window, o, lse), None


forward.register_autograd(_backward, setup_context=_save)
