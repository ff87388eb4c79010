"""What the data stages of a profile cost: counted in manifests that exist, else bounded.

In:    the resolved settings, a machine.   Out: one `Cost` a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.cli.cost import PROCESS_BYTES, Cost
from lib.cli.machines import Machine
from lib.core import params
from lib.core.artifact import Manifest
from lib.core.data_settings import EmbeddedSource, HubDatasetSource, ParquetSource
from lib.core.settings import Settings

SHARD_BYTES = 100e6  # a FineWeb-Edu shard as its hosts serve it
SHARD_CHARACTERS = 250e6
CHARACTERS_PER_TOKEN = 4.8  # of a 65,536-id BPE on English web text
PACKAGE_BYTES = 12.7e6 / 6  # of docstrings, of each package of the embedded corpus
WORKER_BYTES = 0.32e9  # one worker of a data stage (measured: 644 MB with two)
CLEAN_RATE, ENCODE_RATE = 15e6, 8e6  # bytes of text a second and core
LEARN_RATE = 5e6  # bytes a second that a tokenizer learns from (measured: 11.7 MB in 2.0 s)


def data_costs(settings: Settings, machine: Machine) -> Iterator[Cost]:
    """Every stage up to the first training, and the token vectors."""
    down = [download_bytes(s) for s in settings.download_shards.sources.values()]
    total = None if any(d is None for d in down) else sum(d or 0 for d in down)
    here = settings.profile == _active_profile()
    known = _scratch_of(Path("data/shards.manifest.json")) if here else None
    remote = sum(
        d or 0
        for d, s in zip(down, settings.download_shards.sources.values(), strict=True)
        if _is_remote(s)
    )
    yield Cost(
        stage="download_shards",
        download_bytes=remote if total is not None else None,
        scratch_bytes=known or total,
        ram_bytes=WORKER_BYTES * settings.runtime.workers,
        seconds=None if total is None else remote / machine.network + total / CLEAN_RATE,
        binds="network" if remote else "CPU",
        basis="counted in the manifest" if known else "bounded by the settings",
    )
    rates = settings.runtime.workers
    text = _text_bytes(settings)
    ram = WORKER_BYTES * settings.runtime.workers
    seconds = None if text is None else text / CLEAN_RATE / rates
    yield Cost(stage="extract_texts", scratch_bytes=None, ram_bytes=ram, seconds=seconds,
               binds="CPU")  # fmt: skip
    for name in settings.train_tokenizer:
        yield Cost(
            stage=f"train_tokenizer@{name}",
            ram_bytes=ram,
            seconds=None if text is None else text / LEARN_RATE,
            binds="CPU",
        )
    for name in settings.encode_tokens:
        tokens = text_tokens(settings, name, "train")
        known = _scratch_of(Path(f"data/tokens/{name}.manifest.json")) if here else None
        wide = 2 if vocab_size_of(settings, name) <= 2**16 else 4
        yield Cost(
            stage=f"encode_tokens@{name}",
            scratch_bytes=known or (None if tokens is None else wide * tokens),
            ram_bytes=ram,
            seconds=None if tokens is None else tokens * 4 / ENCODE_RATE / rates,
            binds="CPU",
            basis="counted in the manifest" if known else "bounded by the settings",
            facts=(("tokens", tokens),),
        )
    if _wants_embeddings(settings):
        yield embedding_cost(settings)


def download_bytes(source: Any) -> float | None:
    """Bytes of a source's shards; None where only its host can tell."""
    if isinstance(source, EmbeddedSource):
        return PACKAGE_BYTES * len(source.packages) * 0.4  # as zstd Parquet
    if isinstance(source, ParquetSource) and source.shards:
        return (source.shards + 1) * SHARD_BYTES
    pinned = getattr(source, "files", None)
    if pinned:
        return sum(one.bytes for one in pinned.values())
    names = [*getattr(source, "train", ()), *getattr(source, "val", ())]
    folder = Path(getattr(source, "folder", "."))
    sizes = [(folder / n).stat().st_size for n in names if (folder / n).is_file()]
    return float(sum(sizes)) if names and len(sizes) == len(names) else None


def _is_remote(source: Any) -> bool:
    local = isinstance(source, EmbeddedSource) or bool(getattr(source, "train", ()))
    return not local and not getattr(source, "paths", ())


def text_tokens(settings: Settings, encoding: str, split: str) -> float | None:
    """Tokens of an encoding: counted, else for training the most that the settings allow."""
    path = Path(f"data/tokens/{encoding}.manifest.json")
    section = settings.encode_tokens[encoding]
    if path.is_file() and settings.profile == _active_profile():
        return Manifest.read(path).counts[split]["tokens"]
    if split != "train":
        return None
    recipe = settings.extract_texts.recipes[section.documents]
    bounds = []
    for name in recipe.sources:
        source = settings.download_shards.sources[name]
        if isinstance(source, ParquetSource) and source.shards:
            bounds.append(source.shards * SHARD_CHARACTERS / CHARACTERS_PER_TOKEN)
        elif isinstance(source, HubDatasetSource) and section.truncate_tokens:
            bounds.append(float(source.max_train_samples * section.truncate_tokens))
        else:
            return section.max_tokens
    total = sum(bounds)
    return min(total, section.max_tokens) if section.max_tokens else total


def _text_bytes(settings: Settings) -> float | None:
    """Bytes of text in all sources, as far as the settings tell."""
    total = 0.0
    for source in settings.download_shards.sources.values():
        if isinstance(source, EmbeddedSource):
            total += PACKAGE_BYTES * len(source.packages)
        elif isinstance(source, ParquetSource) and source.shards:
            total += source.shards * SHARD_CHARACTERS
        elif isinstance(source, HubDatasetSource):
            return None
    return total


def _wants_embeddings(settings: Settings) -> bool:
    """Whether the profile says anything of token vectors, or nothing of any run: then all count."""
    own = overlay(settings)
    if touched(own):
        return bool(own.get("precompute_embeddings"))
    return "precompute_embeddings" in params.read_yaml(Path(params.PARAMS))


def embedding_cost(settings: Settings) -> Cost:
    """Token vectors on disk, by the stage's own plan; what training adds is told beside it."""
    from lib.data.embedding_plan import plan_of

    sizes = plan_of(settings).files()
    contexts = sum(size for name, size in sizes.items() if name.startswith("context_"))
    vectors = sizes.get("embeddings.npy", sizes["table.npy"])
    return Cost(
        stage="precompute_embeddings",
        scratch_bytes=sizes["token_ids.npy"] + vectors,
        ram_bytes=PROCESS_BYTES,
        binds="disk",
        facts=(("embeddings_bytes", vectors), ("contexts_bytes", contexts)),
    )


def _scratch_of(path: Path) -> float | None:
    """Bytes that an existing manifest names."""
    if not path.is_file():
        return None
    return sum(entry.bytes for entry in Manifest.read(path).files)


def _active_profile() -> str | None:
    return params.read_yaml(Path(params.PARAMS)).get("profile")


def overlay(settings: Settings) -> dict[str, Any]:
    """What params.yaml says under the profile, and nothing of the defaults."""
    profiles = params.read_yaml(Path(params.PARAMS)).get("profiles") or {}
    return profiles.get(settings.profile) or {}


def touched(own: dict[str, Any]) -> set[str]:
    """Runs and families that an overlay says something of."""
    return {n for part in ("train", "model", "runs") for n, v in (own.get(part) or {}).items() if v}


def vocab_size_of(settings: Settings, encoding: str) -> int:
    """Ids of the encoding's tokenizer."""
    return settings.train_tokenizer[settings.encode_tokens[encoding].tokenizer].vocab_size
