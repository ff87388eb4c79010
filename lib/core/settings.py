"""params.yaml, typed: the whole file, and what ties its sections together.

A section is a dataclass in data_settings.py or run_settings.py; `lib.core.params` fills it strictly
(unknown keys, wrong types and contradictions are errors). Model sections are typed by `Config` in
each file of lib/models. Everything but `runtime` is identity: it enters fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from lib.core.refusal import refuse
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
        sources, recipes = self.download_shards.sources, self.extract_texts.recipes
        used = {name for recipe in recipes.values() for name in recipe.sources}
        used |= {getattr(t, "source", None) for t in self.train_tokenizer.values()}
        text = {n for n, s in sources.items() if not isinstance(s, FilesSource | ArchiveSource)}
        maker: dict[str | None, str] = {n: e.tokenizer for n, e in self.encode_tokens.items()}
        refuse(
            *(
                (
                    s not in text,
                    f"extract_texts.recipes.{r}.sources.{s}",
                    s,
                    f"choose {_one_of(text)}",
                )
                for r, recipe in recipes.items()
                for s in recipe.sources
            ),
            *(
                (
                    name not in used and not isinstance(source, ArchiveSource),
                    f"download_shards.sources.{name}",
                    "in no recipe",
                    "name it in extract_texts.recipes, or remove it",
                )
                for name, source in sources.items()
            ),
            *(
                (
                    t.documents not in recipes,
                    f"train_tokenizer.{n}.documents",
                    t.documents,
                    f"choose {_one_of(recipes)}",
                )
                for n, t in self.train_tokenizer.items()
            ),
            *(
                (
                    isinstance(t, Gpt2Tokenizer)
                    and t.source is not None
                    and t.source not in sources,
                    f"train_tokenizer.{n}.source",
                    getattr(t, "source", None),
                    f"choose {_one_of(sources)}",
                )
                for n, t in self.train_tokenizer.items()
            ),
            *(
                (
                    e.documents not in recipes,
                    f"encode_tokens.{n}.documents",
                    e.documents,
                    f"choose {_one_of(recipes)}",
                )
                for n, e in self.encode_tokens.items()
            ),
            *(
                (
                    e.tokenizer not in self.train_tokenizer,
                    f"encode_tokens.{n}.tokenizer",
                    e.tokenizer,
                    f"choose {_one_of(self.train_tokenizer)}",
                )
                for n, e in self.encode_tokens.items()
            ),
            *(
                (
                    t.tokens is not None and t.tokens not in self.encode_tokens,
                    f"train.{n}.tokens",
                    t.tokens,
                    f"choose {_one_of(self.encode_tokens)}",
                )
                for n, t in self.train.items()
            ),
            *(  # a template of dvc.yaml reaches no further than the line of the run
                (
                    maker.get(t.tokens, t.tokens) != t.tokens,
                    f"runs.{n}.tokens",
                    t.tokens,
                    f"give the encoding its tokenizer's name, {maker.get(t.tokens)}",
                )
                for n, t in self.runs.items()
            ),
        )


def _one_of(names) -> str:
    return "one of " + ", ".join(sorted(names)) if names else "nothing: none is declared"
