"""Knobs of the data half, typed: sources, recipes, tokenizers, encodings.

Names, meanings, units and defaults stand here only; lib.core.settings holds the whole file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lib.core.refusal import refuse

# ---------------------------------------------------------------- download_shards (data.md 4)


@dataclass(frozen=True, kw_only=True)
class EmbeddedSource:
    """English documentation that lies in the Python environment itself; no network."""

    kind: Literal["embedded"]
    packages: tuple[str, ...] = ("python", "torch", "numpy", "pandas", "pyarrow", "datasets")
    min_chars: int = 100  # shorter docstrings are no documents
    val_fraction: float = 0.05  # share of bytes, by whole files

    def __post_init__(self) -> None:
        refuse(
            self,
            (not self.packages, "packages", "name at least one package"),
            (self.min_chars < 1, "min_chars", "use 1 or more"),
            (not 0 < self.val_fraction < 1, "val_fraction", "use 0 < x < 1"),
        )


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Parquet shards with one text column, over HTTP (`repo`) or local (`train`, `val`)."""

    kind: Literal["parquet"]
    text_column: str = "text"
    # over HTTP
    repo: str | None = None  # dataset repository on the hub, owner/name
    revision: str = "main"  # branch, tag or commit; resolved to a commit, which is written down
    pattern: str = "https://huggingface.co/datasets/{repo}/resolve/{revision}/shard_{i:05d}.parquet"
    count: int | None = None  # shards that exist at the host
    shards: int | None = None  # training shards wanted: indices 0 .. shards-1 without the val shard
    val_name: str | None = None  # file name of the validation shard; always fetched
    checksums: str | None = None  # file with lines `<sha256>  <name>`
    max_bytes: int = 2 * 1024**3  # cap of one body
    # local files
    folder: str = "data/local"
    train: tuple[str, ...] = ()  # globs below folder
    val: tuple[str, ...] = ()  # names below folder

    def __post_init__(self) -> None:
        http = self.repo is not None or "{repo}" not in self.pattern
        local = bool(self.train)
        refuse(
            self,
            (http == local, "repo", "give either repo (or a pattern of its own) or train"),
            (local and not self.val, "val", "name the validation file; it is never guessed"),
            (http and not self.count, "count", "say how many shards the host has"),
            (http and not self.val_name, "val_name", "pin the validation shard by name"),
            (http and (self.shards or 0) < 1, "shards", "use 1 or more"),
            (
                bool(http and self.count and self.shards and self.shards > self.count - 1),
                "shards",
                f"at most {(self.count or 0) - 1}: one of {self.count} is the validation shard",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SampleShuffle:
    """Seeded buffer shuffle of a `datasets` stream."""

    seed: int
    buffer: int = 10_000


@dataclass(frozen=True, kw_only=True)
class HubDatasetSource:
    """A dataset read by `datasets` in streaming mode and materialised as Parquet shards."""

    kind: Literal["hf_dataset"]
    repo: str  # owner/name, or a local folder of data files
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_from_train: bool = False  # take the eval samples from the head of the train stream
    max_train_samples: int
    max_eval_samples: int
    text_field: str | tuple[str, ...] | None = None  # a list of fields is joined by newlines
    messages_field: str | None = None  # list of {role, content}
    # How one message is written, the last newline dropped; or `chat`: framed for `template: chat`.
    join: str = "{content}\n"
    shuffle: SampleShuffle | None = None

    def __post_init__(self) -> None:
        both = (self.text_field is None) == (self.messages_field is None)
        refuse(
            self,
            (both, "text_field", "give either text_field or messages_field"),
            (self.max_train_samples < 1, "max_train_samples", "use 1 or more"),
            (self.max_eval_samples < 1, "max_eval_samples", "use 1 or more"),
            (
                "{content}" not in self.join and self.join != "chat",
                "join",
                "it must contain {content}, or be chat",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class JsonlSource:
    """JSON lines, gzip or zstd by file name, one record with a text field a line."""

    kind: Literal["jsonl_gz"]
    folder: str = "data/local"
    train: tuple[str, ...]  # names in the order they are read
    val: tuple[str, ...]
    required: Literal["val", "all"] = "val"  # a missing file that is not required is a warning
    text_field: str = "text"

    def __post_init__(self) -> None:
        refuse(
            self,
            (not self.train, "train", "name at least one file"),
            (not self.val, "val", "name the validation files; they are never guessed"),
            (
                bool(set(self.train) & set(self.val)),
                "val",
                sorted(set(self.train) & set(self.val)),
                "a file is either train or val",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Plain UTF-8 text files, one document a line or a file."""

    kind: Literal["txt"]
    paths: tuple[str, ...]  # files, or folders searched for *.txt in sorted order
    val: tuple[str, ...] = ()  # the same for validation
    val_fraction: float | None = None  # or this share of the documents, by sha256 of the text
    document: Literal["line", "file"] = "line"

    def __post_init__(self) -> None:
        one = bool(self.val) != (self.val_fraction is not None)
        fraction = self.val_fraction if self.val_fraction is not None else 0.5
        refuse(
            self,
            (not self.paths, "paths", "name at least one file or folder"),
            (not one, "val", "give either val or val_fraction"),
            (not 0 < fraction < 1, "val_fraction", "use 0 < x < 1"),
        )


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """A file at a URL, known by its sha256; `bytes` caps the body."""

    url: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class FilesSource:
    """Named files with pinned sha256, such as the two files of GPT-2's tokenizer."""

    kind: Literal["files"]
    files: Mapping[str, PinnedFile]


@dataclass(frozen=True, kw_only=True)
class ArchiveSource:
    """A zip or tar archive, fetched or local, unpacked under the rules of reliability.md 8.3."""

    kind: Literal["archive"]
    url: str | None = None
    path: str | None = None  # a local archive or an unpacked folder
    sha256: str | None = None  # pinned; without it the hash of the first fetch is enforced after
    keep: tuple[str, ...] = ("**",)  # globs of the members that are written

    def __post_init__(self) -> None:
        refuse(
            self,
            ((self.url is None) == (self.path is None), "url", "give either url or path"),
        )


Source = (
    EmbeddedSource
    | ParquetSource
    | HubDatasetSource
    | JsonlSource
    | TextSource
    | FilesSource
    | ArchiveSource
)


@dataclass(frozen=True, kw_only=True)
class DownloadShards:
    """Section `download_shards`: what is read, by name. Every source declared here is fetched."""

    sources: Mapping[str, Source] = field(default_factory=dict)


# ---------------------------------------------------------------- extract_texts (data.md 5 to 7)


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Which duplicates are dropped, within a recipe, validation first."""

    exact: bool = True  # equal after NFKC, lower case, whitespace runs -> one space
    near: bool = False  # exact Jaccard >= 0.8 of word 5-grams, candidates by MinHash


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One mixture of sources and how its texts are cleaned."""

    sources: Mapping[str, float]  # source -> weight > 0, normalised to sum 1
    unicode: Literal["none", "nfc", "nfkc"] = "none"
    min_chars: int = 1
    max_chars: int = 1_000_000  # longer documents are split, never cut
    max_drop_fraction: float = 0.05  # rejected + dropped (dedup apart) above this stops the stage
    on_exhausted: Literal["stop", "repeat", "continue"] = "stop"
    max_epochs: int = 1  # times a source may be seen under `repeat`
    dedup: Dedup = field(default_factory=Dedup)
    plain_text: bool = False  # also write <split>.txt, one document a line, newlines as spaces

    def __post_init__(self) -> None:
        refuse(
            self,
            (not self.sources, "sources", "name at least one source"),
            *(
                (not weight > 0, f"sources.{name}", weight, "weights are above 0")
                for name, weight in self.sources.items()
            ),
            (self.min_chars < 1, "min_chars", "use 1 or more"),
            (self.max_chars < self.min_chars, "max_chars", "at least min_chars"),
            (not 0 <= self.max_drop_fraction <= 1, "max_drop_fraction", "use 0 to 1"),
            (self.max_epochs < 1, "max_epochs", "use 1 or more"),
            (
                self.max_epochs > 1 and self.on_exhausted != "repeat",
                "max_epochs",
                "only on_exhausted: repeat sees a source twice",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class ExtractTexts:
    """Section `extract_texts`: the recipes, by name."""

    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    n_tasks: int = 1  # fixed division of the shards for job arrays; part of the identity


# ---------------------------------------------------------------- train_tokenizer (data.md 8)


@dataclass(frozen=True, kw_only=True)
class BpeTokenizer:
    """Byte-level BPE in the cl100k manner, trained on a recipe."""

    kind: Literal["bpe"]
    documents: str  # a recipe of extract_texts
    vocab_size: int = 4096  # includes 256 bytes and 9 specials
    trainer: Literal["rustbpe", "hf"] = "rustbpe"
    doc_cap: int = 10_000  # characters of a document that are counted
    max_chars: int = 2_000_000_000  # characters of training text in all

    def __post_init__(self) -> None:
        refuse(
            self,
            (self.vocab_size < 265, "vocab_size", "at least 265 = 256 bytes + 9"),
            (self.doc_cap < 1, "doc_cap", "use 1 or more"),
            (
                not 1 <= self.max_chars <= 2_000_000_000,
                "max_chars",
                "at most 2e9: the trainer counts in 32 bits",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer:
    """SentencePiece BPE: `lossless` gives every byte back, `seed` is what the guide trains."""

    kind: Literal["sentencepiece"]
    documents: str
    vocab_size: int = 16_000
    recipe: Literal["lossless", "seed"] = "lossless"
    character_coverage: float = 0.9995
    sample_bytes: int = 100_000_000  # training text, documents chosen by hash
    threads: int = 2  # identity: the trainer's result may follow its thread count
    file: str | None = None  # a ready-made .model file instead of training

    def __post_init__(self) -> None:
        refuse(
            self,
            (self.vocab_size < 300, "vocab_size", "use 300 or more"),
            (not 0.9 <= self.character_coverage <= 1, "character_coverage", "use 0.9 to 1"),
            (self.sample_bytes < 1000, "sample_bytes", "use 1000 or more"),
            (self.threads < 1, "threads", "use 1 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class Gpt2Tokenizer:
    """GPT-2's own byte-level BPE, 50,257 ids; taken from a source, a folder or tiktoken's cache."""

    kind: Literal["gpt2"]
    documents: str  # the recipe whose validation text the report measures
    source: str | None = None  # a `files` source that holds encoder.json and vocab.bpe
    folder: str | None = None  # or a folder that holds them
    vocab_size: int = 50_257

    def __post_init__(self) -> None:
        refuse(self, (self.vocab_size != 50_257, "vocab_size", "GPT-2 has 50257"))


Tokenizer = BpeTokenizer | SentencePieceTokenizer | Gpt2Tokenizer


# ---------------------------------------------------------------- encode_tokens (data.md 9, 10)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One way of turning a recipe's documents into token files and packed rows."""

    documents: str  # a recipe of extract_texts
    tokenizer: str  # a name of train_tokenizer
    boundary: Literal["bos", "eos", "both", "none"] = "bos"
    template: Literal["none", "chat"] = "none"  # chat: turns of `join: chat` by their ids
    truncate_tokens: int | None = None  # content ids kept of a training document
    context: int = 256  # T: a row has T + 1 ids
    packing: Literal["bestfit", "stream"] = "bestfit"
    crop: Literal["drop", "requeue"] = "drop"  # what best fit does with the cut tail
    buffer: int = 1000  # documents best fit may choose from
    order: Literal["as_is", "shuffled"] = "as_is"
    seed: int = 0  # of the shuffled order
    max_tokens: int | None = None  # ends the stream with the document that reaches it
    n_tasks: int = 1  # fixed division of the work; part of the identity

    def __post_init__(self) -> None:
        refuse(
            self,
            (self.context < 2, "context", "use 2 or more"),
            (self.buffer < 1, "buffer", "use 1 or more"),
            (self.n_tasks < 1, "n_tasks", "use 1 or more"),
            (
                self.truncate_tokens is not None and self.truncate_tokens < 1,
                "truncate_tokens",
                "use 1 or more, or null",
            ),
            (
                self.max_tokens is not None and self.max_tokens < 1,
                "max_tokens",
                "use 1 or more, or null",
            ),
            (
                self.packing == "bestfit"
                and self.crop == "requeue"
                and self.boundary in ("none", "eos"),
                "crop",
                "requeue puts the boundary id in front: use boundary bos or both",
            ),
        )


# ---------------------------------------------------------------- precompute_embeddings


@dataclass(frozen=True, kw_only=True)
class Gpt2Table:
    """GPT-2's token table and final norm, one pinned file."""

    url: str = (
        "https://huggingface.co/openai-community/gpt2/resolve/"
        "607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors"
    )
    bytes: int = 548_105_171
    sha256: str = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
    # of GPT-2's own tokenizer: row i is the vector of its id i
    tokenizer: str = "5695a11eb4a58ad1456c237fec6b1525c5224639ce309a3377d20fdfdcbc411a"


@dataclass(frozen=True, kw_only=True)
class CheckpointTable:
    """A token table of a model of ours."""

    path: str = "checkpoints/gpt/final"
    tensor: str = "wte.weight"


@dataclass(frozen=True, kw_only=True)
class RandomTable:
    """Seeded N(0, 1) rows."""

    width: int = 128
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class HiddenVectors:
    """Of the residual stream of the model at `checkpoint.path`, in windows from a document's start.

    model.cvfp.hidden repeats them: the model holds these blocks.
    """

    layer: int | None = None  # blocks passed, null: all
    context: int | None = None  # tokens of a window, null: as the model was trained


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Section `precompute_embeddings`: the vectors that context vectors are made from."""

    source: Literal["gpt2", "checkpoint", "hidden", "random"] = "checkpoint"
    mode: Literal["memmap", "gather"] = "memmap"  # gather: the table alone, the same numbers
    dtype: Literal["float16", "bfloat16"] = "float16"  # of the stored vectors
    chunk_tokens: int = 1_000_000  # one unit of work
    keep_source: bool = True  # of gpt2: the downloaded file
    gpt2: Gpt2Table = field(default_factory=Gpt2Table)
    checkpoint: CheckpointTable = field(default_factory=CheckpointTable)
    hidden: HiddenVectors = field(default_factory=HiddenVectors)
    random: RandomTable = field(default_factory=RandomTable)

    def __post_init__(self) -> None:
        refuse(
            self,
            (self.chunk_tokens < 1, "chunk_tokens", "use 1 or more"),
            (self.random.width < 1, "random.width", "use 1 or more"),
            *(
                ((getattr(self.hidden, n) or 1) < 1, f"hidden.{n}", "use 1 or more, or null")
                for n in ("layer", "context")
            ),
            (self.source == "hidden" and self.mode == "gather", "mode",
             "hidden states are no function of the id: use mode: memmap"),
        )  # fmt: skip
