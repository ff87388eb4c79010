"""The `kumiki` command: parser and dispatch, nothing else (cli.md 1).

Rule:  stdout carries the product, stderr everything else; a closed pipe ends quietly with 0.
       A command's module is imported when it is called, so help and errors need no torch.
Codes: see `lib.core.errors`.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lib.core.errors import Interrupted, KumikiError, UserError, report_lines

ANYWHERE = (
    "generate",
    "chat",
    "push",
    "harness",
    "completion",
)  # the others need the project's folder
DEVICES = ("auto", "cpu", "cuda", "mps")
SHELLS = ("bash", "zsh", "tcsh")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # leaves by raising
        raise UserError(message, remedy=f"see {self.prog} --help")


Add = Callable[..., argparse.Action]


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(prog="kumiki", description="Train, judge and use small language models.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (about, options) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        options(command)
        if name not in ("completion", "chat"):
            command.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


# ---------------------------------------------------------------- options of each command


def _doctor(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", metavar="P", help="what this profile needs; default: the active one")
    add("--family", metavar="F", help="what this family needs")
    add("--kernels", action="store_true", help="the kernels only, one row each")
    add("--full", action="store_true", help="also rates of disk, memory and matmul, kept for later")
    add("--online", action="store_true", help="also whether the hub answers")


def _estimate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", metavar="P", help="default: the active one")
    add("--run", metavar="R", help="one run only")
    add("--device", metavar="NAME", help="a named machine instead of this one, such as h200, cpu2")
    add("--fit", metavar="TIME", help="what fits in this time: 30m, 12h, 7d")


def _config(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", metavar="X", help="default: the active one")
    add("--changed", action="store_true", help="only what differs from the defaults")


def _recipe(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", nargs="?", metavar="NAME", help="a recipe of params.yaml; default: all")
    add("--profile", metavar="P", help="default: the active one")
    add("--init", choices=("balanced", "japanese", "code"), help="a new mixture by groups")
    add("--ask", action="store_true", help="ask for sources and weights, on a terminal")
    add("--set", action="append", default=[], metavar="SOURCE=WEIGHT", help="repeatable")
    add("--from", dest="source", type=_absolute, metavar="FILE", help="answers, one a line")
    add("--write", action="store_true", help="into params.yaml, instead of stdout")


def _generate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(add)
    text = command.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="the text to continue; default: stdin")
    text.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    text.add_argument("--score", metavar="FILE", help="bits per byte of a text, no generation")
    add("--n", type=int, default=1, metavar="N", help="texts from the same prompt")
    add("--echo", action="store_true", help="print the prompt in front of the text")
    add("--no-stream", dest="stream", action="store_false", help="print the text when it is whole")
    add("--logprobs", action="store_true", help="log-probability of each token, in nats")
    _add_sampling(command)


def _chat(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(add)
    add("--once", metavar="TEXT", help="one message, one reply, and leave")
    add("--system", metavar="TEXT", help="what stands before the first message")
    add("--template", choices=("auto", "chat", "plain"), default="auto")
    add("--json", action="store_true", help="JSON lines: messages in, replies out")
    _add_sampling(command)


def _add_model(add: Add) -> None:
    add("model", nargs="?", metavar="MODEL", help="run or folder; default: the newest model")
    add("--checkpoint", metavar="PATH", help="the same as MODEL, or a checkpoint of its run")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--max-new-tokens", type=int, default=200, metavar="N")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: the most probable token")
    add("--top-k", type=int, default=40, metavar="N", help="tokens that stay, 0: all")
    add("--top-p", type=float, default=1.0, metavar="X", help="smallest set with this probability")
    add("--min-p", type=float, default=0.0, metavar="X", help="least share of the largest one")
    add("--repetition-penalty", type=float, default=1.0, metavar="X")
    add("--seed", type=int, default=0, metavar="N")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--ema", dest="weights", action="store_const", const="ema", default="ema")
    weights.add_argument("--raw", dest="weights", action="store_const", const="raw")
    add("--depth", type=int, metavar="N", help="depth of thought, where a family has one")
    add("--tokenizer", metavar="PATH", help="must be the one the model was trained with")
    add("--device", default="auto", choices=DEVICES)
    add("--offload", default="auto", choices=("auto", "on", "off"),
        help="weights wait in RAM; auto: where the device is too small")  # fmt: skip


def _bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    what = "families, or one benchmark: stream, kernels, data, generate, train, ..."
    add("what", nargs="+", metavar="WHAT", help=what)
    add("--profile", metavar="P", help="sizes of this profile; default: the active one")
    add("--largest", action="store_true", help="largest model whose whole step fits")
    add("--budget", type=float, metavar="GB", help="memory that --largest may use")
    add("--plan", action="store_true", help="parameters and memory, nothing runs")
    add("--dry-run", type=int, metavar="STEPS", help="full sizes on random tokens, writes nothing")


def _status(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--watch", type=float, metavar="S", help="again every S seconds, until Ctrl-C")
    add("--verify", action="store_true", help="hash what lies in scratch")


def _report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", type=_absolute, metavar="FILE", help="default: report.html in the project")


def _parallel(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("stages", nargs="+", metavar="STAGE", help="such as train_gpt train_trm evaluate@gpt")
    add("--jobs", type=int, default=2, metavar="N", help="stages at the same time")
    add("--gpus", metavar="0,1", help="one for each stage at the same time")


def _push(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="RUN", help="run, or the folder of an export")
    add("--repo", metavar="USER/NAME", help="default: runtime.hub.repo")
    add("--revision", metavar="R", help="branch; default: main")
    add("--public", action="store_true", help="visible to all; default: private")
    add("--dry-run", action="store_true", help="show what would be sent")
    add("--yes", action="store_true", help="do not ask")


def _scratch(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("action", choices=("list", "verify", "gc", "push", "pull"))
    add(
        "place",
        nargs="?",
        metavar="STORE",
        help="of push and pull: a folder, or a URL such as s3://bucket/scratch",
    )
    add("--key", action="append", default=[], metavar="KEY", help="these only; repeatable")
    add("--yes", action="store_true", help="gc: remove, do not ask")


def _harness(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", nargs="?", metavar="MODEL", help="run or folder; default: the newest model")
    add("--tasks", required=True, metavar="A,B", help="cloze, labels of --bundle, or its own tasks")
    add("--bundle", metavar="FOLDER", help="a folder with core.yaml")
    add("--documents", metavar="FOLDER", help="documents that cloze is made from")
    add("--limit", type=int, metavar="N", help="rows of a task")
    add("--device", default="auto", choices=DEVICES)


def _completion(command: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=SHELLS)


def _absolute(text: str) -> Path:
    return Path(text).absolute()  # commands run in the project's folder, the user may not


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "doctor": ("Check machine, packages, kernels and disk against what is needed.", _doctor),
    "estimate": ("What a profile costs before anything runs.", _estimate),
    "config": ("Resolved parameters with the origin of each value.", _config),
    "recipe": ("Show or make a mixture of data sources.", _recipe),
    "generate": ("Continue a text with a trained model.", _generate),
    "chat": ("Talk with a trained model.", _chat),
    "bench": ("Measure against a baseline on this machine.", _bench),
    "status": ("What is done, stale, running or interrupted.", _status),
    "report": ("The leaderboard as text, and the report page.", _report),
    "parallel": ("Run stages side by side in git worktrees.", _parallel),
    "push": ("Upload an exported model to the hub.", _push),
    "scratch": ("List, verify, clean or copy what lies in scratch.", _scratch),
    "harness": ("Judge a model by lm-evaluation-harness, beside our own figures.", _harness),
    "completion": ("Print the completion script of a shell.", _completion),
}


# ---------------------------------------------------------------- dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    atexit.register(gc.freeze)  # nothing is collected at the end, which took half a second
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
        root = find_checkout(Path.cwd())
        if arguments.command not in ANYWHERE:
            if root is None:
                raise UserError("no project here", value=Path.cwd(), remedy="cd to its folder")
            os.chdir(root)
        module = importlib.import_module(f"lib.cli.commands.{arguments.command}")
        module.run(arguments, root)
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
