"""f on many rows at once: the map of one time step, its backward by hand (cvfp.md 2, 6, 15).

Rows pass all layers in blocks, which stay near the core (measured: 512 beats 128 and 2,048 at
d 768 in bf16). Backward keeps LN's inputs, wide, and relu's outputs and the layers' inputs in the
matmul's type: 8 bytes a channel and layer in bf16. Letters: n rows, d width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels.cvfp_epilogue import cvfp_epilogue
from lib.kernels.cvfp_epilogue import runs as epilogue_runs
from lib.nn.contexts.context import EPS, Weights, trajectory

BLOCK = 512  # rows
layer_norm = torch.ops.aten.native_layer_norm
layer_norm_backward = torch.ops.aten.native_layer_norm_backward
Kept = list[tuple[Tensor, Tensor, Tensor]]  # by layer: LN's input, mean, 1 / deviation


def one_step(c: Tensor, P: Sequence[Tensor], weights: Weights, *, owned: bool = False) -> Tensor:
    """f on every row: c (n, d), P: L of (n, d) -> (n, d). owned: as in `trajectory`."""
    if c.requires_grad:
        return trajectory(c, [p[None] for p in P], weights, owned=owned)[-1].squeeze(0)
    wide = torch.promote_types(c.dtype, weights.b[0].dtype)
    narrow = weights.narrow(P[0].dtype)
    flat = [*P, *weights.A, *weights.gain, *weights.offset]
    with torch.autocast(c.device.type, enabled=False):
        if not weights.gelu and epilogue_runs(P[0]):
            return _by_kernel(c.to(wide), P, weights)
        if torch.is_grad_enabled() and any(x.requires_grad for x in flat):
            return _OneStep.apply(c.to(wide), weights.gelu, owned, narrow, *flat)  # type: ignore[return-value]  # a tensor
        R = list(P) if owned else [torch.empty_like(p) for p in P]
        return _forward(c.to(wide), P, R, narrow, weights, None)[0]


def _by_kernel(z: Tensor, P: Sequence[Tensor], weights: Weights) -> Tensor:
    """The same, what follows each product fused: on a GPU, which has no use for blocks of rows."""
    for p, A, gain, offset in zip(P, weights.A, weights.gain, weights.offset, strict=True):
        z = cvfp_epilogue(torch.addmm(p, z.to(p.dtype), A.to(p.dtype).t()), z, gain, offset)
    return z


def step_rows(z: Tensor, P: Sequence[Tensor], narrow: Sequence[Tensor], weights: Weights) -> Tensor:
    """One block of `one_step` without a gradient; P is written over."""
    for layer, p in enumerate(P):
        z = _layer(z, z.to(p.dtype), p, p, layer, narrow, weights)[1][0]
    return z


def _layer(
    z: Tensor, zn: Tensor, p: Tensor, r: Tensor, layer: int, narrow: Sequence[Tensor], w: Weights
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(LN's input, (its output, mean, 1 / deviation)); r takes relu's output, or gelu's input."""
    torch.addmm(p, zn, narrow[layer].t(), out=r)
    y = plus(F.gelu(r) if w.gelu else r.relu_(), z)
    return y, layer_norm(y, (y.shape[-1],), w.gain[layer], w.offset[layer], EPS)


def _forward(
    c: Tensor,
    P: Sequence[Tensor],
    R: Sequence[Tensor],
    narrow: Sequence[Tensor],
    weights: Weights,
    inputs: Sequence[Tensor] | None,
) -> tuple[Tensor, list[Kept]]:
    """f(c), and by block what backward needs. inputs: L of (n, d) that take the layers' inputs."""
    out, blocks = torch.empty_like(c), []
    for start in range(0, len(c), BLOCK):
        rows, kept = slice(start, start + BLOCK), []
        z = c[rows]
        for layer, p in enumerate(P):
            zn = z.to(p.dtype) if inputs is None else inputs[layer][rows].copy_(z)
            y, (z, mean, rstd) = _layer(z, zn, p[rows], R[layer][rows], layer, narrow, weights)
            if inputs is not None:
                kept.append((y, mean, rstd))
        out[rows] = z
        blocks.append(kept)
    return out, blocks


class _OneStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c, gelu, owned, narrow, *flat):  # type: ignore[override]
        L = len(flat) // 4
        P, A, gain, offset = (flat[i * L : (i + 1) * L] for i in range(4))
        R = list(P) if owned else [torch.empty_like(p) for p in P]
        inputs = [torch.empty_like(p) for p in P]
        weights = Weights(A, (), (), gain, offset, gelu)
        out, ctx.blocks = _forward(c, P, R, narrow, weights, inputs)
        ctx.gelu, ctx.narrow, ctx.inputs, ctx.outputs = gelu, narrow, inputs, R
        ctx.save_for_backward(*gain, *offset)
        return out

    @staticmethod
    def backward(ctx, dc):  # type: ignore[override]
        L, (n, d), R = len(ctx.narrow), dc.shape, ctx.outputs
        gain, offset = ctx.saved_tensors[:L], ctx.saved_tensors[L:]
        dP = [torch.empty_like(r) for r in R]
        dgain, doffset = ([dc.new_zeros(d) for _ in range(L)] for _ in "ab")
        for start, kept in zip(range(0, n, BLOCK), ctx.blocks, strict=True):
            rows = slice(start, start + BLOCK)
            dz = dc[rows]
            for layer in reversed(range(L)):
                y, mean, rstd = kept[layer]
                dy, dg, do = layer_norm_backward(
                    dz, y, (d,), mean, rstd, gain[layer], offset[layer], [True, True, True]
                )
                dgain[layer] += dg
                doffset[layer] += do
                r, dh = R[layer][rows], dP[layer][rows]
                if ctx.gelu:
                    torch.ops.aten.gelu_backward.grad_input(dy.to(r.dtype), r, grad_input=dh)
                else:
                    torch.ops.aten.threshold_backward.grad_input(
                        dy.to(r.dtype), r, 0, grad_input=dh
                    )
                if layer:  # the input is detached: a third of the last matmuls falls away
                    dz = plus(dh @ ctx.narrow[layer], dy)
        dA = [(dp.t() @ z).to(dc.dtype) for dp, z in zip(dP, ctx.inputs, strict=True)]
        return (None, None, None, None, *dP, *dA, *dgain, *doffset)


def plus(narrow: Tensor, wide: Tensor) -> Tensor:
    """Their sum in the wide type; a mixed addition would convert into a tensor of its own first."""
    return narrow + wide if narrow.dtype == wide.dtype else narrow.to(wide.dtype).add_(wide)
