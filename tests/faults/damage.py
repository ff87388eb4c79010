"""Damage every kind of file that some stage reads, and see what the reader makes of it.

`python -m tests.faults.damage FOLDER READER [--flips N]` prints {kind: {outcome: how often}} of all
that the step READER reads: refused with a sentence, or mended (it ended with the very bytes of an
undisturbed run).
Law:  never exit 0 with other bytes, never a traceback.
A new kind of artefact is one line in `KINDS`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.crash import Injector, in_child, tree
from tests.faults.toy import STEPS, advance, prepare, run, skip

Harm = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Kind:
    """Files that `reader` (a step) reads; `ran`: it has run before; or it was killed at a point."""

    files: str  # glob in the project
    reader: str
    out: tuple[str, ...]  # what the reader makes: prefixes of names that must not differ
    ran: bool = False
    killed_at: int = 0
    others: tuple[str, ...] = ()  # names that match and belong to another step


MADE = ("data/", "scratch/", "checkpoints/", "metrics/")
KINDS: dict[str, Kind] = {
    "shard": Kind("scratch/shards/*/*.gz", "extract", ("data/documents",)),
    "shard manifest": Kind("data/shards.manifest.json", "extract", ("data/documents",)),
    "document part": Kind("data/documents/*/*.parquet", "encode", ("data/tokens", "scratch/tok")),
    "document ledger": Kind("data/documents/*/*.json", "encode", ("data/tokens", "scratch/tok")),
    "tokenizer": Kind("data/tokenizers/bpe/*", "encode", ("data/tokens", "scratch/tok")),
    "token files": Kind("scratch/tokens/*/*", "train_gpt", ("checkpoints/gpt/final",)),
    "token manifest": Kind("data/tokens/*.json", "train_gpt", ("checkpoints/gpt/final",)),
    "checkpoint": Kind(
        "checkpoints/gpt/work/*/*/step_*/*", "train_gpt", ("checkpoints/gpt/final",), killed_at=300
    ),
    "training state": Kind(
        "checkpoints/gpt/work/*/*/*.json*", "train_gpt", ("checkpoints/gpt/final",), killed_at=300
    ),
    "model": Kind("checkpoints/gpt/final/*", "evaluate_gpt", ("metrics/gpt",)),
    "model for export": Kind("checkpoints/gpt/final/*", "export_gpt", ("checkpoints/gpt/export",)),
    "evaluation record": Kind(
        "metrics/gpt/*",
        "evaluate_gpt",
        ("metrics/gpt",),
        ran=True,
        others=("curve.csv", "loss.csv"),  # training's, and none of the evaluation's inputs
    ),
    "finished evaluation": Kind(
        "data/work/evaluate_gpt/*/**/*", "evaluate_gpt", ("metrics/gpt",), ran=True
    ),
    "half an evaluation": Kind(
        "data/work/evaluate_gpt/*/**/*", "evaluate_gpt", ("metrics/gpt",), killed_at=60
    ),
    "export": Kind("checkpoints/gpt/export/*", "export_gpt", ("checkpoints/gpt/export",), ran=True),
    "half an extraction": Kind(
        "data/work/extract_texts/*/**/*", "extract", ("data/documents",), killed_at=150
    ),
    "finished extraction": Kind(
        "data/work/extract_texts/*/**/*", "extract", ("data/documents",), ran=True
    ),
    "half an encoding": Kind(
        "scratch/tokens/*/**/*", "encode", ("data/tokens", "scratch/tok"), killed_at=100
    ),
    "state of a stage": Kind(
        "data/work/encode_tokens_bpe/*/*.json",
        "encode",
        ("data/tokens", "scratch/tok"),
        killed_at=100,
    ),
}


def harms(data: bytes, others: list[bytes], flips: int, draw: random.Random) -> Iterator[tuple]:
    """(name, damaged bytes, None = removed) of every kind of damage to `data`."""
    sizes = {"empty": 0, "one byte": 1, "half": len(data) // 2, "a byte short": len(data) - 1}
    sizes["footer gone"] = max(0, len(data) - 8)
    for name, size in sizes.items():
        if 0 <= size < len(data):
            yield name, data[:size]
    for _ in range(min(flips, 8 * len(data))):
        bit = draw.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(changed)
    first = draw.randrange(max(1, len(data) - 4096))
    yield "a byte more", data + b"\0"
    if changed := _other_version(data):
        yield "another version", changed
    zeroed = data[:first] + bytes(len(data[first : first + 4096])) + data[first + 4096 :]
    yield "4 KiB zeroed", zeroed
    yield "removed", None
    for other in others[:1]:
        yield "another's bytes", other


def _other_version(data: bytes) -> bytes | None:
    """The same JSON with the next format version, None where it has none."""
    changed = re.sub(
        rb'"version":(\d+)', lambda m: b'"version":%d' % (int(m[1]) + 1), data, count=1
    )
    return changed if changed != data else None


def state_before(prepared: Path, folder: Path, kind: Kind) -> Path:
    """The project in which the reader will find the damage."""
    project = folder / "start"
    shutil.copytree(prepared, project, symlinks=True)
    words = STEPS[kind.reader].words
    if kind.ran:
        advance(project, kind.reader)
    if kind.killed_at:
        assert os.WIFSIGNALED(in_child(lambda: run(project, *words), Injector(kind.killed_at)))
    return project


def read_by(project: Path, kind: Kind) -> tuple[int, str]:
    """Exit code and stderr of the reader."""
    said = project / "stderr"

    def quietly() -> int:
        fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        return run(project, *STEPS[kind.reader].words)

    code = os.waitstatus_to_exitcode(in_child(quietly))
    text = said.read_text(errors="replace")
    said.unlink()
    return code, text


def made(project: Path, kind: Kind) -> dict[str, str]:
    """What the reader made."""
    return {n: h for n, h in tree(project, skip).items() if n.startswith(kind.out)}


def judge(code: int, text: str, same: bool) -> str:
    """What came of one damage; AssertionError for the unforgivable."""
    assert "Traceback" not in text and code != 1, f"a bug:\n{text[-1500:]}"
    if code == 0:
        assert same, f"exit 0 with other bytes\n{text[-1500:]}"
        return "mended, equal bytes"
    assert code in (2, 3), f"exit {code}: {text[-800:]}"
    last = [line for line in text.splitlines() if line.startswith("error: ")]
    assert last, f"no sentence: {text[-800:]}"
    return f"refused, exit {code}"


def planned(paths: list[Path], flips: int, most: int | None) -> list[tuple[Path, str, Any]]:
    """(file, name of the damage, bytes or None) for all damages, or `most` of them by lot."""
    draw, found = random.Random(1), []
    for path in paths:
        data = path.read_bytes()
        others = [p.read_bytes() for p in paths if p.suffix == path.suffix and p != path]
        each = max(2, flips // len(paths))
        harm = harms(data, [o for o in others if o != data], each, draw)
        found += [(path, *one) for one in harm]
    return draw.sample(found, most) if most and most < len(found) else found


def enumerate_damage(
    prepared: Path, folder: Path, kind: Kind, flips: int, most: int | None
) -> Counter[str]:
    """Every damage to every file of the kind; how often each outcome was seen."""
    start = state_before(prepared, folder, kind)
    whole = folder / "whole"
    shutil.copytree(start, whole, symlinks=True)
    code, text = read_by(whole, kind)
    assert code == 0, text
    expected, seen = made(whole, kind), Counter()
    assert expected, f"nothing was made under {kind.out}"
    paths = sorted(
        p
        for p in start.glob(kind.files)
        if p.is_file() and ".lock" not in p.name and p.name not in kind.others
    )
    assert paths, f"no file matches {kind.files}"
    failures: list[str] = []
    for path, name, changed in planned(paths, flips, most):
        project = folder / "damaged"
        shutil.copytree(start, project, symlinks=True)
        target = project / path.relative_to(start)
        stat = target.stat()
        target.unlink()
        if changed is not None:
            target.write_bytes(changed)
            os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        code, text = read_by(project, kind)
        try:
            seen[judge(code, text, made(project, kind) == expected)] += 1
        except AssertionError as error:
            failures.append(f"{path.relative_to(start)}, {name}: {error}")
        shutil.rmtree(project)
    assert not failures, f"{len(failures)} of {sum(seen.values())}:\n" + "\n".join(failures[:8])
    return seen


def main() -> None:
    """Damage all that one step reads; the counts as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("reader", choices=sorted({kind.reader for kind in KINDS.values()}))
    parser.add_argument("--flips", type=int, default=100, help="over all files of a kind")
    parser.add_argument("--most", type=int, help="damages of a kind, by lot; default all")
    given = parser.parse_args()
    prepared, seen, wrong = prepare(given.folder, given.reader), {}, []
    for name, kind in KINDS.items():
        if kind.reader != given.reader:
            continue
        folder = given.folder / name
        try:
            seen[name] = enumerate_damage(prepared, folder, kind, given.flips, given.most)
        except AssertionError as failure:
            wrong.append(f"{name}: {failure}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
