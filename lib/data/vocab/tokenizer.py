"""Tokenizers as artefacts: one interface over every kind, their folder, fingerprint and report.

In:    a section `train_tokenizer.<name>` and texts.   Out: a folder that `load_tokenizer` takes.
Law:   a lossless tokenizer gives every text back, and sum(token_bytes[ids]) is its size in bytes.
Rule:  text is never parsed for special tokens; a special id comes only from its name (data.md 8).
Note:  `tokenizer.json` holds the sha256 of its neighbours and of itself, so a copied folder (inside
       a checkpoint, say) still verifies without a manifest of its own.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lib.core import artifact, files
from lib.core.data_settings import BpeTokenizer, Gpt2Tokenizer
from lib.core.data_settings import Tokenizer as Settings
from lib.core.errors import InputError, UserError
from lib.data.vocab.bpe import BpeModel, cut_runs, read_bpe, take_gpt2, train_bpe
from lib.data.vocab.spm import MODEL_FILE as SPM_FILE
from lib.data.vocab.spm import SpmModel, take_sentencepiece, train_sentencepiece

__all__ = [
    "Tokenizer",
    "build",
    "cut_runs",
    "load_tokenizer",
    "measure",
    "take_gpt2",
    "take_sentencepiece",
    "train_bpe",
    "train_sentencepiece",
    "write_tokenizer",
]

CARD, TOKEN_BYTES, HF_FILE, REPORT = (
    "tokenizer.json",
    "token_bytes.npy",
    "tokenizer.hf.json",
    "report.json",
)
_FORMAT, _VERSION = "kumiki/tokenizer", 1
_HF_DOCUMENTS, _HF_CHARS = 1000, 20_000_000  # validation text on which the HF file is compared
_BATCH = 256  # documents measured at once

log = logging.getLogger(__name__)


class Tokenizer:
    """Text to ids and back. Immutable; one object may serve many threads.

    kind:        bpe, gpt2 or sentencepiece
    vocab_size:  V, specials included
    bos_id, eos_id, pad_id, unk_id: int or None
    lossless:    decode_bytes(encode(x)) is x in UTF-8, for every x without lone surrogates
    fingerprint: sha256 of all that decides ids (data.md 8.2); checkpoints and token files carry it
    token_bytes: int32 (V,), raw bytes that each id stands for; 0 for specials and `<unk>`
    """

    def __init__(self, model: BpeModel | SpmModel) -> None:
        self.model = model
        self.kind, self.lossless = model.kind, model.lossless
        self.bos_id, self.eos_id = model.bos_id, model.eos_id
        self.pad_id, self.unk_id = model.pad_id, model.unk_id
        self.specials = dict(model.specials)
        self.vocab_size = len(model.table)
        self.token_bytes = np.array([len(piece) for piece in model.table], dtype=np.int32)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.vocab_size} {self.fingerprint[:8]}>"

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits."""
        identity = {"kind": self.kind, **self.model.identity()}
        return hashlib.sha256(files.canonical_json(identity)).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` without specials around it, int32 (n,). InputError for lone surrogates.

        A whitespace run over 10,000 characters is cut and its slices are encoded one by one, so no
        text breaks the regex engine. An array and no list: 4 bytes an id, and nothing to convert.
        """
        try:
            parts = cut_runs(text) if self.lossless else [text]
            if len(parts) == 1:
                return self.model.encode(text)
            return np.concatenate([self.model.encode(part) for part in parts])
        except UnicodeEncodeError as error:
            raise InputError(
                "text holds a lone surrogate",
                value=repr(error.object[error.start]),
                remedy="give valid Unicode text",
            ) from None

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text, in order, by `threads` threads; the libraries release the lock."""
        if threads == 1 or len(texts) < 2:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of `ids`, specials left out. UserError for an id outside the vocabulary."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else [int(index) for index in ids]
        if listed and (min(listed) < 0 or max(listed) >= self.vocab_size):
            raise UserError(
                "id outside the vocabulary",
                value=f"{min(listed)}..{max(listed)} of {self.vocab_size}",
                remedy="use the tokenizer that made the ids",
            )
        return self.model.decode_bytes(listed)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no valid UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# ---------------------------------------------------------------- the folder


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, report: dict[str, Any], recipe_hash: str
) -> None:
    """Write all files of a tokenizer but the manifest, which the stage commits last."""
    contents = dict(tokenizer.model.files)
    contents[TOKEN_BYTES] = _npy(tokenizer.token_bytes)
    contents[HF_FILE] = tokenizer.model.hf_json().encode()
    contents[REPORT] = files.canonical_json(report)
    for name, data in contents.items():
        files.write_bytes(folder / name, data)
    card = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "pattern": tokenizer.model.pattern,
        "specials": tokenizer.specials,
        "ids": {
            "bos": tokenizer.bos_id,
            "eos": tokenizer.eos_id,
            "pad": tokenizer.pad_id,
            "unk": tokenizer.unk_id,
        },
        "trainer": tokenizer.model.trainer,
        "recipe_hash": recipe_hash,
        "lossless": tokenizer.lossless,
        "fingerprint": tokenizer.fingerprint,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    files.write_json(folder / CARD, {**card, "sha256": _card_hash(card)})


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, every file hashed first (a few MB: milliseconds).

    UserError when the folder is missing, of another format or of an unknown kind; InputError when
    a file differs from the manifest, from `tokenizer.json`, or from the fingerprint.
    """
    folder = Path(folder)
    card = _read_card(folder)
    found = {name: _read_checked(folder / name, sha256) for name, sha256 in card["files"].items()}
    try:
        if card["kind"] == "sentencepiece":
            model = SpmModel(
                proto=found[SPM_FILE], lossless=card["lossless"], trainer=card["trainer"]
            )
        else:
            model = read_bpe(found, card)
        token_bytes = np.load(io.BytesIO(found[TOKEN_BYTES]), allow_pickle=False)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / CARD, str(error)) from error
    tokenizer = Tokenizer(model)
    if tokenizer.fingerprint != card["fingerprint"]:
        raise _damaged(
            folder / CARD,
            f"fingerprint {card['fingerprint'][:8]}…, its files give {tokenizer.fingerprint[:8]}…",
        )
    if not np.array_equal(token_bytes, tokenizer.token_bytes):
        raise _damaged(folder / TOKEN_BYTES, "other lengths than the pieces have")
    return tokenizer


def _read_card(folder: Path) -> dict[str, Any]:
    """`tokenizer.json`, checked against the manifest beside it and against its own hash."""
    path = folder / CARD
    card = files.read_json(path)
    if (folder / files.MANIFEST).is_file():
        manifest = artifact.Manifest.read(folder / files.MANIFEST)
        listed = [entry for entry in manifest.files if entry.path == CARD]
        if listed and (difference := artifact.damage(folder, listed[0])):
            raise _damaged(path, difference)
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise UserError("not a tokenizer folder", file=path, remedy="name one of data/tokenizers")
    known = ("bpe", "gpt2", "sentencepiece")
    if card.get("version") != _VERSION or card.get("kind") not in known:
        raise UserError(
            "unknown kind of tokenizer",
            file=path,
            value=f"{card.get('kind')}, format version {card.get('version')}",
            remedy="run train_tokenizer again with this version of the project",
        )
    stated = card.pop("sha256", None)
    if stated != _card_hash(card):
        raise _damaged(path, "it does not match its own sha256")
    return card


def _read_checked(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path, "missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(path, f"expected sha256 {sha256[:8]}…")
    return data


def _damaged(path: Path, found: str) -> InputError:
    return InputError(
        "damaged tokenizer", file=path, value=found, remedy="run train_tokenizer again"
    )


def _card_hash(card: dict[str, Any]) -> str:
    return hashlib.sha256(files.canonical_json(card)).hexdigest()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


# ---------------------------------------------------------------- the report, and all in one


def measure(tokenizer: Tokenizer, texts: Iterable[str], threads: int = 1) -> dict[str, Any]:
    """Report over validation `texts`, read once: compression, unknowns, round trips, unused ids.

    `hf_equal` of `hf_documents` give the same ids by tokenizer.hf.json (the first 1,000 at most).
    A lossy tokenizer also gets what it lost: rewritten documents, those with newlines or runs of
    spaces, unknown ids, lines its training skipped.
    """
    totals = dict.fromkeys(("documents", "bytes", "tokens", "unknown", "round_trips"), 0)
    lossy = {"rewritten": 0, "newline_or_space_run": 0}
    model = tokenizer.model
    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    compare = _HfComparison(tokenizer)
    stream = iter(texts)
    while batch := list(islice(stream, _BATCH)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch, threads), strict=True):
            totals["documents"] += 1
            totals["bytes"] += len(text.encode())
            totals["tokens"] += len(ids)
            totals["unknown"] += int(np.count_nonzero(ids == tokenizer.unk_id))
            totals["round_trips"] += tokenizer.decode_bytes(ids) == text.encode()
            used[ids] = True
            compare(text, ids)
            if isinstance(model, SpmModel) and not model.lossless:
                _count_losses(model, text, lossy)
    special = list(tokenizer.specials.values())
    report = {
        **totals,
        "bytes_per_token": _ratio(totals["bytes"], totals["tokens"]),
        "unknown_rate": _ratio(totals["unknown"], totals["tokens"]),
        "round_trip_share": _ratio(totals["round_trips"], totals["documents"]),
        "unused_ids": int(np.count_nonzero(~used)) - int(np.count_nonzero(~used[special])),
        "hf_documents": compare.documents,
        "hf_equal": compare.equal,
    }
    return report if tokenizer.lossless else report | {"losses": lossy | tokenizer.model.losses}


class _HfComparison:
    """Compares the ids of tokenizer.hf.json with ours, on the first documents only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as HfTokenizer

        self._hf = HfTokenizer.from_str(tokenizer.model.hf_json())
        self._hf.encode_special_tokens = True  # special strings are text here
        self.documents = self.equal = self._chars = 0

    def __call__(self, text: str, ids: np.ndarray) -> None:
        if self.documents < _HF_DOCUMENTS and self._chars + len(text) <= _HF_CHARS:
            self.documents += 1
            self._chars += len(text)
            theirs = self._hf.encode(text, add_special_tokens=False).ids
            self.equal += theirs == ids.tolist()


def _count_losses(model: SpmModel, text: str, counts: dict[str, int]) -> None:
    kept = model.normalize(text)
    plain = " ".join(text.split())
    counts["rewritten"] += "".join(kept.split()) != "".join(text.split())
    counts["newline_or_space_run"] += plain != text


def _ratio(part: int, whole: int) -> float | None:
    """part / whole to 10 digits, None for 0 / 0 (a canonical report has no NaN)."""
    return float(f"{part / whole:.10g}") if whole else None


def build(
    settings: Settings,
    train_texts: Iterable[str],
    val_texts: Callable[[], Iterable[str]],
    out: Path,
    *,
    gpt2_folder: Path | None = None,
    cache_folder: Path | None = None,
    recipe: object = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Make the tokenizer of `settings`, write its files into `out`, return its report.

    train_texts: documents in recipe order, read at most once. val_texts: gives them anew.
    gpt2_folder, cache_folder: where GPT-2's files may lie (the fetched source or the section's
    folder; the value of TIKTOKEN_CACHE_DIR). recipe: what `recipe_hash` covers beside the section.
    threads change no byte. Raises what `train_bpe`, `train_sentencepiece` and `take_*` raise.
    """
    if isinstance(settings, BpeTokenizer):
        model = train_bpe(train_texts, settings)
    elif isinstance(settings, Gpt2Tokenizer):
        model = take_gpt2(gpt2_folder or _as_path(settings.folder), cache_folder)
        log.info("gpt2 needs 2.5 times the tokens of a Japanese model of 16,000 pieces on Japanese")
    elif settings.file is not None:
        model = take_sentencepiece(Path(settings.file))
        if len(model.table) != settings.vocab_size:
            log.warning("%s has %d pieces; vocab_size is not used", settings.file, len(model.table))
    else:
        model = train_sentencepiece(train_texts, settings)
    tokenizer = Tokenizer(model)
    report = measure(tokenizer, val_texts(), threads)
    _check(report, tokenizer)
    section = {"section": artifact.plain(settings), "inputs": artifact.plain(recipe)}
    write_tokenizer(out, tokenizer, report, artifact.key_of("tokenizer", section))
    return report


def _as_path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _check(report: dict[str, Any], tokenizer: Tokenizer) -> None:
    """A lossless tokenizer that loses a document is a bug; one the HF file disagrees on is said."""
    assert not tokenizer.lossless or report["round_trips"] == report["documents"], report
    if report["hf_equal"] < report["hf_documents"]:
        different = report["hf_documents"] - report["hf_equal"]
        log.warning("%s gives other ids on %d validation documents", HF_FILE, different)
    if report["documents"] == 0:
        raise InputError("no validation text", remedy="give the recipe at least one document")
