"""`Config` of a family file without running the file: sections are typed before torch is imported.

In:    lib/models/<family>.py. Out: its class `Config`, from the file's head alone.
Rule:  the head, down to the end of `Config`, needs the standard library, lib.core and modules
       lib/models/_<name>_sizes.py (arithmetic, no torch) only; other imports are left out, as is
       all that follows but plain functions, which `Config` may call.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import types
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[1] / "models"


def family_names() -> list[str]:
    """Names of the files in lib/models that are families (found without importing torch)."""
    names = {path.stem for path in MODELS.glob("*.py")}
    return sorted(n for n in names - {"base"} if not n.startswith("_"))


@cache
def config_class(family: str) -> type:
    """`Config` of lib/models/<family>.py, from the file's head alone: torch is never imported."""
    name = f"lib.core.heads.{family}"
    loader = _HeadLoader(name, str(MODELS / f"{family}.py"))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and get_type_hints look their module up
    loader.exec_module(module)
    return module.Config


class _HeadLoader(SourceFileLoader):
    """Compiles a family file without its foreign imports and without what follows `Config`.

    Plain functions below it stay: `Config` may call them.
    """

    def get_code(self, fullname: str) -> types.CodeType:
        # The inherited method would leave the stump in __pycache__, where a real import finds it.
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> types.CodeType:  # type: ignore[override]  # narrower
        tree = ast.parse(data, filename=path)
        names = [n.name if isinstance(n, ast.ClassDef) else "" for n in tree.body]
        assert "Config" in names, f"{path} defines no class Config"
        end = names.index("Config") + 1
        head = [n for n in tree.body[:end] if _is_ours_to_import(n)]
        tree.body = head + [n for n in tree.body[end:] if _is_plain_function(n)]
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)


def _is_ours_to_import(node: ast.stmt) -> bool:
    """Anything but an import, and imports of what the head may need."""
    if isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return True
    return all(
        name.split(".")[0] in sys.stdlib_module_names
        or name.startswith("lib.core")
        or re.fullmatch(r"lib\.models\._\w+_sizes", name) is not None  # arithmetic alone
        for name in names
    )


def _is_plain_function(node: ast.stmt) -> bool:
    """A function whose definition evaluates nothing."""
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return False
    values = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
    return all(isinstance(value, ast.Constant) for value in values)
