"""The size table of the guide comes out of N and d alone."""

from __future__ import annotations

import pytest

from lib.data.embedding_plan import Plan, lines_of

GUIDE = Plan(
    tokens=25_600_000, vocab_size=50_257, width=768, context_width=768, depth=6, memmap=True,
    sweeps=10, chunk_tokens=1_000_000,
)  # fmt: skip


def test_the_guides_job_takes_the_guides_bytes():
    sizes = {name: size / 1e9 for name, size in GUIDE.files().items()}
    for name, gigabytes in (
        ("token_ids.npy", 0.0512), ("embeddings.npy", 39.32), ("context_a.npy", 39.32),
        ("context_b.npy", 39.32), ("table.npy", 0.0772), ("checkpoints", 0.45),
    ):  # fmt: skip
        assert sizes[name] == pytest.approx(gigabytes, rel=0.01), name
    assert GUIDE.params == 7_091_712 and GUIDE.chunks == 26
    assert sum(sizes.values()) == pytest.approx(118.55, abs=0.1)
    assert "8.0" in lines_of(GUIDE, 8 * 10**9)[-1] or "ok" in lines_of(GUIDE, 8 * 10**9)[-1]


def test_memory_does_not_follow_the_corpus():
    longer = Plan(**{**vars(GUIDE), "tokens": 250_000_000})
    assert longer.memory() == GUIDE.memory() < 8e9


def test_slots_and_gather_take_half():
    slots = Plan(**{**vars(GUIDE), "slots": True, "memmap": False})
    assert sum(slots.files().values()) == pytest.approx(42.1e9, rel=0.01)
