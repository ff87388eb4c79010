"""Small documents folders and tokenizers for tests of encoding, by names workers can import."""

from __future__ import annotations

import random
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.core import files
from lib.core.artifact import Manifest, describe, scratch_folder
from lib.core.data_settings import Encoding
from lib.data.encode import encode, plan_encoding
from lib.data.tokens import TokenStore
from lib.data.vocab.bpe import SPECIALS
from lib.data.vocab.tokenizer import Tokenizer, take_gpt2


class ByteTokenizer:
    """One id a byte; bos 256, eos 257, pad 258."""

    kind, vocab_size, bos_id, eos_id, pad_id, lossless = "byte", 259, 256, 257, 258, True
    fingerprint = "b" * 64
    token_bytes = np.array([1] * 256 + [0] * 3, np.int32)

    def encode_batch(self, texts: list[str], threads: int) -> list:
        return [list(text.encode()) for text in texts]

    def decode_bytes(self, ids) -> bytes:
        return bytes(i for i in ids if i < 256)


class ArrayTokenizer(ByteTokenizer):
    """The same, but ids come as arrays and need 32 bits."""

    vocab_size, fingerprint = 70_000, "a" * 64
    token_bytes = np.concatenate([ByteTokenizer.token_bytes, np.zeros(70_000 - 259, np.int32)])

    def encode_batch(self, texts: list[str], threads: int) -> list:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


class ChatTokenizer(ByteTokenizer):
    """Bytes, and the nine specials of ours behind them."""

    vocab_size, fingerprint, eos_id = 256 + len(SPECIALS), "c" * 64, None
    specials = MappingProxyType({name: 256 + i for i, name in enumerate(SPECIALS)})  # bos first
    token_bytes = np.array([1] * 256 + [0] * len(SPECIALS), np.int32)


class LossyTokenizer(ByteTokenizer):
    """Drops the byte that stands for `z` and claims to drop nothing."""

    def encode_batch(self, texts: list[str], threads: int) -> list:
        return [[b for b in text.encode() if b != ord("z")] for text in texts]


class SwappingTokenizer(ByteTokenizer):
    """Every byte is held, but `q` comes back as `p`."""

    def encode_batch(self, texts: list[str], threads: int) -> list:
        return [[ord("p") if b == ord("q") else b for b in text.encode()] for text in texts]


class HonestlyLossyTokenizer(LossyTokenizer):
    """Drops `z` and says so; has no boundary ids."""

    lossless, bos_id, eos_id = False, None, None


def open_double(folder: Path) -> Tokenizer:
    """The tokenizer that the folder is named after."""
    return globals()[folder.name]()


def open_gpt2(folder: Path) -> Tokenizer:
    """GPT-2's own, from its two files."""
    return Tokenizer(take_gpt2(folder))


def texts(count: int, seed: int, longest: int = 120) -> list[str]:
    """Texts of 1 to `longest` characters, some of more bytes than characters."""
    rng = random.Random(seed)
    alphabet = "abc defgh\nijkl あ漢é😀"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(count)]


def write_documents(
    folder: Path, parts: dict[str, list[str]], row_group_size: int = 64, **params
) -> Path:
    """A documents folder: part name without suffix -> texts; params: sources and what else."""
    params = {"on_exhausted": "stop", "max_epochs": 1, "sources": {"en": 1.0}} | params
    counts: dict = {"train": {}, "val": {}}
    for name, part in parts.items():
        split, source = name.split("_")[:2]
        table = pa.table({"text": part, "id": [f"{name}#{i}" for i in range(len(part))]})
        files.make_folder(folder)
        pq.write_table(
            table.cast(pa.schema([("text", pa.string()), ("id", pa.string())])),
            folder / f"{name}.parquet",
            compression="zstd",
            row_group_size=row_group_size,
            use_dictionary=False,
            write_page_checksum=True,
        )
        numbers = counts[split].setdefault(source, {"documents": 0, "bytes": 0})
        numbers["documents"] += len(part)
        numbers["bytes"] += sum(len(text.encode()) for text in part)
    files.write_json(folder / "ledger.json", {})
    entries = {entry.path: entry for entry in describe(folder)}
    in_order = [entries[f"{name}.parquet"] for name in parts] + [entries["ledger.json"]]
    recipe = {"stage": "extract_texts", "rev": 1, "params": params, "inputs": {}}
    manifest = Manifest(
        kind="documents", recipe=recipe, files=tuple(in_order), counts={"splits": counts}
    )
    manifest.write(folder / files.MANIFEST)
    return folder


def settings(**changes) -> Encoding:
    """An encoding for the documents above."""
    return Encoding(
        **{"documents": "en", "tokenizer": "byte", "context": 32, "buffer": 20} | changes
    )


def encode_all(
    documents: Path,
    scratch: Path,
    tokenizer: str = "ByteTokenizer",
    pool_map=map,
    log=lambda line: None,
    **changes,
) -> tuple[Manifest, TokenStore]:
    """Encode everything in this process; returns the manifest and the open store."""
    laid_out = plan_encoding(
        settings(**changes), documents, Path(tokenizer), scratch, open_tokenizer=open_double
    )
    manifest = encode(laid_out, pool_map, log)
    assert manifest is not None
    assert laid_out.folder == scratch / scratch_folder("tokens", manifest.key).relative_to(
        "scratch"
    )
    return manifest, TokenStore(laid_out.folder, manifest)
