"""Linear layers and tables whose constructors compute nothing; the fp8 form for training.

fp8: tensor-wise scales, e4m3 for inputs and weights, e5m2 for gradients (arXiv 2209.05433). y = x
w^T runs on x / s_x and w / s_w with s = amax / largest finite number; the product is scaled back by
s_x s_w. Evaluation and small or odd layers stay in the ordinary precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.core.errors import UserError

MIN_FP8 = 128  # both dimensions: below, scaling costs more than the matmul saves
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Linear(nn.Module):
    """y = x W^T, weight (outputs, inputs), left uninitialised: the family draws it."""

    def __init__(self, inputs: int, outputs: int, *, fp8: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        fits = inputs % 16 == 0 and outputs % 16 == 0 and min(inputs, outputs) >= MIN_FP8
        self.fp8 = fp8 and fits

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight)
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight)
        # A run may keep weights in bf16 (lib/train/rounding.py); what is left out of autocast is
        # computed as wide as its input.
        wide = torch.promote_types(self.weight.dtype, x.dtype)
        return F.linear(x, self.weight.to(wide))


class Table(nn.Embedding):
    """An embedding table, left uninitialised: the family draws it.

    torch's own draws, on the meta device too, and there imports all of the compiler for it.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing to draw here."""


def require_fp8(device: torch.device) -> None:
    """UserError unless `device` multiplies fp8 matrices."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    raise UserError(
        "fp8 needs a GPU of compute capability 8.9 or newer",
        value=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        remedy="set fp8: false",
    )


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x ~ q s: q in an fp8 dtype, its largest entry at the dtype's largest number; s one fp32
    number.
    """
    largest = torch.finfo(dtype).max
    s = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / s).clamp(-largest, largest).to(dtype), s


def scaled_matmul(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """(a q)(b q) s_a s_b in dtype, a (n, k), b (k, m). Off CUDA the same arithmetic in fp32."""
    (qa, sa), (qb, sb) = a, b
    assert not any(side % 16 for side in (*qa.shape, *qb.shape)), "the hardware's multiple"
    if not qa.is_cuda:
        return (qa.float() @ qb.float() * (sa * sb)).to(dtype)
    # The hardware wants a by rows and b by columns.
    columns = qb.mT.contiguous().mT
    multiply = torch._scaled_mm  # type: ignore[attr-defined]  # the only fp8 matmul there is
    out = multiply(qa.contiguous(), columns, scale_a=sa, scale_b=sb, out_dtype=dtype)
    return out[0] if isinstance(out, tuple) else out


class _Fp8Linear(torch.autograd.Function):
    """y = x w^T for x (n, inputs), n a multiple of 16; three fp8 matmuls, gradients as e5m2."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        (qx, sx), (qw, sw) = quantize(x, E4M3), quantize(weight, E4M3)
        ctx.save_for_backward(qx, sx, qw, sw)
        ctx.dtypes = x.dtype, weight.dtype
        return scaled_matmul((qx, sx), (qw.mT, sw), x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        qx, sx, qw, sw = ctx.saved_tensors
        qg, sg = quantize(dy, E5M2)
        dx = scaled_matmul((qg, sg), (qw, sw), ctx.dtypes[0])
        dw = scaled_matmul((qg.mT, sg), (qx, sx), torch.float32)
        return dx, dw.to(ctx.dtypes[1])


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., inputs) times weight (outputs, inputs) in fp8; out in x's or autocast's dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows = x.flatten(0, -2)
    n = len(rows)
    with torch.autocast(device, enabled=False):
        out = _Fp8Linear.apply(F.pad(rows, (0, 0, 0, -n % 16)), weight)
    return out[:n].view(*x.shape[:-1], -1)  # type: ignore[index]  # apply is untyped
