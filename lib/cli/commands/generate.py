"""`kumiki generate`: text on stdout, everything else on stderr (cli.md 3.5)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from lib.cli.console import Clock, Texts, note
from lib.core import files
from lib.core.errors import Interrupted, UserError, relative
from lib.export import saved
from lib.export.generate import Generation, Sampling, TextStream, encode_prompt
from lib.export.saved import Opened


def run(arguments: argparse.Namespace, root: Path | None) -> None:
    """Choose the model, read the prompt, write the text."""
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    if arguments.n < 1 or arguments.max_new_tokens < 1:
        raise UserError(
            "nothing to generate",
            value=f"--n {arguments.n} --max-new-tokens {arguments.max_new_tokens}",
            remedy="ask for 1 or more",
        )
    opened, device = open_named(arguments, root)
    note(saved.describe(opened))
    if arguments.score:
        _score(arguments, opened, device)
        return
    _generate(arguments, opened, sampling, device)


def open_named(arguments: argparse.Namespace, root: Path | None) -> tuple[Opened, Any]:
    """The model that the command line names, and its device."""
    named = named_by(arguments.model, arguments.checkpoint, root)
    from lib.nn.stream import for_reading
    from lib.train.precision import pick_device

    device = pick_device(arguments.device)
    opened = saved.open_model(
        named,
        root,
        device=device,
        weights=arguments.weights,
        streamer=for_reading(arguments.offload, getattr(arguments, "n", 1)),
        warn=lambda text: note(f"warning: {text}"),
    )
    if arguments.tokenizer:
        from lib.data.vocab.tokenizer import load_tokenizer

        given = load_tokenizer(Path(arguments.tokenizer)).fingerprint
        saved.require_tokenizer(given, opened.tokenizer.fingerprint, opened.folder)
    if arguments.depth is not None:
        set_depth = getattr(opened.model, "set_depth", None)
        if set_depth is None:
            raise UserError(
                "this family has no depth of thought", value=opened.family, remedy="drop --depth"
            )
        set_depth(arguments.depth)
    for line in opened.model.engine_notes():
        note(line)
    return opened, device


def named_by(model: str | None, checkpoint: str | None, root: Path | None) -> str | None:
    """What to open: the one of both that is given, or a checkpoint of the run `model`.

    The latter by its path, or by the name that it has there: final, best, step_400.
    """
    if not model or not checkpoint:
        return model or checkpoint
    below = root / saved.RUNS / model if root is not None else Path(model)
    run = below if below.is_dir() else Path(model)
    alike = [m.parent for m in run.rglob(files.MANIFEST) if m.parent.name == checkpoint]
    if alike:  # the run's own before one in its work; of several there, the newest
        return str(max(alike, key=lambda p: (-len(p.parts), *saved.age(p))))
    path = Path(checkpoint)
    if path.is_dir() and run.resolve() in path.resolve().parents:
        return checkpoint
    raise UserError("two models named", value=f"{model} and {checkpoint}",
                    remedy="name one, or a checkpoint of the run")  # fmt: skip


def _generate(
    arguments: argparse.Namespace, opened: Opened, sampling: Sampling, device: Any
) -> None:
    from lib.export.hf import stop_ids

    prompt = _read_prompt(arguments)
    ids, pending = encode_prompt(opened.tokenizer, prompt)
    ids = opened.start_ids + ids
    context = opened.model.max_context
    room = arguments.max_new_tokens if context is None else context - len(ids)
    if room < 1:
        raise UserError(
            "prompt fills the context",
            value=f"{len(ids)} tokens, {context} fit",
            remedy="shorten the prompt",
        )
    generation = Generation(
        opened.model,
        ids,
        sampling,
        max_new_tokens=min(room, arguments.max_new_tokens),
        rows=arguments.n,
        stop_ids=stop_ids(opened.tokenizer),
        device=device,
    )
    texts = Texts(
        streams=[
            TextStream(opened.tokenizer.decode_bytes, arguments.stop, pending)
            for _ in range(arguments.n)
        ],
        prompt=prompt.decode(errors="ignore") if arguments.echo else "",
        stream=arguments.stream,
        as_json=arguments.json,
        logprobs=arguments.logprobs,
    )
    clock = Clock()
    try:
        for made in generation:
            clock.tick()
            texts.take(made, generation.rows)
    except KeyboardInterrupt:
        for row in generation.rows:
            row.stop = row.stop or "interrupted"
    for row in generation.rows:
        if row.stop == "length" and room < arguments.max_new_tokens:
            row.stop = "context"
    texts.finish(generation.rows, _facts(opened, generation, clock))
    if any(row.stop == "interrupted" for row in generation.rows):
        raise Interrupted("interrupted; the same command gives the same text")


def _read_prompt(arguments: argparse.Namespace) -> bytes:
    if arguments.prompt is not None:
        return os.fsencode(arguments.prompt)  # the very bytes of the command line
    if arguments.file is None:
        return sys.stdin.buffer.read()
    return _read(arguments.file)


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(
            "cannot read", file=name, value=error.strerror, remedy="name a file"
        ) from None


def _facts(opened: Opened, generation: Generation, clock: Clock) -> dict[str, Any]:
    """The footer: what was asked, what came, how fast."""
    import resource

    ids = [i for row in generation.rows for i in row.ids]
    text = opened.tokenizer.decode_bytes(ids).decode(errors="replace")
    return {
        "model": relative(opened.folder),
        "prompt_tokens": len(generation.prompt),
        "new_tokens": len(ids),
        "stop": "/".join(row.stop or "" for row in generation.rows),
        "first_token_s": clock.first_s,
        "tokens_per_s": len(ids) / clock.seconds,
        "characters_per_s": len(text) / clock.seconds,
        **opened.model.log_scalars(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **vars(generation.sampling),
    }


def _score(arguments: argparse.Namespace, opened: Opened, device: Any) -> None:
    """Bits per byte of one text under the evaluation's own protocol."""
    from lib.eval.bpb import validate
    from lib.eval.scorer import Rules

    try:
        text = _read(arguments.score).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            "not UTF-8",
            file=arguments.score,
            value=f"byte {error.start}",
            remedy="save it as UTF-8",
        ) from None
    tokenizer, model = opened.tokenizer, opened.model
    boundary = opened.boundary or ("none" if tokenizer.bos_id is None else "bos")
    rules = Rules.of(tokenizer, boundary, model.max_context or 1024)
    found = validate(model, [(arguments.score, text)], tokenizer, rules, device=device)
    if not found.total_bytes:
        raise UserError("empty text", file=arguments.score, remedy="give some text")
    facts = {
        "bpb": found.bpb,
        "loss": found.loss,
        "bytes": found.total_bytes,
        "tokens": int(found.tokens.sum()),
        "stride": rules.stride,
        "context": rules.context,
    }
    if arguments.json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    number = "null (this tokenizer does not give every text back)"
    number = number if found.bpb is None else f"{found.bpb:.6f}"
    sys.stdout.write(f"bpb {number}, {facts['bytes']} bytes, {facts['tokens']} tokens\n")
