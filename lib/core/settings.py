"""Every knob of params.yaml, typed: the one place where names, meanings, units and defaults stand.

A section of params.yaml is a dataclass here; `lib.core.params` fills it strictly (unknown keys,
wrong types and contradictions are errors). `__post_init__` refuses contradictions through `refuse`;
what ties sections together stands in `Settings`. Defaults are given here only, params.yaml shows
them. Model sections are typed by `Config` in each file of lib/models. Everything but `runtime` is
identity: it enters fingerprints. `runtime` changes no byte of any output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class Refused(ValueError):
    """Contradictions found in one dataclass: a list of (key, value, remedy)."""

    def __init__(self, problems: list[tuple[str, object, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {value}; {remedy}" for key, value, remedy in problems))


def refuse(*checks: tuple[bool, str, object, str]) -> None:
    """Raise `Refused` with every (bad, key, value, remedy) whose first element is true."""
    problems = [(key, value, remedy) for bad, key, value, remedy in checks if bad]
    if problems:
        raise Refused(problems)


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
            (not self.packages, "packages", self.packages, "name at least one package"),
            (self.min_chars < 1, "min_chars", self.min_chars, "use 1 or more"),
            (not 0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "use 0 < x < 1"),
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
            (
                http == local,
                "repo",
                self.repo,
                "give either repo (or a pattern of its own) or train",
            ),
            (
                local and not self.val,
                "val",
                self.val,
                "name the validation file; it is never guessed",
            ),
            (http and not self.count, "count", self.count, "say how many shards the host has"),
            (
                http and not self.val_name,
                "val_name",
                self.val_name,
                "pin the validation shard by name",
            ),
            (http and (self.shards or 0) < 1, "shards", self.shards, "use 1 or more"),
            (
                bool(http and self.count and self.shards and self.shards > self.count - 1),
                "shards",
                self.shards,
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
    join: str = "{content}\n"  # how one message is written; the last newline is dropped
    shuffle: SampleShuffle | None = None

    def __post_init__(self) -> None:
        both = (self.text_field is None) == (self.messages_field is None)
        refuse(
            (both, "text_field", self.text_field, "give either text_field or messages_field"),
            (
                self.max_train_samples < 1,
                "max_train_samples",
                self.max_train_samples,
                "use 1 or more",
            ),
            (self.max_eval_samples < 1, "max_eval_samples", self.max_eval_samples, "use 1 or more"),
            ("{content}" not in self.join, "join", self.join, "it must contain {content}"),
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
            (not self.train, "train", self.train, "name at least one file"),
            (not self.val, "val", self.val, "name the validation files; they are never guessed"),
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
            (not self.paths, "paths", self.paths, "name at least one file or folder"),
            (not one, "val", self.val, "give either val or val_fraction"),
            (not 0 < fraction < 1, "val_fraction", fraction, "use 0 < x < 1"),
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
            ((self.url is None) == (self.path is None), "url", self.url, "give either url or path"),
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
            (not self.sources, "sources", dict(self.sources), "name at least one source"),
            *(
                (not weight > 0, f"sources.{name}", weight, "weights are above 0")
                for name, weight in self.sources.items()
            ),
            (self.min_chars < 1, "min_chars", self.min_chars, "use 1 or more"),
            (self.max_chars < self.min_chars, "max_chars", self.max_chars, "at least min_chars"),
            (
                not 0 <= self.max_drop_fraction <= 1,
                "max_drop_fraction",
                self.max_drop_fraction,
                "use 0 to 1",
            ),
            (self.max_epochs < 1, "max_epochs", self.max_epochs, "use 1 or more"),
            (
                self.max_epochs > 1 and self.on_exhausted != "repeat",
                "max_epochs",
                self.max_epochs,
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
            (self.vocab_size < 265, "vocab_size", self.vocab_size, "at least 265 = 256 bytes + 9"),
            (self.doc_cap < 1, "doc_cap", self.doc_cap, "use 1 or more"),
            (
                not 1 <= self.max_chars <= 2_000_000_000,
                "max_chars",
                self.max_chars,
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
            (self.vocab_size < 300, "vocab_size", self.vocab_size, "use 300 or more"),
            (
                not 0.9 <= self.character_coverage <= 1,
                "character_coverage",
                self.character_coverage,
                "use 0.9 to 1",
            ),
            (self.sample_bytes < 1000, "sample_bytes", self.sample_bytes, "use 1000 or more"),
            (self.threads < 1, "threads", self.threads, "use 1 or more"),
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
        refuse((self.vocab_size != 50_257, "vocab_size", self.vocab_size, "GPT-2 has 50257"))


Tokenizer = BpeTokenizer | SentencePieceTokenizer | Gpt2Tokenizer


# ---------------------------------------------------------------- encode_tokens (data.md 9, 10)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One way of turning a recipe's documents into token files and packed rows."""

    documents: str  # a recipe of extract_texts
    tokenizer: str  # a name of train_tokenizer
    boundary: Literal["bos", "eos", "both", "none"] = "bos"
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
            (self.context < 2, "context", self.context, "use 2 or more"),
            (self.buffer < 1, "buffer", self.buffer, "use 1 or more"),
            (self.n_tasks < 1, "n_tasks", self.n_tasks, "use 1 or more"),
            (
                self.truncate_tokens is not None and self.truncate_tokens < 1,
                "truncate_tokens",
                self.truncate_tokens,
                "use 1 or more, or null",
            ),
            (
                self.max_tokens is not None and self.max_tokens < 1,
                "max_tokens",
                self.max_tokens,
                "use 1 or more, or null",
            ),
            (
                self.packing == "bestfit"
                and self.crop == "requeue"
                and self.boundary in ("none", "eos"),
                "crop",
                self.crop,
                "requeue puts the boundary id in front: use boundary bos or both",
            ),
        )


# ---------------------------------------------------------------- train, runs, families


@dataclass(frozen=True, kw_only=True)
class Train:
    """One training run: `train.defaults` < `families.<run>` < `train.<run>` or `runs.<run>`.

    Null leaves the choice to the family (`Family.defaults`), for `steps` and its two alternatives
    likewise. Loaded, `model` is the family's `Config` with this run's overlay in it.
    """

    family: str | None = None  # file in lib/models; null: the run's own name
    tokens: str | None = None  # the encoding it reads, a name of encode_tokens
    model: Any = None  # overlay of model.<family> for this run
    init_from: str | None = None  # folder of another run's final model: weights only, step 0
    # length: the first that is given, in this order
    steps: int | None = None
    target_flops: float | None = None
    param_data_ratio: float | None = None  # tokens per scaling parameter
    batch_tokens: int | Literal["auto"] | None = None  # of one step over all ranks
    # optimizer; a family may have rates of its own
    optimizer: Literal["adamw", "muon", "normuon"] = "adamw"  # rule of the matrices
    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices
    grad_clip: float | None = None  # global norm over all ranks and parameters, 0 = off
    skip_steps: int = 0  # updates that may be left out for a non-finite gradient before it stops
    # schedule
    schedule: Literal["constant", "linear", "cosine", "warmdown", "base", "modern"] | None = None
    warmup: int = 0  # steps
    warmdown_ratio: float = 0.2  # share of the steps that `warmdown` falls over
    final_lr: float = 0.0  # share of the peak that is left at the end
    # average of the weights
    ema_decay: float = 0.0  # 0 = none; else evaluation and the final model use the average
    ema_ramp: bool = False  # min(decay, (1 + t) / (10 + t))
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is native
    # what is looked at on the way
    eval_every: int = 250  # steps between validations, 0 = only at the end
    eval_bytes: int | None = None  # validation text of one of them, null = all
    sample_every: int = 0  # steps between samples, 0 = none

    def __post_init__(self) -> None:
        counts = ("warmup", "skip_steps", "eval_every", "sample_every")
        lengths = ("steps", "target_flops", "param_data_ratio", "eval_bytes")
        shares = ("beta1", "beta2", "ema_decay")
        batch = self.batch_tokens
        refuse(
            *((getattr(self, n) < 0, n, getattr(self, n), "use 0 or more") for n in counts),
            *(
                (x is not None and not x > 0, n, x, "use a number above 0, or null")
                for n, x in ((n, getattr(self, n)) for n in lengths)
            ),
            *(
                (not 0 <= getattr(self, n) < 1, n, getattr(self, n), "use 0 <= x < 1")
                for n in shares
            ),
            (isinstance(batch, int) and batch < 1, "batch_tokens", batch, "use 1 or more"),
            (not self.lr > 0, "lr", self.lr, "use a number above 0"),
            (not self.eps > 0, "eps", self.eps, "use a number above 0"),
            (self.weight_decay < 0, "weight_decay", self.weight_decay, "use 0 or more"),
            ((self.grad_clip or 0) < 0, "grad_clip", self.grad_clip, "use 0 (off) or more"),
            (
                not 0 <= self.warmdown_ratio <= 1,
                "warmdown_ratio",
                self.warmdown_ratio,
                "use 0 to 1",
            ),
            (not 0 <= self.final_lr <= 1, "final_lr", self.final_lr, "use 0 to 1"),
            (
                self.steps is not None and self.warmup > self.steps,
                "warmup",
                self.warmup,
                f"at most steps, {self.steps}",
            ),
        )


# ---------------------------------------------------------------- runtime: changes no result


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where weights are pushed while a run goes on; the token comes from HF_TOKEN or the login."""

    repo: str  # owner/name
    every_steps: int = 1000
    private: bool = True

    def __post_init__(self) -> None:
        refuse(
            (self.repo.count("/") != 1, "repo", self.repo, "write owner/name"),
            (self.every_steps < 1, "every_steps", self.every_steps, "use 1 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Settings of the Weights & Biases tracker; WANDB_MODE of the environment wins over `mode`."""

    project: str = "kumiki"
    run_name: str | None = None  # null: the run's name
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How and where things run. Enters no fingerprint, is listed by no stage."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 2  # fixed: summation order must not follow the machine's core count
    workers: int = 2  # processes of the data stages
    eval_tokens: int | None = None  # padded tokens that evaluation runs at once, null: by device
    download_workers: int = 4
    executor: Literal["local", "ray"] = "local"
    verify: Literal["stamp", "full"] = "stamp"  # full: hash every input at every start
    log_every_s: float = 10.0  # seconds between progress lines where there is no terminal
    allow_private_hosts: tuple[str, ...] = ()  # hosts that may resolve to private addresses
    max_rate: int | None = None  # bytes per second of all downloads together
    stop_grace_s: float = 60.0  # seconds a launcher waits after forwarding a signal
    # training
    device_batch_size: int | Literal["auto"] = "auto"  # most rows on one device at once
    compile: bool = False  # torch.compile of what the family names
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory
    attention: Literal["auto", "flash", "flex", "sdpa"] = "auto"
    deterministic: bool = False  # GPU: slower kernels whose sums have one order (the CPU's always)
    shard: Literal["none", "optimizer", "fsdp"] = "none"  # what ranks hold a part of
    log_every: int = 10  # steps
    checkpoint_every_steps: int = 500  # whichever comes first
    checkpoint_every_minutes: float = 10.0
    keep_last: int = 2  # checkpoints kept while a run goes on
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    wandb: Wandb = field(default_factory=Wandb)
    hub: Hub | None = None

    def __post_init__(self) -> None:
        rows = self.device_batch_size
        refuse(
            (isinstance(rows, int) and rows < 1, "device_batch_size", rows, "use 1 or more"),
            (self.log_every < 1, "log_every", self.log_every, "use 1 or more"),
            (
                self.checkpoint_every_steps < 1,
                "checkpoint_every_steps",
                self.checkpoint_every_steps,
                "use 1 or more",
            ),
            (
                not self.checkpoint_every_minutes > 0,
                "checkpoint_every_minutes",
                self.checkpoint_every_minutes,
                "use a number above 0",
            ),
            (
                self.keep_last < 2,
                "keep_last",
                self.keep_last,
                "use 2 or more: a damaged checkpoint needs an older one behind it",
            ),
            (self.threads < 1, "threads", self.threads, "use 1 or more"),
            (self.workers < 1, "workers", self.workers, "use 1 or more"),
            (
                self.eval_tokens is not None and self.eval_tokens < 1,
                "eval_tokens",
                self.eval_tokens,
                "use 1 or more, or null",
            ),
            (self.download_workers < 1, "download_workers", self.download_workers, "use 1 or more"),
        )


# ---------------------------------------------------------------- eval, export


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """How a long document is cut into windows (evaluation.md 2.3)."""

    stride: int | None = None  # targets from one window to the next; null: half the context

    def __post_init__(self) -> None:
        bad = self.stride is not None and self.stride < 1
        refuse((bad, "stride", self.stride, "use 1 or more, or null"))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Section `eval`: how finished models are measured, the same way for all families."""

    bpb: BitsPerByte = field(default_factory=BitsPerByte)
    samples: bool = True  # texts of the model beside its numbers
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the matmuls; auto: fp32 on a CPU


@dataclass(frozen=True, kw_only=True)
class Export:
    """Section `export`: the layout of exported models."""

    # auto: transformers' own class where it has the architecture, else auto_map, our code
    form: Literal["auto", "native", "auto_map"] = "auto"


# ---------------------------------------------------------------- the whole file


@dataclass(frozen=True, kw_only=True)
class Settings:
    """params.yaml with its active profile laid over it."""

    profile: str
    seed: int = 1234
    download_shards: DownloadShards = field(default_factory=DownloadShards)
    extract_texts: ExtractTexts = field(default_factory=ExtractTexts)
    train_tokenizer: Mapping[str, Tokenizer] = field(default_factory=dict)
    encode_tokens: Mapping[str, Encoding] = field(default_factory=dict)
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
        )


def _one_of(names) -> str:
    return "one of " + ", ".join(sorted(names)) if names else "nothing: none is declared"
