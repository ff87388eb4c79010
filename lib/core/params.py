"""params.yaml -> Settings: strict, all errors at once, in well under a second and without torch.

In:    params.yaml (read as DVC reads it: YAML 1.2), the git-ignored .kumiki.yaml (runtime only),
       `--set KEY=VALUE`. Out: `lib.core.settings.Settings`.
Order: dataclass default < base value < `profiles.<profile>` overlay < .kumiki.yaml < --set;
       mappings are merged, lists and scalars replaced (pipeline.md 4).
Note:  every profile of the file is checked at every load, not only the active one: DVC sees missing
       keys but never a misspelt one.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lib.core.errors import KumikiError, UserError, raise_all, report_lines
from lib.core.heads import config_class, family_names
from lib.core.settings import Settings
from lib.core.typed import Problem, build, error_of, nearest, unknown_keys

PARAMS, LOCAL = "params.yaml", ".kumiki.yaml"
_MAX_DEPTH = 100
_MAX_ALIASES = 1000


def load(root: Path = Path(), overrides: Sequence[str] = ()) -> Settings:
    """Read and check the whole of `root`/params.yaml; returns it with the active profile laid over.

    overrides: `KEY=VALUE` strings, VALUE read as YAML. Raises UserError (or several at once).
    """
    path = root / PARAMS
    raw = read_yaml(path)
    local = read_yaml(root / LOCAL) if (root / LOCAL).is_file() else {}
    raise_all([error_of(problem, LOCAL) for problem in unknown_keys(local, ("runtime",))])
    profiles = _profiles(raw, path)
    active = raw.get("profile")
    if not isinstance(active, str) or active not in profiles:
        names = ", ".join(sorted(profiles))
        raise UserError("unknown profile", file=path, value=active, remedy=f"choose one of {names}")
    errors: dict[str, KumikiError] = {}
    chosen = None
    for name in [active, *(p for p in profiles if p != active)]:
        is_active = name == active
        last = [local, _parse_overrides(overrides)] if is_active else []
        settings, problems = resolve(raw if is_active else _without_runs(raw, name), name, *last)
        for problem in problems:
            error = error_of(problem, path)
            errors.setdefault(str(error), error)
        if name == active:
            chosen = settings
    raise_all(list(errors.values()))
    assert chosen is not None
    return chosen


def _profiles(raw: Mapping, path: Path) -> Mapping[str, Any]:
    """The overlays by name, before anything is laid over anything."""
    found = raw.get("profiles") or {}
    overlays = found if isinstance(found, Mapping) else {"profiles": found}
    for name, overlay in overlays.items():
        if not isinstance(name, str) or not isinstance(overlay or {}, Mapping):
            value, remedy = f"{name}: {overlay}", "write a name and a mapping, as small: {}"
            raise UserError("wrong profile", file=path, value=value, remedy=remedy)
    return found


def _without_runs(raw: dict, profile: str) -> dict:
    """`raw` without the lines under `runs` that the profile does not speak of.

    They are checked as the active profile completes them: in another one they inherit what its long
    runs need, a warm-up of thousands of steps, and whoever makes it the active one will be told.
    """
    named = _mapping(_mapping(_mapping(raw, "profiles"), profile), "runs")
    return {**raw, "runs": {n: line for n, line in _mapping(raw, "runs").items() if n in named}}


def resolve(raw: dict, profile: str, *last: dict) -> tuple[Settings | None, list[Problem]]:
    """One profile of the parsed file as Settings, and every problem found on the way."""
    base = {k: v for k, v in raw.items() if k != "profiles"}
    overlay = (raw.get("profiles") or {}).get(profile) or {}
    merged = merge(base, overlay, *last, {"profile": profile})
    problems: list[Problem] = []
    runs = inherit(merged)
    settings = build(Settings, {**merged, "train": runs}, "", problems)
    models, configs = _build_models(merged, runs, problems)
    once: dict[tuple, Problem] = {}  # what a run inherits is told where the file has it, once
    for what, key, value, remedy in problems:
        place = _origin(key, merged)
        once.setdefault((what, place, str(value)), (what, place, value, remedy))
    problems = list(once.values())
    if settings is not None and not problems:
        train = {n: replace(settings.train[n], model=c) for n, c in configs.items()}
        settings = replace(settings, train=train, model=models)
    located = [
        (what, f"profiles.{profile}.{key}" if _has(overlay, key) else key, value, remedy)
        for what, key, value, remedy in problems
    ]
    return settings, located


def merge(*layers: Mapping) -> dict:
    """Later layers win; mappings merge key by key, everything else is replaced."""
    result: dict = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            result[key] = merge(old, value) if both else value  # type: ignore[arg-type]  # both
    return result


def inherit(merged: Mapping) -> dict[str, Any]:
    """Every run complete: `train.defaults` < `families.<run>` < `train.<run>` or `runs.<run>`.

    A line under `runs` starts from the settings of its family's own run, `train.<family>`: all but
    what the line says is equal, which is what a twin is. The defaults stay among them, so that they
    are checked where no run exists.
    """
    train, added, families = (_mapping(merged, n) for n in ("train", "runs", "families"))
    defaults = train.get("defaults") or {}
    result: dict[str, Any] = {"defaults": defaults}
    for name in [*train, *added]:
        if name != "defaults":
            own = train.get(_begins_from(name, merged))
            layers = [defaults, own, families.get(name), added.get(name), train.get(name)]
            bad = next((x for x in layers if x is not None and not isinstance(x, Mapping)), None)
            result[name] = _laid([x for x in layers if x]) if bad is None else bad
    return result


def _laid(layers: Sequence[Mapping]) -> dict:
    """Layers merged; whoever says `steps` means no `epochs` of a layer before, and the reverse."""
    result: dict = {}
    for layer in layers:
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if layer.get(one) is not None and layer.get(other) is None:
                result.pop(other, None)
        result = merge(result, layer)
    return result


def _begins_from(run: str, merged: Mapping) -> str | None:
    """The family whose own run a line under `runs` begins from, else None."""
    return _mapping(_mapping(merged, "runs"), run).get("family")


def _mapping(tree: Mapping, name: str) -> Mapping:
    value = tree.get(name)
    return value if isinstance(value, Mapping) else {}


def _origin(key: str, merged: Mapping) -> str:
    """The key under which the file gives what a run has inherited."""
    section, _, rest = key.partition(".")
    run, _, rest = rest.partition(".")
    if section != "train" or _has(merged, key):
        return key
    layers = (
        f"runs.{run}",
        f"families.{run}",
        f"train.{_begins_from(run, merged)}",
        "train.defaults",
    )
    places = [f"{place}.{rest}" for place in layers]
    return next((place for place in places if _has(merged, place)), key)


def _build_models(
    merged: Mapping, runs: Mapping[str, Any], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(family -> Config of `model.<family>`, run -> Config with the run's overlay in it)."""
    sections, known = _mapping(merged, "model"), family_names()
    models: dict[str, Any] = {}
    for family, value in sections.items():
        if family not in known:
            problems.append(("unknown family", f"model.{family}", None, nearest(family, known)))
            continue
        models[family] = build(config_class(family), value, f"model.{family}", problems)
    configs: dict[str, Any] = {}
    for name, run in runs.items():
        if name == "defaults" or not isinstance(run, Mapping):
            continue
        family, overlay = run.get("family") or name, run.get("model")
        if family not in known:
            problems.append(
                ("unknown family", f"train.{name}.family", family, nearest(family, known))
            )
            continue
        if overlay is None and family in models:
            configs[name] = models[family]
            continue
        base = sections.get(family)
        layers = [x if isinstance(x, Mapping) else {} for x in (base, overlay)]
        found: list[Problem] = []
        configs[name] = build(config_class(family), merge(*layers), f"train.{name}.model", found)
        own = [p for p in found if family not in models or models[family] is not None]
        problems.extend(own)  # a section that is wrong by itself is told once
    return models, configs


def read_yaml(path: Path) -> dict:
    """A YAML 1.2 mapping, read as DVC reads it: `3e-4` is a float, `yes` text (pipeline.md 5)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", file=path, remedy="run from the project's folder") from None
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8", file=path, value=error, remedy="save it as UTF-8") from None
    return copy.deepcopy(_parsed(text, path))


@cache
def _parsed(text: str, path: Path) -> dict:
    """Of one text, once: a stage asks for params.yaml eight times, and each would cost 80 ms."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if len(re.findall(r"(?:^|[\s\[,{])\*\w", text)) > _MAX_ALIASES:
        raise UserError("too many aliases", file=path, remedy=f"use at most {_MAX_ALIASES}")
    if _is_deep(text):
        raise UserError("nested too deep", file=path, remedy=f"use at most {_MAX_DEPTH} levels")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError("not valid YAML", file=path, value=error, remedy="mend the line") from None
    if not isinstance(value, dict):
        raise UserError("not a mapping", file=path, remedy="see the params.yaml of the project")
    return value


def _is_deep(text: str) -> bool:
    """Whether brackets or dashes nest beyond reason: the parser's time grows with depth squared."""
    opened = itertools.accumulate(
        1 if mark in "[{" else -1 for mark in re.findall(r"[\[\]{}]", text)
    )
    return max(opened, default=0) > _MAX_DEPTH or bool(re.search(r"(?:[-?] +){100}", text))


def _parse_overrides(overrides: Sequence[str]) -> dict:
    from ruamel.yaml import YAML

    result: dict = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError("not KEY=VALUE", value=f"--set {text}", remedy="write --set seed=7")
        node: Any = YAML(typ="safe", pure=True).load(value)
        for part in reversed(key.split(".")):
            node = {part: node}
        result = merge(result, node)
    return result


def _has(tree: object, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


# ---------------------------------------------------------------- command


def main() -> int:
    """`python -m lib.core.params --check`: every profile is typed and holds every tracked key."""
    parser = argparse.ArgumentParser(prog="python -m lib.core.params", description=main.__doc__)
    parser.add_argument("--check", action="store_true", required=True)
    parser.parse_args()
    try:
        load()
        from lib.core.dag import check_params

        check_params(Path())
    except KumikiError as error:
        sys.stderr.write("\n".join(report_lines(error)) + "\n")
        return error.code
    sys.stdout.write("params.yaml: every profile is valid\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
