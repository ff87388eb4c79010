"""A toy project whose stages are killed everywhere, in a process of its own.

`python -m tests.faults.toy FOLDER CHAIN kill:N twice:N ENOSPC:N EIO:N SIGTERM:N SIGINT:N` strikes
the steps of a chain (or one step), in each of these ways at every N-th change of the file system,
and prints {step: {way: [points, N]}}. A fresh interpreter, because forks of a process in which Rust
or OpenMP has started threads hang; one for all ways, because it takes longer than 20 points.

A new stage is one line in `STEPS`; a new family has its steps because its file is there, and a line
in `MODELS` where its first size of the contract suite is not the one to use here.
"""

from __future__ import annotations

import argparse
import errno
import gzip
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.core import artifact, chunkstore, dag, params, stage
from lib.core.artifact import Manifest
from lib.data import dedup
from lib.models import families
from tests.conftest import ROOT
from tests.faults.crash import enumerate_crashes, in_child, tree

CONTEXT = 64  # of rows and models; samples take most of it
MODELS = {"gpt": {"depth": 1, "width": 16, "heads": 2, "context": CONTEXT}}
DATA = """
profile: small
seed: 7
download_shards:
  sources:
    notes: {kind: jsonl_gz, folder: notes, train: [a.jsonl.gz, b.jsonl.gz], val: [v.jsonl.gz]}
extract_texts:
  recipes:
    notes: {sources: {notes: 1.0}, min_chars: 5, dedup: {exact: true, near: true}}
train_tokenizer:
  bpe: {kind: bpe, documents: notes, vocab_size: 300}
  spm: {kind: sentencepiece, documents: notes, vocab_size: 340, sample_bytes: 100000}
encode_tokens:
  bpe: {documents: notes, tokenizer: bpe, context: CONTEXT, crop: requeue}
profiles:
  small: {}
runtime: {workers: 1, threads: 1, device: cpu, checkpoint_every_steps: 1, device_batch_size: 2}
"""
# One run of every family: steps, a validation and a checkpoint in each kind of place.
TRAIN = {
    "steps": 3, "batch_tokens": 4 * CONTEXT, "tokens": "bpe", "ema_decay": 0.9,
    "eval_every": 2, "eval_bytes": 300, "lr": 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One stage with its arguments, and the steps that have run before it."""

    words: tuple[str, ...]
    after: tuple[str, ...] = ()


STEPS: dict[str, Step] = {
    "download": Step(("download_shards",)),
    "extract": Step(("extract_texts",), ("download",)),
    "bpe": Step(("train_tokenizer", "--name", "bpe"), ("extract",)),
    "spm": Step(("train_tokenizer", "--name", "spm"), ("extract",)),
    "encode": Step(("encode_tokens", "--name", "bpe"), ("bpe",)),
}
RUNS = {name: name for name in families()}  # run -> family
for _run in RUNS:
    STEPS[f"train_{_run}"] = Step(("pretrain", "--run", _run), ("encode",))
    STEPS[f"evaluate_{_run}"] = Step(("evaluate", "--run", _run), (f"train_{_run}",))
    STEPS[f"export_{_run}"] = Step(("export", "--run", _run), (f"train_{_run}",))
THIN = 8  # trainer, evaluation, export are one code for all: gpt at each point, others at an eighth
SECTIONS: dict[str, dict] = {}  # of params.yaml, beside those in DATA
if "cvfp" in RUNS:  # embeddings of a trained table, then two phases
    _rows = ("--embeddings", "data/embeddings.manifest.json")
    SECTIONS["precompute_embeddings"] = {"source": "checkpoint", "chunk_tokens": 1000}
    RUNS["phase1_cvfp"] = "cvfp"
    STEPS["embed"] = Step(("precompute_embeddings",), ("train_gpt",))
    STEPS["train_phase1_cvfp"] = Step(("pretrain", "--run", "phase1_cvfp", *_rows), ("embed",))
    _contexts = ("--contexts", "checkpoints/phase1_cvfp/final")
    _words = ("pretrain", "--run", "cvfp", *_rows, *_contexts)
    STEPS["train_cvfp"] = Step(_words, ("train_phase1_cvfp",))
GPTS = ("train_gpt", "evaluate_gpt", "export_gpt", "embed")
# What one process strikes, in order: the data, then every family.
CHAINS = {"data": ("download", "extract", "bpe", "spm", "encode")} | {
    family: tuple(f"{word}_{family}" for word in ("train", "evaluate", "export"))
    for family in families()
}
if "cvfp" in CHAINS:
    CHAINS["cvfp"] = ("embed", "train_phase1_cvfp", *CHAINS["cvfp"])


def params_text() -> str:
    """params.yaml of the toy project, with every family there is."""
    sizes = {name: MODELS.get(name) or _contract_size(name) for name in families()}
    runs = {run: TRAIN | {"family": family} for run, family in RUNS.items()}
    sections = {**SECTIONS, "train": runs, "model": sizes}
    return DATA.replace("CONTEXT", str(CONTEXT)) + "".join(
        f"{name}: {json.dumps(value)}\n" for name, value in sections.items()
    )


def _contract_size(family: str) -> dict:
    from tests.test_family_contract import TINY

    size = dict(TINY.get(family, [{}])[0])
    return size | ({"context": CONTEXT} if "context" in size else {})


def write_project(project: Path) -> None:
    """Three small shards with repeats, short lines and awkward characters."""
    (project / "notes").mkdir(parents=True)
    (project / "params.yaml").write_text(params_text())
    (project / "dvc.yaml").write_text("stages: {}\n")
    words = ["川が流れる", "the river", "木組み\n", "joinery", "数は", "ﾊﾝｶｸ", "number ▁"]
    for number, name in enumerate("abv"):
        texts = [
            " ".join(words[(number + i * k) % 7] + str(i * k % 13) for k in range(1, 12))
            for i in range(20)
        ]
        lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        lines += '{"text": "x"}\n{"text": "' + texts[3].replace("\n", " ") + '"}\n'
        with gzip.GzipFile(project / "notes" / f"{name}.jsonl.gz", "wb", mtime=0) as out:
            out.write(lines.encode())


def run(project: Path, title: str, *arguments: str) -> int:
    """The stage in this (forked) process; its exit code."""
    os.chdir(project)
    os.environ["KUMIKI_SCRATCH"] = "scratch"
    module = importlib.import_module(f"stages.{title}")
    hooks = {n: getattr(module, n) for n in ("check", "modules") if hasattr(module, n)}
    return stage.main(module.STAGE, module.body, module.identity, argv=arguments, **hooks)


def order_of(step: str) -> list[str]:
    """The steps that `step` needs, in order, without itself."""
    found: list[str] = []
    for earlier in STEPS[step].after:
        found += [s for s in (*order_of(earlier), earlier) if s not in found]
    return found


def prepare(folder: Path, *steps: str, later: Sequence[str] = ()) -> Path:
    """The toy project as `steps` find it: all that they need has run; `later` ones are warm too."""
    project = folder / "prepared"
    write_project(project)
    warm(project, *steps, *later)
    done: list[str] = []
    for step in steps:
        for earlier in (s for s in order_of(step) if s not in done):
            advance(project, earlier)
            done.append(earlier)
    return project


def advance(project: Path, step: str) -> None:
    """Run one step in the project."""
    status = in_child(lambda: run(project, *STEPS[step].words))
    assert status == 0, f"{step} ends with {os.waitstatus_to_exitcode(status)}"


def warm(project: Path, *steps: str) -> None:
    """Imports, code hashes and parameters, once here: they are two thirds of a point's time."""
    names = [
        "pandas",
        "certifi",
        "urllib3",
        "tiktoken.registry",
        "lib.cli.estimate",
        "numpy.ctypeslib",
    ]
    names += [f"lib.data.{n}" for n in ("extract", "encode", "embedding_plan", "vocab.tokenizer")]
    names += [f"lib.data.raw.{n}" for n in ("sources", "embedded", "hub", "local", "remote")]
    names += [f"stages.{step.words[0]}" for step in STEPS.values()]
    hashed = [f"stages.{STEPS[e].words[0]}" for s in steps for e in (*order_of(s), s)]
    if any(STEPS[step].words[0] in MODELLED for step in steps):
        hashed += [f"lib.models.{family}" for family in families()]
        hashed += [f"lib.export.{name}" for name in ("samples", "generate", "hf", "modeling")]
        _warm_models()
    for name in names:
        importlib.import_module(name)
    for name in hashed:
        dag.code_hash(name, ROOT)
    dedup._weights()
    params.load(project)
    chunkstore.mount_of = lambda place: "ext4"  # scratch is refused in memory, where toys may lie


def _warm_models() -> None:
    """What trains and evaluates is imported; no thread is started, as forks would hang."""
    import torch

    torch.set_num_threads(1)
    loss = torch.nn.Linear(4, 4)(torch.ones(2, 4)).square().sum()
    loss.backward()
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
    names = ["train.session", "train.trainer", "eval.judge", "export.hf", "export.saved"]
    names += [f"models.{family}" for family in families()]
    for name in names:
        importlib.import_module(f"lib.{name}")
    importlib.import_module("safetensors.torch")
    importlib.import_module("tests.train.test_trainer")  # what of a log follows the clock
    samples = importlib.import_module("lib.export.samples")
    samples.GREEDY_TOKENS, samples.FREE_TOKENS = 2, 4  # fewer of the same


MODELLED = ("pretrain", "evaluate", "export", "precompute_embeddings")


VARYING = (
    "stage.log", "receipt.json", ".stamps.json", "done.json", ".pyc", "training_log.jsonl",
    "speed.json",
)  # fmt: skip


def skip(name: str) -> bool:
    """What varies by moment: logs and receipts; stamps; parts that the next run sweeps."""
    return name.endswith(VARYING) or ".part" in name or "/units/" in name


def copies(start: Path, folder: Path) -> Callable[[int], Path]:
    """Fresh copies of a starting state, in folders of different names: bytes may not follow it."""

    def make(point: int) -> Path:
        path = folder / f"point_{point}"
        shutil.copytree(start, path, symlinks=True)
        return path

    return make


def manifests_hold(project: Path) -> None:
    """Whatever bears a manifest under its final name is whole."""
    for path in project.rglob("manifest.json"):
        if ".part" not in path.as_posix():
            artifact.verify(path.parent, Manifest.read(path))
    for path in project.rglob("*.manifest.json"):
        Manifest.read(path)


def log_without_clock(project: Path) -> str:
    """training_log.jsonl of every run, but for what follows the clock."""
    from tests.train.test_trainer import CLOCKED

    lines = []
    for path in sorted(project.rglob("training_log.jsonl")):
        for line in path.read_text().splitlines():
            kept = {k: v for k, v in json.loads(line).items() if k not in CLOCKED}
            lines.append(json.dumps(kept, sort_keys=True))
    return "\n".join(lines)


def bytes_of(start: Path, folder: Path, step: str, workers: int) -> dict[str, str]:
    """The tree that a step leaves with so many workers."""
    path = copies(start, folder)(workers)
    text = (path / "params.yaml").read_text().replace("workers: 1", f"workers: {workers}")
    (path / "params.yaml").write_text(text)
    assert in_child(lambda: run(path, *STEPS[step].words)) == 0
    return {n: h for n, h in tree(path, skip).items() if n != "params.yaml"}


WAYS: dict[str, dict[str, Any]] = {
    "kill": {},
    "twice": {"twice": True},  # the recovery is killed too
    "ENOSPC": {"error": errno.ENOSPC},
    "EIO": {"error": errno.EIO},
    "SIGTERM": {"number": signal.SIGTERM},
    "SIGINT": {"number": signal.SIGINT},
}


def strike(start: Path, folder: Path, step: str, way: str, every: int) -> list[int]:
    """Strike one step, beginning with the project `start`: (the number of points, one in how many).

    The first point rotates from family to family and from way to way, so that together they meet
    points of every kind.
    """
    words = STEPS[step].words
    alike = [name for name in STEPS if STEPS[name].words[0] == words[0]]
    every *= THIN if words[0] in MODELLED and step not in GPTS else 1
    first = 1 + (alike.index(step) + list(WAYS).index(way)) % every

    def whole(path: Path) -> int:
        """The step; beside what it leaves, what its log says but for the clock."""
        code = run(path, *words)
        if code == 0 and words[0] == "pretrain":
            (path / "log_without_clock").write_text(log_without_clock(path))
        return code

    points = enumerate_crashes(
        whole, copies(start, folder), manifests_hold, skip, every, first, **WAYS[way]
    )
    return [points, every]


def main() -> None:
    """Strike a chain; with --workers, compare what one and two leave."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("chain", choices=(*CHAINS, *STEPS))
    parser.add_argument("ways", nargs="*", help=" ".join(f"{way}:N" for way in WAYS))
    parser.add_argument("--workers", action="store_true")
    given = parser.parse_args()
    steps = CHAINS.get(given.chain, (given.chain,))
    project = prepare(given.folder, steps[0], later=steps[1:])
    found: dict[str, dict[str, list[int]]] = {step: {} for step in steps}
    wrong: list[str] = []
    for step in steps:
        for way in ["workers"] if given.workers else given.ways:
            way, _, every = way.partition(":")
            folder = given.folder / step
            folder.mkdir()
            try:
                if given.workers:
                    one, two = (bytes_of(project, folder, step, n) for n in (1, 2))
                    assert one == two, sorted(n for n in one | two if one.get(n) != two.get(n))
                    found[step][way] = [len(one), 1]
                else:
                    found[step][way] = strike(project, folder, step, way, int(every))
            except AssertionError as failure:
                wrong.append(f"{step}, {way}: {failure}")
            shutil.rmtree(folder)
        advance(project, step)
    assert not wrong, "\n".join(wrong)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
