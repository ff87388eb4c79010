"""What follows a context block's product: z' = LN(z + relu(P + table[ids])) (kernels.md 5.9)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.kernels import decide
from lib.kernels.cvfp_epilogue.reference import cvfp_epilogue as _reference

MAX_WIDTH = 8_192


def cvfp_epilogue(
    P: Tensor,
    z: Tensor,
    table: Tensor,
    ids: Tensor,
    gamma: Tensor,
    beta: Tensor,
    z_old: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z' (n, d) in z's dtype; with z_old also two statistics without gradients, fp32: the share of

    rows with mean((z' - z_old)^2) < tau, and the sums of z' by column (d,).
    P, z, z_old (n, d); table (V, d), B e + b of each id; ids (n,) int64; gamma, beta (d,).
    """
    n, d = z.shape if z.ndim == 2 else (-1, -1)
    fits = P.shape == z.shape and table.ndim == 2 and table.shape[1] == d and ids.shape == (n,)
    same = z_old is None or z_old.shape == z.shape
    if n < 0 or not fits or not same or gamma.shape != (d,) or beta.shape != (d,):
        named = (("P", P), ("z", z), ("table", table), ("ids", ids), ("gamma", gamma))
        raise ValueError("do not fit: " + ", ".join(f"{n} {tuple(x.shape)}" for n, x in named))
    with torch.autocast(z.device.type, enabled=False):
        if decide("cvfp_epilogue", z.device, z.dtype, "" if d <= MAX_WIDTH else f"width {d}"):
            out, _, _, share, sums = torch.ops.kumiki.cvfp_epilogue(
                P, z, table, ids, gamma, beta, z_old, tau
            )
            return (out, None, None) if z_old is None else (out, share, sums)
        return _reference(P, z, table, ids, gamma, beta, z_old, tau)
