"""Cloze: pure in documents and seed, free of hints, scored by CORE's own code."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.eval import cloze, core
from lib.eval.batched import Answerer
from lib.eval.bundle import read_bundle
from lib.eval.cloze import RULES, Corpus, is_valid, make_items, sentences_of, write_bundle
from lib.eval.core import Exam
from lib.models.base import Family
from tests.conftest import ROOT
from tests.standins import ByteTokenizer

TEXT = """river mountain garden window letter winter summer market station bridge engine doctor
teacher painter village harbour kitchen library forest island"""
WORDS = TEXT.split()


def documents(n: int = 120, seed: int = 1) -> list[tuple[str, str]]:
    """Documents of six sentences; a document's sentences share two words of its own."""
    draw = np.random.default_rng(seed)
    found = []
    for d in range(n):
        own = list(draw.choice(WORDS, 2, replace=False))
        lines = []
        for _ in range(6):
            words = [str(w) for w in [*own, *draw.choice(WORDS, 4)]]
            draw.shuffle(words)
            lines.append("The " + " ".join(words[:5]) + " is near the " + words[5] + ".")
        found.append((f"doc{d}", " ".join(lines)))
    return found


DOCUMENTS = documents()
ITEMS = make_items(DOCUMENTS, 100, 0)


def test_the_same_documents_and_seed_give_the_same_items():
    assert make_items(list(DOCUMENTS), 100, 0) == ITEMS
    assert make_items(DOCUMENTS, 100, 1) != ITEMS
    assert {task: len(items) for task, items in ITEMS.items()} == dict.fromkeys(cloze.TASKS, 100)


def test_fewer_items_are_the_first_of_more():
    fewer = make_items(DOCUMENTS, 60, 0)
    assert all(fewer[task] == items[:60] for task, items in ITEMS.items())


@pytest.mark.parametrize("task", cloze.TASKS)
def test_no_item_gives_itself_away(task):
    for item in ITEMS[task]:
        right = item["choices"][item["gold"]]
        assert right not in item["query"]
        assert len(set(item["choices"])) == len(item["choices"]) == (2 if "order" in task else 4)
        if task == "cloze_last_word":
            words = [choice.rstrip(".") for choice in item["choices"]]
            assert not any(word.casefold() in item["query"].casefold() for word in words)
            assert max(map(len, words)) - min(map(len, words)) <= 4
            assert len({word[0].isupper() for word in words}) == 1
        if task == "cloze_continuation":
            sizes = [len(choice) for choice in item["choices"]]
            assert all(abs(size - len(right)) <= 0.2 * len(right) for size in sizes)


def test_gold_places_are_even():
    """Chi-square over the places, well below the 0.1 % point."""
    many = make_items(documents(400, 3), 400, 0)
    for items in many.values():
        places = np.bincount([item["gold"] for item in items])
        expected = len(items) / len(places)
        assert ((places - expected) ** 2 / expected).sum() < {2: 10.8, 4: 16.3}[len(places)]


def test_a_document_gives_one_item_a_task():
    texts = dict(DOCUMENTS)
    for task, items in ITEMS.items():
        if task != "cloze_order":
            continue
        homes = [next(n for n, t in texts.items() if i["query"] in t) for i in items]
        assert len(set(homes)) == len(homes)


# ---------------------------------------------------------------- sentences


def test_sentences_are_cut_where_one_ends():
    text = "One is here. Two, e.g. this, is\nthere! (Three?) 4 is last.\n\nA new block"
    assert list(sentences_of(text, RULES["en"])) == [
        "One is here.", "Two, e.g. this, is there!", "(Three?) 4 is last.", "A new block",
    ]  # fmt: skip
    japanese = "春が来た。「もう行く\nのか。」と聞いた！はい。"
    assert list(sentences_of(japanese, RULES["ja"])) == [
        "春が来た。", "「もう行くのか。」", "と聞いた！", "はい。",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be one.",
        "This sentence has no end to it and so is none",
        ">>> this is a prompt of the interpreter, no prose.",
        "This one is full of marks like --- or ..., is it not?",
        "x = 1; y = 2; z[0] = 3; w[1] = 4; v[2] = 5; u[3] = 6.",
        "A sentence that goes on and on " + "and on " * 30 + "until its end.",
    ],
)
def test_what_is_no_prose_is_left_out(text):
    assert not is_valid(text, RULES["en"])


def test_prose_is_taken():
    assert is_valid("This is a plain sentence of prose.", RULES["en"])
    assert is_valid('He said: "It is a plain sentence."', RULES["en"])


def test_japanese_text_has_its_own_rules():
    path = ROOT / "data/samples/ja/validation_0.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        lines = [(str(n), json.loads(line)["text"]) for n, line in enumerate(stream)]
    found = make_items(lines, 50, 0)
    assert all(found.values())
    for item in found["cloze_last_word"]:
        assert all(choice[-1] in "。！？」』）" for choice in item["choices"])


# ---------------------------------------------------------------- the bundle and the score


class Knowing(Family):
    """Gives the text it knows probability near 1: its logits see the bytes so far."""

    vocab_size = 258

    def __init__(self, texts: list[str], flat: bool = False) -> None:
        super().__init__()
        self.data, self.flat = b"\n".join(text.encode() for text in texts), flat

    def forward(self, tokens, state=None):
        z = torch.zeros(*tokens.shape, 258)
        past = [] if state is None else state
        for row, ids in enumerate([] if self.flat else tokens.tolist()):
            seen = bytes(i for i in past if i < 256)
            for t, one in enumerate(ids):
                seen += bytes([one]) if one < 256 else b""
                if (found := self.after(seen)) is not None:
                    z[row, t, found] = 9.0
        return z, [*past, *tokens[0].tolist()]

    def after(self, seen: bytes) -> int | None:
        for reach in (100, 60, 24):
            at = self.data.find(seen[-reach:])
            if len(seen) >= reach and 0 <= at < len(self.data) - reach:
                return self.data[at + reach]
        return None

    def repeat_state(self, state, n):
        return state


def scores(folder: Path, model: Family, tokenizer=None) -> list[dict]:
    tokenizer = tokenizer or ByteTokenizer()
    tasks = read_bundle(folder, cloze.INDEX).tasks
    exam = Exam(
        answerer=Answerer(model=model, vocab_size=tokenizer.vocab_size),
        encode=lambda texts: [tokenizer.encode(text) for text in texts],
        start_id=tokenizer.bos_id, max_context=4096, identity={},
    )  # fmt: skip
    records = exam.take(tasks)
    return [core.summarise(task, records[task.label]) for task in tasks]


def test_a_model_without_an_opinion_is_at_chance(tmp_path):
    write_bundle(tmp_path / "c", documents(400, 5), 200, 0)
    tables = scores(tmp_path / "c", Knowing([], flat=True))
    score = core.mean([table["centered"] for table in tables])
    assert abs(score) < 3 * cloze.standard_error(tables)


def test_a_model_that_knows_the_text_has_everything_right(tmp_path):
    listed = documents(70, 6)
    write_bundle(tmp_path / "c", listed, 50, 0)
    tables = scores(tmp_path / "c", Knowing([text for _, text in listed]))
    found = {table["label"]: table["accuracy"] for table in tables}
    assert found == dict.fromkeys(cloze.TASKS, 1.0)


def test_the_bundle_is_the_same_for_every_tokenizer(tmp_path):
    """Items are text: what differs between two models is what they make of it."""
    counts = write_bundle(tmp_path / "c", DOCUMENTS, 60, 0)
    assert counts == dict.fromkeys(cloze.TASKS, 60)
    tasks = read_bundle(tmp_path / "c", cloze.INDEX).tasks
    assert [task.baseline for task in tasks] == [25, 25, 50]
    assert cloze.read_items(tasks[0]) == make_items(DOCUMENTS, 60, 0)["cloze_continuation"]


def test_too_little_text_gives_no_bundle(tmp_path):
    counts = write_bundle(tmp_path / "c", DOCUMENTS[:20], 400, 0)
    assert min(counts.values()) < cloze.LEAST_ITEMS and not (tmp_path / "c").exists()


def test_standard_error_is_that_of_the_mean():
    tables = [{"accuracy": 0.5, "n": 100, "baseline": b} for b in (25.0, 25.0, 50.0)]
    by_hand = math.sqrt(0.0025 / 0.5625 * 2 + 0.0025 / 0.25) / 3
    assert cloze.standard_error(tables) == pytest.approx(by_hand)


def test_word_overlap_finds_the_topic_and_not_the_last_word():
    """Documents share words of their own, so the next sentence is found; the rest is chance."""
    found = {task: cloze.overlap_accuracy(items, DOCUMENTS) for task, items in ITEMS.items()}
    assert found["cloze_continuation"] > 0.5
    assert found["cloze_last_word"] == pytest.approx(0.25, abs=0.13)


def test_word_overlap_of_equals_is_the_first_whatever_the_hash_seed():
    """Two choices whose words are as rare as each other's: no order of summation may tell them."""
    names = [f"{'abcdefgh'[k]}word" for k in range(8)]
    rarity = [(f"d{n}", " ".join(f"x{w} y{w}" for w in names[n:])) for n in range(8)]
    choices = [" ".join(side + w for w in names) for side in "xy"]
    items = [
        {"query": " ".join(choices), "choices": choices[::step], "gold": 0} for step in (1, -1)
    ]
    for cut in range(8):  # other words, other orders
        few = [{**i, "choices": [" ".join(c.split()[cut:]) for c in i["choices"]]} for i in items]
        assert cloze.overlap_accuracy(few, rarity) == 1.0


def test_contexts_are_what_stands_directly_before():
    text = "The first sentence is a good one here. no. The second sentence is also good here. "
    text += "The third sentence comes right after it. The fourth one is the last of them all."
    corpus = Corpus([("d", text)], "en")
    assert [s is not None for s in corpus.sentences[0]][-2:] == [True, True]
    last = len(corpus.sentences[0]) - 1
    assert corpus.context(0, last).endswith("The third sentence comes right after it.")
    assert corpus.context(0, 0) == ""
    assert corpus.by_length == sorted(corpus.by_length)
