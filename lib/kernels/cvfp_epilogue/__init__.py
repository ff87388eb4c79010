"""What follows a context block's product: z' = LN(z + relu(P)) (kernels.md 5.9)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.cvfp_epilogue.reference import cvfp_epilogue as _reference

MAX_WIDTH = 8_192


def runs(P: Tensor) -> bool:
    """Whether the kernel would run on products like P (n, d), beside a state in fp32."""
    limit = "" if P.shape[1] <= MAX_WIDTH else f"width {P.shape[1]}"
    return decide("cvfp_epilogue", P.device, P.dtype, limit)


def cvfp_epilogue(P: Tensor, z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """z' (n, d) in z's dtype; P, z (n, d); gamma, beta (d,). P may be narrower than the state z.

    P is z A' + B e + b: the token's side joins in the product's own addition, which reads it once
    anyway, so no table is looked up here and none needs a gradient.
    """
    d = z.shape[1] if z.ndim == 2 else -1
    if d < 0 or P.shape != z.shape or gamma.shape != (d,) or beta.shape != (d,):
        named = (("P", P), ("z", z), ("gamma", gamma), ("beta", beta))
        raise ValueError("do not fit: " + ", ".join(f"{n} {tuple(x.shape)}" for n, x in named))
    with torch.autocast(z.device.type, enabled=False):
        if runs(P):
            return torch.ops.kumiki.cvfp_epilogue(P, z, gamma, beta)[0]
        return _reference(P, z, gamma, beta)
