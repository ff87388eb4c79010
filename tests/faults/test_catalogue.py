"""The catalogue against the tree: every row is there and every test that it names exists."""

from __future__ import annotations

import ast
import functools

import pytest

from tests.conftest import ROOT
from tests.faults.catalogue import CONTROLS, ROWS, page, results_of, unproven

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


def test_the_page_holds_what_was_counted_and_how_tests_ended(tmp_path):
    report, test = tmp_path / "junit.xml", ROWS["A13"].tests[0]
    classname = test.partition(".py")[0].replace("/", ".")
    case = f'<testcase classname="{classname}" name="{test.rpartition("::")[2]}[x]">'
    report.write_text(f"<suites><suite>{case}</testcase></suite></suites>")
    results = results_of([report])
    assert "A13" not in unproven(results) and "A1" in unproven(results)
    counts = [{"row": "A8", "injected": "SIGKILL in x", "count": 1234, "seen": "equal"}]
    text = page(counts, results)
    assert "1,234" in text and "SIGKILL in x: 1234, equal" in text and "1 passed tests" in text
    report.write_text(f"<suites><suite>{case}<failure/></testcase></suite></suites>")
    assert "A13" in unproven(results_of([report]))
