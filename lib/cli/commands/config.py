"""`kumiki config`: every resolved parameter and where its value comes from (cli.md 3.3)."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.core import artifact, params
from lib.core.errors import UserError
from lib.core.settings import Settings


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Resolve the profile, find the origin of each value, print."""
    raw = params.read_yaml(Path(params.PARAMS))
    profiles = raw.get("profiles") or {}
    settings = load_profile(arguments.profile)
    chosen = settings.profile
    local = Path(params.LOCAL)
    layers = Layers(raw, chosen, params.read_yaml(local) if local.is_file() else {})
    rows = [
        {"key": key, "value": value, "origin": layers.origin(key), "default": default}
        for key, value, default in _leaves(settings)
        if not (arguments.changed and value == default)
    ]
    active = raw.get("profile")
    if arguments.json:
        known = {"profile": chosen, "active": active, "profiles": sorted(profiles)}
        tables.put_json({**known, "values": rows})
        return
    marked = (f"*{name}" if name == active else name for name in sorted(profiles))
    tables.put([f"profiles: {', '.join(marked)}"])
    tables.put([""] if chosen == active else [f"values of {chosen}", ""])
    shown = [(r["key"], _shown(r["value"]), r["origin"]) for r in rows]
    tables.put(tables.lines(shown, ("key", "value", "from")))


def load_profile(profile: str | None) -> Settings:
    """The settings with `profile` instead of the active one. UserError for an unknown name."""
    active = params.load()  # the whole file must be right, whichever profile was asked for
    if profile in (None, active.profile):
        return active
    raw = params.read_yaml(Path(params.PARAMS))
    known = raw.get("profiles") or {}
    if profile not in known:
        names = ", ".join(sorted(known))
        raise UserError(
            "unknown profile", file=params.PARAMS, value=profile, remedy=f"choose one of {names}"
        )
    local = Path(params.LOCAL)
    last = [params.read_yaml(local)] if local.is_file() else []
    settings, problems = params.resolve(raw, str(profile), *last)
    assert settings is not None and not problems, problems
    return settings


@dataclasses.dataclass(frozen=True)
class Layers:
    """Where a resolved key may come from, last layer first."""

    raw: Mapping[str, Any]
    profile: str
    local: Mapping[str, Any]

    def origin(self, key: str) -> str:
        """The file and key that gave the value, or `default`."""
        overlay = (self.raw.get("profiles") or {}).get(self.profile) or {}
        for name in _places(key):
            if params._has(self.local, name):
                return f"{params.LOCAL} {name}"
            if params._has(overlay, name):
                return f"profiles.{self.profile}.{name}"
            if params._has(self.raw, name):
                return name
        return "default"


def _places(key: str) -> Iterator[str]:
    """The keys under which the file may give what a run has resolved to."""
    yield key
    section, _, rest = key.partition(".")
    run, _, rest = rest.partition(".")
    if section == "train" and rest:
        yield f"runs.{run}.{rest}"
        yield f"families.{run}.{rest}"
        if rest.startswith("model."):
            yield f"model.{run}.{rest.removeprefix('model.')}"
        yield f"train.defaults.{rest}"


def _leaves(settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, default of the dataclass) of every value, in the file's order."""
    for field in dataclasses.fields(settings):
        if field.name not in ("runs", "families"):  # they are in `train`, resolved
            yield from _walk(field.name, getattr(settings, field.name), _default(field))


def _walk(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _walk(f"{key}.{field.name}", getattr(value, field.name), _default(field))
    elif isinstance(value, Mapping) and value:
        for name, one in value.items():
            yield from _walk(f"{key}.{name}", one, None)
    else:
        yield key, artifact.plain(value), artifact.plain(default)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 or os.environ.get("KUMIKI_DEBUG") else text[:59] + "…"
