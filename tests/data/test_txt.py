"""The documents' text as the published Japanese recipe wants it: a file of lines."""

from __future__ import annotations

import gzip
import json

from lib.core import files
from tests.project import run_module

PROJECT = """
profile: small
seed: 7
download_shards:
  sources: {own: {kind: jsonl_gz, train: [a.jsonl.gz], val: [v.jsonl.gz]}}
extract_texts: {recipes: {ja: {sources: {own: 1.0}}}}
train_tokenizer: {bpe: {kind: bpe, documents: ja, vocab_size: 300}}
encode_tokens: {bpe: {documents: ja, tokenizer: bpe, context: 32}}
profiles: {small: {}}
"""


def test_the_training_text_may_be_had_as_lines(tmp_path):
    """`--txt`: asked for with the documents or later, when nothing else is left to do."""
    texts = {"a": ["木を組む\n釘はない", "二つ目"], "v": ["検証"]}
    for name, given in texts.items():
        body = "".join(json.dumps({"text": text}) + "\n" for text in given)
        files.write_bytes(tmp_path / f"data/local/{name}.jsonl.gz", gzip.compress(body.encode()))
    files.write_bytes(tmp_path / "params.yaml", PROJECT.encode())
    assert run_module(tmp_path, "stages.download_shards").returncode == 0
    for part in ("first", "again"):
        path = tmp_path / part / "ja.txt"
        done = run_module(tmp_path, "stages.extract_texts", "--txt", str(path))
        assert done.returncode == 0, done.stderr.decode()
        assert path.read_text(encoding="utf-8") == "木を組む 釘はない\n二つ目\n"
    assert b"up to date" in done.stderr
    done = run_module(tmp_path, "stages.extract_texts", "--txt", "en.txt")
    assert done.returncode == 2 and b"ja.txt" in done.stderr
