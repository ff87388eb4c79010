"""The finished model: what `final/` holds, written by training, opened by everything after it.

Files: model.safetensors (the averaged weights where the run keeps an average), config.json (family,
       sizes, vocabulary), the tokenizer's files, provenance.json (from what), manifest.json.
Rule:  nothing is read before its hash agrees; names and shapes are compared with the family's
       before a tensor is allocated; another tokenizer is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.errors import UserError
from lib.core.heads import config_class, family_names
from lib.core.typed import typed
from lib.train.checkpoint import Tensors, read_tensors, verified_manifest, write_tensors

if TYPE_CHECKING:
    import torch

    from lib.models.base import Family

KIND, FORMAT, VERSION = "model", "kumiki/model", 1
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
CARD = "tokenizer.json"


def write_final(
    folder: Path,
    weights: Tensors,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    tokenizer: Path | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a finished model to `folder`, whole or not at all.

    config: `family`, `config`, `vocab_size`, `context`, `tokenizer` (fingerprint). tokenizer: the
    folder whose files go in beside it (its manifest stays behind, `final/` has its own). beside:
    file name -> JSON value.
    """
    with files.atomic_folder(folder) as part:
        write_tensors(part / WEIGHTS, weights)
        files.write_json(part / CONFIG, {"format": FORMAT, "version": VERSION, **config})
        files.write_json(part / PROVENANCE, provenance)
        for name, value in (beside or {}).items():
            files.write_json(part / name, value)
        for path in sorted(tokenizer.iterdir()) if tokenizer else []:
            if path.is_file() and path.name != files.MANIFEST and not path.name.startswith("."):
                files.link_or_copy(path, part / path.name)
        recipe = {"family": config["family"], "fingerprint": provenance.get("fingerprint")}
        Manifest(kind=KIND, recipe=recipe, files=artifact.describe(part)).write(
            part / files.MANIFEST
        )


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a finished model: `family`, its `config`; the weights are not read.

    InputError where the file is not as it was written.
    """
    manifest = Manifest.read(folder / files.MANIFEST, KIND)
    entries = tuple(e for e in manifest.files if e.path == CONFIG)
    artifact.verify(folder, replace(manifest, files=entries))
    return files.read_json(folder / CONFIG)


def family_of(folder: Path) -> str:
    """The family of a finished model, as `config_of` finds it."""
    return config_of(folder)["family"]


@dataclass(frozen=True, kw_only=True)
class Final:
    """A finished model on disk, verified."""

    folder: Path
    family: str
    config: Any  # the family's Config
    vocab_size: int
    context: int
    tokenizer: str  # fingerprint
    provenance: dict[str, Any]
    sha256: str  # of the manifest: the identity of all it lists

    @classmethod
    def open(cls, folder: Path, tokenizer: str | None = None) -> Final:
        """Verify `folder` and read what it is.

        InputError where a file is not as it was, UserError where it is no finished model, of
        another format version, or made with another tokenizer than the fingerprint `tokenizer`.
        """
        manifest = verified_manifest(folder, KIND)
        raw = files.read_json(folder / CONFIG)
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise UserError(
                "model of another format version",
                file=folder,
                value=f"{raw.get('format')} {raw.get('version')}, this is {FORMAT} {VERSION}",
                remedy="run its training stage again",
            )
        if tokenizer is not None and tokenizer != raw["tokenizer"]:
            raise UserError(
                "tokenizer does not match",
                file=folder,
                value=f"made with {raw['tokenizer'][:8]}, given {tokenizer[:8]}",
                remedy="use the model's own tokenizer or retrain",
            )
        if raw["family"] not in family_names():
            names = ", ".join(family_names())
            raise UserError(
                "unknown family", file=folder, value=raw["family"], remedy=f"there are {names}"
            )
        return cls(
            folder=folder,
            family=raw["family"],
            config=typed(config_class(raw["family"]), raw["config"], folder / CONFIG),
            vocab_size=raw["vocab_size"],
            context=raw["context"],
            tokenizer=raw["tokenizer"],
            provenance=files.read_json(folder / PROVENANCE),
            sha256=manifest.sha256,
        )

    def weights(self, shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, torch.Tensor]:
        """All weights on the CPU; UserError unless names and shapes are those of `shapes`."""
        return read_tensors(self.folder / WEIGHTS, shapes)

    def model(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
        streamer: Callable[..., Any] | None = None,
    ) -> Family:  # fmt: skip
        """The model on `device` in evaluation mode; dtype: of its matmuls, default fp32.

        streamer: lib.nn.stream's, for a model that may be larger than the device.
        """
        import torch

        from lib.models.base import build, load_family

        family = load_family(self.family)
        config = typed(family.Config, artifact.plain(self.config), self.folder / CONFIG)
        with torch.device("meta"):
            shapes = {
                name: tuple(t.shape)
                for name, t in family.Model(config, self.vocab_size).state_dict().items()
            }
        model = build(
            family, config, self.vocab_size, weights=self.weights(shapes), device=device,
            dtype=dtype or torch.float32, streamer=streamer,
        )  # fmt: skip
        return model.eval()
