"""The catalogue against the tree: every row is there and every test that it names exists."""

from __future__ import annotations

import ast
import functools

import pytest

from tests.conftest import ROOT
from tests.faults.catalogue import (
    CONTROLS,
    ROWS,
    WANTED,
    moment_of,
    page,
    reasons_of,
    results_of,
    unproven,
)

COUNTS = {"A": 15, "B": 8, "C": 11, "D": 9, "E": 12, "F": 6}


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_catalogue_is_there():
    assert list(ROWS) == [f"{part}{n}" for part, last in COUNTS.items() for n in range(1, last + 1)]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_names_tests_that_exist(name):
    assert ROWS[name].tests or ROWS[name].gap
    for test in ROWS[name].tests:
        file, _, function = test.partition("::")
        assert function in functions_of(file), test


def test_every_control_exists():
    for test in CONTROLS.values():
        file, _, function = test.partition("::")
        assert function in functions_of(file), test


def suite(*cases: str) -> str:
    head = '<suites><testsuite time="61.2" timestamp="2026-01-02T03:04:05">'
    return head + "".join(cases) + "</testsuite></suites>"


def case_of(test: str, inside: str = "") -> str:
    file, _, name = test.partition(".py::")
    classname = file.replace("/", ".")
    return f'<testcase classname="{classname}" name="{name}[x]">{inside}</testcase>'


def test_the_page_holds_what_was_counted_and_how_tests_ended(tmp_path):
    report, test, other = tmp_path / "junit.xml", ROWS["A13"].tests[0], ROWS["A12"].tests[0]
    skip = case_of(other, '<skipped message="no lock here"/>')
    report.write_text(suite(case_of(test), skip))
    results = results_of([report])
    counts = [
        {"row": "A8", "injected": "SIGKILL in y", "count": 5, "seen": "equal"},
        {"row": "A8", "injected": "SIGKILL in x", "count": 1234, "seen": "equal"},
        {"row": "A10", "injected": "SIGINT in x", "count": 7, "seen": "75"},
    ]
    bad = unproven(counts, results)
    assert "A13" not in bad and "A1" in bad and "A12" in bad
    assert "SIGKILL: 1239, wanted 2000" in bad and "damaged: 0, wanted 1000" in bad
    text = page(counts, results, reasons_of([report]), moment_of(report))
    assert "2026-01-02, 1 min 01 s" in text and "Crash points: **1,239**" in text
    assert "SIGKILL in x: 1234, SIGKILL in y: 5: equal" in text and "1 passed tests" in text
    assert "signals that are handled: 7." in text and "- 1 tests: no lock here" in text
    assert "Failed tests: **0**" in text
    report.write_text(suite(case_of(test, "<failure/>")))
    results = results_of([report])
    enough = [{"row": "A1", "injected": what, "count": n, "seen": ""} for what, n in WANTED.items()]
    bad = unproven(enough, results)
    assert "A13" in bad and not [line for line in bad if "wanted" in line]
    assert "Failed tests: **1**" in page(counts, results, reasons_of([report]), moment_of(report))
