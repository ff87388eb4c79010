"""What is measured, on what: a finished model, its tokenizer and tokens, the documents behind them.

Rule:  the text is the one that the training tokens were encoded from, the tokenizer the model's
       own; both are compared by hash. Needs no torch, so a stage may ask before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.core import artifact
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.stage import Run, input_hash
from lib.data.documents import read_documents
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.tokens import TokenStore
from lib.train.final import Final

Document = tuple[str, str]  # id, text


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is measured, on what; all of it has been verified."""

    final: Final
    tokenizer: Tokenizer
    store: TokenStore
    documents: Path  # folder of the recipe

    @classmethod
    def open(cls, run: Run) -> Inputs:
        """UserError where model, tokens and documents do not belong together."""
        folder, tokens = run.inputs["model"], run.inputs["tokens"]
        manifest = Manifest.read(tokens, kind="tokens")
        scratch = artifact.scratch_folder("tokens", manifest.key)
        artifact.ensure(scratch, manifest.files, None, full=run.runtime.verify == "full")
        store, tokenizer = TokenStore(scratch, manifest), load_tokenizer(folder)
        final = Final.open(folder, tokenizer.fingerprint)
        store.require_tokenizer(tokenizer.fingerprint)
        trained_on = final.provenance.get("parents", {}).get("tokens")
        if trained_on not in (None, input_hash(tokens)):
            raise UserError(
                "model was trained on other tokens",
                file=folder,
                value=f"trained on {trained_on[:8]}, given {input_hash(tokens)[:8]}",
                remedy="give --tokens of its own encoding, or train again",
            )
        documents = find_documents(run.inputs["documents"], manifest)
        return cls(final=final, tokenizer=tokenizer, store=store, documents=documents)

    def texts(self) -> Iterator[Document]:
        """The validation documents, in order."""
        return read_documents(self.documents, "val")

    @property
    def context(self) -> int:
        """T: what the model may be given, at most; without a limit, the length of its rows."""
        return self.final.context


def find_documents(folder: Path, tokens: Manifest) -> Path:
    """The recipe's folder below `folder` from which `tokens` were encoded.

    UserError when there is none: the text has changed since.
    """
    wanted = tokens.recipe["inputs"]["documents"]
    found = {
        path.parent: Manifest.read(path).sha256 for path in sorted(folder.glob("*/manifest.json"))
    }
    for place, sha256 in found.items():
        if sha256 == wanted:
            return place
    seen = ", ".join(f"{place.name} {sha256[:8]}" for place, sha256 in found.items()) or "nothing"
    raise UserError(
        "validation text has changed since the tokens were made",
        file=folder,
        value=f"tokens of {wanted[:8]}, found {seen}",
        remedy="`dvc repro` the encoding and the training",
    )
