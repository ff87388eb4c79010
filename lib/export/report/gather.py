"""What the report shows, read from the pipeline's files: runs, ledgers, artefacts.

In:    params.yaml's runs, metrics/<run>/, checkpoints/<run>/final, data/.   Out: `Found`.
Rule:  a file that is not there is None and shown as missing; nothing is computed that a stage could
       have written. Without torch; with `measured`, also what receipts say (no output).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.core import artifact, files
from lib.core.artifact import Manifest
from lib.core.settings import Settings

Row = dict[str, str]
EVAL, RECORD, SAMPLES = "eval.json", "eval_record.json", "samples.json"
# Two standard deviations of a difference of two seeds; 0.0077 is the largest deviation between
# seeds that was measured (docs/benchmarks.md). Each run of the pipeline has one seed.
DECIDED = 2 * 2**0.5 * 0.0077
TABLES = ("curve", "loss", "depth", "controls")


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """One run of `families` with all that its stages have left; None or empty is missing."""

    name: str
    family: str
    tokens: str  # the encoding it reads
    twin: bool  # a line under `runs` that overlays its family's model
    metrics: dict[str, Any] | None
    record: dict[str, Any]
    samples: dict[str, Any]
    tables: dict[str, list[Row]]  # curve, loss, depth, controls: rows of the csv
    provenance: dict[str, Any] | None
    speed: dict[str, Any] = field(default_factory=dict)  # measured, `kumiki report` only

    @property
    def is_measured(self) -> bool:
        """Whether its numbers are here, and the record that says on which text."""
        return self.metrics is not None and self.val_sha256 is not None

    @property
    def val_sha256(self) -> str | None:
        """The validation text it was measured on."""
        return self.record.get("val_sha256")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One link of the chain from shards to models."""

    name: str  # its path, and the anchor on the page
    kind: str
    key: str
    sha256: str  # of the manifest
    total_bytes: int
    parents: tuple[str, ...]  # names
    facts: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that the page shows."""

    profile: str
    runs: list[FoundRun]
    ledgers: dict[str, dict[str, Any]]  # recipe -> ledger.json
    artefacts: list[Artefact]
    recipes: dict[str, str]  # encoding -> recipe of documents
    measured: bool = False

    def groups(self) -> list[tuple[str | None, list[FoundRun]]]:
        """Runs by validation text, best first within; those without numbers last, under None."""
        done = [run for run in self.runs if run.is_measured]
        found: list[tuple[str | None, list[FoundRun]]] = [
            (text, sorted((run for run in done if run.val_sha256 == text), key=_rank))
            for text in dict.fromkeys(run.val_sha256 for run in done)
        ]
        missing = [run for run in self.runs if not run.is_measured]
        return found + ([(None, missing)] if missing else [])


def against(run: FoundRun, runs: Sequence[FoundRun]) -> tuple[float, bool] | None:
    """(bits per byte more than its family, whether that is decided) of a twin; else None."""
    family = next((one for one in runs if one.name == run.family), None)
    own, theirs = ((one.metrics or {}).get("bpb") if one else None for one in (run, family))
    if not run.twin or own is None or theirs is None:
        return None
    return own - theirs, abs(own - theirs) > DECIDED


def _rank(run: FoundRun) -> tuple[bool, float, str]:
    bpb = (run.metrics or {}).get("bpb")
    return (bpb is None, bpb or 0.0, run.name)


def gather(root: Path, settings: Settings, measured: bool = False) -> Found:
    """Read what is there. InputError for a file that is damaged."""
    # What is added, twins above all, stands first in the file and comes after the families here.
    names = sorted(settings.families, key=lambda name: name in settings.runs)
    runs = [_run(root, settings, name, measured) for name in names]
    ledgers = {
        path.parent.name: files.read_json(path)
        for path in sorted((root / "data/documents").glob("*/ledger.json"))
    }
    recipes = {name: e.documents for name, e in settings.encode_tokens.items()}
    return Found(
        profile=settings.profile,
        runs=runs,
        ledgers=ledgers,
        artefacts=list(_artefacts(root, [run.name for run in runs])),
        recipes=recipes,
        measured=measured,
    )


def _run(root: Path, settings: Settings, name: str, measured: bool) -> FoundRun:
    known, folder = settings.families[name], root / "metrics" / name
    final = root / "checkpoints" / name / "final/provenance.json"
    added = settings.runs.get(name)
    return FoundRun(
        name=name,
        family=known.family or name,
        tokens=known.tokens or "",
        twin=added is not None and added.model is not None,
        metrics=_json(folder / EVAL),
        record=_json(folder / RECORD) or {},
        samples=_json(folder / SAMPLES) or {},
        tables={table: _csv(folder / f"{table}.csv") for table in TABLES},
        provenance=_json(final),
        speed=_speed(root, name) if measured else {},
    )


def _json(path: Path) -> dict[str, Any] | None:
    return files.read_json(path) if path.is_file() else None


def _csv(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


# ---------------------------------------------------------------- provenance


def _artefacts(root: Path, runs: list[str]) -> Iterator[Artefact]:
    """Every artefact with a manifest, upstream first; parents are those whose hash it names."""
    places = [
        root / "data/shards.manifest.json",
        *sorted((root / "data/documents").glob("*/manifest.json")),
        *sorted((root / "data/tokenizers").glob("*/manifest.json")),
        *sorted((root / "data/tokens").glob("*.manifest.json")),
        root / "data/embeddings.manifest.json",
        *(root / "checkpoints" / run / "final/manifest.json" for run in runs),
    ]
    hashes: dict[str, str] = {}
    for path in places:
        if not path.is_file():
            continue
        manifest, sha256 = Manifest.read(path), files.sha256_file(path)
        own = path.parent if path.name == files.MANIFEST else path
        name = own.relative_to(root).as_posix()
        named = {"recipe": manifest.recipe, "provenance": _json(own / "provenance.json")}
        parents = dict.fromkeys(hashes[h] for h in _texts(named) if h in hashes)
        if manifest.kind == "documents":  # they name shards one by one, not the manifest
            parents = dict.fromkeys(n for n in hashes.values() if n.startswith("data/shards"))
        hashes[sha256] = name
        if manifest.kind == "tokenizer" and (card := _json(own / "tokenizer.json")):
            hashes |= {text: name for text in _texts(card) if len(text) == 64}
        yield Artefact(
            name=name,
            kind=manifest.kind,
            key=manifest.key,
            sha256=sha256,
            total_bytes=sum(entry.bytes for entry in manifest.files),
            parents=tuple(parents),
            facts=_facts(manifest),
        )


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)


def _facts(manifest: Manifest) -> str:
    counts = manifest.counts
    if manifest.kind == "documents":
        of = [c["documents"] for split in counts["splits"].values() for c in split.values()]
        return f"{sum(of):,} documents"
    if manifest.kind == "tokens":
        return f"{counts['train']['tokens']:,} training tokens, {counts['rows']['rows']:,} rows"
    return f"{len(manifest.files)} files"


# ---------------------------------------------------------------- measured, no output


def _speed(root: Path, run: str) -> dict[str, Any]:
    """Seconds, peak memory, tokens/s, step time and code hash of the newest finished work."""
    import json
    import statistics

    receipts = sorted(
        (root / "checkpoints" / run / "work").glob("*/*/receipt.json"),
        key=lambda p: (p.stat().st_mtime_ns, p.as_posix()),
    )
    if not receipts:
        return {}
    work, found = receipts[-1].parent, files.read_json(receipts[-1])
    steps = []
    if (work / "training_log.jsonl").is_file():
        told = map(json.loads, (work / "training_log.jsonl").read_bytes().splitlines())
        steps = [line for line in told if line.get("tokens_per_s")]
    for name, key in (("tokens_per_s", "tokens_per_s"), ("step_s", "time")):
        found[name] = statistics.median(line[key] for line in steps) if steps else None
    code = _json(work / "state.json")
    found["code"] = artifact.key_of("code", code["code"]) if code else None
    judged = sorted((root / "data/work" / f"evaluate_{run}").glob("*/speed.json"))
    found["evaluation"] = files.read_json(judged[-1]) if judged else {}
    return found
