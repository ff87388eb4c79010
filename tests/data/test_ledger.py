"""The ledger: its laws, its limits, its form."""

from __future__ import annotations

import copy

import pytest

from lib.core.errors import InputError
from lib.data.clean import CleanCounts
from lib.data.ledger import Entry, Ledger, LedgerError
from lib.data.raw.lines import ReadCounts


def balanced() -> Entry:
    return Entry(
        read=ReadCounts(
            lines=12,
            records=10,
            blank=2,
            rejected={"malformed": 1},
            positions={"malformed": ["f:3"]},
        ),
        clean=CleanCounts(
            documents_in=9,
            bytes_in=100,
            split=2,
            repairs={"control": [1, 0, 4], "unicode": [2, 5, 1]},
            dropped={"empty": [1, 0], "dup_exact": [3, 30]},
        ),
        shards=1,
        documents_out=7,
        bytes_out=70,
    )


def test_balanced_counts_pass():
    balanced().check("f")
    assert Entry.from_counts(balanced().to_counts()) == balanced()


@pytest.mark.parametrize(
    ("law", "path"),
    [
        ("L1", ("read", "lines")),
        ("L1", ("read", "blank")),
        ("L2", ("read", "rejected", "malformed")),
        ("L3", ("clean", "split")),
        ("L3", ("documents_out",)),
        ("L3", ("clean", "dropped", "empty", 0)),
        ("L4", ("bytes_out",)),
        ("L4", ("clean", "bytes_in")),
        ("L4", ("clean", "repairs", "unicode", 1)),
        ("L4", ("clean", "repairs", "control", 2)),
        ("L4", ("clean", "dropped", "dup_exact", 1)),
    ],
)
def test_one_lost_unit_anywhere_breaks_its_law(law, path):
    """It is a bug, so no KumikiError: the stage ends with a traceback and exit 1."""
    raw = copy.deepcopy(balanced().to_counts())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 1
    with pytest.raises(LedgerError, match=law):
        Entry.from_counts(raw).check("f")


def test_sums_keep_the_laws_and_the_first_positions():
    total = Entry()
    for number in range(30):
        entry = balanced()
        entry.read.positions = {"malformed": [f"f{number}:3"]}
        total.add(entry)
    total.check("sum")
    assert total.read.rejected == {"malformed": 30}
    assert total.read.positions["malformed"] == [f"f{n}:3" for n in range(20)]
    assert total.clean.dropped == {"empty": [30, 0], "dup_exact": [90, 900]}


def test_lost_share_names_the_reasons_and_leaves_duplicates_out():
    ledger = Ledger()
    ledger.add("web", "train", balanced())
    ledger.add("web", "val", balanced())
    ledger.check(0.2)  # 2 of 10, the 3 duplicates do not count
    with pytest.raises(InputError) as caught:
        ledger.check(0.19)
    assert "2 of 10: empty 1, malformed 1" in str(caught.value)
    assert "web, train" in str(caught.value)


@pytest.mark.parametrize("present", ["train", "val"])
def test_d08_an_empty_split_is_refused(present):
    ledger = Ledger()
    ledger.add("web", present, balanced())
    with pytest.raises(InputError, match=r"no (train|val) documents"):
        ledger.check(1.0)


def test_json_holds_every_count():
    ledger = Ledger()
    ledger.add("web", "train", balanced())
    table = ledger.to_json()["web"]["train"]
    assert table["rejected"] == {"malformed": {"records": 1, "first": ["f:3"]}}
    assert table["dropped"]["dup_exact"] == {"documents": 3, "bytes": 30}
    assert table["repairs"]["unicode"] == {"documents": 2, "bytes_added": 5, "bytes_removed": 1}
    assert (table["lines"], table["documents_out"], table["bytes_out"]) == (12, 7, 70)
