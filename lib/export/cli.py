"""The `kumiki` command: parser and dispatch, nothing else (cli.md 1).

Rule:  stdout carries the product, stderr everything else; a closed pipe ends quietly with 0.
       A command's module is imported when it is called, so help and errors need no torch.
Codes: see `lib.core.errors`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.core.errors import Interrupted, KumikiError, UserError, report_lines

COMMANDS = {
    "generate": "lib.export.generate_command",
    "harness": "lib.eval.harness_command",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # leaves by raising
        raise UserError(message, remedy=f"see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(prog="kumiki", description="Train, judge and use small language models.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands)
    _add_harness(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    about = "Continue a text with a trained model."
    command = commands.add_parser("generate", help=about, description=about)
    add = command.add_argument
    add("model", nargs="?", metavar="MODEL", help="run or folder; default: the newest model")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="the text to continue; default: stdin")
    text.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    text.add_argument("--score", metavar="FILE", help="bits per byte of a text, no generation")
    add("--checkpoint", metavar="PATH", help="the same as MODEL")
    add("--max-new-tokens", type=int, default=200, metavar="N")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: the most probable token")
    add("--top-k", type=int, default=40, metavar="N", help="tokens that stay, 0: all")
    add("--top-p", type=float, default=1.0, metavar="X", help="smallest set with this probability")
    add("--min-p", type=float, default=0.0, metavar="X", help="least share of the largest one")
    add("--repetition-penalty", type=float, default=1.0, metavar="X")
    add("--seed", type=int, default=0, metavar="N")
    add("--n", type=int, default=1, metavar="N", help="texts from the same prompt")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--ema", dest="weights", action="store_const", const="ema", default="ema")
    weights.add_argument("--raw", dest="weights", action="store_const", const="raw")
    add("--depth", type=int, metavar="N", help="depth of thought, where a family has one")
    add("--tokenizer", metavar="PATH", help="must be the one the model was trained with")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--echo", action="store_true", help="print the prompt in front of the text")
    add("--no-stream", dest="stream", action="store_false", help="print the text when it is whole")
    add("--logprobs", action="store_true", help="log-probability of each token, in nats")
    add("--json", action="store_true", help="one JSON document on stdout")


def _add_harness(commands: argparse._SubParsersAction) -> None:
    about = "Judge a model by lm-evaluation-harness, beside our own figures."
    command = commands.add_parser("harness", help=about, description=about)
    add = command.add_argument
    add("model", nargs="?", metavar="MODEL", help="run or folder; default: the newest model")
    add("--tasks", required=True, metavar="A,B", help="cloze, labels of --bundle, or its own tasks")
    add("--bundle", metavar="FOLDER", help="a folder with core.yaml")
    add("--documents", metavar="FOLDER", help="documents that cloze is made from")
    add("--limit", type=int, metavar="N", help="rows of a task")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--json", action="store_true", help="one JSON document on stdout")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        return _dispatch(argv)
    except KumikiError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted; run the same command to begin again"))
    except BrokenPipeError:
        # The reader has gone (`| head`). The interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RuntimeError, MemoryError, OSError) as error:
        from lib.core.stage import by_cause

        mapped = by_cause(error)
        if mapped is None:
            raise
        return _fail(mapped)


def _dispatch(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        sys.stdout.write(f"kumiki {version()}\n")
    elif arguments.command is None:
        parser.error("no command")
    else:
        module = importlib.import_module(COMMANDS[arguments.command])
        module.run(arguments, find_checkout(Path.cwd()))
    sys.stdout.flush()
    return 0


def _fail(error: KumikiError) -> int:
    sys.stderr.write("\n".join(report_lines(error)) + "\n")
    return error.code


def find_checkout(folder: Path) -> Path | None:
    """The project's folder, from `folder` upwards; None outside of one."""
    for place in (folder, *folder.parents):
        if (place / "dvc.yaml").is_file() and (place / "params.yaml").is_file():
            return place
    return None


def version() -> str:
    """Of the installed distribution, else of the tree that this file lies in."""
    from importlib import metadata

    try:
        return metadata.version("kumiki")
    except metadata.PackageNotFoundError:
        import tomllib

        text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
        return tomllib.loads(text)["project"]["version"]


if __name__ == "__main__":
    raise SystemExit(main())
