"""A stage's declaration, and its command line: options with the paths of dvc.yaml (cli.md 2.1).

In:    a `Stage`, the words.   Out: their values; UserError with the remedy where they do not parse.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from lib.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage script declares. `{name}` stands for the item that `--name` or `--run` gives."""

    name: str
    about: str  # one sentence, shown by --help
    sections: tuple[str, ...]  # parameters it may read, as dvc.yaml tracks them
    inputs: dict[str, str] = field(default_factory=dict)  # option -> default path
    extras: tuple[str, ...] = ()  # options of inputs that only some runs have
    wishes: dict[str, str] = field(default_factory=dict)  # option -> help; changes no result
    out: str  # default path of the output
    beside: dict[str, str] = field(default_factory=dict)  # option -> folder that gets single files
    item: str | None = None  # "name" or "run": the option that picks the foreach item
    work: str = "data/work"  # where working state lies
    tasks: bool = False  # whether its units can be shared out to a job array (--task, --of)
    defer_stop: bool = False  # True: commit at the next step instead of dropping the unit in hand


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # leaves by raising
        raise UserError(message, remedy=f"see python -m {self.prog} --help")


def parse(stage: Stage, argv: Sequence[str] | None) -> argparse.Namespace:
    """The values of `argv`, of the process itself where it is None."""
    parser = _Parser(prog=f"stages.{stage.name}", description=stage.about)
    if stage.item:
        parser.add_argument(f"--{stage.item}", required=True, help="which item of the section")
    name = None
    if stage.item:
        known, _ = parser.parse_known_args(argv) if "--help" not in _words(argv) else (None, None)
        name = getattr(known, stage.item) if known else "{name}"
    for option, default in stage.inputs.items():
        parser.add_argument(f"--{option}", default=default.replace("{name}", name or ""))
    for option in stage.extras:
        parser.add_argument(f"--{option}", help="an input that some runs have")
    parser.add_argument("--out", default=stage.out.replace("{name}", name or ""))
    for option, default in stage.beside.items():
        parser.add_argument(f"--{option}", default=default.replace("{name}", name or ""))
    for option, meaning in stage.wishes.items():
        parser.add_argument(f"--{option}", help=meaning)
    if stage.tasks:
        parser.add_argument("--task", type=int, help="do the units of this task only, from 0")
        parser.add_argument("--of", type=int, help="how many tasks there are: n_tasks")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one parameter of params.yaml for this run",
    )
    arguments = parser.parse_args(argv)
    if arguments.set and os.environ.get("DVC_STAGE"):
        raise UserError("--set under dvc", value=arguments.set, remedy="edit params.yaml")
    return arguments


def _words(argv: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if argv is None else argv
