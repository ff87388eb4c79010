"""Bits per byte: what every validation document costs under a model, over the bytes of its text.

In:    documents (id, text) in order, their tokenizer, a scorer over a model.
Out:   nats, bytes, ids per document; BPB = sum of nats / (ln 2 x total bytes), evaluation.md 2.
Law:   the bytes of the scored targets are those of the text, checked for each document. Ranks,
       kills, resumes change nothing: finished blocks are kept, sums over documents are exact.
Letters: W ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.core import files
from lib.core.errors import InputError
from lib.eval.scorer import Model, Rules, Scorer, Tokenizer, bits_per_byte

BLOCK_BYTES = 2**21  # text of one unit of work: what a kill costs at most
LEAST_BYTES = 1000  # below, a number would mean nothing

Document = tuple[str, str]  # id, text


# ---------------------------------------------------------------- a whole validation text


@dataclass(frozen=True)
class Ranks:
    """This process among W. `add` sums an fp64 array over the ranks; x + 0 is exact."""

    rank: int = 0
    world: int = 1
    add: Callable[[np.ndarray], np.ndarray] = lambda part: part

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> Ranks:
        """The ranks of torch.distributed where a launcher started it, else one rank."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()

        def add(part: np.ndarray) -> np.ndarray:
            tensor = torch.from_numpy(part).to(device)
            distributed.all_reduce(tensor)
            return tensor.cpu().numpy()

        return cls(distributed.get_rank(), distributed.get_world_size(), add)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Per document, in document order."""

    nats: np.ndarray  # fp64
    bytes: np.ndarray  # int64, UTF-8 bytes of the text
    tokens: np.ndarray  # int64, ids of the text
    val_sha256: str  # over ids and texts of the documents
    lossless: bool = True

    @property
    def total_bytes(self) -> int:
        """Bytes of all texts; nothing stands for what separates them."""
        return int(self.bytes.sum())

    @property
    def bpb(self) -> float | None:
        """Bits per byte; None where the ids do not hold the text."""
        return bits_per_byte(math.fsum(self.nats), self.total_bytes) if self.lossless else None

    @property
    def loss(self) -> float:
        """Nats per id; comparable under one tokenizer only."""
        return math.fsum(self.nats) / max(1, int(self.tokens.sum()))

    def record(self) -> dict[str, Any]:
        """What eval_record.json keeps: all that the number was computed from."""
        total = int(self.tokens.sum())
        return {
            "bpb": self.bpb,
            "val_sha256": self.val_sha256,
            "documents": len(self.nats),
            "total_bytes": self.total_bytes,
            "tokens": total,
            "bytes_per_token": self.total_bytes / max(1, total),
            "perplexity": math.exp(self.loss) if self.lossless else None,  # of this tokenizer only
            "document_nats": self.nats.tolist(),
            "document_bytes": self.bytes.tolist(),
        }


def measure(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    scorer: Scorer,
    *,
    ranks: Ranks | None = None,
    units: Path | None = None,
    advance: Callable[[float], None] = lambda total_bytes: None,
) -> Measured:
    """Score documents; rank r takes those with i mod W = r, every rank gets the whole result.

    units: folder where finished blocks of documents are kept; it belongs to one model, tokenizer
    and rules. A block is read again only when its texts are the same. InputError for a document
    whose ids do not decode to it.
    """
    ranks = ranks or Ranks()
    text_hash, parts, first = hashlib.sha256(), [], 0
    for number, block in enumerate(blocks_of(documents)):
        block_hash = hashlib.sha256()
        for document in block:
            data = hashed_bytes(document)
            text_hash.update(data)
            block_hash.update(data)
        path = units / f"bpb_{number:05d}.json" if units else None
        part = _read_unit(path, block_hash.hexdigest(), len(block))
        if part is None:
            mine = range((ranks.rank - first) % ranks.world, len(block), ranks.world)
            part = ranks.add(_score_block(block, mine, tokenizer, scorer))
            if path and ranks.rank == 0:
                unit = {"sha256": block_hash.hexdigest(), "part": part.tolist()}
                files.write_note(path, unit)
        parts.append(part)
        first += len(block)
        advance(float(part[1].sum()))
    nats, sizes, tokens = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0))
    return Measured(
        nats=nats,
        bytes=sizes.astype(np.int64),
        tokens=tokens.astype(np.int64),
        val_sha256=text_hash.hexdigest(),
        lossless=tokenizer.lossless,
    )


def blocks_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, each block closed by the one that takes it to BLOCK_BYTES."""
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document[1].encode())
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def hashed_bytes(document: Document) -> bytes:
    """A document's share of val_sha256: lengths (8 bytes, little endian) before id and text."""
    parts = [part.encode() for part in document]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _read_unit(path: Path | None, sha256: str, documents: int) -> np.ndarray | None:
    """A finished block (3, documents), or None when there is none of these texts."""
    unit = files.read_note(path) if path else None
    if unit is None:
        return None
    part = np.array(unit["part"], np.float64)
    return part if unit["sha256"] == sha256 and part.shape == (3, documents) else None


def _score_block(
    block: list[Document], mine: range, tokenizer: Tokenizer, scorer: Scorer
) -> np.ndarray:
    """Nats, bytes, ids of the documents `mine`, zeros for the other ranks': (3, documents) fp64."""
    part = np.zeros((3, len(block)), np.float64)
    ids = [encode_checked(block[i], tokenizer) for i in mine]
    nats, counted = scorer(ids, [block[i][0] for i in mine])
    for at, i in enumerate(mine):
        size = len(block[i][1].encode())
        if tokenizer.lossless and counted[at] != size:
            raise InputError(
                "bytes of the scored ids are not those of the text",
                value=f"document {block[i][0]}: {counted[at]} by ids, {size} by text",
                remedy="make the tokenizer again, then what was trained with it",
            )
        part[:, i] = nats[at], size, len(ids[at])
    return part


def encode_checked(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a document, int64; InputError unless a lossless tokenizer gives its bytes back."""
    name, text = document
    ids = np.asarray(tokenizer.encode(text), np.int64)
    if tokenizer.lossless and tokenizer.decode_bytes(ids.tolist()) != text.encode():
        raise InputError(
            "ids do not decode to the text",
            value=f"document {name}",
            remedy="make the tokenizer again, then what was trained with it",
        )
    return ids


def count_only(documents: Iterable[Document], tokenizer: Tokenizer) -> Measured:
    """Bytes, ids and the text's hash where BPB is not defined; nats are 0."""
    digest, rows = hashlib.sha256(), []
    for document in documents:
        digest.update(hashed_bytes(document))
        rows.append((len(document[1].encode()), len(tokenizer.encode(document[1]))))
    sizes = np.array(rows, np.int64).reshape(-1, 2)
    return Measured(
        nats=np.zeros(len(sizes)),
        bytes=sizes[:, 0],
        tokens=sizes[:, 1],
        val_sha256=digest.hexdigest(),
        lossless=False,
    )


def round_trip_share(documents: Iterable[Document], tokenizer: Tokenizer) -> float:
    """Share of the documents that decode(encode(x)) gives back; for a lossy tokenizer's record."""
    total = kept = 0
    for _, text in documents:
        total += 1
        kept += tokenizer.decode_bytes(np.asarray(tokenizer.encode(text)).tolist()) == text.encode()
    return kept / total if total else 0.0


# ---------------------------------------------------------------- for the trainer


def take_prefix(documents: Iterable[Document], limit_bytes: int) -> list[Document]:
    """The first documents up to `limit_bytes` bytes of text, at least one.

    By bytes, not ids: every tokenizer validates on the same text.
    """
    taken: list[Document] = []
    total = 0
    for document in documents:
        total += len(document[1].encode())
        if taken and total > limit_bytes:
            break
        taken.append(document)
    return taken


def validate(
    model: Model,
    prefix: Sequence[Document],
    tokenizer: Tokenizer,
    rules: Rules,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    budget_tokens: int | None = None,
    ranks: Ranks | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Measured:
    """`measure` on a `take_prefix`, in memory: `.bpb` (None for a lossy tokenizer) and `.loss`."""
    scorer = Scorer(
        model=model,
        rules=rules,
        token_bytes=tokenizer.token_bytes,
        device=device,
        dtype=dtype,
        budget_tokens=budget_tokens,
        warn=warn,
    )
    return measure(prefix, tokenizer, scorer, ranks=ranks)
