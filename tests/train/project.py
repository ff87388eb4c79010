"""A project folder with real token files, made in a second: what the training stage starts from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.data_settings import BpeTokenizer
from lib.data.encode import encode, plan_encoding
from lib.data.vocab import chat
from lib.data.vocab import tokenizer as tokenizers
from tests.conftest import HANG_S, ROOT
from tests.data import encoding_double as double
from tests.data.texts import english

PARAMS = """
profile: small
seed: 7
train:
  defaults:
    lr: 0.01
  gpt:
    steps: 6
    batch_tokens: 128
    ema_decay: 0.9
    eval_every: 3
    eval_bytes: 400
model:
  gpt:
    width: 16
    heads: 2
    depth: 1
    context: 32
runtime:
  device: cpu
  threads: 1
  device_batch_size: 2
  checkpoint_every_steps: 2
profiles:
  small: {}
"""


# What a checkpoint of a run is opened with, where the rows are those of conversations.
FRAMED = (
    PARAMS.replace("  gpt:\n    steps", "  gpt:\n    tokens: bpe\n    steps")
    + """
download_shards:
  sources:
    talks: {kind: hf_dataset, repo: a/b, messages_field: messages, join: chat,
            max_train_samples: 70, max_eval_samples: 10}
extract_texts:
  recipes:
    en: {sources: {talks: 1.0}}
train_tokenizer:
  bpe: {kind: bpe, documents: en, vocab_size: 300}
encode_tokens:
  bpe: {documents: en, tokenizer: bpe, template: chat, context: 32}
"""
)


def make_project(folder: Path, seed: int = 1, framed: bool = False) -> Path:
    """Tokenizer, token files in scratch, params.yaml; `seed` decides the texts.

    framed: each is a conversation, its turns between their ids.
    """
    texts = english(80, seed)
    template = "chat" if framed else "none"
    texts = [chat.frame([("user", x), ("assistant", x)]) for x in texts] if framed else texts
    documents = double.write_documents(
        folder / "documents", {"train_en_00000": texts[:70], "val_en_00000": texts[70:]}
    )
    place = folder / "data/tokenizers/bpe"
    settings = BpeTokenizer(kind="bpe", documents="en", vocab_size=300)
    tokenizers.build(settings, texts, lambda: texts[70:], place)
    recipe = {"stage": "train_tokenizer", "texts": seed}
    found = Manifest(kind="tokenizer", recipe=recipe, files=artifact.describe(place))
    found.write(place / files.MANIFEST)
    plan = plan_encoding(
        double.settings(tokenizer="bpe", template=template), documents, place, folder / "scratch",
        open_tokenizer=tokenizers.load_tokenizer,
    )  # fmt: skip
    manifest = encode(plan, map, lambda line: None)
    assert manifest is not None
    manifest.write(folder / "data/tokens/bpe.manifest.json")
    shutil.rmtree(documents)
    (folder / "params.yaml").write_text(FRAMED if framed else PARAMS)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    return folder


def command(
    project: Path,
    *arguments: str,
    module: str = "stages.pretrain",
    start_new_session: bool = False,
    **environment: str,
) -> subprocess.Popen:
    """The training stage as a process of its own."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=project,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def outcome(project: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `pretrain --run gpt`."""
    process = command(project, "--run", "gpt", *arguments, **environment)
    out, err = process.communicate(timeout=HANG_S)
    return process.returncode, out, err
