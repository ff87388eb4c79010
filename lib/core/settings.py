"""params.yaml, typed: the whole file, and what ties its sections together.

A section is a dataclass in data_settings.py or run_settings.py; `lib.core.params` fills it strictly
(unknown keys, wrong types and contradictions are errors). Model sections are typed by `Config` in
each file of lib/models. Everything but `runtime` is identity: it enters fingerprints.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.core.data_settings import (
    ArchiveSource,
    DownloadShards,
    Embeddings,
    Encoding,
    ExtractTexts,
    FilesSource,
    Gpt2Tokenizer,
    Tokenizer,
)
from lib.core.refusal import Check, refuse
from lib.core.run_settings import Eval, Export, Runtime, Train


@dataclass(frozen=True, kw_only=True)
class Settings:
    """params.yaml with its active profile laid over it."""

    profile: str
    seed: int = 1234
    download_shards: DownloadShards = field(default_factory=DownloadShards)
    extract_texts: ExtractTexts = field(default_factory=ExtractTexts)
    train_tokenizer: Mapping[str, Tokenizer] = field(default_factory=dict)
    encode_tokens: Mapping[str, Encoding] = field(default_factory=dict)
    precompute_embeddings: Embeddings = field(default_factory=Embeddings)
    train: Mapping[str, Train] = field(default_factory=dict)  # by run, added runs included
    runs: Mapping[str, Train] = field(default_factory=dict)  # runs of your own
    families: Mapping[str, Train] = field(default_factory=dict)  # what is evaluated and exported
    model: Mapping[str, Any] = field(default_factory=dict)  # family -> its Config
    runtime: Runtime = field(default_factory=Runtime)
    eval: Eval = field(default_factory=Eval)
    export: Export = field(default_factory=Export)

    def __post_init__(self) -> None:
        refuse(self, *self._names())

    def _names(self) -> Iterator[Check]:
        """Names that other sections declare: (is wrong, key, value, remedy) of each."""
        sources, recipes = self.download_shards.sources, self.extract_texts.recipes
        text = {n for n, s in sources.items() if not isinstance(s, FilesSource | ArchiveSource)}
        for r, recipe in recipes.items():
            for s in recipe.sources:
                key = f"extract_texts.recipes.{r}.sources.{s}"
                yield s not in text, key, s, f"choose {_one_of(text)}"
        used = {name for recipe in recipes.values() for name in recipe.sources}
        used |= {getattr(t, "source", None) for t in self.train_tokenizer.values()}
        for n, source in sources.items():
            idle = n not in used and not isinstance(source, ArchiveSource)
            remedy = "name it in extract_texts.recipes, or remove it"
            yield idle, f"download_shards.sources.{n}", "in no recipe", remedy
        for n, t in self.train_tokenizer.items():
            key = f"train_tokenizer.{n}"
            yield from _unless_among(recipes, f"{key}.documents", t.documents)
            if isinstance(t, Gpt2Tokenizer) and t.source is not None:
                yield from _unless_among(sources, f"{key}.source", t.source)
        for n, e in self.encode_tokens.items():
            yield from _unless_among(recipes, f"encode_tokens.{n}.documents", e.documents)
            yield from _unless_among(
                self.train_tokenizer, f"encode_tokens.{n}.tokenizer", e.tokenizer
            )
        for n, run in self.train.items():
            if run.tokens is not None:
                yield from _unless_among(self.encode_tokens, f"train.{n}.tokens", run.tokens)
        for n, run in self.runs.items():  # a template of dvc.yaml reaches no further than its line
            encoding = self.encode_tokens.get(run.tokens or "")
            if encoding is not None and encoding.tokenizer != run.tokens:
                remedy = f"give the encoding its tokenizer's name, {encoding.tokenizer}"
                yield True, f"runs.{n}.tokens", run.tokens, remedy


def _unless_among(names: Collection[str], key: str, value: str) -> Iterator[Check]:
    yield value not in names, key, value, f"choose {_one_of(names)}"


def _one_of(names) -> str:
    return "one of " + ", ".join(sorted(names)) if names else "nothing: none is declared"
