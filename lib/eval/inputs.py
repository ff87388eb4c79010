"""What is measured, on what: a model, its tokenizer and tokens, the documents behind them, tasks.

Rule:  the text is the one that the training tokens were encoded from, the tokenizer the model's
       own; both are compared by hash. Needs no torch, so a stage may ask before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.stage import Run, input_hash
from lib.data.documents import read_documents
from lib.data.raw.sources import ensure_files
from lib.data.tokens import TokenStore
from lib.data.vocab.tokenizer import Tokenizer, load_tokenizer
from lib.eval import bundle as bundles
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


# ---------------------------------------------------------------- where the bundle is


def find_bundle(run: Run) -> Path | None:
    """The folder of `eval.core.bundle`, a verified source or a local folder; None = no CORE."""
    settings = run.settings.eval.core
    if settings.enabled is False:
        return None
    if settings.bundle is not None:
        if _entries(run):
            manifest = Manifest.read(run.inputs["shards"], "shards")
            paths = ensure_files(manifest, settings.bundle, None, run.runtime, run.log)
            roots = sorted(p.parent for n, p in paths.items() if n.split("/")[-1] == bundles.INDEX)
            if roots:
                return roots[0]
        elif (Path(settings.bundle) / bundles.INDEX).is_file():
            return Path(settings.bundle)
    ways = "name a folder with core.yaml, or a source of kind archive, in eval.core.bundle"
    if settings.enabled is True:
        raise UserError("no task bundle", value=settings.bundle, remedy=ways)
    run.log(f"core: null, no task bundle ({settings.bundle or 'eval.core.bundle is null'}); {ways}")
    return None


def bundle_identity(run: Run) -> list[list[str]] | None:
    """(name, sha256) of every file that decides CORE; None where there is no bundle."""
    settings = run.settings.eval.core
    if settings.enabled is False or settings.bundle is None:
        return None
    if entries := _entries(run):
        return entries
    folder = Path(settings.bundle)
    if not (folder / bundles.INDEX).is_file():
        return None
    named = [folder / bundles.INDEX, folder / bundles.BASELINES]
    named += sorted((folder / bundles.DATA).rglob("*.jsonl"))
    return [[p.relative_to(folder).as_posix(), files.sha256_file(p)] for p in named if p.is_file()]


def _entries(run: Run) -> list[list[str]]:
    """Files of the source that `eval.core.bundle` names, as the shard manifest lists them."""
    start = f"{run.settings.eval.core.bundle}/"
    entries = Manifest.read(run.inputs["shards"], "shards").files
    return [[e.path, e.sha256] for e in entries if e.path.startswith(start)]
