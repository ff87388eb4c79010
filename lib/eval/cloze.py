"""Cloze: three multiple-choice tasks made from the validation text itself (evaluation.md 6).

In:    validation documents, a seed, a number of items.   Out: a bundle, scored as CORE's is.
Pure:  the same documents, seed and items give the same bytes: no network, no tokenizer, no clock.
Note:  tiny models fail CORE's tasks, which ask for knowledge; here they show what their own text
       taught them. A score below the word-overlap baseline has not yet learned the topic.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lib.core import files
from lib.core.rng import derive_seed, numpy_generator
from lib.eval.bundle import BASELINES, DATA, Task
from lib.export.samples import language_of

INDEX = "cloze.yaml"
TASKS = {
    "cloze_continuation": 25.0,
    "cloze_last_word": 25.0,
    "cloze_order": 50.0,
}  # chance, percent
LEAST_ITEMS = 50  # of a task: fewer would be noise
CONTEXT_SENTENCES = 2

Document = tuple[str, str]  # id, text
Language = Literal["en", "ja"]
Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a sentence and a word are in one language."""

    border: re.Pattern[str]  # between two sentences
    ends: str  # marks that end one, besides closing quotes and brackets
    shortest: int  # characters of a valid sentence
    longest: int
    context: int  # characters of a context, at least
    between: str  # joins sentences, and a context with its continuation
    word: re.Pattern[str]
    last_word: re.Pattern[str]  # groups: word, what follows it


_CLOSING = "\"'”’)]}」』）】"
RULES: dict[Language, Rules] = {
    "en": Rules(
        border=re.compile(r"(?<=[.!?])\s+(?=[^\W_a-z]|[\"'“‘(\[{])"),
        ends=".!?", shortest=30, longest=200, context=60, between=" ",
        word=re.compile(r"[^\W\d_]+"),
        last_word=re.compile(r"(?<!\w)([^\W\d_]{4,})([^\w\s]*)$"),
    ),
    "ja": Rules(
        border=re.compile(r"(?<=[。！？])(?![」』）】])|(?<=[。！？][」』）】])"),
        ends="。！？", shortest=10, longest=100, context=20, between="",
        word=re.compile(r"[\u4e00-\u9fff]{2,}|[\u30a1-\u30fa\u30fc]{3,}"),
        last_word=re.compile(r"([\u4e00-\u9fff]{2,}|[\u30a1-\u30fa\u30fc]{3,})"
                             r"([^\u4e00-\u9fff\u30a1-\u30fa\u30fc]*)$"),
    ),
}  # fmt: skip


# ---------------------------------------------------------------- sentences


def sentences_of(text: str, rules: Rules) -> Iterator[str]:
    """Sentences in order, white space made one space (Japanese: line ends removed)."""
    for block in re.split(r"\n[^\S\n]*\n", text):
        block = re.sub(r"\s*\n\s*", "", block) if not rules.between else block
        for sentence in rules.border.split(block):
            if plain := " ".join(sentence.split()):
                yield plain


def is_valid(sentence: str, rules: Rules) -> bool:
    """Prose of an ordinary length that ends as a sentence does."""
    if not rules.shortest <= len(sentence) <= rules.longest or ">>>" in sentence:
        return False
    if not sentence.rstrip(_CLOSING).endswith(tuple(rules.ends)):
        return False
    if re.search(r"[^\w\s]{3}", sentence):
        return False
    return sum(c.isalpha() or c == " " for c in sentence) >= 0.75 * len(sentence)


@dataclass(frozen=True)
class Corpus:
    """Sentences of every document, and what distractors are drawn from."""

    documents: Sequence[Document]
    language: Language
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", RULES[self.language])

    @cached_property
    def sentences(self) -> list[list[str | None]]:
        """Of each document in order; None in the place of one that is not valid."""
        found = []
        for _, text in self.documents:
            every = sentences_of(text, self.rules)
            found.append([s if is_valid(s, self.rules) else None for s in every])
        return found

    @cached_property
    def by_length(self) -> list[tuple[int, str, int]]:
        """(length, sentence, document) of all valid sentences, each text once, sorted."""
        first: dict[str, int] = {}
        for d, group in enumerate(self.sentences):
            for sentence in filter(None, group):
                first.setdefault(sentence, d)
        return sorted((len(s), s, d) for s, d in first.items())

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each word occurs, case folded."""
        words = (w for _, text in self.documents for w in self.rules.word.findall(text))
        return Counter(word.casefold() for word in words)

    @cached_property
    def last_words(self) -> list[str]:
        """The different last words of valid sentences, sorted."""
        found = (self.rules.last_word.search(s) for group in self.sentences for s in group if s)
        return sorted({match.group(1) for match in found if match})

    def context(self, d: int, at: int) -> str:
        """Up to two valid sentences directly before sentence `at` of document d."""
        taken: list[str] = []
        for sentence in reversed(self.sentences[d][max(0, at - CONTEXT_SENTENCES) : at]):
            if sentence is None:
                break
            taken.insert(0, sentence)
        return self.rules.between.join(taken)


# ---------------------------------------------------------------- items


def make_items(documents: Sequence[Document], items: int, seed: int) -> dict[str, list[Item]]:
    """Task -> at most `items` items, one a document, documents in the order of a hash."""
    corpus = Corpus(documents, "ja" if language_of(t for _, t in documents) == "ja" else "en")
    makers: dict[str, Callable[[Corpus, int, int, Any], Item | None]] = {
        "cloze_continuation": _continuation,
        "cloze_last_word": _last_word,
        "cloze_order": _order,
    }
    found: dict[str, list[Item]] = {}
    for task, make in makers.items():
        order = sorted(range(len(documents)), key=lambda d: _hash(seed, task, documents[d][0], d))
        found[task] = []
        for d in order:
            if len(found[task]) == items:
                break
            draw = numpy_generator(seed, "cloze", task, documents[d][0], d)
            for at in draw.permutation(len(corpus.sentences[d])).tolist():
                if item := make(corpus, d, at, draw):
                    found[task].append(item)
                    break
    return found


def _hash(seed: int, task: str, name: str, d: int) -> int:
    return derive_seed(seed, "cloze order", task, name, d)


def _continuation(corpus: Corpus, d: int, at: int, draw: Any) -> Item | None:
    """Which sentence comes next; the others come from other documents and are as long."""
    true, context = corpus.sentences[d][at], corpus.context(d, at)
    if true is None or len(context) < corpus.rules.context or true in context:
        return None
    low = bisect_left(corpus.by_length, (math.ceil(0.8 * len(true)),))
    high = bisect_right(corpus.by_length, (math.floor(1.2 * len(true)), chr(0x10FFFF)))
    others: list[str] = []
    for k in draw.permutation(high - low).tolist():
        _, sentence, place = corpus.by_length[low + k]
        if place != d and sentence != true and sentence not in context:
            others.append(sentence)
        if len(others) == 3:
            return _choose(context, true, others, draw)
    return None


def _last_word(corpus: Corpus, d: int, at: int, draw: Any) -> Item | None:
    """Which word ends the sentence; no candidate stands in the context, so overlap is no help."""
    rules, sentence = corpus.rules, corpus.sentences[d][at]
    match = rules.last_word.search(sentence) if sentence else None
    if match is None or sentence is None:
        return None
    word, rest, head = match.group(1), match.group(2), sentence[: match.start(1)].rstrip()
    query = rules.between.join(filter(None, (corpus.context(d, at), head)))
    folded, count = query.casefold(), corpus.counts[word.casefold()]
    if word.casefold() in folded or len(query) < rules.context:
        return None
    others: list[str] = []
    taken = {word.casefold()}
    for k in draw.permutation(len(corpus.last_words)).tolist():
        other = corpus.last_words[k]
        name = other.casefold()
        if (
            name not in taken
            and name not in folded
            and abs(len(other) - len(word)) <= 2
            and _capitals(other) == _capitals(word)
            and count <= 2 * corpus.counts[name] <= 4 * count
        ):
            taken.add(name)
            others.append(other + rest)
        if len(others) == 3:
            return _choose(query, word + rest, others, draw)
    return None


def _capitals(word: str) -> tuple[bool, bool]:
    return word[0].isupper(), word[1:].islower()


def _order(corpus: Corpus, d: int, at: int, draw: Any) -> Item | None:
    """Which of two sentences comes first."""
    three = corpus.sentences[d][at : at + 3]
    if len(three) < 3 or not all(three) or three[1] == three[2]:
        return None
    query, second, third = (str(sentence) for sentence in three)
    between = corpus.rules.between
    true = second + between + third
    return None if true in query else _choose(query, true, [third + between + second], draw)


def _choose(query: str, true: str, others: list[str], draw: Any) -> Item | None:
    """An item with the right answer at a drawn place; None where two choices are the same."""
    gold = int(draw.integers(len(others) + 1))
    choices = [*others[:gold], true, *others[gold:]]
    if len(set(choices)) < len(choices):
        return None
    return {"query": query, "choices": choices, "gold": gold}


# ---------------------------------------------------------------- the bundle


def write_bundle(
    folder: Path, documents: Iterable[Document], items: int, seed: int
) -> dict[str, int]:
    """Write the tasks as a bundle; returns task -> items. Too few items of a task: no bundle."""
    listed = list(documents)
    found = make_items(listed, items, seed)
    counts = {task: len(made) for task, made in found.items()}
    if min(counts.values()) < LEAST_ITEMS:
        return counts
    delimiter = RULES["ja" if language_of(t for _, t in listed) == "ja" else "en"].between
    with files.atomic_folder(folder) as part:
        index, baselines = "icl_tasks:\n", "Eval Task,Random baseline\n"
        for task, made in found.items():
            uri = f"cloze/{task}.jsonl"
            files.write_bytes(
                part / DATA / uri,
                b"".join(json.dumps(i, ensure_ascii=False).encode() + b"\n" for i in made),
            )
            index += (
                f"- label: {task}\n  dataset_uri: {uri}\n  num_fewshot: [0]\n"
                f"  icl_task_type: multiple_choice\n"
                f"  continuation_delimiter: {json.dumps(delimiter)}\n"
            )
            baselines += f"{task},{TASKS[task]:g}\n"
        files.write_bytes(part / INDEX, index.encode())
        files.write_bytes(part / BASELINES, baselines.encode())
    return counts


def read_items(task: Task) -> list[Item]:
    """The items of a task in the order of its file."""
    return [json.loads(line) for line in task.path.read_bytes().splitlines()]


# ---------------------------------------------------------------- numbers


def standard_error(tasks: Sequence[dict[str, Any]]) -> float:
    """Of the mean of centred accuracies: sqrt(sum a (1 - a) / n / (1 - b)^2) / tasks."""
    parts = (
        t["accuracy"] * (1 - t["accuracy"]) / t["n"] / (1 - t["baseline"] / 100) ** 2 for t in tasks
    )
    return math.sqrt(sum(parts)) / len(tasks)


def overlap_accuracy(items: Sequence[Item], documents: Iterable[Document]) -> float:
    """Accuracy of choosing by idf-weighted word overlap with the context; the first of equals."""
    is_japanese = language_of(item["query"] for item in items) == "ja"
    word, total, seen = RULES["ja" if is_japanese else "en"].word, 0, Counter()

    def words_of(text: str) -> set[str]:
        return {found.casefold() for found in word.findall(text)}

    for _, text in documents:
        total += 1
        seen.update(words_of(text))
    right = 0
    for item in items:
        context = words_of(item["query"])
        scores = [  # fsum: the words come in the order of a set, which follows the hash seed
            math.fsum(math.log((1 + total) / (1 + seen[w])) for w in words_of(choice) & context)
            for choice in item["choices"]
        ]
        right += scores.index(max(scores)) == item["gold"]
    return right / len(items)
