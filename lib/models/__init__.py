"""The families: one file each, found by listing this folder; there is no registry.

Importing this package imports no family and no torch. A file named _<family>_<part> is a part of
that family, moved out so that its model reads like a page.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from lib.core.errors import UserError

NOT_FAMILIES = {"__init__", "base"}


def families() -> list[str]:
    """Names of the families, sorted: every file here but the contract itself."""
    names = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(name for name in names - NOT_FAMILIES if not name.startswith("_"))


def load_family(name: str) -> ModuleType:
    """The module `lib.models.<name>` with `Config` and `Model`; UserError for an unknown name."""
    known = families()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or known
        raise UserError("unknown family", value=name, remedy=f"did you mean {' or '.join(near)}?")
    return importlib.import_module(f"{__name__}.{name}")
