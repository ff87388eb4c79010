"""Cleaning: each rule, the byte law, the batch's shortcut and texts in chunks against the rules."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import clean
from lib.data.clean import CleanCounts, Rules, clean_batch, clean_long, split_text

PLAIN = Rules(unicode="none", min_chars=1, max_chars=1000)
MARKS = (
    "\r\n\t \x00\x07\x0b\x0c\x1f\x7f\ufeff\u3000\u0085\u00a0a.。！Ａ①ｶﾞか゛\u3099é\u0301\U0001f600"
)
TEXTS = st.text(st.sampled_from(MARKS) | st.characters(exclude_categories=["Cs"]), max_size=40)
RULES = st.builds(
    Rules,
    unicode=st.sampled_from(["none", "nfc", "nfkc"]),
    min_chars=st.integers(1, 4),
    max_chars=st.integers(4, 12),
)


def law(counts: CleanCounts, documents: list[str]) -> None:
    """L3 and L4 with what came out."""
    assert counts.documents_in + counts.split == len(documents) + sum(
        d[0] for d in counts.dropped.values()
    )
    assert counts.bytes_in + sum(r[1] for r in counts.repairs.values()) == (
        sum(len(d.encode()) for d in documents)
        + sum(d[1] for d in counts.dropped.values())
        + sum(r[2] for r in counts.repairs.values())
    )


@pytest.mark.parametrize(
    ("text", "documents", "repairs", "dropped"),
    [
        ("clean text", ["clean text"], {}, {}),
        ("a\r\nb\rc\n\rd", ["a\nb\nc\n\nd"], {"newline": [1, 0, 1]}, {}),
        ("a\rb", ["a\nb"], {"newline": [1, 0, 0]}, {}),
        ("a\x00\x08b\x0b\x0c\x0e\x1fc\x7f", ["abc"], {"control": [1, 0, 7]}, {}),
        ("\ufeffa\ufeffb", ["a\ufeffb"], {"control": [1, 0, 3]}, {}),
        ("\x01\ufeffa", ["a"], {"control": [1, 0, 4]}, {}),
        (" \t\na\u3000b \n", ["a\u3000b"], {"edge_space": [1, 0, 5]}, {}),
        ("\u3000字下げ", ["\u3000字下げ"], {}, {}),
        ("", [], {}, {"empty": [1, 0]}),
        (" \r\n", [], {"newline": [1, 0, 1], "edge_space": [1, 0, 2]}, {"empty": [1, 0]}),
        ("\u3000\u2028", [], {}, {"empty": [1, 6]}),
        ("x\x85y", ["x\x85y"], {}, {}),  # C1 controls are not ours to remove
        ("<|bos|> ", ["<|bos|>"], {"edge_space": [1, 0, 1]}, {}),
    ],
)
def test_rules(text, documents, repairs, dropped):
    counts = CleanCounts()
    assert clean.clean(text, PLAIN, counts) == documents
    assert counts.repairs == repairs
    assert counts.dropped == dropped
    law(counts, documents)


def test_unicode_forms_are_a_choice():
    """NFKC rewrites ①, ㈱, half-width kana and U+3000; by default nothing does."""
    text = "①㈱ｶﾞ\u3000か\u3099"
    for form, expected in (("none", text), ("nfc", "①㈱ｶﾞ\u3000が"), ("nfkc", "1(株)ガ が")):
        counts = CleanCounts()
        rules = Rules(unicode=form, min_chars=1, max_chars=99)
        assert clean.clean(text, rules, counts) == [expected]
        added = len(expected.encode()) - len(text.encode())
        assert counts.repairs == ({} if form == "none" else {"unicode": [1, 0, -added]})


def test_too_short_counts_characters_not_bytes():
    counts = CleanCounts()
    rules = Rules(unicode="none", min_chars=3, max_chars=9)
    assert clean.clean("日本", rules, counts) == []
    assert counts.dropped == {"too_short": [1, 6]}
    assert clean.clean("日本語", rules, counts) == ["日本語"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aa\n\nbb\n\ncc\nddd", ["aa\n\nbb\n\n", "cc\nddd"]),  # the last blank line
        ("aaa\nbbb\nccc. d", ["aaa\nbbb\n", "ccc. d"]),  # else newline
        ("One. Two. Three", ["One. Two. ", "Three"]),  # else sentence
        ("一。二！三四五六七八九十", ["一。二！", "三四五六七八九十"]),
        ("abcdefghijklm", ["abcdefghij", "klm"]),  # else the limit
        ("abcdefgh. j", ["abcdefgh. ", "j"]),  # the end lies exactly at the limit
        ("abcdefghi. j", ["abcdefghi.", " j"]),
        ("0123456789", ["0123456789"]),
    ],
)
def test_long_texts_split_where_a_reader_would(text, pieces):
    assert split_text(text, 10) == pieces


@settings(deadline=None)
@given(text=TEXTS, limit=st.integers(1, 12))
def test_pieces_concatenate_to_the_text(text, limit):
    pieces = split_text(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(p) <= limit for p in pieces) or pieces == [""]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, rules=RULES)
def test_byte_law_holds_for_any_text(text, rules):
    counts = CleanCounts()
    documents = clean.clean(text, rules, counts)
    law(counts, documents)
    assert counts.split == max(len(documents) - 1, 0)
    whole = "".join(documents)
    assert not set(whole) & set("\r\x00\x07\x0b\x0c\x1f\x7f")
    assert whole == whole.strip(" \t\n")
    if rules.form:
        assert unicodedata.is_normalized(rules.form, whole)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6), rules=RULES)
def test_batches_equal_the_rules_text_by_text(texts, rules):
    """The search for texts that need work must overlook none."""
    ids = [f"d{i}" for i in range(len(texts))]
    fast, slow = CleanCounts(), CleanCounts()
    documents, names, array = clean_batch(texts, ids, rules, fast)
    expected = [clean.clean(t, rules, slow) for t in texts]
    assert documents == [p for pieces in expected for p in pieces] == array.to_pylist()
    assert fast == slow
    assert names == [n for i, p in zip(ids, expected, strict=True) for n in _names(i, len(p))]


def _names(name: str, pieces: int) -> list[str]:
    return [name] if pieces == 1 else [f"{name}#{k}" for k in range(pieces)]


def test_the_shortcut_knows_every_code_point():
    """One text a code point, at the start, inside and at the end."""
    rules = PLAIN
    for start in range(0, sys.maxunicode + 1, 1 << 16):
        points = [chr(c) for c in range(start, start + (1 << 16)) if not 0xD800 <= c < 0xE000]
        if start > 1 << 17:
            points = points[:: 1 << 8]
        for make in ("{}x", "x{}y", "x{}", "{}"):
            texts = [make.format(p) for p in points]
            dirty = set(clean.find_dirty(texts, pa.array(texts), rules))
            changed = {
                i for i, t in enumerate(texts) if clean.clean(t, rules, CleanCounts()) != [t]
            }
            assert changed <= dirty, [texts[i] for i in changed - dirty][:3]


def test_control_search_in_bytes_equals_the_pattern():
    """Bytes of longer characters must not look like controls, nor hide one."""
    for code in [*range(0x3000), 0xFEFF, 0x10FFFF]:
        data = np.frombuffer(("日" + chr(code) + "a").encode(), np.uint8)
        assert clean._has_control(data) == bool(clean._CONTROL_OR_CR.search(chr(code))), hex(code)


def test_clean_texts_take_the_shortcut(shared, monkeypatch):
    """On real text the rules run for few: the reason why cleaning is cheap."""
    import pyarrow.parquet as pq

    texts = pq.read_table(shared / "data/en_shards/shard_00000.parquet")["text"].to_pylist()
    calls = []
    real = clean.clean
    monkeypatch.setattr(clean, "clean", lambda *a: calls.append(1) or real(*a))
    rules = Rules(unicode="none", min_chars=1, max_chars=10**6)
    clean_batch(texts, [""] * len(texts), rules, CleanCounts())
    assert len(calls) < len(texts) / 20


# Few characters each, so that what belongs together often falls on both sides of a border.
CLOSE = st.one_of(
    *(
        st.text(alphabet, max_size=14)
        for alphabet in ("\r\na", "\ufeff\x00a \n", "か\u3099ゝe\u0301")
    )
)
SPACED = st.text("\u3000\u2028 \na", max_size=10)


@settings(max_examples=600, deadline=None)
@given(text=CLOSE | SPACED | TEXTS, rules=RULES, size=st.integers(1, 4))
def test_chunks_equal_the_whole(text, rules, size):
    """CR LF, marks and whole runs of white space may fall on a border of chunks."""
    chunks = [text[a : a + size] for a in range(0, len(text), size)]
    whole, streamed = CleanCounts(), CleanCounts()
    expected = clean.clean(text, rules, whole)
    assert list(clean_long(lambda: iter(chunks), rules, streamed)) == expected
    assert streamed == whole


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_boundaries_join_nothing_before_them(form):
    """A text cut before such a character normalises part by part; else chunks would differ."""
    safe = [chr(c) for c in range(0xD800) if clean._BOUNDARY.match(chr(c))]
    before = ["a", "か", "\u1100", "\u0b47", "e\u0301", "ｶ", "\u0928", "\U00011099", "\u3099"]
    for first in before:
        head = unicodedata.normalize(form, first)
        for mark in safe:
            for tail in ("", "\u3099", "\u0301"):
                tail = mark + tail
                joined = unicodedata.normalize(form, first + tail)
                assert joined == head + unicodedata.normalize(form, tail), (first, tail)
