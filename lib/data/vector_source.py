"""Where token vectors come from: GPT-2's table, a table of a model of ours, seeded random rows.

A source is named in `precompute_embeddings.source`; its hash is part of the artefact's identity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.core import artifact, fetch, files, transfer
from lib.core import data_settings as settings
from lib.core.errors import EnvError, InputError, UserError
from lib.core.rng import torch_generator
from lib.core.run_settings import Runtime
from lib.data.raw.remote import policy_for

EPS = 1e-5

Log = Callable[[str], None]


def source_table(
    section: settings.Embeddings, vocab_size: int, runtime: Runtime, log: Log
) -> Tensor:
    """The normalised table (V, e) fp32. UserError where it has not a row for every id."""
    if section.source == "random":
        draw = torch_generator(section.random.seed, "embeddings")
        rows = torch.randn(vocab_size, section.random.width, generator=draw)
    elif section.source in ("checkpoint", "hidden"):
        rows = _tensors(
            Path(section.checkpoint.path) / "model.safetensors", [section.checkpoint.tensor]
        )[0]
    else:
        path = gpt2_file(section.gpt2, runtime, log)
        rows, gain, offset = _tensors(path, ["wte.weight", "ln_f.weight", "ln_f.bias"])
        _require_rows(rows, vocab_size, path)
        return F.layer_norm(rows, rows.shape[-1:], gain, offset, EPS)
    _require_rows(rows, vocab_size, section.source)
    return F.layer_norm(rows[:vocab_size], rows.shape[-1:], eps=EPS)


def _require_rows(rows: Tensor, vocab_size: int, source: object) -> None:
    exact = source not in (
        "random",
        "checkpoint",
        "hidden",
    )  # padded tables have rows beyond the vocabulary
    if len(rows) < vocab_size or (exact and len(rows) != vocab_size):
        raise UserError(
            "table and token ids are of different vocabularies",
            value=f"{len(rows):,} rows, vocabulary {vocab_size:,}",
            remedy="encode with the table's own tokenizer, or use source: checkpoint",
        )


def _tensors(path: Path, names: list[str]) -> list[Tensor]:
    """Tensors by name, with or without `transformer.` in front, fp32."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stream:
            held = set(stream.keys())
            found = [
                next((n for n in (name, f"transformer.{name}") if n in held), None)
                for name in names
            ]
            if None in found:
                missing = names[found.index(None)]
                raise UserError("no such tensor", file=path, value=missing, remedy="name its table")
            return [stream.get_tensor(name).float() for name in found]
    except FileNotFoundError:
        raise UserError("no such file", file=path, remedy="run the stage that makes it") from None
    except SafetensorError as error:
        raise InputError(
            "not a safetensors file", file=path, value=error, remedy="remove it and run again"
        ) from error


def gpt2_file(gpt2: settings.Gpt2Table, runtime: Runtime, log: Log) -> Path:
    """The pinned file in scratch, fetched once; EnvError says where to put it by hand."""
    target = artifact.scratch_root() / "downloads" / gpt2.sha256[:16] / "model.safetensors"
    job = transfer.Job(url=gpt2.url, target=target, size=gpt2.bytes, sha256=gpt2.sha256)
    try:
        fetch.fetch(job, policy_for([gpt2.url], runtime), log=log)
    except EnvError as error:
        raise EnvError(
            "GPT-2's table is not here and its host cannot be reached",
            file=target,
            value=f"{gpt2.bytes:,} bytes, sha256 {gpt2.sha256[:16]}",
            remedy="put the file there, or use precompute_embeddings.source: checkpoint",
        ) from error
    return target


def source_hash(section: settings.Embeddings) -> str:
    """Identity of what the vectors are taken from."""
    if section.source == "checkpoint":
        path = Path(section.checkpoint.path)
        return f"{files.sha256_file(path / files.MANIFEST)}:{section.checkpoint.tensor}"
    if section.source == "hidden":
        path, own = Path(section.checkpoint.path), section.hidden
        made = files.sha256_file(path / files.MANIFEST)
        return f"{made}:{section.checkpoint.tensor}:hidden:{own.layer}:{own.context}"
    if section.source == "gpt2":
        return section.gpt2.sha256
    return f"random:{section.random.width}:{section.random.seed}"


def width_of(section: settings.Embeddings) -> int:
    """Width of a vector, read from the source's header alone."""
    if section.source == "gpt2":
        return 768
    if section.source == "random":
        return section.random.width
    path = Path(section.checkpoint.path) / "model.safetensors"  # hidden states are as wide
    return _tensors(path, [section.checkpoint.tensor])[0].shape[1]
