"""`kumiki chat`: turns with a trained model; its state carries over from turn to turn.

Law:   a reply equals what the full forward pass over the whole conversation would give.
Rule:  a model without a chat template continues text, and one line says so. When the context is
       full, the oldest turns go, said once (cli.md 3.6).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.cli.commands.generate import open_named
from lib.cli.console import note, write
from lib.cli.conversation import Conversation
from lib.core import files
from lib.core.errors import KumikiError, UserError, relative
from lib.data.vocab.chat import IDS
from lib.export import saved
from lib.export.generate import Sampling
from lib.export.saved import Opened

HELP = "/reset, /seed N, /temp X, /save FILE, /quit"


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Open the model, then one message, JSON lines, or a conversation."""
    opened, device = open_named(arguments, root)
    note(saved.describe(opened))
    talk = Conversation(
        opened, sampling_of(arguments), arguments.max_new_tokens, arguments.stop,
        has_template(opened, arguments.template), device=device,
    )  # fmt: skip
    note(f"seed {talk.sampling.seed}, temperature {talk.sampling.temperature}")
    if not talk.chat:
        note("note: base model, it continues text")
    if arguments.system:
        talk.add("system", os.fsencode(arguments.system))  # the very bytes of the command line
    if arguments.once is not None:
        talk.add("user", os.fsencode(arguments.once))
        answer(talk, arguments.json)
        if sys.stdout.isatty():
            write("\n")
    elif arguments.json:
        for line in sys.stdin.buffer:
            talk.add("user", message_of(line))
            answer(talk, True)
    else:
        converse(talk)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling options of the command line."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(arguments, name) for name in names})


def has_template(opened: Opened, wanted: str) -> bool:
    """Whether turns are framed: the tokenizer has the ids, and the model was trained with them."""
    specials = opened.tokenizer.specials
    able = all(name in specials for name in IDS)
    if wanted == "chat" and not able:
        raise UserError(
            "tokenizer has no chat ids", file=opened.folder, remedy="use --template plain"
        )
    return wanted == "chat" or (wanted == "auto" and able and opened.framed)


def message_of(line: bytes) -> bytes:
    """The content of one JSON line `{"role": "user", "content": TEXT}`."""
    try:
        value = json.loads(line)
        if value["role"] == "user":
            return value["content"].encode()
    except (ValueError, KeyError, TypeError, AttributeError):  # half a surrogate pair, too
        pass
    remedy = 'write {"role": "user", "content": "..."}'
    raise UserError("not a message", value=line.decode(errors="replace").strip(), remedy=remedy)


def answer(talk: Conversation, as_json: bool = False) -> None:
    """One reply on stdout."""
    for text in talk.reply():
        if not as_json:
            write(text)
    if as_json:
        said = {"role": "assistant", "content": talk.turns[-1].content}
        sys.stdout.write(json.dumps(said, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def converse(talk: Conversation) -> None:
    """Until the end of input, /quit or Ctrl-C at the prompt."""
    if sys.stdin.isatty():
        note(HELP)
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            note("")
            return
        if not line or line.strip() == b"/quit":
            return
        if line.startswith(b"/"):
            order(talk, os.fsdecode(line).split())
            continue
        try:
            talk.add("user", line.rstrip(b"\r\n"))
        except UserError as error:  # bytes that are no text: the next line may be
            note(f"error: {error}")
            continue
        answer(talk)
        write("\n")


def order(talk: Conversation, words: list[str]) -> None:
    """One of the slash commands; a wrong one is told, not fatal."""
    name, value = words[0], words[1] if len(words) > 1 else ""
    try:
        if name == "/reset":
            talk.turns, talk.told = [], set()
        elif name == "/seed":
            talk.sampling = replace(talk.sampling, seed=number(name, value, int))
        elif name == "/temp":
            talk.sampling = replace(talk.sampling, temperature=number(name, value, float))
        elif name == "/save" and value:
            save(talk, value)
        else:
            note(HELP)
    except KumikiError as error:
        note(f"error: {error}; {HELP}")


def save(talk: Conversation, name: str) -> None:
    """The turns so far as JSON."""
    said = [{"role": t.role, "content": t.content} for t in talk.turns]
    try:
        files.write_json(Path(name), said)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = getattr(error, "strerror", None) or "not a file name"
        raise UserError("cannot write", file=name, value=why) from None
    note(f"saved {len(said)} turns in {relative(name)}")


def number(name: str, text: str, kind: type) -> Any:
    """What stands behind an order."""
    try:
        return kind(text)
    except ValueError:
        wanted = "whole number" if kind is int else "number"
        raise UserError(f"{name} takes a {wanted}", value=text or "nothing") from None
