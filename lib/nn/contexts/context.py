"""Context vectors: the recurrence c_t = f(c_{t-1}, u_t), its trajectories and their gradient.

    z^0 = c_{t-1},  z^l = LN_l(z^{l-1} + relu(A_l z^{l-1} + B_l u_t + b_l)),  c_t = z^L  (cvfp.md 2)

`trajectory` steps over time with all rows in parallel; `one_step` is the map of a single step.
Its backward is written by hand: kept are the states (wide) and the rectified parts (compute dtype),
6 bytes a channel and layer in bf16.
Letters: T time, B rows, L layers, d width, e input width. State and LN are fp32 (fp64 stays fp64),
matmul inputs are in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5
WEIGHT_SCALE = 15.36  # variance times inputs of first weights: 0.1 at 1,536 inputs

Activation = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """LN(x + relu(W [z; u] + b)), the form of both blocks; x is z in one and u in the other."""

    def __init__(self, width: int, inputs: int, affine: bool = True, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype))
        self.norm = nn.LayerNorm(width, EPS, elementwise_affine=affine, dtype=dtype)


def initial(name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
    """First value of a parameter of `Layer`: weights N(0, 15.36 / inputs), biases N(0, 0.01^2)."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("norm.bias"):
        return torch.zeros(shape)
    std = math.sqrt(WEIGHT_SCALE / shape[1]) if len(shape) == 2 else 0.01
    return torch.empty(shape).normal_(0, std, generator=draw)


def matmul_dtype(like: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of `like` or fp32, whichever is wider."""
    kind = like.device.type
    if like.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(like.dtype, torch.float32)


@dataclass(frozen=True)
class Weights:
    """The layers of a context block as `trajectory` takes them; one entry a layer."""

    A: tuple[Tensor, ...]  # (d, d) of the state, wide
    B: tuple[Tensor, ...]  # (d, e) of the token
    b: tuple[Tensor, ...]  # (d,)
    gain: tuple[Tensor, ...]  # (d,); constants where LN has no affine
    offset: tuple[Tensor, ...]
    gelu: bool = False
    _narrow: dict[torch.dtype, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    def narrow(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A in `dtype`, converted once: these weights are those of one step."""
        if dtype not in self._narrow:
            self._narrow[dtype] = tuple(a.detach().to(dtype) for a in self.A)
        return self._narrow[dtype]

    @classmethod
    def of(cls, layers: nn.ModuleList, gelu: bool = False) -> Weights:
        """The weights of `Layer`s, half precision ones widened; views, so gradients arrive."""
        found: list[tuple[Tensor, ...]] = []
        for layer in layers:
            assert isinstance(layer, Layer)
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            W, b, d = layer.weight.to(wide), layer.bias.to(wide), len(layer.bias)
            gain, offset = torch.ones_like(b.detach()), torch.zeros_like(b.detach())
            if layer.norm.elementwise_affine:
                gain, offset = layer.norm.weight.to(wide), layer.norm.bias.to(wide)
            found.append((W[:, :d], W[:, d:], b, gain, offset))
        A, B, b, gain, offset = zip(*found, strict=True)
        return cls(A, B, b, gain, offset, gelu)

    def apart(self) -> tuple[Weights, Callable[[], Tensor]]:
        """Leaves of the same values, and what hands their gradients on once, at a step's end.

        Otherwise every micro-batch would carry its gradient through the views that cut A out of W:
        a twentieth of the step's time.
        """
        groups = (self.A, self.B, self.b, self.gain, self.offset)
        whole = [x for group in groups for x in group]
        leaves = [x.detach().contiguous().requires_grad_(x.requires_grad) for x in whole]
        cut = [tuple(leaves[i : i + len(self.A)]) for i in range(0, len(leaves), len(self.A))]

        def hand_on() -> Tensor:
            pairs = zip(whole, leaves, strict=True)
            return deliver([(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None])

        return Weights(cut[0], cut[1], cut[2], cut[3], cut[4], self.gelu), hand_on

    def token_side(self, u: Tensor) -> list[Tensor]:
        """P_l = B_l u + b_l in the compute dtype; u (..., e) -> L of (..., d)."""
        dtype = matmul_dtype(self.b[0])
        u = u.to(dtype)
        return [F.linear(u, B.to(dtype), b.to(dtype)) for B, b in zip(self.B, self.b, strict=True)]


# ---------------------------------------------------------------- stepping


def trajectory(
    c0: Tensor,
    P: Sequence[Tensor],
    weights: Weights,
    keep: Tensor | None = None,
    *,
    owned: bool = False,
) -> list[Tensor]:
    """z^1 .. z^L of all T steps, each (T, B, d) wide; the last one is c.

    c0 (B, d); P: L of (T, B, d), `token_side`; keep (T, B), 0 where the state is reset before the
    step. Differentiable in c0, P and the weights. owned: P is the caller's no more, its memory
    may be written over.
    """
    wide = torch.promote_types(c0.dtype, weights.b[0].dtype)
    mask = None if keep is None else keep.to(wide).unsqueeze(-1)
    flat = [*P, *weights.A, *weights.gain, *weights.offset]
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (c0, *flat))
    with torch.autocast(c0.device.type, enabled=False):
        if needs:
            narrow = weights.narrow(P[0].dtype)
            made = _Trajectory.apply(c0.to(wide), mask, weights.gelu, owned, narrow, *flat)
            return list(made)  # type: ignore[arg-type]  # a tuple
        R = list(P) if owned else [P[0].new_empty(1, *P[0].shape[1:]) for _ in P]
        narrow = weights.narrow(P[0].dtype)
        return _step_through(c0.to(wide), mask, weights.gelu, narrow, _four(flat), R)[0]


def _four(flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    L = len(flat) // 4
    return [flat[i * L : (i + 1) * L] for i in range(4)]


def _step_through(
    c0: Tensor,
    keep: Tensor | None,
    gelu: bool,
    narrow: Sequence[Tensor],
    four: list[Sequence[Tensor]],
    R: list[Tensor],
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Z of `trajectory` and LN's statistics. R: where relu's output (gelu's input) goes, L of

    (T, B, d), P itself where nobody needs it; or of (1, B, d), written over at every step.
    """
    P, _, gain, offset = four
    T, B, d = P[0].shape
    L, dtype = len(P), P[0].dtype
    Z = [c0.new_empty(T, B, d) for _ in range(L)]
    stats = [(c0.new_empty(T, B, 1), c0.new_empty(T, B, 1)) for _ in range(L)]
    transposed = [a.t() for a in narrow]
    z = c0
    for t in range(T):
        if keep is not None:
            z = z * keep[t]
        for layer in range(L):
            r = R[layer][t if len(R[layer]) == T else 0]
            torch.addmm(P[layer][t], z.to(dtype), transposed[layer], out=r)
            grown = F.gelu(r) if gelu else r.relu_()  # gelu keeps its input for backward
            y = z + grown
            mean, rstd = stats[layer][0][t], stats[layer][1][t]
            z = Z[layer][t]
            torch.ops.aten.native_layer_norm.out(
                y, (d,), gain[layer], offset[layer], EPS, out0=z, out1=mean, out2=rstd
            )
    return Z, stats


class _Trajectory(torch.autograd.Function):
    """The steps above with backpropagation through time."""

    @staticmethod
    def forward(ctx, c0, keep, gelu, owned, narrow, *flat):  # type: ignore[override]
        P = flat[: len(flat) // 4]
        R = list(P) if owned else [torch.empty_like(p) for p in P]
        Z, stats = _step_through(c0, keep, gelu, narrow, _four(flat), R)
        L = len(Z)
        ctx.gelu, ctx.has_keep, ctx.narrow = gelu, keep is not None, narrow
        ctx.save_for_backward(
            c0, keep if keep is not None else c0.new_empty(0), *Z, *R,
            *(s for pair in stats for s in pair), *flat[L:],
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return tuple(Z)

    @staticmethod
    def backward(ctx, *dZ):  # type: ignore[override]
        c0, keep, *rest = ctx.saved_tensors
        L = len(dZ)
        Z, R = rest[:L], rest[L : 2 * L]
        flat_stats, (_, gain, offset) = rest[2 * L : 4 * L], _thirds(rest[4 * L :])
        keep = keep if ctx.has_keep else None
        T, _, d = Z[0].shape
        dtype, wide = R[0].dtype, c0.dtype
        narrow = ctx.narrow
        dP = [torch.empty_like(r) for r in R]
        dgain, doffset = ([torch.zeros(d, dtype=wide, device=c0.device) for _ in Z] for _ in "ab")
        c_before = c0 if T == 1 else torch.cat((c0[None], Z[-1][:-1]))
        first = c_before.view(T, *c0.shape) if T == 1 else c_before
        first = first if keep is None else first * keep
        inputs = [first, *Z[:-1]]
        dc: Tensor | None = None
        for t in reversed(range(T)):
            dz = _plus(dc, None if dZ[-1] is None else dZ[-1][t])
            if dz is None:
                dz = torch.zeros_like(c0)
            for layer in reversed(range(L)):
                z, r = inputs[layer][t], R[layer][t]
                y = z + (F.gelu(r) if ctx.gelu else r)
                mean, rstd = flat_stats[2 * layer][t], flat_stats[2 * layer + 1][t]
                dy, dg, do = torch.ops.aten.native_layer_norm_backward(
                    dz, y, (d,), mean, rstd, gain[layer], offset[layer], [True, True, True]
                )
                dgain[layer] += dg
                doffset[layer] += do
                dh, slope = dP[layer][t], dy.to(dtype)
                if ctx.gelu:
                    torch.ops.aten.gelu_backward.grad_input(slope, r, grad_input=dh)
                else:
                    torch.ops.aten.threshold_backward.grad_input(slope, r, 0, grad_input=dh)
                if layer == 0 and t == 0 and not ctx.needs_input_grad[0]:
                    break  # the input is detached: a third of the last matmuls falls away
                dz = (
                    dy + dh @ narrow[layer] if dtype != wide else torch.addmm(dy, dh, narrow[layer])
                )
                if layer:
                    dz = _plus(dz, None if dZ[layer - 1] is None else dZ[layer - 1][t])
            dc = dz if keep is None else dz * keep[t]  # type: ignore[operator]  # a tensor here
        dA = [
            (dp.flatten(0, 1).t() @ z.flatten(0, 1).to(dtype)).to(wide)
            for dp, z in zip(dP, inputs, strict=True)
        ]
        return (
            dc if ctx.needs_input_grad[0] else None,
            *(None,) * 4,
            *dP,
            *dA,
            *dgain,
            *doffset,
        )


def _thirds(flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    L = len(flat) // 3
    return [flat[i * L : (i + 1) * L] for i in range(3)]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# ---------------------------------------------------------------- token side by table


class TokenTables:
    """P_l of many tokens through a table row for each id (cvfp.md 15.2).

    The table of a step is built once for the ids present, its rows are gathered per micro-batch;
    gradients are summed into one buffer, and `hand_on` carries them to B and b at the end.
    """

    def __init__(self, weights: Weights, vectors: Tensor, learns: bool) -> None:
        """vectors (U, e): the token vectors of the step's distinct ids."""
        with torch.set_grad_enabled(learns):
            self.tables = weights.token_side(vectors)
        self.values = [table.detach() for table in self.tables]
        wide = weights.b[0].dtype
        self.gradients = [torch.zeros(v.shape, dtype=wide, device=v.device) for v in self.values]
        # Something must require a gradient, or autograd would not call the gather's backward.
        self._anchor = torch.zeros((), device=vectors.device, requires_grad=learns)

    def gather(self, index: Tensor) -> list[Tensor]:
        """Rows `index` (n,) of every layer's table; backward adds into `gradients`."""
        pairs = zip(self.values, self.gradients, strict=True)
        return [_Gather.apply(self._anchor, v, g, index) for v, g in pairs]  # type: ignore[misc]

    def hand_on(self) -> Tensor:
        """0 whose gradient is that of all rows gathered so far; yield it after them."""
        pairs = zip(self.tables, self.gradients, strict=True)
        return deliver([(table, g.to(table.dtype)) for table, g in pairs])


def deliver(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """0 whose backward gives each tensor its gradient as it is, whatever the loss is scaled by:

    the gradients were made under that scale already.
    """
    if not pairs:  # nobody asked for a gradient
        return torch.zeros((), requires_grad=True)
    tensors, gradients = zip(*pairs, strict=True)
    return _Deliver.apply(gradients, *tensors)  # type: ignore[return-value]  # a tensor


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, *tensors):  # type: ignore[override]
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        return None, *ctx.gradients


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, values, gradients, index):  # type: ignore[override]
        ctx.gradients, ctx.index = gradients, index
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        ctx.gradients.index_add_(0, ctx.index, upstream.to(ctx.gradients.dtype))
        return None, None, None, None


def shifts(
    x: Tensor, keep: Tensor | None, last: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """x_{t-1} .. x_{t-J} within the document, zeros before it; x (T, B, w), keep (T, B).

    last: J tensors (B, w), what `shifts` returned beside for the rows before (J is its length): x
    of the last row, then its shifts.
    """
    found, after, now = [], [], x
    for before in last:
        after.append(now[-1])
        now = torch.cat((before[None], now[:-1]))
        now = now if keep is None else now * keep.to(now.dtype).unsqueeze(-1)
        found.append(now)
    return found, after


def leaky_trace(e: Tensor, keep: Tensor | None, c: Tensor, R: Tensor) -> Tensor:
    """c_t = a c_{t-1} + sqrt(1 - a^2) R e_t, time constants from 1 to 64 tokens, (T, B, d).

    e (T, B, w), keep (T, B), c (B, d), R (d, w). Learns nothing: a control (cvfp.md 14).
    """
    i = torch.arange(len(R), device=e.device, dtype=e.dtype)
    a = torch.exp(-1 / 2 ** (6 * i / max(1, len(R) - 1)))
    x = F.linear(e, R) * (1 - a.square()).sqrt()
    found = []
    for t in range(len(x)):
        c = a * (c if keep is None else c * keep[t, :, None]) + x[t]
        found.append(c)
    return torch.stack(found)
