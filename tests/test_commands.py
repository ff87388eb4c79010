"""docs/commands.md, the Makefile and `make -n` against each other."""

from __future__ import annotations

import re
import subprocess

import pytest

from lib.cli.main import COMMANDS
from lib.core import dag, params
from tests.conftest import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/commands.md").read_text().split("## Flags")[0].splitlines()
    if line.startswith("| ") and "make" in line and not line.startswith("| guide")
]
ALIASES = {row[2].removeprefix("`make ").rstrip("`"): row[3] for row in ROWS if row[2] != "-"}
SHELL = ("repro", "setup-disk", "recipe", "train-phase7-1.5b-resume", "push", "generate")


def printed(target: str) -> str:
    words = ["make", "-n", "-o", "setup", target, "RUN=gpt"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", sorted(ALIASES))
def test_an_alias_prints_the_command_of_the_table(target):
    text, told = printed(target), ALIASES[target]
    first = re.findall(r"`([^`]+)`", told)
    if target == "evaluate":
        first = ["dvc repro evaluate@gpt"]
    if target in SHELL:
        return
    assert first[0] in text, f"{target} runs {text!r}"


def test_every_guide_target_of_the_makefile_is_in_the_table():
    text = (ROOT / "Makefile").read_text()
    declared = {w for line in re.findall(r"^\.PHONY: (.*)$", text, re.M)[1:] for w in line.split()}
    assert declared and declared <= ALIASES.keys()


def test_profiles_and_commands_of_the_table_exist():
    profiles = params.read_yaml(ROOT / "params.yaml")["profiles"]
    text = (ROOT / "docs/commands.md").read_text()
    assert set(re.findall(r"profile=(\w+)", text)) <= profiles.keys()
    assert set(re.findall(r"`kumiki (\w+)", text)) <= COMMANDS.keys()


def test_stages_of_the_table_exist_or_belong_to_a_family_to_come():
    text = (ROOT / "docs/commands.md").read_text()
    named = set(re.findall(r"profile=\w+ (\w+)", text))
    known = set(dag.stages_of(ROOT))
    families = {path.stem for path in (ROOT / "lib/models").glob("[a-z]*.py")}
    late = {n for n in named - known if n.split("_")[-1] not in families}
    assert named - known <= late | {"precompute_embeddings"}


def test_a_foreign_checkpoint_is_refused():
    words = ["make", "-o", "setup", "train-phase7-1.5b-resume", "CHECKPOINT=/etc"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and "not a checkpoint of this run: /etc" in done.stderr
