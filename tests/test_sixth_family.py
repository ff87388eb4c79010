"""Adding a family is one file, one section, one line: a bigram model in a copy of the project."""

from __future__ import annotations

import shutil

from tests.conftest import HANG_S, ROOT
from tests.train.project import command, make_project

BIGRAM = '''"""Bigram: the next id from this id alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lib.models.base import Family


@dataclass(frozen=True, kw_only=True)
class Config:
    """Section `model.bigram`."""

    width: int = 16


class Model(Family):
    """A table and a head."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, config.width)
        self.head = nn.Linear(config.width, vocab_size)

    def forward(self, tokens, state=None):
        return self.head(self.table(tokens)), state
'''


def test_a_sixth_family_trains_with_one_file_one_section_and_one_line(tmp_path):
    project = make_project(tmp_path / "p")
    for name in ("lib", "stages"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = {p for p in project.rglob("*.py")}
    (project / "lib/models/bigram.py").write_text(BIGRAM)
    assert len([x for x in BIGRAM.splitlines() if x]) <= 25
    text = (project / "params.yaml").read_text()
    text = text.replace("model:\n", "model:\n  bigram: {width: 8}\n")
    line = "  bigram: {family: bigram, steps: 30, batch_tokens: 256, lr: 0.05, sample_every: 30}\n"
    (project / "params.yaml").write_text(text + "runs:\n" + line)
    process = command(project, "--run", "bigram", PYTHONPATH=str(project))
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, err
    assert {p for p in project.rglob("*.py")} - before == {project / "lib/models/bigram.py"}
    bpb = (project / "metrics/bigram/curve.csv").read_text().splitlines()
    assert bpb[0] == "step,tokens,bytes,flops,bpb"
    losses = (project / "metrics/bigram/loss.csv").read_text().splitlines()[1:]
    first, last = (float(losses[i].split(",")[3]) for i in (0, -1))
    assert abs(first - 5.704) < 0.1 and last < first - 0.5, (first, last)
    assert (project / "checkpoints/bigram/final/model.safetensors").is_file()
    assert "Step     30 | Loss: " in out and "\n  | " in out
