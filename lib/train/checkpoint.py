"""Checkpoints: folders `step_<n>/` of safetensors and JSON, committed whole, read when they verify.

In:    named groups of tensors (model, optimizer, ema, rng) and a JSON state.
Out:   `<work>/step_<n>/`: `<group>.safetensors`, `state.json`, `manifest.json` written last.
Rule:  nothing is read before its hash agrees with the manifest: a flipped bit loads without
       complaint in every format (reliability.md E3). An older checkpoint goes only when `keep`
       newer ones verify.
Note:  a name that shares its storage with another (tied weights) is written once; the file's
       metadata, one key of canonical JSON, says which names stand for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.errors import InputError, KumikiError, UserError

if TYPE_CHECKING:
    from torch import Tensor

KIND, VERSION = "checkpoint", 2  # of state.json
STATE, SUFFIX, KEY = "state.json", ".safetensors", "kumiki"
TENSORS_VERSION = 1

Tensors = Mapping[str, "Tensor"]


# ---------------------------------------------------------------- tensors in files


def write_tensors(path: Path, tensors: Tensors) -> None:
    """One safetensors file, mode 0644, durable; equal tensors give equal bytes."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in places:
            aliases[name] = places[place]
            continue
        places[place] = name
        # A view would be refused or drag its whole storage along: take the values alone.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        kept[name] = tensor.cpu() if whole else tensor.cpu().contiguous().clone()
    note = {"format": "kumiki/tensors", "version": TENSORS_VERSION, "aliases": aliases}
    metadata = {KEY: files.canonical_json(note).decode().strip()}
    with files.library_file(path, sum(t.nbytes for t in kept.values())) as temp:
        save_file(kept, temp, metadata)


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """All tensors of a file on the CPU, tied names restored.

    shapes: what is expected; compared with the header before anything is allocated. InputError when
    the file is no safetensors file, UserError when names or shapes are others.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stream:
            names = list(stream.keys())  # it is no mapping
            note = json.loads((stream.metadata() or {}).get(KEY, "{}"))
            aliases = note.get("aliases", {})
            if shapes is not None:
                found = {n: tuple(stream.get_slice(n).get_shape()) for n in names}
                found |= {alias: found[name] for alias, name in aliases.items()}
                _compare_shapes(path, found, shapes)
            tensors = {name: stream.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise _gone(path) from None
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            "not a safetensors file", file=path, value=error, remedy="run the training again"
        ) from error
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def _compare_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        here, there = found.get(name, "absent"), wanted.get(name, "none")
        if here != there:
            raise UserError(
                "weights do not fit the model",
                file=path,
                value=f"{name}: {here}, the model has {there}",
                remedy="use the weights of this model and vocabulary",
            )


def _gone(path: Path) -> UserError:
    return UserError(
        "file is not there any more", file=path, remedy="a newer checkpoint may have replaced it"
    )


# ---------------------------------------------------------------- one checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """One that has been verified. `state` is what `commit` was given."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, group: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict:
        """The tensors of `group`; empty when it has none."""
        path = self.path / f"{group}{SUFFIX}"
        return read_tensors(path, shapes) if path.exists() else {}


def verify(path: Path) -> Checkpoint:
    """Hash every file of the checkpoint folder; InputError names the first that is not as it was.

    UserError for another format version.
    """
    verified_manifest(path, KIND)
    state = files.read_json(path / STATE)
    if state.get("version") != VERSION:
        raise UserError(
            "checkpoint of another format version",
            file=path,
            value=f"{state.get('version')}, this is {VERSION}",
            remedy="continue it with the release that wrote it, or remove it",
        )
    return Checkpoint(path, int(state["step"]), state)


def verified_manifest(folder: Path, kind: str) -> Manifest:
    """The manifest of `folder` after every file, itself included, was found as it was written."""
    manifest = Manifest.read(folder / files.MANIFEST, kind=kind)
    artifact.verify(folder, manifest)
    return manifest


# ---------------------------------------------------------------- all checkpoints of a run


class Checkpoints:
    """The checkpoints in one working folder.

    identity: fingerprint, family, vocabulary, tokenizer and what else a checkpoint must agree in.
    keep: how many stay while the run goes on, at least 2.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int = 2,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        assert keep >= 2, "a damaged checkpoint needs an older one behind it"
        self.folder, self.identity, self.keep, self.warn = folder, dict(identity), keep, warn
        self._good: set[int] = set()  # steps verified by this process

    def steps(self) -> list[int]:
        """Steps that have a folder, newest first; whether it is good nobody has looked yet."""
        names = [p.name.removeprefix("step_") for p in self.folder.glob("step_*") if p.is_dir()]
        return sorted((int(n) for n in names if n.isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.folder / f"step_{step}"

    def newest_good(self) -> Checkpoint | None:
        """The newest one that verifies and is of this run; None when there is none at all.

        Falls back with a warning and its reason. InputError when all are damaged, UserError with
        both values when the only sound ones are another run's: never a fresh start beside old work.
        """
        files.sweep_parts(self.folder)
        reasons: list[KumikiError] = []
        for step in self.steps():
            try:
                found = verify(self.path(step))
                self._check_identity(found, step)
                self._good.add(step)
                for reason in reasons:
                    self.warn(f"checkpoint passed over: {reason}")
                return found
            except KumikiError as error:
                reasons.append(error)
        if not reasons:
            return None
        foreign = [r for r in reasons if isinstance(r, UserError)]
        if foreign:
            raise foreign[0]
        raise InputError(
            "no checkpoint is whole",
            file=self.folder,
            value=str(reasons[0]),
            remedy="remove the folder to begin anew",
        )

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, verified."""
        return verify(self.path(step))

    def _check_identity(self, found: Checkpoint, step: int) -> None:
        if found.step != step:
            raise InputError(
                "checkpoint under another step's name", file=found.path, value=found.step
            )
        theirs = found.state["identity"]
        for name, ours in self.identity.items():
            if theirs.get(name) != ours:
                raise UserError(
                    f"{name} does not match in the checkpoint",
                    file=found.path,
                    value=f"made with {_short(theirs.get(name))}, given {_short(ours)}",
                    remedy="use what it was made with, or remove it to begin anew",
                )

    def commit(self, step: int, groups: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint after `step` steps, read it again, then retire older ones."""
        path = self.path(step)
        note = {"version": VERSION, "step": step, "identity": self.identity, **state}
        files.check_space(self.folder, sum(t.nbytes for g in groups.values() for t in g.values()))
        with files.atomic_folder(path) as part:
            for name, tensors in groups.items():
                if tensors:
                    write_tensors(part / f"{name}{SUFFIX}", tensors)
            files.write_json(part / STATE, note)
            recipe = {"step": step, "fingerprint": self.identity.get("fingerprint")}
            entries = artifact.describe(part)
            Manifest(kind=KIND, recipe=recipe, files=entries).write(part / files.MANIFEST)
        verify(path)
        self._good.add(step)
        self.retire(self.keep)
        return path

    def retire(self, keep: int) -> None:
        """Remove all but the `keep` newest that verify (and what is newer than those)."""
        good = 0
        for step in self.steps():
            if good >= keep:
                files.remove_tree(self.path(step))
            elif self._is_good(step):
                good += 1

    def _is_good(self, step: int) -> bool:
        if step not in self._good:
            try:
                self._check_identity(verify(self.path(step)), step)
            except KumikiError:
                return False
            self._good.add(step)
        return True

    def set_best(self, step: int | None) -> None:
        """Make `best/` the checkpoint of `step` by hard links; None or a lost step: no `best/`."""
        best = self.folder / "best"
        if step is not None and (best / STATE).is_file() and self._holds(best, step):
            return
        if step is not None and step in self.steps():
            files.publish(self.path(step), best)
        else:
            files.remove_tree(best)

    def _holds(self, folder: Path, step: int) -> bool:
        try:
            return verify(folder).step == step
        except KumikiError:
            return False


def _short(value: Any) -> str:
    text = str(value)
    return text[:8] if len(text) >= 32 else text
