"""Rows of a table held as a tensor train of two cores: the specification (phase7.md 3.2.1).

    cell p has i1 = p div v2, i2 = p mod v2;  E[p, a d2 + b] = sum_k C1[i1, k, a] C2[i2, k, b]

cropped to `width` columns. Letters: C1 (v1, R, d1), C2 (v2, R, d2), n cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 4096  # cells whose core rows are gathered at once: R (d1 + d2) numbers each


def expand(C1: Tensor, C2: Tensor, width: int) -> Tensor:
    """The rows of all v1 v2 cells, (v1 v2, width): the definition; of a block for C1[p:q]."""
    table = torch.einsum("xka,ykb->xyab", C1, C2)
    return table.flatten(2).flatten(0, 1)[:, :width]


def forward(cell: Tensor, C1: Tensor, C2: Tensor, width: int) -> Tensor:
    """cell (n,) int64 -> (n, width) in the cores' dtype."""
    out = C1.new_empty(len(cell), width)
    for part in torch.arange(len(cell), device=cell.device).split(CHUNK):
        i1, i2 = _split(cell[part], C2)
        rows = C1[i1].mT @ C2[i2]  # (part, d1, d2)
        out[part] = rows.flatten(1)[:, :width]
    return out


def backward(cell: Tensor, C1: Tensor, C2: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both cores, summed over cells in sorted order: no order of arrival matters."""
    dC1, dC2 = torch.zeros_like(C1), torch.zeros_like(C2)
    columns = C1.shape[2] * C2.shape[2]
    for part in torch.argsort(cell, stable=True).split(CHUNK):
        i1, i2 = _split(cell[part], C2)
        d = F.pad(dout[part].to(C1.dtype), (0, columns - dout.shape[1]))
        d = d.unflatten(1, (C1.shape[2], C2.shape[2]))
        add_rows(dC1, i1, C2[i2] @ d.mT)  # (part, R, d1)
        add_rows(dC2, i2, C1[i1] @ d)
    return dC1, dC2


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, in one order on every device."""
    if total.is_cuda:  # sorts; index_add_ would add by atomics there
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def _split(cell: Tensor, C2: Tensor) -> tuple[Tensor, Tensor]:
    return cell // C2.shape[0], cell % C2.shape[0]
