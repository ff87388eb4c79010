"""Sums of rows by index in one fixed order, without atomics (kernels.md 4.7).

Entries are sorted by index (stable) and split into segments of at most LIMIT. A segment that is all
of its index is written where it belongs, the others to slots that are added in order afterwards:
a frequent token must not make one program add thousands of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 256  # entries of a segment


class Segments(NamedTuple):
    """Of n entries over `rows` indices; P segments at most, S slots at most. All int64.

    order (n,): entries by index; index, begin, end (P,): of each segment, in `order`; an unused one
    is empty; slot (P,): where its sum goes, -1 for straight into its row. split (S,): the row of
    each run of slots, -1 unused; first, last (S,): its slots.
    """

    order: Tensor
    index: Tensor
    begin: Tensor
    end: Tensor
    slot: Tensor
    split: Tensor
    first: Tensor
    last: Tensor


def segments(index: Tensor, rows: int) -> Segments:
    """index (n,) int64 in [0, rows). Sizes depend on n and rows: nothing waits."""
    n = len(index)
    order = torch.argsort(index, stable=True)
    starts = torch.searchsorted(index[order], torch.arange(rows + 1, device=index.device))
    counts = starts.diff()
    parts = (counts + LIMIT - 1) // LIMIT  # segments of each row
    behind = parts.cumsum(0)
    at = torch.arange(min(rows, n) + n // LIMIT, device=index.device)
    row = torch.searchsorted(behind, at, right=True)
    used, row = row < rows, row.clamp(max=rows - 1)
    begin = starts[row] + (at - (behind - parts)[row]) * LIMIT
    begin = torch.where(used, begin, 0)
    end = torch.where(used, torch.minimum(begin + LIMIT, starts[row + 1]), 0)
    many = parts > 1
    slots = torch.where(many, parts, 0)
    slots_behind = slots.cumsum(0)
    slot = (slots_behind - slots)[row] + at - (behind - parts)[row]
    slot = torch.where(used & many[row], slot, -1)
    # Rows that were split, in order: fewer than n / LIMIT, each has more than LIMIT entries.
    nth = torch.arange(max(1, n // LIMIT), device=index.device)
    split = torch.searchsorted(many.long().cumsum(0), nth + 1)
    there, split = split < rows, split.clamp(max=rows - 1)
    first = torch.where(there, (slots_behind - slots)[split], 0)
    last = torch.where(there, slots_behind[split], 0)
    return Segments(order, row, begin, end, slot, torch.where(there, split, -1), first, last)


def slot_count(n: int) -> int:
    """Slots at most: rows that are split have more than LIMIT entries each."""
    return 2 * (n // LIMIT) + 1
