"""The README's commands: each parses, names what exists; the offline ones run on a tiny project."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lib.cli.main import build_parser
from lib.core import dag, params
from tests.conftest import ROOT
from tests.project import add_model, make_project, run_module

PAGES = ("README.md", "README.ja.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def commands(page: str) -> list[str]:
    lines = [line.split(" # ")[0].strip() for b in blocks(page, "sh") for line in b.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_both_languages_show_the_same_commands_settings_and_sections():
    assert commands(PAGES[0]) == commands(PAGES[1])
    without = [[re.sub(r"\s*#.*", "", b) for b in blocks(p, "yaml")] for p in PAGES]
    assert without[0] == without[1]
    heads = [re.findall(r"^##", (ROOT / p).read_text(encoding="utf-8"), re.M) for p in PAGES]
    assert len(heads[0]) == len(heads[1])


@pytest.mark.parametrize("command", [c for c in commands("README.md") if c.startswith("kumiki")])
def test_every_kumiki_command_parses(command):
    words = shlex.split(command.split(" > ")[0])[1:]
    found = build_parser().parse_args(words)
    profiles = params.read_yaml(ROOT / "params.yaml")["profiles"]
    assert getattr(found, "profile", None) in {None, *profiles}


def test_every_make_target_and_stage_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z][\w.-]*)`?", text)) - {"sure"}:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target
    stages, runs = dag.stages_of(ROOT), params.read_yaml(ROOT / "params.yaml")["families"]
    for name in re.findall(r"dvc repro (\w+)(?![@\w])", text):
        assert name in stages, name
    own = re.findall(r"^  (\w+): {family:", "".join(blocks("README.md", "yaml")), re.M)
    for name in re.findall(r"kumiki (?:generate|chat) (\w+)", text):
        assert name in {*runs, *own}, name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:lib|tests|stages)/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_every_promise_names_a_test_that_exists():
    named = [
        re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / p).read_text("utf-8")) for p in PAGES
    ]
    assert named[0] == named[1] and len(named[0]) > 7
    for path, name in named[0]:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_the_stated_time_is_the_measured_one():
    """One number, in three places that must agree: both pages and the measured figures."""
    pages = [ROOT / name for name in (*PAGES, "docs/benchmarks.md")]
    forms = (r"it takes (.*?) minutes", r"(\S+) 分かかります", r"`make repro` takes (.*?) minutes")
    texts = [" ".join(page.read_text(encoding="utf-8").split()) for page in pages]
    told = [re.search(f, text) for f, text in zip(forms, texts, strict=True)]
    numbers = [re.findall(r"[\d.]+", found[1]) for found in told if found]
    assert len(numbers) == 3 and numbers[0] == numbers[1] == numbers[2], numbers


def test_the_settings_for_own_data_load(tmp_path):
    """The block is laid over the shipped file, as a user would paste it."""
    block, family = blocks("README.md", "yaml")
    raw = params.read_yaml(ROOT / "params.yaml")
    (tmp_path / "block.yaml").write_text(block)
    settings, problems = params.resolve(
        params.merge(raw, params.read_yaml(tmp_path / "block.yaml")), "small"
    )
    assert problems == [] and settings and settings.encode_tokens["notes"].packing == "stream"
    assert settings.train["mine"].steps == 200
    (tmp_path / "family.yaml").write_text(family)
    assert params.read_yaml(tmp_path / "family.yaml")["runs"]["bigram"]["steps"] == 200


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("readme"))
    add_model(folder)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text + "families:\n  gpt: {family: gpt, tokens: bpe}\n")
    return folder


@pytest.mark.parametrize(
    "command", [c for c in commands("README.md") if c.startswith("kumiki") and " trm" not in c]
)
def test_the_commands_run(project, command):
    """On a model of a second instead of minutes; the rest is the same."""
    words = shlex.split(command.split(" > ")[0])[1:]
    words = [w for w in words if w not in ("--profile", "trm_ja")]
    done = run_module(project, "lib.cli.main", *words)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


@pytest.mark.slow
def test_the_whole_page_from_a_clone(tmp_path):
    """Clone, `make repro`, everything the page shows: minutes, and a package index."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "kumiki")], check=True)
    for command in ("make repro", *commands("README.md")[2:]):
        shell = f". .venv/bin/activate 2>/dev/null; {command}"
        subprocess.run(["bash", "-c", shell], cwd=tmp_path / "kumiki", check=True)
