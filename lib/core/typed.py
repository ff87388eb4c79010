"""A tree of YAML or JSON -> a dataclass, by its annotations; every problem at once, with a remedy.

In:    mappings, lists, scalars; a dataclass whose fields are scalars, Literals, tuples, mappings,
       dataclasses, or unions of them, which a Literal field `kind` may tell apart.
Note:  `1` is a float where one is asked for; nothing else is converted. What a dataclass itself
       refuses (`lib.core.refusal`) is told with the rest.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lib.core.errors import KumikiError, UserError, raise_all
from lib.core.refusal import Refused

_SECRET = re.compile(r"(^|_)(token|secret|password|api_key|access_key)$", re.IGNORECASE)

Problem = tuple[str, str, object, str]  # what, key, value, remedy


def typed(kind: type, value: Any, file: str | Path) -> Any:
    """`value`, as JSON or YAML in `file` gives it, as the dataclass `kind`; all errors at once."""
    problems: list[Problem] = []
    result = build(kind, value, "", problems)
    raise_all([error_of(problem, file) for problem in problems])
    return result


def error_of(problem: Problem, file: str | Path) -> KumikiError:
    """What a user is told; the key alone where the value says nothing."""
    what, key, value, remedy = problem
    if not what.startswith(("unknown", "missing", "secret")):
        key = f"{key} is {'null' if value is None else value}"
    return UserError(what, file=file, value=key, remedy=remedy)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def build(kind: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    """`value` as an instance of the annotation `kind`; where that fails, a problem and None."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key, problems)  # type: ignore[arg-type]  # a class
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        return _wrong(key, value, nearest(value, arguments), problems)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, value, key, problems)
    if origin is tuple:
        if not isinstance(value, list):
            return _wrong(key, value, "give a list", problems)
        return tuple(
            build(arguments[0], one, f"{key}.{i}", problems) for i, one in enumerate(value)
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return _wrong(key, value, "give a mapping", problems)
        bad_names = [n for n in value if not isinstance(n, str) or not re.fullmatch(r"[\w\-.]+", n)]
        for name in bad_names:
            _wrong(f"{key}.{name}", name, "names are letters, digits, _ and -", problems)
        return {n: build(arguments[1], one, f"{key}.{n}", problems) for n, one in value.items()}
    return _build_scalar(kind, value, key, problems)


def _build_scalar(kind: type, value: Any, key: str, problems: list[Problem]) -> Any:
    if kind is float and type(value) in (int, float):
        if value != value or value in (float("inf"), float("-inf")):
            return _wrong(key, value, "give a finite number", problems)
        return float(value)
    if type(value) is kind:
        return value
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    remedy = f"give {words.get(kind, kind.__name__)}"
    if kind is int and type(value) is float and value.is_integer():
        remedy = f"write {int(value)}"
    return _wrong(key, value, remedy, problems)


def _build_union(kinds: Iterable[Any], value: Any, key: str, problems: list[Problem]) -> Any:
    kinds = list(kinds)
    if value is None and type(None) in kinds:
        return None
    kinds = [k for k in kinds if k is not type(None)]
    tagged = {_tag(k): k for k in kinds if is_dataclass(k)}
    if tagged and None not in tagged:  # a tagged union: `kind` chooses
        if not isinstance(value, Mapping):
            return _wrong(key, value, "give a mapping with `kind`", problems)
        chosen = value.get("kind")
        if chosen not in tagged:
            return _wrong(f"{key}.kind", chosen, nearest(chosen, tagged), problems)
        return build(tagged[chosen], value, key, problems)
    trials: list[list[Problem]] = []
    for kind in kinds:
        trial: list[Problem] = []
        result = build(kind, value, key, trial)
        if not trial:
            return result
        trials.append(trial)
    problems.extend(trials[0])
    return None


def _tag(kind: Any) -> str | None:
    hint = _hints(kind).get("kind")
    return get_args(hint)[0] if get_origin(hint) is Literal else None


def _build_dataclass(kind: type, value: Any, key: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        return _wrong(key, value, "give a mapping", problems)
    dot = f"{key}." if key else ""
    known = {f.name: f for f in fields(kind)}
    found = unknown_keys(value, known, dot)
    hints = _hints(kind)
    given = {n: build(hints[n], v, dot + n, found) for n, v in value.items() if n in known}
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in value:
            found.append(("missing key", dot + name, None, "add it"))
    problems.extend(found)
    if found:
        return None
    try:
        return kind(**given)
    except Refused as refused:
        problems.extend(("not possible", dot + k, v, r) for k, v, r in refused.problems)
        return None


def unknown_keys(value: Mapping, known: Iterable[str], dot: str = "") -> list[Problem]:
    """A problem for every key of `value` that is not among the `known`; dot: what stands before."""
    problems: list[Problem] = []
    for name in (str(n) for n in value if n not in known):
        close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
        nearly = difflib.get_close_matches(name, close, n=1, cutoff=0.9)
        if _SECRET.search(name) and not nearly:  # `encode_token` is a slip, no secret
            problems.append(("secret", dot + name, None, f"remove it and export {name.upper()}"))
            continue
        remedy = f"did you mean {dot}{close[0]}?" if close else f"choose {_choices(known)}"
        problems.append(("unknown key", dot + name, None, remedy))
    return problems


def _wrong(key: str, value: Any, remedy: str, problems: list[Problem]) -> None:
    problems.append(("wrong value", key, repr(value) if isinstance(value, str) else value, remedy))


def nearest(value: Any, choices: Iterable[Any]) -> str:
    """The remedy for a value that is none of `choices`."""
    choices = [str(c) for c in choices]
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose {_choices(choices)}"


def _choices(names: Iterable[str]) -> str:
    return "one of " + ", ".join(sorted(names))
