"""Byte-level BPE: training by rustbpe or `tokenizers`, GPT-2's own tables, encoding by tiktoken.

In:    an iterator of documents, or GPT-2's two files.   Out: a `BpeModel`.
Law:   the pieces of encode(text) join to the UTF-8 bytes of text, for every text (data.md 8).
Ids:   of a trained model 0..255 are the bytes, 256 + k is merge k, the specials come last.
Note:  special strings inside text are ordinary text; only the caller puts special ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from lib.core import files
from lib.core.data_settings import BpeTokenizer
from lib.core.errors import EnvError, InputError, UserError

# The split of cl100k with digit runs of 1 or 2. tiktoken's engine and Oniguruma read the same text.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BOS = "<|bos|>"
SPECIALS = (
    BOS,
    *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
GPT2_END = "<|endoftext|>"
MAX_RUN = 10_000  # whitespace characters that are encoded at once (data.md 9.3)
MODEL_FILE = "bpe.json"

_FORMAT = "kumiki/bpe"
_RUN_END = re.compile(rf"\s{{{MAX_RUN}}}(?=\s)")

# GPT-2's files: names they go by, the name tiktoken's cache gives them (sha1 of an address), sha256
_GPT2_FILES = {
    "encoder.json": (
        ("encoder.json", "vocab.json"),
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "vocab.bpe": (
        ("vocab.bpe", "merges.txt"),
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
}


def cut_runs(text: str) -> list[str]:
    """`text` cut after every MAX_RUN-th character of a whitespace run; the slices join to `text`.

    The `\\s+(?!\\S)` of the patterns backtracks over a whole run: at 1,000,000 spaces the regex
    engine runs out of stack. 3 GB/s, so every text passes through here.
    """
    if len(text) <= MAX_RUN:
        return [text]
    cuts = [0, *(match.end() for match in _RUN_END.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(cuts)]


@dataclass(frozen=True, kw_only=True)
class BpeModel:
    """Ordered merges with their split pattern and specials; immutable, safe to share by threads."""

    kind: str  # bpe or gpt2
    pattern: str
    pieces: tuple[bytes, ...]  # bytes of each ordinary id, which is its rank too
    merges: tuple[tuple[int, int], ...]  # ids; merge k makes id 256 + k
    specials: dict[str, int]  # ids after the pieces
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    trainer: dict[str, str]
    files: dict[str, bytes] = field(repr=False)  # what `read` needs, by name
    losses: dict[str, int] = field(default_factory=dict)  # counted while training: none
    lossless: bool = True

    @cached_property
    def table(self) -> list[bytes]:
        """Bytes of every id; specials stand for none."""
        return [*self.pieces, *(b"" for _ in self.specials)]

    @property
    def unk_id(self) -> None:
        """Every byte is a piece, so nothing is unknown."""
        return None

    @cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            self.kind,
            pat_str=self.pattern,
            mergeable_ranks={piece: rank for rank, piece in enumerate(self.pieces)},
            special_tokens=self.specials,
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (n,). UnicodeEncodeError for lone surrogates."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError as error:  # the regex engine gave up; cut_runs leaves no known case
            raise _unsplittable(text) from error
        except BaseException as error:
            # A Rust panic derives from BaseException and its class cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            raise _unsplittable(text) from None
        return ids.astype(np.int32)  # a copy: the buffer itself is read-only

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that `ids` stand for."""
        return b"".join(map(self.table.__getitem__, ids))

    def identity(self) -> dict[str, object]:
        """What the fingerprint hashes, besides the kind (data.md 8.2)."""
        return {
            "tokens": [piece.hex() for piece in self.pieces],
            "pattern": self.pattern,
            "specials": self.specials,
            "normaliser": None,
            "escape": None,
        }

    def hf_json(self) -> str:
        """The same tokenizer for the `tokenizers` library.

        Equal ids on ordinary text. It differs where its regex engine knows another Unicode version,
        on whitespace runs over MAX_RUN, and it parses special strings unless
        `encode_special_tokens` is set on it.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        text = [_spell(piece) for piece in self.pieces]
        model = models.BPE(
            vocab={piece: index for index, piece in enumerate(text)} | self.specials,
            merges=[(text[a], text[b]) for a, b in self.merges],
        )
        hf = Tokenizer(model)
        hf.pre_tokenizer = _hf_splitter(self.pattern, Regex, pre_tokenizers)
        hf.decoder = decoders.ByteLevel()
        hf.add_special_tokens([AddedToken(name, special=True) for name in self.specials])
        return hf.to_str()


def _unsplittable(text: str) -> InputError:
    return InputError(
        "text cannot be split into pieces",
        value=f"{len(text)} characters: {text[:20]!r}",
        remedy="leave this document out and report it",
    )


def _hf_splitter(pattern: str, regex, pre_tokenizers):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# ---------------------------------------------------------------- training


def train_bpe(texts: Iterable[str], settings: BpeTokenizer) -> BpeModel:
    """Byte-level BPE of `settings.vocab_size` ids on `texts`, read once, in order (data.md 8.3).

    rustbpe merges the most frequent pair, ties to the smallest pair of ids; `hf` has another tie
    rule. Both count distinct pieces, so memory follows the vocabulary of the text, not its length.
    UserError with the reached size when the text has too few different pairs.
    """
    merges_wanted = settings.vocab_size - 256 - len(SPECIALS)
    train = {"rustbpe": _merges_by_rustbpe, "hf": _merges_by_hf}[settings.trainer]
    merges = train(_capped(texts, settings), 256 + merges_wanted) if merges_wanted else []
    if len(merges) < merges_wanted:
        reached = 256 + len(merges) + len(SPECIALS)
        raise UserError(
            "training text has too few different pairs",
            value=f"vocab_size {settings.vocab_size} asked, {reached} reached",
            remedy=f"set vocab_size to {reached} or less, or give more text",
        )
    package = {"rustbpe": "rustbpe", "hf": "tokenizers"}[settings.trainer]
    return _trained(merges, {"name": settings.trainer, "version": version(package)})


def _trained(merges: list[tuple[int, int]], trainer: dict[str, str]) -> BpeModel:
    pieces = _join(merges)
    specials = {name: len(pieces) + i for i, name in enumerate(SPECIALS)}
    model = {"format": _FORMAT, "version": 1, "pattern": PATTERN, "merges": merges}
    return BpeModel(
        kind="bpe",
        pattern=PATTERN,
        pieces=pieces,
        merges=tuple(merges),
        specials=specials,
        bos_id=specials[BOS],
        eos_id=specials[BOS],  # bos separates documents, so it ends one as well
        pad_id=None,
        trainer=trainer,
        files={MODEL_FILE: files.canonical_json(model)},
    )


def _join(merges: Iterable[tuple[int, int]]) -> tuple[bytes, ...]:
    """The bytes of every id, from the merges. ValueError for merges that training never makes."""
    pieces = [bytes([value]) for value in range(256)]
    for a, b in merges:
        if not (0 <= a < len(pieces) and 0 <= b < len(pieces)):
            raise ValueError(f"merge {len(pieces) - 256} of unknown ids {a}, {b}")
        pieces.append(pieces[a] + pieces[b])
    if len(set(pieces)) != len(pieces):
        # Left-to-right merging gives every byte string one way to arise, so this is never training.
        raise ValueError("two ids of the same bytes")
    return tuple(pieces)


def _capped(texts: Iterable[str], settings: BpeTokenizer) -> Iterator[str]:
    """Each document cropped to `doc_cap`; ends with the one that takes the sum past `max_chars`."""
    total = 0
    for text in texts:
        text = text[: settings.doc_cap]
        yield from cut_runs(text)
        total += len(text)
        if total > settings.max_chars:
            return


def _merges_by_rustbpe(texts: Iterator[str], size: int) -> list[tuple[int, int]]:
    import rustbpe

    trainer = rustbpe.Tokenizer()  # type: ignore[attr-defined]  # it has no stubs
    trainer.train_from_iterator(texts, size, pattern=PATTERN)
    ranks = sorted((rank, bytes(piece)) for piece, rank in trainer.get_mergeable_ranks())
    return _recover_merges([piece for _, piece in ranks])


def _recover_merges(pieces: list[bytes]) -> list[tuple[int, int]]:
    """The merge behind each piece after the 256 bytes: what merging by lower ranks leaves."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    merges = []
    for rank, piece in enumerate(pieces[256:], start=256):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = min(joined)
            assert first < rank, f"piece {rank} is no merge of two earlier ones"
            at = joined.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((ranks[parts[0]], ranks[parts[1]]))
    return merges


def _merges_by_hf(texts: Iterator[str], size: int) -> list[tuple[int, int]]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = _hf_splitter(PATTERN, Regex, pre_tokenizers)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    ids = {bytes([value]): value for value in range(256)}
    merges = []
    for left, right in json.loads(hf.to_str())["model"]["merges"]:
        a, b = _unspell(left), _unspell(right)
        if a + b not in ids:  # its trainer lets two merges share one id
            ids[a + b] = 256 + len(merges)
            merges.append((ids[a], ids[b]))
    return merges


# ---------------------------------------------------------------- GPT-2


def take_gpt2(folder: Path | None, cache_folder: Path | None = None) -> BpeModel:
    """GPT-2's tokenizer from `folder` (either spelling of its files) or tiktoken's cache folder.

    EnvError with the three ways when neither holds it, InputError when a file is not GPT-2's.
    """
    found: dict[str, bytes] = {}
    for name, (spellings, cached_name, sha256) in _GPT2_FILES.items():
        places = [folder / spelling for spelling in spellings] if folder else []
        places += [cache_folder / cached_name] if cache_folder else []
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise EnvError(
                "GPT-2's tokenizer is not here",
                value=f"no {name} in {folder or 'any folder'}",
                remedy="declare it as a `files` source, set `folder` to one with encoder.json and "
                "vocab.bpe, or set TIKTOKEN_CACHE_DIR",
            )
        found[name] = path.read_bytes()
        actual = hashlib.sha256(found[name]).hexdigest()
        if actual != sha256:
            raise InputError(
                "not GPT-2's file",
                file=path,
                value=f"expected sha256 {sha256[:8]}…, found {actual[:8]}…",
                remedy="fetch it again",
            )
    return _gpt2_from(found)


def _gpt2_from(found: dict[str, bytes]) -> BpeModel:
    vocab = json.loads(found["encoder.json"])
    end_id = vocab.pop(GPT2_END)
    pieces = [_unspell(piece) for piece, _ in sorted(vocab.items(), key=lambda item: item[1])]
    lines = found["vocab.bpe"].decode().splitlines()[1:]  # the first line is a version
    merges = [tuple(vocab[part] for part in line.split(" ")) for line in lines]
    assert end_id == len(pieces) == 256 + len(merges)
    return BpeModel(
        kind="gpt2",
        pattern=GPT2_PATTERN,
        pieces=tuple(pieces),
        merges=tuple(merges),
        specials={GPT2_END: end_id},
        bos_id=end_id,
        eos_id=end_id,
        pad_id=end_id,
        trainer={"name": "gpt2", "version": "2019"},
        files=found,
    )


# ---------------------------------------------------------------- reading, byte spelling


def read_bpe(found: dict[str, bytes], card: dict) -> BpeModel:
    """The model that `files` of a tokenizer folder hold. ValueError or KeyError when damaged."""
    if card["kind"] == "gpt2":
        return _gpt2_from(found)
    raw = json.loads(found[MODEL_FILE])
    if (raw["format"], raw["version"], raw["pattern"]) != (_FORMAT, 1, PATTERN):
        raise ValueError(f"unknown format or split pattern: {raw['format']} {raw['version']}")
    return _trained([(int(a), int(b)) for a, b in raw["merges"]], dict(card["trainer"]))


# GPT-2's spelling of bytes as printable characters: those that print stay, the others become
# U+0100 and on, in order.
_PRINTABLE = frozenset(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
_OTHERS = [value for value in range(256) if value not in _PRINTABLE]
_SPELLING = {value: chr(value) for value in _PRINTABLE} | {
    value: chr(256 + index) for index, value in enumerate(_OTHERS)
}
_VALUES = {letter: value for value, letter in _SPELLING.items()}


def _spell(piece: bytes) -> str:
    return "".join(map(_SPELLING.__getitem__, piece))


def _unspell(piece: str) -> bytes:
    return bytes(map(_VALUES.__getitem__, piece))
