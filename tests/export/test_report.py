"""The report page: self-contained, escaped, balanced, the same bytes for the same files."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib.cli import main as cli
from lib.core import dag, params
from lib.core.artifact import Manifest
from lib.export.report.charts import Axis, Series, line_chart
from lib.export.report.gather import against, gather
from lib.export.report.page import render
from tests.conftest import ROOT
from tests.export.report_project import EVIL, RUNS, make_report_project


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_report_project(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(project) -> str:
    return render(gather(project, params.load(project)))


class Parser(HTMLParser):
    """Ids, links, resources, and whether every element is closed in order."""

    VOID = ("meta", "br", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        known = dict(attrs)
        self.ids |= {known["id"]} if "id" in known else set()
        self.links += [known["href"]] if tag == "a" else []
        self.resources += [known[n] for n in ("src", "srcset") if n in known]
        self.resources += [known["href"]] if tag == "link" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


def parsed(text: str) -> Parser:
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_the_page_fetches_nothing_and_every_link_has_its_target(page):
    found = parsed(page)
    assert found.resources == [] and "script" not in found.tags and "url(" not in page
    assert all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= found.ids
    assert len(page.encode()) < 3_000_000


def test_text_of_a_model_is_text(page):
    assert EVIL not in page and "&lt;script&gt;" in page


def test_runs_stand_by_validation_text_best_first_twins_marked(page):
    board = page[page.index('id="leaderboard"') : page.index('id="curves"')]
    assert board.count("<table>") == 2, "one table a validation text"
    assert board.index(">gpt<") < board.index(">gpt_shallow<") < board.index(">hostile<")
    assert board.count("twin of gpt") == 2 and "baseline" in board
    assert "Missing, not measured yet: wide" in board


def test_a_twin_is_compared_with_its_family_and_a_close_one_is_not_decided(project):
    """One seed says nothing of differences that another seed would make as well."""
    runs = gather(project, params.load(project)).runs
    gpt, twin = (next(run for run in runs if run.name == name) for name in ("gpt", "gpt_shallow"))
    near = replace(twin, metrics={**(twin.metrics or {}), "bpb": gpt.metrics["bpb"] + 0.02})
    far = replace(twin, metrics={**(twin.metrics or {}), "bpb": gpt.metrics["bpb"] - 0.03})
    assert against(gpt, runs) is None
    assert against(near, runs) == (pytest.approx(0.02), False)
    assert against(far, runs) == (pytest.approx(-0.03), True)


def test_numbers_of_two_texts_are_never_in_one_chart(page):
    charts = re.findall(r'aria-label="([^"]+)"', page)
    english = [c for c in charts if c.startswith("en:")]
    assert english and all(" ja" not in c.split(":", 2)[2] for c in english)


def test_the_first_familys_text_comes_first(page):
    """YAML puts what `<<` merges first, so a twin's Japanese table stood above the GPT's."""
    assert page.index("Validation text en") < page.index("Validation text ja")


def test_depth_controls_tasks_and_what_is_missing_are_shown(page):
    for text in (
        "Depth of thought",
        "phi) was not done",
        "Controls",
        "phase1",
        "order, ",
        "word overlap",
        "0.500",
    ):
        assert text in page, text
    assert "wide: not trained yet" in page and "late.gz" in page


def test_the_ledger_is_added_up_again(project, tmp_path):
    copy = tmp_path / "p"
    shutil.copytree(project, copy)
    assert render(gather(copy, params.load(copy))).count('class="ok">exact') == 4
    path = copy / "data/documents/en/ledger.json"
    path.write_text(path.read_text().replace('"documents_out":100', '"documents_out":99'))
    assert 'class="wrong">broken' in render(gather(copy, params.load(copy)))


def test_the_same_files_give_the_same_bytes(project, page):
    assert render(gather(project, params.load(project))) == page


def test_without_anything_the_page_says_so(project, tmp_path):
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(project / name, tmp_path / name)
    text = render(gather(tmp_path, params.load(tmp_path)))
    parsed(text)
    assert f"0 of {len(RUNS)} runs measured" in text and "Missing: no documents yet" in text


def test_the_command_prints_the_board_and_says_what_is_older(
    project, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "p"
    shutil.copytree(project, copy)
    monkeypatch.chdir(copy)
    assert cli.main(["report"]) == 0
    out, err = capsys.readouterr()
    assert "twin of gpt" in out and "missing: wide; dvc repro evaluate@wide" in out and not err
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    Manifest(kind="model", recipe={"run": "new"}).write(
        copy / "checkpoints/gpt/final/manifest.json"
    )
    assert cli.main(["report", "--out", str(copy)]) == 2, "a folder or a device is not replaced"
    capsys.readouterr()
    assert cli.main(["report", "--json"]) == 0
    assert "numbers of gpt are older than its model" in capsys.readouterr().err


def test_the_stage_depends_on_every_runs_files():
    wanted = set(dag.report_inputs(ROOT))
    assert wanted <= set(dag.stages_of(ROOT)["report"]["deps"])
    for run in params.read_yaml(ROOT / "params.yaml")["families"]:
        assert f"metrics/{run}/curve.csv" in wanted


def test_ticks_are_round_and_few():
    for low, high in ((1, 4), (204_800, 819_200), (1e9, 1e16), (0.2, 0.21), (3, 3)):
        for log in (False, True):
            ticks = Axis(low, high, 0, 100, log).ticks()
            assert len(ticks) <= 8 and all(low <= t <= high for t in ticks), (low, high, ticks)
    assert line_chart([], title="", x_label="", y_label="") == ""
    one = Series(name="a<b", colour=0, points=[(1, 2)])
    assert "a&lt;b" in line_chart([one], title="t", x_label="x", y_label="y")
