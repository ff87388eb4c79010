"""report: all metrics, ledgers and hashes -> one self-contained HTML page.

In:  metrics/<run>/, checkpoints/<run>/final of every run of `families`; data/.
Out: checkpoints/report.html. No rate, time or machine in it: the same inputs give the same bytes.
     `kumiki report` renders the same page to report.html with what was measured here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.core import dag, files, stage
from lib.core.stage import Run, Stage

STAGE = Stage(
    name="report",
    about="Show every run's numbers, curves, samples, data and hashes on one page.",
    sections=("runs", "families", "encode_tokens", "profile"),
    inputs={},
    out="checkpoints/report.html",
)


def identity(run: Run) -> dict[str, Any]:
    """The bytes of every file that the page is made from."""
    found = dag.report_inputs(Path())
    paths = [p for name in found for p in _files(Path(name))]
    return {
        "profile": run.settings.profile,
        "runs": sorted(run.settings.runs),
        "files": {path.as_posix(): files.sha256_file(path) for path in paths},
    }


def _files(path: Path) -> list[Path]:
    """The file, or of a folder its manifests and the JSON beside them: they name the rest."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*.json") if p.is_file())
    return [path] if path.is_file() else []


def body(run: Run) -> None:
    """Gather, render, write."""
    from lib.export.report.gather import gather
    from lib.export.report.page import render

    found = gather(Path(), run.settings)  # type: ignore[arg-type]  # the declared sections of it
    files.write_bytes(run.result, render(found).encode())
    done = sum(one.is_measured for one in found.runs)
    run.summary = f"{done} of {len(found.runs)} runs measured"


if __name__ == "__main__":
    raise SystemExit(stage.main(STAGE, body, identity))
