"""SentencePiece: a lossless and a seed-compatible BPE recipe, ready-made `.model` files, encoding.

In:    an iterator of documents or a `.model` file.   Out: an `SpmModel` over the model's own bytes.
Law:   lossless models give decode_bytes(encode(x)) = the UTF-8 bytes of x, for every text.
Two rules make it so (data.md 8.4): a literal U+2581, the library's own mark for a space, is encoded
by us as its three byte pieces; and decoding uses our table id -> bytes, never the library's decode.
Note:  the `.model` is stored without the thread count and paths of its training, so equal training
       gives equal bytes.
"""

from __future__ import annotations

import heapq
import io
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lib.core.data_settings import SentencePieceTokenizer
from lib.core.errors import InputError, UserError
from lib.data.vocab.spm_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNIGRAM,
    UNKNOWN,
    UNKNOWN_MARK,
    UNUSED,
    USER_DEFINED,
    Spec,
    read_spec,
    without_circumstances,
)

MODEL_FILE = "spm.model"
SEED_LINE_BYTES = 4192  # the library's default: longer training lines are skipped

_PARAGRAPH_CHARS = 60_000  # the trainer may abort at 65,536 characters without a space
_LINE_BYTES = 4 * _PARAGRAPH_CHARS + 1
# Ends of training lines: newline is a symbol of its own, the trainer refuses NUL and skips lines
# with U+2585, its own mark, and U+2581 never reaches the library when encoding.
_LINE_ENDS = re.compile(f"[\n\0{SPACE_MARK}{UNKNOWN_MARK}]")
# Texts that show a loss quickly; a ready-made model that changes one of them is not lossless.
_PROBES = (
    *(" ", "  a  ", "a\nb\n", "\r\n\t", "\u3000字", "①㈱ｶﾞ", "e\u0301", "\ufeff", "<unk></s><0x41>"),
    *("a\u2581b \u2581", "\0", "\U0001f469\u200d\U0001f52c", "\U0010ffff"),
)


@dataclass(frozen=True, kw_only=True)
class SpmModel:
    """A SentencePiece model with the bytes of its pieces; immutable, safe to share by threads."""

    proto: bytes = field(repr=False)  # the `.model` file
    lossless: bool
    trainer: dict[str, str]
    losses: dict[str, int] = field(default_factory=dict)  # counted while training the seed recipe
    kind: str = "sentencepiece"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.processor.get_piece_size() != len(self.spec.pieces):
            raise ValueError("the library reads another number of pieces")

    @cached_property
    def spec(self) -> Spec:
        """Pieces and normaliser as the file has them."""
        return read_spec(self.proto)

    @cached_property
    def processor(self):
        """The library's object; ValueError for bytes that are no model."""
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except RuntimeError as error:
            raise ValueError(f"no SentencePiece model: {error}") from error

    @property
    def files(self) -> dict[str, bytes]:
        """The model file by name."""
        return {MODEL_FILE: self.proto}

    @cached_property
    def table(self) -> list[bytes]:
        """Bytes of every id: a byte piece is that byte, U+2581 else a space, control nothing."""
        return [_piece_bytes(piece, kind) for piece, _, kind in self.spec.pieces]

    @cached_property
    def _mark_ids(self) -> np.ndarray:
        """The three byte pieces of a literal U+2581."""
        ids = [self.processor.piece_to_id(f"<0x{value:02X}>") for value in SPACE_MARK.encode()]
        return np.array(ids, dtype=np.int32)

    def _id(self, name: str) -> int | None:
        index = getattr(self.processor, name)()
        return None if index < 0 else index

    @property
    def bos_id(self) -> int | None:
        """Id of `<s>`, or None."""
        return self._id("bos_id")

    @property
    def eos_id(self) -> int | None:
        """Id of `</s>`, or None."""
        return self._id("eos_id")

    @property
    def pad_id(self) -> int | None:
        """Id of `<pad>`, or None."""
        return self._id("pad_id")

    @property
    def unk_id(self) -> int | None:
        """Id of `<unk>`."""
        return self._id("unk_id")

    @property
    def specials(self) -> dict[str, int]:
        """Control pieces and `<unk>` with their ids."""
        return {
            piece: index
            for index, (piece, _, kind) in enumerate(self.spec.pieces)
            if kind in (CONTROL, UNKNOWN)
        }

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (n,). UnicodeEncodeError for lone surrogates."""
        if not self.lossless or SPACE_MARK not in text:
            return self.processor.encode_as_numpy(text.encode())
        parts = [self.processor.encode_as_numpy(part.encode()) for part in text.split(SPACE_MARK)]
        ids = [piece for part in parts for piece in (self._mark_ids, part)]
        return np.concatenate(ids[1:])

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that `ids` stand for; of a lossy model, what the library makes of them."""
        if self.lossless:
            return b"".join(map(self.table.__getitem__, ids))
        return self.processor.decode(ids).encode()

    def normalize(self, text: str) -> str:
        """`text` after the model's own rewriting, as it is before it is cut into pieces."""
        return self.processor.normalize(text).replace(SPACE_MARK, " ")

    def identity(self) -> dict[str, object]:
        """What the fingerprint hashes, besides the kind (data.md 8.2)."""
        spec = self.spec
        return {
            "pieces": [
                [piece, struct.pack("<f", score).hex(), kind] for piece, score, kind in spec.pieces
            ],
            "algorithm": spec.algorithm,
            "pattern": None,
            "specials": self.specials,
            "roles": [self.unk_id, self.pad_id, self.bos_id, self.eos_id],
            "normaliser": {
                "charsmap": blake2b(spec.charsmap, digest_size=16).hexdigest(),
                "byte_fallback": spec.byte_fallback,
                "dummy_prefix": spec.dummy_prefix,
                "collapse_spaces": spec.collapse_spaces,
            },
            "escape": SPACE_MARK if self.lossless else None,
        }

    def hf_json(self) -> str:
        """The same tokenizer for the `tokenizers` library.

        Lossless models: equal ids on every text without whitespace runs over 10,000. Its pieces
        have a plain space for U+2581, so a literal U+2581 is unknown there and falls to bytes.
        Lossy models: its normaliser works on graphemes, SentencePiece's on longest prefixes, so
        rare sequences differ; the report counts the documents. Special strings are parsed unless
        `encode_special_tokens` is set on it.
        """
        return _hf_json(self)


def _piece_bytes(piece: str, kind: int) -> bytes:
    if kind in (CONTROL, UNKNOWN):
        return b""
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


# ---------------------------------------------------------------- training


def train_sentencepiece(texts: Iterable[str], settings: SentencePieceTokenizer) -> SpmModel:
    """SentencePiece BPE by the `lossless` or `seed` recipe (data.md 8.4, 8.5), texts read once.

    Memory: `sample_bytes` of text here, about 18 times that in the trainer. UserError with the
    reachable size when the vocabulary is too large or too small for the text.
    """
    sample = _sample(texts, settings.sample_bytes)
    if not any(sample):
        raise InputError("no training text", remedy="give the recipe at least one document")
    if settings.recipe == "lossless":
        lines, losses = _paragraphs(sample), {}
    else:
        lines, losses = (text.replace("\n", " ") for text in sample), _seed_losses(sample)
    proto = _train(lines, settings)
    trainer = {"name": f"sentencepiece {settings.recipe}", "version": version("sentencepiece")}
    return SpmModel(
        proto=without_circumstances(proto),
        lossless=settings.recipe == "lossless",
        trainer=trainer,
        losses=losses,
    )


def take_sentencepiece(path: Path) -> SpmModel:
    """A ready-made `.model` file; lossless when its form allows it and no probe text changes.

    UserError when the file is missing, InputError when it is no model.
    """
    try:
        proto = path.read_bytes()
    except FileNotFoundError:
        raise UserError("no such file", file=path, remedy="correct the key `file`") from None
    trainer = {"name": "file", "version": "0"}
    try:
        spec = read_spec(proto)
        exact = SpmModel(proto=proto, lossless=spec.keeps_bytes, trainer=trainer)
    except ValueError as error:
        raise InputError(
            "not a SentencePiece model", file=path, value=error, remedy="give an intact file"
        ) from error
    if spec.keeps_bytes and all(
        exact.decode_bytes(exact.encode(probe).tolist()) == probe.encode() for probe in _PROBES
    ):
        return exact
    return SpmModel(proto=proto, lossless=False, trainer=trainer)


def _sample(texts: Iterable[str], limit_bytes: int) -> list[str]:
    """The documents of smallest hash, together at most `limit_bytes`, in their order.

    The hash is over the document itself, so the choice follows neither its position nor the length
    of the stream, which is read once. (The library's own sampling is not reproducible.)
    """
    heap: list[tuple[int, int, str]] = []  # (-hash, position, text): the largest hash leaves first
    total = 0
    for position, text in enumerate(texts):
        data = text.encode()
        digest = int.from_bytes(blake2b(data, digest_size=8, person=b"spm sample").digest(), "big")
        heapq.heappush(heap, (-digest, position, text))
        total += len(data)
        while total > limit_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2].encode())
    return [text for _, text in sorted((position, text) for _, position, text in heap)]


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """Training lines of the lossless recipe, none empty, too long or with a reserved character."""
    for text in texts:
        for line in _LINE_ENDS.split(text):
            for start in range(0, len(line), _PARAGRAPH_CHARS):
                yield line[start : start + _PARAGRAPH_CHARS]


def _seed_losses(texts: Iterable[str]) -> dict[str, int]:
    """What the seed recipe does not train on: long lines, and those with the library's own mark."""
    sizes, skipped = [], []
    for text in texts:
        sizes.append(len(text.encode()))
        if sizes[-1] > SEED_LINE_BYTES or UNKNOWN_MARK in text:
            skipped.append(sizes[-1])
    return {
        "train_documents": len(sizes),
        "train_bytes": sum(sizes),
        "skipped_documents": len(skipped),
        "skipped_bytes": sum(skipped),
    }


def _train(lines: Iterator[str], settings: SentencePieceTokenizer) -> bytes:
    import sentencepiece

    lossless = settings.recipe == "lossless"
    recipe: dict[str, Any] = {}  # options of the library, of several types
    if lossless:
        recipe = {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "max_sentence_length": _LINE_BYTES,
            "user_defined_symbols": ["\n"],
            "required_chars": SPACE_MARK,
        }
    failures: list[BaseException] = []
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_guarded(lines, _LINE_BYTES if lossless else None, failures),
            model_writer=out,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            num_threads=settings.threads,
            unk_id=0,
            pad_id=1,
            bos_id=2,
            eos_id=3,
            minloglevel=2,
            **recipe,
        )
    except RuntimeError as error:
        if failures:  # the source of the texts failed; the library hides that in its own error
            raise failures[0] from None
        raise _refusal(str(error), settings) from error
    return out.getvalue()


def _guarded(
    lines: Iterator[str], limit_bytes: int | None, failures: list[BaseException]
) -> Iterator[bytes]:
    """The lines as bytes; keeps what their source raises. No line may be one the trainer skips."""
    try:
        for line in lines:
            data = line.encode()
            assert limit_bytes is None or 0 < len(data) <= limit_bytes
            yield data
    except GeneratorExit:  # the trainer stopped early for a reason of its own
        raise
    except BaseException as error:
        failures.append(error)
        raise


def _refusal(message: str, settings: SentencePieceTokenizer) -> UserError:
    """The trainer's refusal with the sizes it names and the way out."""
    if match := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return UserError(
            "training text has too few different pieces",
            value=f"vocab_size {settings.vocab_size} asked, {match[1]} reached",
            remedy=f"set vocab_size to {match[1]} or less, or give more text",
        )
    if match := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return UserError(
            "vocabulary cannot hold the characters of the text",
            value=f"vocab_size {match[1]}, {match[2]} needed",
            remedy=f"set vocab_size above {match[2]}, or lower character_coverage (.995 at 8,000)",
        )
    return UserError("SentencePiece refused to train", value=message, remedy="change its section")


# ---------------------------------------------------------------- for the `tokenizers` library


def _hf_json(spm: SpmModel) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    spec = spm.spec
    space = " " if spm.lossless else SPACE_MARK
    names = [piece.replace(SPACE_MARK, space) for piece, _, _ in spec.pieces]
    unknown = None if spm.unk_id is None else names[spm.unk_id]
    if spec.algorithm == UNIGRAM:
        scores = [score for _, score, _ in spec.pieces]
        model = models.Unigram(
            list(zip(names, scores, strict=True)), spm.unk_id, byte_fallback=spec.byte_fallback
        )
    elif spec.algorithm == BPE:
        model = models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=_all_merges(names, spec),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    else:
        raise UserError(
            "SentencePiece model of an unknown algorithm",
            value=spec.algorithm,
            remedy="use one of type bpe or unigram",
        )
    hf = Tokenizer(model)
    if not spm.lossless:
        steps = [normalizers.Precompiled(spec.charsmap)] if spec.charsmap else []
        if spec.collapse_spaces:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        if spec.dummy_prefix:
            steps += [normalizers.Prepend(" ")]
        hf.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    undo = [] if spm.lossless else [decoders.Replace(SPACE_MARK, " ")]
    undo += [decoders.ByteFallback(), decoders.Fuse()]
    if spec.dummy_prefix and not spm.lossless:
        undo += [decoders.Strip(" ", 1, 0)]
    hf.decoder = decoders.Sequence(undo)
    symbols = [p for p, _, kind in spec.pieces if kind == USER_DEFINED and len(p) > 1]
    hf.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    hf.add_special_tokens([AddedToken(name, special=True) for name in spm.specials])
    return hf.to_str()


def _all_merges(names: list[str], spec: Spec) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, in the order of the piece's score."""
    usable = {
        name
        for name, (_, _, kind) in zip(names, spec.pieces, strict=True)
        if kind in (NORMAL, UNUSED)
    }
    order = sorted(range(len(names)), key=lambda index: -spec.pieces[index][1])
    return [
        (names[index][:at], names[index][at:])
        for index in order
        if names[index] in usable
        for at in range(1, len(names[index]))
        if names[index][:at] in usable and names[index][at:] in usable
    ]
