"""Texts that show what a model has become: seven prompts, greedy, and eight free ones.

In:    a model and its tokenizer.   Out: prompt, ids, text and stop reason of each.
Note:  prompts are in the language of the validation text; a model trained without a boundary id has
       nothing to begin a free text with and gets none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lib.core.progress import watched
from lib.export.generate import Generation, Row, Sampling, TextStream
from lib.export.hf import stop_ids

PROMPTS = {  # a fact, a list, an opposite, a day, a colour, an equation, a definition
    "en": (
        "The largest ocean on Earth is the",
        "Three things to pack for a walk in the rain are",
        "The opposite of early is",
        "The day after Thursday is",
        "The colour of fresh snow is",
        "12 + 7 =",
        "A function is",
    ),
    "ja": (
        "日本で一番高い山は",
        "雨の日に持って行く三つのものは、",
        "「早い」の反対は",
        "木曜日の次の日は",
        "降ったばかりの雪の色は",
        "12 + 7 =",
        "辞書とは",
    ),
}
JAPANESE_SHARE = 0.2  # of letters that are kana or kanji: from here on a text is Japanese
GREEDY_TOKENS, FREE_TOKENS, FREE_ROWS, FREE_SEED = 16, 128, 8, 42


def language_of(texts: Iterable[str], most: int = 100_000) -> str:
    """`ja` where kana and kanji are a fifth of the first `most` letters, else `en`."""
    letters = japanese = 0
    for text in texts:
        for letter in filter(str.isalpha, text):
            letters += 1
            japanese += "\u3040" <= letter <= "\u30ff" or "\u4e00" <= letter <= "\u9fff"
        if letters >= most:
            break
    return "ja" if letters and japanese / letters >= JAPANESE_SHARE else "en"


def make_samples(
    model: Any, tokenizer: Any, start_ids: list[int], language: str, device: Any = "cpu"
) -> dict[str, Any]:
    """What samples.json holds. Prompts that leave no room in the context are left out."""
    found = []
    for prompt in PROMPTS[language]:
        ids = start_ids + [int(i) for i in tokenizer.encode(prompt)]
        for row in _rows(model, tokenizer, ids, Sampling(temperature=0), GREEDY_TOKENS, 1, device):
            found.append({"prompt": prompt, **_told(tokenizer, row)})
    warm = Sampling(temperature=1.0, top_k=0, seed=FREE_SEED)
    free = _rows(model, tokenizer, start_ids, warm, FREE_TOKENS, FREE_ROWS, device)
    settings = {"temperature": warm.temperature, "seed": warm.seed}
    rows = [{"prompt": "", **_told(tokenizer, row)} for row in free]
    return {"language": language, "greedy": found, "free": rows, "free_settings": settings}


def _rows(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    sampling: Sampling,
    wanted: int,
    rows: int,
    device: Any,
) -> list[Row]:
    room = wanted if model.max_context is None else min(wanted, model.max_context - len(ids))
    if not ids or room < 1:
        return []
    options = {"max_new_tokens": room, "rows": rows, "device": device}
    generation = Generation(model, ids, sampling, stop_ids=stop_ids(tokenizer), **options)
    for _ in watched(generation, room, "tokens", "samples"):
        pass
    return generation.rows


def _told(tokenizer: Any, row: Row) -> dict[str, Any]:
    stream = TextStream(tokenizer.decode_bytes)
    text = "".join([*map(stream.feed, row.ids), stream.finish()])
    return {"ids": row.ids, "text": text, "stop": row.stop}
