"""A family's own code as a flat folder of files, for people without this project.

In:    the names of the families that a model is made of.   Out: file name -> source.
Rule:  what a file imports at its head goes along; what it imports inside a function goes along only
       if a head asks for it too. The rest is training's: reaching it there is an ImportError.
Form:  `from lib.nn.rope import x` becomes `from .lib_nn_rope import x`, the one spelling of a
       relative import that transformers' loader follows. It names things, never modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELING, WRAPPER = "modeling_kumiki", "lib.export.modeling"
LOOKUP = "lib.models"  # whose list of a folder's files is replaced by the families given

_IMPORT = re.compile(
    r"^(?P<lead>[ ]*)from (?P<module>lib(?:\.\w+)*) import (?P<names>.+)$", re.MULTILINE
)


def auto_map_sources(families: Iterable[str]) -> dict[str, str]:
    """File name -> source of everything that the families' `Model`s need, for one flat folder."""
    names = list(families)
    texts, todo = {LOOKUP: _lookup(names)}, [WRAPPER, *(f"{LOOKUP}.{name}" for name in names)]
    while todo:
        module = todo.pop()
        if module not in texts:
            texts[module] = _path_of(module).read_text(encoding="utf-8")
            found = _IMPORT.finditer(texts[module])
            todo += [match["module"] for match in found if not match["lead"]]
    return {f"{_flat(module)}.py": _relative(module, text, texts) for module, text in texts.items()}


def families_of(family: str, config: Mapping) -> list[str]:
    """The family of a config and the one whose frozen blocks it has inside, if it has."""
    hidden = config.get("hidden")
    return sorted({family, hidden["family"]} if hidden else {family})


def _lookup(names: list[str]) -> str:
    """What stands for `lib.models`. Imports wait until they are asked for: families import it."""
    cases = "".join(
        f"    if name == {name!r}:\n"
        f"        from .{_flat(f'{LOOKUP}.{name}')} import Config, Model\n\n"
        for name in names
    )
    return f'''"""The families of this folder."""

from types import SimpleNamespace


def families():
    """Their names."""
    return {names!r}


def load_family(name):
    """A family's `Config` and `Model`."""
{cases}    return SimpleNamespace(Config=Config, Model=Model)
'''


def _relative(module: str, text: str, kept: Collection[str]) -> str:
    def turned(match: re.Match) -> str:
        lead, source, names = match["lead"], match["module"], match["names"]
        if source in kept:
            for name in re.findall(r"\w+", names):
                inner = f"{source}.{name}"
                assert not _path_of(inner).is_file(), f"{module}: import from {inner}, not it"
            return f"{lead}from .{_flat(source)} import {names}"
        assert not names.startswith("("), f"{module}: {source} on one line, please"
        return f'{lead}raise ImportError("{source} is not part of an export")'

    return _IMPORT.sub(turned, text)


def _flat(module: str) -> str:
    return MODELING if module == WRAPPER else module.replace(".", "_")


def _path_of(module: str) -> Path:
    base = ROOT.joinpath(*module.split("."))
    package = base / "__init__.py"
    return package if package.is_file() else base.with_suffix(".py")
