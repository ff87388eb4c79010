"""Texts that the tokenizer tests share: prose of our own, and strings that break tokenizers."""

from __future__ import annotations

import random

from hypothesis import strategies as st

_SYLLABLES = "ka to mi no ber tim joi ning wood ham mer plane saw rain ridge".split()  # noqa: SIM905
_WORDS = [a + b for a in _SYLLABLES for b in _SYLLABLES]
_WORDS += ["the", "board", "joins", "it's", "cut", "don't", "hurry", "1998", "times,"] * 9
_KANA = (
    "木を組む大工は釘を使わずに梁と柱をつなぐ。雨の日も、継ぎ手は動かない。「組木」という技です。"
)


def english(documents: int = 60, seed: int = 1) -> list[str]:
    """Documents of random words, with newlines, runs of spaces and numbers."""
    rng = random.Random(seed)
    gaps = [" ", " ", " ", " ", "\n", ", ", "  "]
    return [
        "".join(rng.choice(_WORDS) + rng.choice(gaps) for _ in range(rng.randrange(20, 200)))
        for _ in range(documents)
    ]


def japanese(documents: int = 60, seed: int = 2) -> list[str]:
    """Documents of random slices of a few sentences, with newlines and full-width spaces."""
    rng = random.Random(seed)
    texts = []
    for _ in range(documents):
        parts = []
        for _ in range(rng.randrange(10, 60)):
            at = rng.randrange(len(_KANA))
            parts.append(
                _KANA[at : at + rng.randrange(2, 12)] + rng.choice(["", "", "\n", "\u3000"])
            )
        texts.append("".join(parts))
    return texts


HOSTILE = (
    "",
    " ",
    "\0",
    "\u2581",
    "a\u2581b \u2581\u2581 c",
    "\u2585 \u2584\u2583",
    "a\r\nb\rc\n\n\n",
    "\ufeffbom",
    "e\u0301 \u0301\u0301 partial",
    "\u3042\u3099 \u30ab\u3099",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽",
    "①㈱ｶﾞ\u3000ﬁ",
    "<|bos|>text<|assistant_end|><|endoftext|>",
    "<s></s><unk><pad><0x41><0xE2>",
    "\x85\x1c\u2028\u2029\u00a0",
    "\ud7ff\ue000\uffff\U00010000\U0010ffff",
    "don't DON'T 12345 1,234.56%",
    " " * 300 + "x" + "\t" * 300,
)

# Every plane; characters that mean something inside a tokenizer come more often than by chance.
unicode_texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\u2581\u2585\0\r\n\t \u200d\u0301\u3099\ufeff<|>0x_ an漢字カ"),
    ),
    max_size=60,
)
