"""The wiring diagram against the code: what a stage imports, what dvc.yaml says it depends on.

`python -m lib.core.dag --write` puts every stage's import closure into dvc.yaml (comments stay);
`--check` compares both directions. `code_hash` is what a working state remembers of the code.

Rule:  a stage depends on the files it imports, one by one; a folder of which it imports three
       files in five (a training run: nine in ten) is one dependency, but never the families.
Why:   DVC reads and writes all of dvc.lock after each stage, which cost more than a small stage. A
       file too many costs little where the work is still there: the stage finds it finished, by
       `code_hash`, which is exact, and publishes it again. Training is what may last for days.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lib.core.errors import KumikiError, UserError, raise_all, report_lines

DVC_YAML = "dvc.yaml"
ROOTS = ("lib", "stages")
REPORT = "report"  # the stage whose data dependencies are written too: every run's files
NEARLY, TRAINING = 0.6, 0.9  # of a folder's files, and the folder stands for them
FAMILIES = "lib/models"
KERNELS = "lib/kernels"  # what lies in an operator's folder is chosen when it runs
# What computes: a change here may change bytes, so unfinished work is not silently continued.
COMPUTES = ("lib/data/", "lib/models/", "lib/nn/", "lib/kernels/", "lib/train/", "lib/eval/")


@cache
def _source(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _candidates(module: str, root: Path) -> Iterator[Path]:
    """The files that importing `module` runs: the packages on the way and the module itself."""
    parts = module.split(".")
    if parts[0] not in ROOTS:
        return
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        if (base / "__init__.py").is_file():
            yield base / "__init__.py"
        elif base.with_suffix(".py").is_file():
            yield base.with_suffix(".py")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement that can run, without descending into expressions (most of a tree)."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            yield from _statements(node.orelse)
            continue
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, name, []))


def imports_of(path: Path, root: Path) -> set[Path]:
    """Files of ours that `path` imports anywhere in it, type-checking blocks excepted."""
    found: set[Path] = set()
    for node in _statements(_source(path).body):
        if isinstance(node, ast.Import):
            for name in node.names:
                found.update(_candidates(name.name, root))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}: write it out"
            module = node.module or ""
            found.update(_candidates(module, root))
            for name in node.names:
                found.update(_candidates(f"{module}.{name.name}", root))
    return found


def closure(entries: list[Path], root: Path) -> list[str]:
    """All files of ours that `entries` reach by imports, themselves included, as sorted paths."""
    todo, done = list(entries), set()
    while todo:
        path = todo.pop()
        if path not in done:
            done.add(path)
            todo.extend(imports_of(path, root))
            if path.parent.parent == root / KERNELS:
                todo.extend(path.parent.glob("*.py"))
    return sorted(p.relative_to(root).as_posix() for p in done)


def folded(names: list[str], root: Path, nearly: float = TRAINING) -> list[str]:
    """`names`, with a folder in place of its files where that share of them is there."""
    left, folders = set(names), []
    for folder in sorted(path for path in (root / "lib").glob("**/") if path != root / "lib"):
        name = folder.relative_to(root).as_posix()
        inside = {path.relative_to(root).as_posix() for path in folder.glob("**/*.py")}
        if name != FAMILIES and inside & left and len(inside & left) >= nearly * len(inside):
            left, folders = left - inside, [*folders, name]
    return sorted([*left, *folders])


@cache
def code_hash(module: str, root: Path) -> dict[str, str]:
    """File -> hash of its syntax tree without docstrings and comments, over what computes.

    module: the stage, as `stages.encode_tokens`. A comment in a model file costs no retraining.
    """
    entry = [p for p in _candidates(module, root) if p.name != "__init__.py"]
    hashes = {}
    for name in closure(entry, root):
        if name.startswith(COMPUTES) or name == "lib/core/rng.py" or root / name in entry:
            tree = _dump_without_docstrings(_source(root / name))
            hashes[name] = hashlib.sha256(tree.encode()).hexdigest()[:16]
    return hashes


def _dump_without_docstrings(tree: ast.Module) -> str:
    """The tree as text. Docstrings are out of it for that long: a copy would double the cost.

    They must come back: a package file whose docstring is gone would look like one with code.
    """
    kept: list[tuple[Any, list[ast.stmt]]] = []
    for node in [tree, *_statements(tree.body)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                kept.append((node, node.body))
                node.body = node.body[1:] or [ast.Pass()]
    try:
        return ast.dump(tree)
    finally:
        for node, body in kept:
            node.body = body


# ---------------------------------------------------------------- dvc.yaml


def module_of(cmd: str) -> str:
    """The stage module that a `cmd` runs; launchers stand before it."""
    return next(word for word in cmd.split() if word.startswith("stages."))


def stages_of(root: Path) -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml by name; a `foreach` stage is its `do` with `foreach` added."""
    from lib.core.params import read_yaml

    stages = read_yaml(root / DVC_YAML).get("stages") or {}
    return {
        name: {**body["do"], "foreach": body["foreach"]} if "foreach" in body else body
        for name, body in stages.items()
    }


def loaded_by_name(module: str, root: Path) -> Iterator[Path]:
    """Files of ours that a stage names in text (its `modules`), which no import statement shows."""
    for node in ast.walk(_source(root / (module.replace(".", "/") + ".py"))):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"lib(\.\w+)+", text):
            yield from _candidates(text, root)


def families_of(body: dict[str, Any], root: Path) -> tuple[list[Path], set[str]]:
    """(family files that a stage runs, names of those that dvc.yaml writes as a template).

    `--run gpt` is one family, that which `train.gpt` names or the run's own name. Of a `foreach`
    over families the closure is the union, only the
    family file itself is templated (pipeline.md 2.5). Of `runs` it is that of the families which
    its lines name.
    """
    words = body["cmd"].split()
    run = words[words.index("--run") + 1] if "--run" in words else None
    models = sorted((root / "lib/models").glob("[a-z]*.py"))
    every = [path for path in models if path.stem != "base"]
    if run is None:
        return [], set()
    from lib.core.params import PARAMS, read_yaml

    raw = read_yaml(root / PARAMS)
    if "foreach" not in body:
        family = (raw["train"].get(run) or {}).get("family") or run
        return [path for path in every if path.stem == family], set()
    templated = {path.relative_to(root).as_posix() for path in every}
    if "runs" in body["foreach"]:
        lines = (raw.get("runs") or {}).values()
        used = {line.get("family") for line in lines}
        return [root / "lib/models/base.py", *(p for p in every if p.stem in used)], templated
    return every, templated


def wanted_code(body: dict[str, Any], root: Path) -> list[str]:
    """The code that a stage should declare: files, and folders of which it imports nearly all."""
    entries = []
    for module in body["cmd"].split():
        if module.startswith(("stages.", "lib.")):
            entries += _candidates(module, root)
    entries += loaded_by_name(module_of(body["cmd"]), root)
    families, templated = families_of(body, root)
    files = closure(entries + families, root)
    nearly = TRAINING if module_of(body["cmd"]) == "stages.pretrain" else NEARLY
    names = folded([name for name in files if name not in templated], root, nearly)
    return [name for name in names if not _is_bare(root / name)]


def _is_bare(path: Path) -> bool:
    """Whether a package's file holds a docstring and nothing that could change a result."""
    if path.name != "__init__.py":
        return False
    body = _source(path).body
    return all(isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant) for x in body)


def is_code(dependency: str) -> bool:
    """Whether `make dag` writes this entry; a templated one is written by hand."""
    return dependency.startswith(("lib/", "stages/")) and "$" not in dependency


def report_inputs(root: Path) -> list[str]:
    """What the report page is made from: every run, and the data behind them (pipeline.md 2)."""
    from lib.core.params import PARAMS, read_yaml

    raw = read_yaml(root / PARAMS)
    encodings, tokenizers = raw.get("encode_tokens") or {}, raw.get("train_tokenizer") or {}
    runs = raw.get("families") or {}
    names = ("eval.json", "eval_record.json", "samples.json", "curve.csv", "loss.csv")
    return [
        "data/shards.manifest.json",
        "data/documents",
        *(f"data/tokenizers/{name}" for name in tokenizers),
        *(f"data/tokens/{name}.manifest.json" for name in encodings),
        *(f"checkpoints/{run}/final" for run in runs),
        *(f"metrics/{run}/{name}" for run in runs for name in names),
    ]


def differences(root: Path) -> list[str]:
    """One line for each code dependency that is missing in dvc.yaml or is there without need."""
    lines = []
    for name, body in stages_of(root).items():
        declared = {d for d in body.get("deps", []) if is_code(d)}
        wanted = set(wanted_code(body, root))
        if name == REPORT:
            declared, wanted = set(body.get("deps", [])), wanted | set(report_inputs(root))
        lines += [f"{name}: {d} is imported, not declared" for d in sorted(wanted - declared)]
        lines += [f"{name}: {d} is declared, not imported" for d in sorted(declared - wanted)]
    return lines


def write(root: Path) -> bool:
    """Bring the code dependencies of dvc.yaml in step; data dependencies come first and stay.

    The report's are written as well, so that an added run is on the page.
    """
    from io import StringIO

    from ruamel.yaml import YAML

    from lib.core import files

    round_trip = YAML()
    round_trip.width, round_trip.preserve_quotes = 4096, True
    round_trip.indent(mapping=2, sequence=4, offset=2)
    path = root / DVC_YAML
    before = path.read_text(encoding="utf-8")
    tree = round_trip.load(before)
    for name, raw in tree["stages"].items():
        body = raw.get("do", raw)
        data = [d for d in body.get("deps", []) if not is_code(d)]
        data = report_inputs(root) if name == REPORT else data
        foreach = {"foreach": raw["foreach"]} if "foreach" in raw else {}
        body["deps"] = data + wanted_code({**body, **foreach}, root)
    out = StringIO()
    round_trip.dump(tree, out)
    if out.getvalue() != before:
        files.write_bytes(path, out.getvalue().encode())
    return out.getvalue() != before


def check_params(root: Path) -> None:
    """UserError for every parameter that a stage tracks and some profile does not hold.

    DVC itself finds this only when the stage starts, `--dry` passes (pipeline.md 4.4).
    """
    from lib.core.params import PARAMS, read_yaml

    raw = read_yaml(root / PARAMS)
    errors: list[KumikiError] = []
    for body in stages_of(root).values():
        keys = _items(body.get("foreach"), raw)
        for entry in body.get("params", []):
            for key in keys:
                for profile in raw["profiles"]:
                    name = entry.replace("${profile}", profile).replace("${key}", key)
                    if "${item" not in name and not _reaches(raw, name):
                        errors.append(
                            UserError(
                                "missing key", file=root / PARAMS, value=name, remedy="add it"
                            )
                        )
    raise_all(list({str(e): e for e in errors}.values()))


def _items(foreach: Any, raw: dict) -> list[str]:
    if foreach is None:
        return [""]
    if isinstance(foreach, str):  # ${section}
        node: Any = raw
        for part in foreach.strip("${} ").split("."):
            node = node[part]
        return list(node)
    return list(foreach)


def _reaches(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def main() -> int:
    """Write or check the code dependencies of dvc.yaml."""
    parser = argparse.ArgumentParser(prog="python -m lib.core.dag", description=main.__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true", help="bring dvc.yaml in step")
    group.add_argument("--check", action="store_true", help="say what is out of step")
    arguments = parser.parse_args()
    root = Path()
    try:
        if arguments.write:
            sys.stdout.write(f"dvc.yaml: {'written' if write(root) else 'in step'}\n")
            return 0
        lines = differences(root)
        raise_all(
            [UserError("out of step", file=DVC_YAML, value=x, remedy="make dag") for x in lines]
        )
    except KumikiError as error:
        sys.stderr.write("\n".join(report_lines(error)) + "\n")
        return error.code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
