"""A project of many runs with invented numbers, as the stages would have left them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lib.core import artifact, files
from lib.core.artifact import Manifest

RUNS = {  # run -> family, encoding, overlay (a twin), final bpb or None (not measured)
    "ja_twin": ("gpt", "spm", {"heads": 2}, 2.86),
    "gpt": ("gpt", "bpe", None, 1.80),
    "gpt_shallow": ("gpt", "bpe", {"depth": 2}, 1.91),
    "wide": ("gpt", "bpe", {"width": 64}, None),
    "ja": ("gpt", "spm", None, 2.71),
    "hostile": ("gpt", "bpe", None, 1.95),
}
EVIL = "<script>alert('x')</script>\x1b[31m"

PARAMS = """
profile: small
download_shards:
  sources: {own: {kind: jsonl_gz, train: [a], val: [b]}}
extract_texts:
  recipes: {en: {sources: {own: 1.0}}, ja: {sources: {own: 1.0}}}
train_tokenizer:
  bpe: {kind: bpe, documents: en, vocab_size: 300}
  spm: {kind: sentencepiece, documents: ja, vocab_size: 300}
encode_tokens:
  bpe: {documents: en, tokenizer: bpe, context: 32}
  spm: {documents: ja, tokenizer: spm, context: 32}
model:
  gpt: {width: 16, heads: 2, depth: 1, context: 32}
runs: &added
%s
families:
  <<: *added
  gpt: {family: gpt, tokens: bpe}
profiles:
  small: {}
"""


def make_report_project(root: Path) -> Path:
    """params.yaml, metrics, ledgers and finals of `RUNS`; no weights."""
    lines = [
        f"  {name}: {json.dumps({'family': f, 'tokens': t, **({'model': o} if o else {})})}"
        for name, (f, t, o, _) in RUNS.items()
        if name != "gpt"
    ]
    files.write_bytes(root / "params.yaml", (PARAMS % "\n".join(lines)).encode())
    files.write_bytes(root / "dvc.yaml", b"stages: {}\n")
    shards = Manifest(kind="shards", recipe={"rev": 1})
    shards.write(root / "data/shards.manifest.json")
    for recipe in ("en", "ja"):
        _documents(root / "data/documents" / recipe)
    for name, (family, tokens, _, bpb) in RUNS.items():
        if bpb is not None:
            _run(root, name, family, tokens, bpb)
    _tables(root)
    return root


def _documents(folder: Path) -> None:
    entry = {
        "documents_in": 103, "documents_out": 100, "split": 0, "bytes_in": 10_050,
        "bytes_out": 9_700, "dropped": {"dup_exact": {"documents": 3, "bytes": 300}},
        "repairs": {"edge_space": {"documents": 9, "bytes_added": 0, "bytes_removed": 50}},
    }  # fmt: skip
    book = {"sources": {"own": {"train": entry, "val": entry}}, "missing": {"own": ["late.gz"]}}
    files.write_json(folder / "ledger.json", book)
    counts = {"splits": {"train": {"own": {"documents": 100, "bytes": 9_700}}}}
    found = Manifest(kind="documents", recipe={"of": folder.name}, counts=counts)
    found.write(folder / files.MANIFEST)


def _run(root: Path, name: str, family: str, tokens: str, bpb: float) -> None:
    final, metrics = root / "checkpoints" / name / "final", root / "metrics" / name
    files.write_json(
        final / "provenance.json",
        {"fingerprint": "f" * 16, "seed": 7, "steps": 400, "train": {"lr": 0.01}, "parents": {}},
    )
    Manifest(kind="model", recipe={"run": name}, files=artifact.describe(final)).write(
        final / files.MANIFEST
    )
    files.write_json(
        metrics / "eval.json",
        {"bpb": bpb, "cloze": bpb / 10, "core": None, "core_partial": 0.012, "core_v2": None,
         "params": 5_242_880, "train_flops": 2.3e13, "train_tokens": 819_200, "val_bytes": 617_682},
    )  # fmt: skip
    task = {"label": "cloze_order", "n": 320, "accuracy": 0.55, "centered": 0.1}
    record = {
        "bpb": bpb, "val_sha256": ("a" if tokens == "bpe" else "b") * 64,
        "model": files.sha256_file(final / files.MANIFEST), "family": family,
        "baselines": {"bpb": {"bigram": 2.0, "gzip": 2.73, "xz": 2.05}},
        "cloze": {"cloze": bpb / 10, "standard_error": 0.02, "tasks": [task],
                  "overlap": {"cloze": 0.25, "accuracy": {"cloze_order": 0.51}}},
        "core": {"tasks": [{**task, "label": "copa"}]},
    }  # fmt: skip
    files.write_json(metrics / "eval_record.json", record)
    text = EVIL if name == "hostile" else "日本語の文、and English."
    sample = {"prompt": "The day", "text": text, "stop": "length", "ids": [1]}
    files.write_json(metrics / "samples.json", {"greedy": [sample], "free": [sample]})
    curve, loss = ["step,tokens,bytes,flops,bpb"], ["step,tokens,flops,loss,lr,grad"]
    for step in range(1, 401):
        count, now = step * 2048, bpb + 2 * math.exp(-step / 80)
        loss.append(f"{step},{count},{count * 2.8e7},{now * 2.2 + (step % 7) / 20},0.01,0.5")
        if step % 50 == 0:
            curve.append(f"{step},{count},{count * 3},{count * 2.8e7},{now}")
    for table, rows in (("curve", curve), ("loss", loss)):
        files.write_bytes(metrics / f"{table}.csv", ("\n".join(rows) + "\n").encode())


def _tables(root: Path) -> None:
    depth = "step,flops,bpb\n1,1e9,2.91\n2,2e9,2.75\n3,3e9,2.71\n"
    files.write_bytes(root / "metrics/ja/depth.csv", depth.encode())
    arms = "arm,bpb,range\nnone,2.1,0.01\nphase1,1.95,0.004\n"
    files.write_bytes(root / "metrics/hostile/controls.csv", arms.encode())
