"""`kumiki completion SHELL`: the script that completes commands, options, runs, stages, profiles.

Out:  the script on stdout; `eval "$(kumiki completion bash)"` in the shell's start file.
Note: runs and profiles are read from the project's files when Tab is pressed, without Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lib.core.errors import UserError

# A project's files as words: folders below checkpoints, keys two spaces deep in the YAML files.
_KEYS = "sed -n '/^{section}:/,/^[a-z]/s/^  \\([A-Za-z0-9_]*\\):.*/\\1/p' {file} 2>/dev/null"
_RUNS = "ls -1 checkpoints 2>/dev/null | grep -v html"
_PROFILES = _KEYS.format(section="profiles", file="params.yaml")
_STAGES = _KEYS.format(section="stages", file="dvc.yaml")
_PREAMBLE = {
    "bash": "\n".join(
        f'_kumiki_{name}() {{ compgen -W "$({words})" -- "$1"; }}'
        for name, words in (("runs", _RUNS), ("profiles", _PROFILES), ("stages", _STAGES))
    ),
    "zsh": "\n".join(
        f"_kumiki_{name}() {{ compadd -- $({words}); }}"
        for name, words in (("runs", _RUNS), ("profiles", _PROFILES), ("stages", _STAGES))
    ),
    "tcsh": "",
}
_KINDS = {"model": "runs", "run": "runs", "profile": "profiles", "stages": "stages"}


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Print the script."""
    from lib.cli.main import build_parser

    try:
        import shtab  # comes with dvc
    except ImportError:
        raise UserError(
            "completion is not available", value="shtab", remedy="pip install shtab"
        ) from None
    parser = build_parser()
    for command in _commands(parser):
        for action in command._actions:
            kind = _KINDS.get(action.dest)
            if kind and arguments.shell != "tcsh":
                name = f"_kumiki_{kind}"
                action.complete = {arguments.shell: name}  # type: ignore[attr-defined]  # shtab's
    script = shtab.complete(parser, shell=arguments.shell, preamble=_PREAMBLE)  # type: ignore[arg-type]  # by shell
    sys.stdout.write(script.rstrip("\n") + "\n")


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [command for action in found for command in action.choices.values()]
