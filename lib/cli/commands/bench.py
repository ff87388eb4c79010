"""`kumiki bench`: what this machine does, beside a baseline (cli.md 3.7).

WHAT: a family (steps, --largest, --plan, --dry-run), two families (side by side), or one of the
suites of benchmarks/ (data, train, kernels, stream, generate, ...). The table goes to stdout, the
CSV to benchmarks/out/.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.cli import tables
from lib.cli.bench_trials import dry_run, largest, plan, trial_of, write_csv
from lib.cli.commands.config import load_profile
from lib.cli.console import note
from lib.core import files
from lib.core.errors import EnvError, UserError
from lib.core.heads import family_names
from lib.core.settings import Settings
from lib.export import amounts

SUITES = Path("benchmarks")
GRACE = 10.0  # seconds that an interrupted benchmark has to put its files away
LENGTHS = (256, 512, 1024)  # contexts of two families side by side, at constant tokens


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Choose by what is named."""
    suites = sorted(p.stem for p in SUITES.glob("[a-z]*.py"))
    families = family_names()
    unknown = [w for w in arguments.what if w not in families and w not in suites]
    if unknown:
        names = ", ".join(dict.fromkeys([*families, *suites]))  # some are both
        raise UserError("unknown benchmark", value=unknown[0], remedy=f"choose one of {names}")
    mode = mode_of(arguments)
    if alone := [w for w in arguments.what if w not in families]:
        require_suite_only(arguments, alone[0], mode)
        suite(alone[0])
        return
    if mode and len(arguments.what) > 1:
        raise UserError(f"{mode} is of one family", value=" ".join(arguments.what),
                        remedy="run it once for each")  # fmt: skip
    settings = load_profile(arguments.profile)
    for name in arguments.what:
        if name not in settings.train:
            raise UserError("no such run", value=name, remedy="add a line under `runs`")
    name = arguments.what[0]
    if arguments.plan:
        plan(settings, name, arguments.json)
    elif arguments.dry_run is not None:
        dry_run(settings, name, arguments.dry_run, arguments.json)
    elif arguments.largest:
        largest(settings, name, arguments.budget, arguments.json)
    elif len(arguments.what) > 2:
        raise UserError("too many families", value=len(arguments.what), remedy="name two at most")
    else:
        steps(settings, arguments.what, arguments.json)


def mode_of(arguments: argparse.Namespace) -> str | None:
    """The option that asks for something else than steps. UserError for two of them."""
    asked = {
        "--plan": arguments.plan,
        "--dry-run": arguments.dry_run is not None,
        "--largest": arguments.largest,
    }
    modes = [name for name, given in asked.items() if given]
    if len(modes) > 1:
        raise UserError("options exclude each other", value=" ".join(modes), remedy="give one")
    return modes[0] if modes else None


def require_suite_only(arguments: argparse.Namespace, name: str, mode: str | None) -> None:
    """A suite runs whole and by itself: what it could not heed is refused, not dropped."""
    if len(arguments.what) > 1:
        raise UserError("a benchmark is named alone", value=" ".join(arguments.what),
                        remedy=f"run {name} by itself")  # fmt: skip
    if mode:
        raise UserError(f"{mode} is of families", value=name, remedy=f"leave out {mode}")
    if arguments.json:
        raise UserError("a suite prints tables only", value=name, remedy="leave out --json")


def suite(name: str) -> None:
    """A benchmark of benchmarks/, in a process of its own; its output is the product."""
    with subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}"]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # A terminal interrupts both. subprocess.run kills after 0.25 s: its folder would stay.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            raise
    if code:
        raise EnvError("benchmark failed", value=name, remedy="the lines above tell why")


# ---------------------------------------------------------------- steps


def steps(settings: Settings, names: Sequence[str], as_json: bool) -> None:
    """Forward, backward and step of each; of two, at several lengths and equal tokens."""
    import torch

    from lib.cli.measure import rates

    torch.set_num_threads(settings.runtime.threads)
    rows: list[dict[str, Any]] = []
    for name in names:
        first = trial_of(settings, name)
        tokens = first.rows * first.context
        for trial in [first] if len(names) == 1 else _lengths(first, tokens):
            note(f"{name}: {trial.rows} rows of {trial.context}")
            rows.append({"run": name, "context": trial.context, **rates(trial)})
    path = write_csv("_vs_".join(names), rows)
    if as_json:
        tables.put_json({"machine": machine(), "rows": rows, "csv": str(path)})
        return
    cells = [
        (r["run"], r["context"], f"{r['parameters']:,}", f"{r['forward_s']:.4f} s",
         f"{r['backward_s']:.4f} s", f"{r['step_s']:.4f} s",
         f"{r['step_p20_s']:.4f} to {r['step_p80_s']:.4f}", f"{r['tokens_per_s']:,.0f}",
         amounts.size(r["peak_bytes"]), r["device"].upper())
        for r in rows
    ]  # fmt: skip
    header = ("run", "context", "parameters", "forward", "forward + backward", "step",
              "step p20 to p80", "tokens/s", "peak", "on")  # fmt: skip
    tables.put([*tables.lines(cells, header), "", machine(), f"csv: {path}"])
    if len(names) == 2:
        tables.put(["", *crossover(rows, *names), *quality(names)])


def _lengths(trial: Any, tokens: int) -> Iterator[Any]:
    """The same family at every length that its Config takes."""
    for length in LENGTHS:
        config = trial.config
        if hasattr(config, "context"):
            config = replace(config, context=length)
        yield replace(trial, config=config, context=length, rows=max(1, tokens // length))


def crossover(rows: Sequence[dict[str, Any]], first: str, second: str) -> list[str]:
    """The length from which the second family's step is the faster one."""
    times = {(r["run"], r["context"]): r["step_s"] / r["tokens"] for r in rows}
    faster = [n for n in LENGTHS if times[second, n] < times[first, n]]
    where = f"from a context of {faster[0]:,}" if faster else "at no length in range"
    return [f"{second} is faster than {first} {where}"]


def quality(names: Sequence[str]) -> list[str]:
    """The two models' own numbers, where both were trained on equally many tokens."""
    found = {}
    for name in names:
        path = Path("metrics") / name / "eval.json"
        found[name] = files.read_json(path) if path.is_file() else {}
    tokens = {m.get("train_tokens") for m in found.values()}
    if len(tokens) != 1 or tokens == {None}:
        return ["not comparable: trained on different numbers of tokens, or not measured"]
    return [f"{name}: bpb {amounts.number(m.get('bpb'))}, cloze {amounts.number(m.get('cloze'), 3)}"
            for name, m in found.items()]  # fmt: skip


# ---------------------------------------------------------------- what stands beside every number


def machine() -> str:
    """Machine, versions, commit, in one line."""
    import torch

    from lib.cli.commands.push import git_commit

    commit = (git_commit(Path()) or "none")[:10]
    threads = torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {threads} threads, {versions}, commit {commit}"
