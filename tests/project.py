"""A project folder with documents, tokens and a finished model, made in a second."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.data_settings import BpeTokenizer, Encoding
from lib.core.stage import input_hash
from lib.data.encode import encode, plan_encoding
from lib.data.vocab import tokenizer as tokenizers
from lib.models import gpt
from lib.models.base import build
from lib.train.final import write_final
from tests.conftest import HANG_S, ROOT
from tests.data import encoding_double as double
from tests.data.texts import english

PARAMS = """
profile: small
seed: 7
extract_texts:
  recipes: {en: {sources: {own: 1.0}}}
download_shards:
  sources: {own: {kind: jsonl_gz, train: [a], val: [b]}}
train_tokenizer:
  bpe: {kind: bpe, documents: en, vocab_size: 300}
encode_tokens:
  bpe: {documents: en, tokenizer: bpe, context: 32}
train:
  gpt: {steps: 1, tokens: bpe}
model:
  gpt: {width: 16, heads: 2, depth: 2, context: 64}
runtime: {device: cpu, threads: 1, eval_tokens: 512}
profiles:
  small: {}
"""
CONFIG = gpt.Config(width=16, heads=2, depth=2, context=64)


def make_project(folder: Path, *, texts: int = 60, validation: Sequence[str] | None = None) -> Path:
    """Documents, tokenizer, token files, params.yaml; no model yet."""
    train = english(texts, 1)
    val = english(8, 2) if validation is None else list(validation)
    recipe = folder / "data/documents/en"
    parts = {"train_own_00000": train, "val_own_00000": val}
    double.write_documents(recipe, parts, sources={"own": 1.0})
    place = folder / "data/tokenizers/bpe"
    settings = BpeTokenizer(kind="bpe", documents="en", vocab_size=300)
    tokenizers.build(settings, train, lambda: val, place)
    made = {"stage": "train_tokenizer", "texts": texts}
    found = Manifest(kind="tokenizer", recipe=made, files=artifact.describe(place))
    found.write(place / files.MANIFEST)
    plan = plan_encoding(
        Encoding(documents="en", tokenizer="bpe", context=32),
        recipe,
        place,
        folder / "scratch",
        open_tokenizer=tokenizers.load_tokenizer,
    )
    manifest = encode(plan, map, lambda line: None)
    assert manifest is not None
    manifest.write(folder / "data/tokens/bpe.manifest.json")
    shards = Manifest(kind="shards", recipe={"sources": {}}, files=())
    shards.write(folder / "data/shards.manifest.json")
    files.write_bytes(folder / "params.yaml", PARAMS.encode())
    files.write_bytes(folder / "dvc.yaml", b"stages: {}\n")
    return folder


def add_model(
    project: Path, run: str = "gpt", seed: int = 3, module: Any = gpt, config: Any = CONFIG
) -> Path:
    """A finished model under checkpoints/<run>/final; its weights are random, its head is not 0."""
    model = build(module, config, 300, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    place = project / "data/tokenizers/bpe"
    described = {
        "family": module.__name__.split(".")[-1],
        "config": asdict(config),
        "vocab_size": 300,
        "context": 32,
        "tokenizer": tokenizers.load_tokenizer(place).fingerprint,
    }
    provenance = {
        "run": run,
        "fingerprint": "f" * 16,
        "boundary": "bos",
        "train_tokens": 1280,
        "train_flops": 1280 * model.flops_per_token(32),
        "parents": {"tokens": input_hash(project / "data/tokens/bpe.manifest.json")},
    }
    final = project / "checkpoints" / run / "final"
    write_final(final, model.state_dict(), described, provenance, place)
    return final


def run_module(project: Path, *words: str, **options) -> subprocess.CompletedProcess:
    """`python -m words...` in the project, as DVC or a user starts it."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=project,
        env={**os.environ, **own},
        capture_output=True,
        timeout=HANG_S,
        **options,
    )
