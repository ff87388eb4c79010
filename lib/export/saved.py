"""Finding and opening a model as a user names it: a run, a finished model, a checkpoint, an export.

In:    a name or a folder, and where the project lies.   Out: model, tokenizer, what was opened.
Rule:  everything is hashed before it is used; a model chosen by us falls back to the next good one
       and says so, a model named by the user does not. Pickled files are never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.errors import InputError, KumikiError, UserError, relative
from lib.data.vocab import chat

RUNS = "checkpoints"
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
Weights = Literal["ema", "raw"]
Streamer = Callable[[Any, Any, Any], Any]  # lib.nn.stream.for_reading: larger than the device


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model ready to generate."""

    folder: Path
    family: str
    config: Any  # the family's Config
    model: Any  # lib.models.base.Family, in evaluation mode
    tokenizer: Any  # lib.data.vocab.tokenizer.Tokenizer
    boundary: str | None  # what stood between documents in training; None: not recorded
    framed: bool  # turns of conversations stood between their ids in training
    weights: str  # which of them: final, export, step 400, ...

    @property
    def start_ids(self) -> list[int]:
        """What a text begins with: the id that stood before a document."""
        if self.boundary == "none":
            return []
        first = self.tokenizer.eos_id if self.boundary == "eos" else self.tokenizer.bos_id
        return [] if first is None else [first]


def open_model(
    name: str | None,
    root: Path | None,
    *,
    device: Any = "cpu",
    weights: Weights = "ema",
    streamer: Streamer | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Opened:
    """Open what `name` says: a folder, a run below `root`, or, without a name, the newest model.

    A run gives `final`, else `best`, else its newest step. InputError for damage, UserError where
    there is no such model.
    """
    if name is not None and (Path(name).suffix in PICKLED or Path(name).is_file()):
        raise UserError(
            "pickled file as model" if Path(name).suffix in PICKLED else "not a folder",
            value=name,
            remedy="it is never opened, convert it to safetensors where you trust it, "
            "or train again",
        )
    if name is not None and Path(name).is_dir() and is_model(Path(name)):
        return open_folder(Path(name), device=device, weights=weights, streamer=streamer)
    if root is None:
        raise UserError(
            "no model" if name is None else "no such model",
            value=name,
            remedy="name a folder, or run inside the project",
        )
    places = list(_places(name, root))
    if not places:
        raise UserError(
            "no model in checkpoints",
            value=name,
            remedy=f"run `dvc repro train_{name or '<run>'}`, or name a folder",
        )
    first: KumikiError | None = None
    for place in places:
        try:
            return open_folder(place, device=device, weights=weights, streamer=streamer)
        except InputError as error:
            first = first or error
            warn(f"passed over: {error}")
    assert first is not None
    raise first


def is_model(folder: Path) -> bool:
    """Whether this folder itself holds a model, rather than runs or checkpoints."""
    return (folder / "kumiki.json").is_file() or (folder / files.MANIFEST).is_file()


def _places(name: str | None, root: Path) -> Iterator[Path]:
    """Folders to try, best first."""
    if name is None:
        finals = [path.parent for path in (root / RUNS).glob("*/final/manifest.json")]
        yield from sorted(finals, key=age, reverse=True)
        return
    run = Path(name) if Path(name).is_dir() else root / RUNS / name
    if (run / "final" / files.MANIFEST).is_file():
        yield run / "final"
    works = [path.parent for path in (run / "work").glob("**/step_*/manifest.json")]
    steps = sorted(works, key=lambda p: (int(p.name.removeprefix("step_")), *age(p)), reverse=True)
    yield from sorted((run / "work").glob("**/best"))
    yield from steps


def age(folder: Path) -> tuple[int, str]:
    """Larger is newer; of the same moment, the name decides, not the order on disk."""
    return (folder / files.MANIFEST).stat().st_mtime_ns, folder.as_posix()


def open_folder(
    folder: Path, *, device: Any = "cpu", weights: Weights = "ema",
    streamer: Streamer | None = None,
) -> Opened:  # fmt: skip
    """Open exactly this folder; every file is hashed first."""
    if (folder / "kumiki.json").is_file():
        return _open_export(folder, device, streamer, weights)
    kind = Manifest.read(folder / files.MANIFEST).kind
    if kind == "checkpoint":
        return _open_checkpoint(folder, device, streamer, weights)
    return _open_final(folder, device, streamer, weights)


def _open_final(folder: Path, device: Any, streamer: Streamer | None, weights: Weights) -> Opened:
    from lib.data.vocab.tokenizer import load_tokenizer
    from lib.train.final import Final

    _require_averaged(folder, weights)
    tokenizer = load_tokenizer(folder)
    final = Final.open(folder, tokenizer.fingerprint)
    return Opened(
        folder=folder,
        family=final.family,
        config=final.config,
        model=final.model(device, streamer=streamer),
        tokenizer=tokenizer,
        boundary=final.provenance.get("boundary"),
        framed=(folder / chat.CARD).is_file(),
        weights="final",
    )


def _open_checkpoint(
    folder: Path, device: Any, streamer: Streamer | None, weights: Weights
) -> Opened:
    """A step of a run that lies in the project: its sizes and tokenizer stand in params.yaml."""
    from lib.core import params
    from lib.core.typed import typed
    from lib.data.vocab.tokenizer import load_tokenizer
    from lib.models.base import build, load_family
    from lib.train.checkpoint import verify

    found = verify(folder)
    root, run = _home_of(folder)
    settings = params.load(root)
    known = settings.train.get(run)
    if known is None or known.tokens is None:
        raise UserError("run is not in params.yaml", file=folder, value=run, remedy="name a model")
    encoding, identity = settings.encode_tokens[known.tokens], found.state["identity"]
    tokenizer = load_tokenizer(root / "data/tokenizers" / encoding.tokenizer)
    require_tokenizer(tokenizer.fingerprint, identity["tokenizer"], folder)
    family = load_family(identity["family"])
    config = typed(family.Config, artifact.plain(known.model), root / params.PARAMS)
    shapes = shapes_of(family, config, identity["vocab_size"])
    state = found.tensors("model", shapes)
    averaged = found.tensors("ema") if weights == "ema" else {}
    state |= {name: tensor.to(state[name].dtype) for name, tensor in averaged.items()}
    size = identity["vocab_size"]
    model = build(family, config, size, weights=state, device=device, streamer=streamer)
    return Opened(
        folder=folder,
        family=identity["family"],
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
        boundary=encoding.boundary,
        framed=encoding.template == chat.JOIN,
        weights=f"step {found.step}, {'averaged' if averaged else 'raw'}",
    )


def _home_of(folder: Path) -> tuple[Path, str]:
    """(project, run) of a folder below <project>/checkpoints/<run>/work."""
    for place in folder.absolute().parents:
        if place.parent.name == RUNS:
            return place.parent.parent, place.name
    raise UserError(
        "checkpoint outside of a project", file=folder, remedy="name a finished model or an export"
    )


def shapes_of(family: Any, config: Any, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a model's state, without allocating it."""
    import torch

    with torch.device("meta"):
        state = family.Model(config, vocab_size).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _open_export(folder: Path, device: Any, streamer: Streamer | None, weights: Weights) -> Opened:
    from lib.core.typed import typed
    from lib.data.vocab.tokenizer import load_tokenizer
    from lib.export.hf import TOKENIZER, WEIGHTS, read_names, restore
    from lib.models.base import build, load_family
    from lib.train.checkpoint import read_tensors

    _require_averaged(folder, weights)
    if (folder / files.MANIFEST).is_file():
        artifact.verify(folder, Manifest.read(folder / files.MANIFEST))
    note = read_names(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    require_tokenizer(tokenizer.fingerprint, note["tokenizer"], folder)
    family = load_family(note["family"])
    config = typed(family.Config, note["config"], folder / "kumiki.json")
    shapes = shapes_of(family, config, note["vocab_size"])
    state = restore(read_tensors(folder / WEIGHTS), note, shapes)
    size = note["vocab_size"]
    model = build(family, config, size, weights=state, device=device, streamer=streamer)
    return Opened(
        folder=folder,
        family=note["family"],
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
        boundary=note["boundary"],
        framed=(folder / chat.CARD).is_file(),
        weights="export",
    )


def _require_averaged(folder: Path, weights: Weights) -> None:
    """UserError where raw weights are asked of what a run has left: the averaged ones alone."""
    if weights == "raw":
        raise UserError(
            "a finished model holds one set of weights",
            file=folder,
            remedy="leave out --raw, or name a checkpoint of its run",
        )


def require_tokenizer(given: str, wanted: str, folder: Path) -> None:
    """UserError unless the fingerprints agree."""
    if given != wanted:
        raise UserError(
            "tokenizer differs",
            file=folder,
            value=f"checkpoint {wanted[:6]}, given {given[:6]}",
            remedy="leave out --tokenizer",
        )


def describe(opened: Opened) -> str:
    """The choice in one line: where it lies, what it is, how large, which tokenizer."""
    params = sum(p.numel() for p in opened.model.parameters())
    return (
        f"model: {relative(opened.folder)} ({opened.weights}), {opened.family}, {params:,} "
        f"parameters, tokenizer {opened.tokenizer.kind} {opened.tokenizer.fingerprint[:8]}"
    )
