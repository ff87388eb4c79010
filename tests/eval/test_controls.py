"""controls.json becomes a table, of a model without controls an empty one."""

from __future__ import annotations

from lib.core import files
from lib.eval.controls import write_controls
from lib.models.cvfp import verdict


def row(arm: str, bpb: float | None, sd: float | None) -> dict:
    return {"arm": arm, "bpb": bpb, "bpb_sd": sd, "tokens": 5}


def test_the_table_has_a_line_for_each_arm(tmp_path):
    assert write_controls(tmp_path, tmp_path / "out") is None
    assert (tmp_path / "out/controls.csv").read_text() == "arm\n"
    rows = [row("none", 2.5, None), row("phase1", 2.25, 0.01)]
    files.write_json(tmp_path / "controls.json", {"rows": rows, "verdict": "said"})
    assert write_controls(tmp_path, tmp_path / "out") == "said"
    lines = (tmp_path / "out/controls.csv").read_text().splitlines()
    assert sorted(lines[0].split(",")) == ["arm", "bpb", "bpb_sd", "tokens"]
    assert len(lines) == 3 and "none" in lines[1] and "2.25" in lines[2]


def test_the_verdict_weighs_the_gain_against_the_noise():
    """A useless first phase, random weights again, differs by noise alone."""
    untrained = row("untrained", 2.3, 0.01)
    assert verdict([row("phase1", 2.1, 0.01), untrained]).endswith("helps")
    assert verdict([row("phase1", 2.5, 0.01), untrained]).endswith("hurts")
    assert verdict([row("phase1", 2.295, 0.01), untrained]).endswith("no difference")
    assert verdict([row("phase1", 2.1, None), untrained]).endswith("not decided")
    assert "not decided" in verdict([untrained])
