"""Entries by index in segments: every entry once, in order, none over the limit."""

from __future__ import annotations

import pytest
import torch

from lib.kernels import scatter
from lib.kernels.scatter import segments, slot_count


@pytest.mark.parametrize("n", [0, 1, 5, 64, 500])
@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("limit", [1, 4, 256])
def test_every_entry_is_in_one_segment_of_its_index(n, rows, limit, monkeypatch):
    monkeypatch.setattr(scatter, "LIMIT", limit)
    index = torch.randint(0, rows, (n,), generator=torch.Generator().manual_seed(n + rows)) // 2
    found = segments(index, rows)
    seen, slots = [], []
    for row, begin, end, slot in zip(*(x.tolist() for x in found[1:5]), strict=True):
        entries = found.order[begin:end]
        assert len(entries) <= limit
        assert (index[entries] == row).all()
        seen += entries.tolist()
        if slot >= 0:
            slots.append(slot)
        elif end > begin:
            assert (index == row).sum() == end - begin, "straight into its row: all of it"
    assert sorted(seen) == list(range(n))
    assert slots == list(range(len(slots)))
    assert len(slots) <= slot_count(n)
    runs = [(r, a, b) for r, a, b in zip(*(x.tolist() for x in found[5:]), strict=True) if r >= 0]
    assert [s for _, a, b in runs for s in range(a, b)] == slots
    assert [r for r, _, _ in runs] == [i for i in range(rows) if (index == i).sum() > limit]
