"""Knobs of training, evaluation and export, typed; and `runtime`, which changes no result.

Names, meanings, units and defaults stand here only; lib.core.settings holds the whole file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lib.core.kernel_choice import CHOICES, OPERATORS
from lib.core.refusal import refuse

# ---------------------------------------------------------------- train, runs, families


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Small runs beside a run, which its family names: what its result is compared with."""

    tokens: int = 20_000_000  # of each
    seeds: int = 2
    arms: tuple[str, ...] | None = None  # null: all that the family knows

    def __post_init__(self) -> None:
        refuse(
            self,
            (self.tokens < 1, "tokens", "use 1 or more"),
            (self.seeds < 1, "seeds", "use 1 or more"),
        )


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
    loss_on: Literal["all", "assistant"] = "all"  # assistant: of conversations, its turns alone
    # length: the first that is given, in this order
    steps: int | None = None
    epochs: float | None = None  # passes over all rows
    target_flops: float | None = None
    param_data_ratio: float | None = None  # tokens per scaling parameter
    batch_tokens: int | Literal["auto"] | None = None  # of one step over all ranks
    # shares over equal parts of the run, () = the whole of it in every step
    batch_ramp: tuple[float, ...] = ()  # of batch_tokens; rates follow its root
    context_ramp: tuple[float, ...] = ()  # of the rows, which are cut into shorter ones
    # optimizer; a family may have rates of its own
    optimizer: Literal["adamw", "adamw8bit", "muon", "normuon"] = "adamw"  # rule of the matrices
    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices
    moments: Literal["float32", "bfloat16"] = "float32"  # of adamw; bfloat16: 4 B a weight less
    # of linear layers; bf16_sr: gradients too, rounded stochastically by adamw; 4 B a weight less
    weights: Literal["fp32", "bf16_sr"] = "fp32"
    adamw_every: int = 1  # steps from one update of AdamW to the next, which gather gradients
    grad_clip: float | None = None  # global norm over all ranks and parameters, 0 = off
    skip_steps: int = 0  # updates that may be left out for a non-finite gradient before it stops
    # schedule
    schedule: (
        Literal["constant", "linear", "triangle", "cosine", "warmdown", "base", "modern"] | None
    ) = None
    warmup: int = 0  # steps
    warmdown_ratio: float = 0.2  # share of the steps that `warmdown` falls over
    final_lr: float = 0.0  # share of the peak that is left at the end
    # average of the weights
    ema_decay: float = 0.0  # 0 = none; else evaluation and the final model use the average
    ema_ramp: bool = False  # min(decay, (1 + t) / (10 + t))
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is the faster
    grad_wire: Literal["float32", "bfloat16"] = "float32"  # gradients of a streamed run on the bus
    # what is looked at on the way
    eval_every: int = 250  # steps between validations, 0 = only at the end
    eval_bytes: int | None = None  # validation text of one of them, null = all
    patience: int | None = None  # validations in a row without a better one that end the run
    sample_every: int = 0  # steps between samples, 0 = none
    controls: Controls | None = None  # null: none are trained

    def __post_init__(self) -> None:
        counts = ("warmup", "skip_steps", "eval_every", "sample_every")
        lengths = ("steps", "epochs", "target_flops", "param_data_ratio", "eval_bytes")
        shares = ("beta1", "beta2", "ema_decay")
        batch = self.batch_tokens
        refuse(
            self,
            *((getattr(self, n) < 0, n, "use 0 or more") for n in counts),
            *(
                (x is not None and not x > 0, n, "use a number above 0, or null")
                for n, x in ((n, getattr(self, n)) for n in lengths)
            ),
            *((not 0 <= getattr(self, n) < 1, n, "use 0 <= x < 1") for n in shares),
            (
                self.patience is not None and (self.patience < 1 or not self.eval_every),
                "patience",
                "use 1 or more, and eval_every above 0",
            ),
            (isinstance(batch, int) and batch < 1, "batch_tokens", "use 1 or more"),
            (
                self.epochs is not None and (self.steps is not None or not isinstance(batch, int)),
                "epochs",
                "give it without steps, and with a number of batch_tokens",
            ),
            *(
                (any(not 0 < x <= 1 for x in getattr(self, n)), n, "use 0 < x <= 1")
                for n in ("batch_ramp", "context_ramp")
            ),
            (
                bool(self.batch_ramp) and self.skip_steps > 0,
                "skip_steps",
                "use 0 with batch_ramp: steps have no one size to leave out",
            ),
            (self.adamw_every < 1, "adamw_every", "use 1 or more"),
            (
                self.adamw_every > 1 and self.optimizer == "adamw8bit",
                "adamw_every",
                "use 1 with adamw8bit",
            ),
            (
                self.weights == "bf16_sr" and self.precision not in ("auto", "bf16"),
                "precision",
                "use bf16 with weights: bf16_sr",
            ),
            (not self.lr > 0, "lr", "use a number above 0"),
            (not self.eps > 0, "eps", "use a number above 0"),
            (self.weight_decay < 0, "weight_decay", "use 0 or more"),
            ((self.grad_clip or 0) < 0, "grad_clip", "use 0 (off) or more"),
            (not 0 <= self.warmdown_ratio <= 1, "warmdown_ratio", "use 0 to 1"),
            (not 0 <= self.final_lr <= 1, "final_lr", "use 0 to 1"),
            (
                self.steps is not None and self.warmup > self.steps,
                "warmup",
                f"at most steps, {self.steps}",
            ),
        )

    def looks_at(self, step: int) -> bool:
        """Whether validation follows the `step`th update for its number alone."""
        return bool(self.eval_every) and step % self.eval_every == 0


# ---------------------------------------------------------------- runtime: changes no result


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where weights go during a run and at its end; the token comes from HF_TOKEN or the login."""

    repo: str  # owner/name
    every_steps: int = 1000
    private: bool = True

    def __post_init__(self) -> None:
        refuse(
            self,
            (self.repo.count("/") != 1, "repo", "write owner/name"),
            (self.every_steps < 1, "every_steps", "use 1 or more"),
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
    activation_bytes: int = 2**30  # graphs of one step kept by families that may run it twice
    memory_limit: int = 8 * 10**9  # bytes that a plan may take
    attention: Literal["auto", "flash", "flex", "sdpa"] = "auto"
    # auto: a Triton kernel where it runs and passes its self-test, else the PyTorch reference; or
    # by operator with a `default`. KUMIKI_KERNELS=reference in the environment wins.
    kernels: Literal["auto", "triton", "reference"] | Mapping[str, str] = "auto"
    deterministic: bool = False  # GPU: slower kernels whose sums have one order (the CPU's always)
    shard: Literal["none", "optimizer", "fsdp"] = "none"  # what ranks hold a part of
    # weights that wait in host memory (lib.nn.stream)
    stream: Literal["auto", "on", "off"] = "auto"  # auto: where the device cannot hold them
    stream_group: int | Literal["auto"] = "auto"  # micro-batches that one load of a block serves
    stream_slots: int = 3  # blocks on the device at once
    stream_resident: float = 0.0  # share of the blocks that stay on the device
    stream_boundaries: Literal["auto", "gpu", "host"] = "auto"  # where inputs of blocks wait
    stream_overlap_optimizer: Literal["auto", "off"] = "auto"  # update beside the next forward
    stream_pinned: bool = True  # page-locked host memory; false: slower, needs no permission
    device_memory_gb: float | None = None  # most that the device gives, null: all that is free
    log_every: int = 10  # steps
    checkpoint_every_steps: int = 500  # whichever comes first
    checkpoint_every_minutes: float = 10.0
    keep_last: int = 2  # checkpoints kept while a run goes on
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    wandb: Wandb = field(default_factory=Wandb)
    hub: Hub | None = None

    def __post_init__(self) -> None:
        rows = self.device_batch_size
        kernels = self.kernels if isinstance(self.kernels, Mapping) else {}
        choices, known = ", ".join(CHOICES), ("default", *OPERATORS)
        refuse(
            self,
            *((n not in known, f"kernels.{n}", n, f"choose {', '.join(known)}") for n in kernels),
            *(
                (x not in CHOICES, f"kernels.{n}", x, f"choose {choices}")
                for n, x in kernels.items()
            ),
            (isinstance(rows, int) and rows < 1, "device_batch_size", "use 1 or more"),
            (self.stream_slots < 2, "stream_slots", "use 2 or more"),
            (
                isinstance(self.stream_group, int) and self.stream_group < 1,
                "stream_group",
                "use auto, or 1 or more",
            ),
            (not 0 <= self.stream_resident <= 1, "stream_resident", "use 0 to 1"),
            (
                self.device_memory_gb is not None and not self.device_memory_gb > 0,
                "device_memory_gb",
                "use a number above 0, or null",
            ),
            (self.log_every < 1, "log_every", "use 1 or more"),
            (self.checkpoint_every_steps < 1, "checkpoint_every_steps", "use 1 or more"),
            (
                not self.checkpoint_every_minutes > 0,
                "checkpoint_every_minutes",
                "use a number above 0",
            ),
            (
                self.keep_last < 2,
                "keep_last",
                "use 2 or more: a damaged checkpoint needs an older one behind it",
            ),
            (self.threads < 1, "threads", "use 1 or more"),
            (self.workers < 1, "workers", "use 1 or more"),
            (
                self.eval_tokens is not None and self.eval_tokens < 1,
                "eval_tokens",
                "use 1 or more, or null",
            ),
            (self.download_workers < 1, "download_workers", "use 1 or more"),
        )


# ---------------------------------------------------------------- eval, export


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """How a long document is cut into windows (evaluation.md 2.3)."""

    stride: int | None = None  # targets from one window to the next; null: half the context

    def __post_init__(self) -> None:
        bad = self.stride is not None and self.stride < 1
        refuse(self, (bad, "stride", "use 1 or more, or null"))


@dataclass(frozen=True, kw_only=True)
class Core:
    """DCLM's CORE, or the part of it that a bundle holds (evaluation.md 3)."""

    enabled: Literal["auto"] | bool = "auto"  # auto: where there is a bundle
    bundle: str | None = None  # a source of kind archive, or a folder with core.yaml
    max_per_task: int = 0  # rows of a task, 0 = all; a capped run is core_partial
    max_context: int | None = None  # ids of a prompt; null: what the model was trained on

    def __post_init__(self) -> None:
        limit, ways = self.max_context, "name a folder with core.yaml, or a source of kind archive"
        refuse(
            self,
            (self.enabled is True and not self.bundle, "bundle", ways),
            (self.max_per_task < 0, "max_per_task", "use 0 (all) or more"),
            (limit is not None and limit < 2, "max_context", "use 2 or more, or null"),
        )


@dataclass(frozen=True, kw_only=True)
class Cloze:
    """Tasks made from the validation text (evaluation.md 6)."""

    items: int = 400  # of each task at most, 0 = no cloze
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(self, (self.items < 0, "items", "use 0 (off) or more"))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Section `eval`: how finished models are measured, the same way for all families."""

    bpb: BitsPerByte = field(default_factory=BitsPerByte)
    core: Core = field(default_factory=Core)
    cloze: Cloze = field(default_factory=Cloze)
    samples: bool = True  # texts of the model beside its numbers
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the matmuls; auto: fp32 on a CPU


@dataclass(frozen=True, kw_only=True)
class Export:
    """Section `export`: the layout of exported models."""

    # auto: transformers' own class where it has the architecture, else auto_map, our code
    form: Literal["auto", "native", "auto_map"] = "auto"
    gguf: bool = False  # model.gguf beside it, by llama.cpp's converter
