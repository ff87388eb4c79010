"""What a run reads: token rows, its tokenizer, validation text, another run's weights.

In:    the manifest of an encoding, a tokenizer folder.   Out: `Data`, closures for the loop.
Rule:  token files are verified before their first use; a tokenizer that did not make them is
       refused.
Note:  validation text comes out of the token files: a lossless tokenizer gives back the documents
       bytes, so every tokenizer and family is measured on the same text (evaluation.md 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.core import artifact
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.run_settings import Train
from lib.data.embeddings import Embeddings
from lib.data.loader import Chunks, Loader
from lib.data.tokens import TokenStore
from lib.data.vocab import chat
from lib.data.vocab.tokenizer import Tokenizer, load_tokenizer
from lib.eval.bpb import Document, take_prefix, validate
from lib.eval.scorer import Rules
from lib.export.generate import Sampling, generate
from lib.models.base import Family
from lib.train.final import Final
from lib.train.plan import Plan

SAMPLE_TOKENS, SAMPLES = 48, 2


def said(ids: Tensor, *, opens: int, closes: Tensor) -> Tensor:
    """Of rows (B, n): which ids stand after `opens` with none of `closes` between; bool.

    The id that closes counts too: a model has to learn to stop.
    """
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
    marks = (ids == opens, torch.isin(ids, closes.to(ids.device)))
    last_open, last_close = ((place * mark).cummax(1).values for mark in marks)
    return F.pad((last_open > last_close)[:, :-1], (1, 0))


@dataclass(frozen=True)
class Data:
    """Token rows and the tokenizer that made them."""

    store: TokenStore
    tokenizer: Tokenizer
    seed: int
    _vectors: Embeddings | None = None

    @classmethod
    def open(cls, tokens: Path, tokenizer: Path, seed: int, *, full: bool) -> Data:
        """Verify and open; InputError for damaged files, UserError for another tokenizer."""
        manifest = Manifest.read(tokens, kind="tokens")
        folder = artifact.scratch_folder("tokens", manifest.key)
        artifact.ensure(folder, manifest.files, None, full=full)
        store, loaded = TokenStore(folder, manifest), load_tokenizer(tokenizer)
        store.require_tokenizer(loaded.fingerprint)
        return cls(store, loaded, seed)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of training text that one training token stands for."""
        return float(self.store.documents("train").bytes.sum()) / max(1, self.store.length("train"))

    def rows(self, plan: Plan, stream_rows: int | None = None) -> Loader | Chunks:
        """The seeded rows of every step, or the chunks of the corpus read as one stream."""
        if stream_rows is not None:
            return Chunks(self.store, stream_rows)
        return Loader(self.store, plan.batch_tokens, self.seed, plan.rows_by_step)

    def answers(self, loss_on: str) -> Callable[[Tensor], Tensor] | None:
        """Which ids of rows are targets; None: all. UserError where no turns are framed."""
        if loss_on == "all":
            return None
        if self.store.template != chat.JOIN:
            raise UserError(
                "no conversations to tell apart", value="loss_on: assistant",
                remedy="give the encoding template: chat, its source join: chat",
            )  # fmt: skip
        opens, closes = chat.limits(self.tokenizer)
        return partial(said, opens=opens, closes=torch.tensor(closes))

    def first_rows(self, count: int) -> np.ndarray:
        """The first packed rows, at most `count`: (rows, T + 1)."""
        found = np.empty((min(count, self.store.rows), self.store.context + 1), np.int64)
        for number, row in enumerate(found):
            self.store.read_row(number, row)
        return found

    def embeddings(self, inputs: Mapping[str, Path]) -> Embeddings:
        """The vectors that belong to these token files, verified once."""
        if self._vectors is None:
            found = Embeddings.open(inputs["embeddings"], inputs["tokens"], self.store)
            object.__setattr__(self, "_vectors", found)
        assert self._vectors is not None
        return self._vectors

    def val_bytes_per_token(self, settings: Train) -> float:
        """Bytes of the validated text over its ids."""
        wanted = settings.eval_bytes
        prefix = take_prefix(self.documents, wanted) if wanted else self.documents
        tokens = sum(len(self.tokenizer.encode(text)) for _, text in prefix)
        return sum(len(text.encode()) for _, text in prefix) / max(1, tokens)

    @cached_property
    def documents(self) -> list[Document]:
        """All validation documents: (number, text)."""
        found, held = [], self.store.documents("val")
        special = {self.store.bos_id, self.store.eos_id}
        for number in range(len(held)):
            start, stop = (int(held.offsets[number + i]) for i in (0, 1))
            ids = self.store.tokens("val", start, stop - start).tolist()
            data = self.tokenizer.decode_bytes([i for i in ids if i not in special])
            found.append((str(number), data.decode("utf-8", errors="replace")))
        return found

    def validator(
        self, settings: Train, device: torch.device, dtype: torch.dtype
    ) -> Callable[[Family], float | None]:
        """Bits per byte of the first `eval_bytes` of validation text; None if the ids lose text."""
        rules = Rules.of(self.tokenizer, self.store.boundary, self.store.context)
        wanted = settings.eval_bytes
        prefix = take_prefix(self.documents, wanted) if wanted else self.documents

        def bpb(model: Family) -> float | None:
            return validate(model, prefix, self.tokenizer, rules, device=device, dtype=dtype).bpb

        return bpb

    def sampler(self, device: torch.device) -> Callable[[Family], list[str]]:
        """Short texts that begin with nothing but the boundary id."""
        first = self.store.bos_id if self.store.bos_id is not None else self.store.eos_id

        def texts(model: Family) -> list[str]:
            if first is None:
                return []
            rows = generate(
                model, [first], Sampling(), rows=SAMPLES, device=device,
                max_new_tokens=min(SAMPLE_TOKENS, self.store.context - 1),
            )  # fmt: skip
            return [self.tokenizer.decode_bytes(r.ids).decode("utf-8", "replace") for r in rows]

        return texts


def take_weights(source: Path, model: Family, tokenizer: str) -> None:
    """Load the weights of the finished model in `source` into `model`.

    UserError unless tokenizer and shapes agree, and what else the family compares.
    """
    final = Final.open(source, tokenizer)
    model.take_weights(final.config, final.weights)


def sized(settings: Train, store: TokenStore) -> Train:
    """`settings` with the steps of its `epochs`, whole passes over the rows where it has them."""
    if settings.epochs is None:
        return settings
    assert isinstance(settings.batch_tokens, int), "run_settings demands a number"
    rows: float = settings.batch_tokens // store.context
    if ramp := settings.batch_ramp:
        rows *= sum(ramp) / len(ramp)
    return replace(settings, epochs=None, steps=max(1, int(settings.epochs * store.rows / rows)))


def require_context(context: int, model: Family) -> None:
    """UserError unless the rows are as long as the model's context.

    Longer ones do not fit; on shorter ones no position beyond them would ever be trained.
    """
    own = model.max_context
    if own is not None and context != own:
        raise UserError(
            f"rows are {'longer' if context > own else 'shorter'} than the model's context",
            value=f"rows of {context}, model {own}",
            remedy=f"run the encode_tokens stage again with context {own}, or give the model "
            f"context {context}",
        )
