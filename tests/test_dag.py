"""dvc.yaml against the code, in both directions: what a stage imports, reads, takes and makes."""

from __future__ import annotations

import importlib
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.core import dag
from lib.core.params import PARAMS, read_yaml
from lib.core.stage import Stage
from tests.conftest import ROOT

STAGES = dag.stages_of(ROOT)
RAW = read_yaml(ROOT / PARAMS)
WITHOUT_OVERLAY = {"seed", "profile", "runs", "families"}
RANK = {"lib": 0, "core": 1, "kernels": 2, "nn": 3, "models": 4, "stages": 6, "cli": 7}
RANK |= dict.fromkeys(("data", "train", "eval", "export"), 5)


def declared(name: str) -> Stage:
    return importlib.import_module(dag.module_of(STAGES[name]["cmd"])).STAGE


def test_every_import_is_declared_and_every_declaration_imported():
    """An undeclared import is a change that DVC would not see."""
    assert dag.differences(ROOT) == []


def test_hashing_code_changes_nothing_that_is_asked_afterwards():
    """The trees are shared: without its docstring a package file counted as code, from then on."""
    dag._source.cache_clear()
    dag.code_hash.cache_clear()
    alone = dag.code_hash("stages.pretrain", ROOT)
    dag.code_hash("stages.evaluate", ROOT)
    dag.code_hash.cache_clear()
    assert dag.code_hash("stages.pretrain", ROOT) == alone
    assert dag.differences(ROOT) == []


def test_an_undeclared_import_and_an_idle_declaration_are_both_found(tmp_path):
    """The test above must be able to fail."""
    for part in ("lib", "stages"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "dvc.yaml").read_text()
    text = text.replace("      - lib/data/tokens.py\n", "      - lib/data/nothing.py\n", 1)
    (tmp_path / "dvc.yaml").write_text(text)
    shutil.copy(ROOT / "params.yaml", tmp_path)  # names the families of added runs
    lines = dag.differences(tmp_path)
    assert len(lines) == 2 and "tokens.py is imported" in lines[0] and "nothing.py" in lines[1]


def test_a_folder_stands_for_its_files_where_nearly_all_are_imported():
    files = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "lib/nn/stream").glob("*.py"))
    for kept in range(len(files) + 1):
        found = dag.folded(files[:kept], ROOT, 0.6)
        assert found == (["lib/nn/stream"] if kept >= 0.6 * len(files) else files[:kept])
    models = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "lib/models").glob("*.py"))
    assert dag.folded(models, ROOT, 0.6) == models, "one family would rebuild another"


@pytest.mark.parametrize("name", [n for n in STAGES if n.startswith("train_") and "_tok" not in n])
def test_an_idle_layer_trains_nothing_again(name):
    """What DVC sees of a folder is what the run imports, a tenth of its files apart."""
    body = STAGES[name]
    wanted = dag.wanted_code(body, ROOT)
    imported = set(dag.code_hash(dag.module_of(body["cmd"]), ROOT))
    family = dag.families_of(body, ROOT)[0]
    imported |= set(dag.closure(family, ROOT))
    for folder in (one for one in wanted if (ROOT / one).is_dir() and one != "lib/core"):
        inside = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob("**/*.py")}
        assert len(inside - imported) <= 0.1 * len(inside), folder


def test_a_package_file_is_a_dependency_as_soon_as_it_holds_code(tmp_path):
    """A docstring changes no result; what stands beside it may."""
    for part in ("lib", "stages"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert "lib/data/__init__.py" not in dag.wanted_code(STAGES["train_gpt"], tmp_path)
    with (tmp_path / "lib/data/__init__.py").open("a") as package:
        package.write("SEED = 1\n")
    dag._source.cache_clear()
    assert "lib/data/__init__.py" in dag.wanted_code(STAGES["train_gpt"], tmp_path)


def test_a_stage_depends_on_every_file_of_its_kernels():
    """Which of them runs, the reference or Triton, is decided on the user's machine."""
    gpt = STAGES["train_gpt"]["deps"]
    assert "lib/kernels/rms_norm" in gpt and "lib/kernels/gla" not in gpt
    assert "lib/kernels/xxt/triton.py" in dag.closure([ROOT / "lib/kernels/xxt/__init__.py"], ROOT)


def wanted_parameters(name: str) -> set[str]:
    """What dvc.yaml should track for a stage: its sections, and the profile's overlay of each.

    An added item (tokenizer, encoding, run) tracks whole sections of the profile, which need not
    say anything of it; a twin starts from its family's own run. What is equal then is published
    again in seconds.
    """
    body, stage = STAGES[name], declared(name)
    words = body["cmd"].split()
    item = words[words.index(f"--{stage.item}") + 1] if stage.item else ""
    if name != "train":
        family = (RAW["train"].get(item) or {}).get("family") or item
        sections = {s.replace("{name}", item).replace("{family}", family) for s in stage.sections}
        overlays = {s.removesuffix(".${key}") for s in sections - WITHOUT_OVERLAY}
        return sections | {f"profiles.${{profile}}.{s}" for s in overlays}
    overlays = {f"profiles.${{profile}}.{s}" for s in ("train", "runs", "model")}
    return {"seed", "train", "runs.${key}", "model.${item.family}"} | overlays


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_those_that_the_stage_declares(name):
    """A section read but not tracked would leave a stale output; one tracked but unread reruns."""
    assert set(STAGES[name].get("params", [])) == wanted_parameters(name)


@pytest.mark.parametrize("name", STAGES)
def test_paths_of_the_command_are_dependencies_and_outputs(name):
    body, stage = STAGES[name], declared(name)
    words = body["cmd"].split()
    options = {w[2:]: v for w, v in itertools.pairwise(words) if w.startswith("--")}
    made = [*body["outs"], *body.get("metrics", []), *body.get("plots", [])]
    outs = {o if isinstance(o, str) else next(iter(o)) for o in made}
    places = {options[name] for name in ("out", *stage.beside)}
    assert options["out"] in outs
    assert all(out in places or str(Path(out).parent) in places for out in outs)
    given = {k: v for k, v in options.items() if k in (*stage.inputs, *stage.extras)}
    data = {d for d in body["deps"] if not d.startswith(("lib/", "stages/"))}
    data -= {"data/local", "data/samples"}
    if name == dag.REPORT:  # every run's files, listed one by one
        assert data == set(dag.report_inputs(ROOT))
        return
    assert set(given.values()) == data, "the command's inputs and the data dependencies differ"
    assert given.keys() >= stage.inputs.keys(), "every input of the stage is written out"


@pytest.mark.parametrize("name", STAGES)
def test_forbidden_forms_do_not_occur(name):
    """Each of these fails only after hours, or leaves an orphan (pipeline.md 1, 2.6)."""
    body = STAGES[name]
    assert body["cmd"].startswith("exec python -m "), "without exec a shell outlives dvc"
    assert not {"persist", "always_changed", "frozen"} & body.keys()
    assert not re.search(r"nproc|\$\(|20\d\d-|/home|~", body["cmd"])
    for out in body["outs"]:
        path = out if isinstance(out, str) else next(iter(out))
        assert not path.startswith(("/", "..")) and "://" not in path
    assert not any("://" in d for d in body["deps"])
    assert body.get("desc"), "dvc stage list shows a sentence for each stage"


def test_imports_go_down_only():
    """lib.cli, stages -> lib.{train,eval,export,data} -> lib.models -> nn -> kernels -> core."""
    for path in sorted([*ROOT.glob("lib/**/*.py"), *ROOT.glob("stages/*.py")]):
        mine = layer_of(path)
        for target in dag.imports_of(path, ROOT):
            theirs = layer_of(target)
            down = RANK[theirs] < RANK[mine] or theirs == mine
            beside = RANK[theirs] == RANK[mine] == RANK["data"]
            assert down or beside, f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}"


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "stages":
        return "stages"
    return parts[1] if len(parts) > 2 else "lib"


@pytest.mark.parametrize("path", sorted(ROOT.glob("stages/[a-z]*.py")), ids=lambda p: p.stem)
def test_help_is_fast_and_needs_no_torch(path):
    """`--help` must answer in under a second; torch alone takes two to four."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('stages.{path.stem}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--out" in run.stdout


def test_a_stage_is_short():
    """Forty to eighty lines: what is worth testing stands in lib."""
    for path in sorted(ROOT.glob("stages/[a-z]*.py")):
        lines = len(Path(path).read_text().splitlines())
        assert lines <= 100, f"{path.name} has {lines} lines"


FORBIDDEN = {
    r"\bpickle\b": "no pickle",
    r"torch\.(load|save)\(": "safetensors only",
    r"allow_pickle=True": "no pickle",
    r"yaml\.load\((?!text)": "lib.core.params.read_yaml",
    r"(?<![\w.])(eval|exec)\(": "nothing is executed from data",
    r"except\s*:": "name the exception",
    r"(?<![\w.])print\(": "stages log, commands write",
    r"extractall\(": "lib.core.archive",
    r"shell=True": "no shell",
    r"trust_remote_code=True": "no code from data",
    r"random\.seed\(|torch\.manual_seed\(": "lib.core.rng",
    r"\bNotImplementedError\b|\bTODO\b|\bFIXME\b": "no stubs",
    r"except Exception": "the stage frame only",
}
ONLY_FILES = {r"""open\([^)]*["'][wax]b?\+?["']""": "files", r"os\.(replace|rename)\(": "files"}


def test_forbidden_words_do_not_occur_in_the_code():
    """House rules as a grep: reliability.md 8.1, style.md 9.2."""
    found = []
    for path in sorted([*ROOT.glob("lib/**/*.py"), *ROOT.glob("stages/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.split("#")[0]
            for pattern, rule in {**FORBIDDEN, **ONLY_FILES}.items():
                allowed = (
                    (rule == "files" and name == "lib/core/files.py")
                    or (rule == "the stage frame only" and name == "lib/core/stage.py")
                    or (rule == "lib.core.rng" and name == "lib/core/rng.py")
                    or (rule == "files" and "self.fs." in code)  # a remote store, no disk of ours
                    or "`" in code  # a docstring speaks of it
                )
                if re.search(pattern, code) and not allowed:
                    found.append(f"{name}:{number}: {rule}: {line.strip()}")
    assert found == []
