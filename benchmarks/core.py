"""CORE fast against CORE one prompt at a time: the same model, rows and decisions, in one run.

`python -m benchmarks.core --bundle FOLDER [--cap N] [--gpt2 FOLDER] [--max-context N]`
Without --gpt2: the trained small GPT with its own tokenizer. With it: a GPT of the same shape with
weights at random and GPT-2's vocabulary of 50,257, whose files lie in FOLDER.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from lib.eval import reference
from lib.eval.batched import Answerer
from lib.eval.bundle import read_bundle, read_rows
from lib.eval.prompts import make_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--cap", type=int, default=12, help="rows of a task, 0 = all")
    parser.add_argument("--examples", type=int, default=10**9, help="of them that are scored")
    parser.add_argument("--gpt2", help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds: for a busy machine")
    parser.add_argument("--budget", type=int, help="runtime.eval_tokens")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    now = time.process_time if given.cpu else time.perf_counter
    model, tokenizer = random_gpt2(Path(given.gpt2)) if given.gpt2 else trained()
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    fast = Answerer(model=model, vocab_size=tokenizer.vocab_size, budget_tokens=given.budget)
    seconds, examples_seen, differ = [0.0, 0.0], 0, 0
    for task in read_bundle(Path(given.bundle)).tasks:
        rows = read_rows(task, given.cap)
        examples = list(
            make_examples(
                task,
                rows,
                tokenizer.encode_batch,
                start_id=start,
                max_context=given.max_context,
                wanted=range(min(len(rows), given.examples)),
            )
        )
        clock = [now()]
        ours = fast(task, examples)
        clock.append(now())
        theirs = [
            reference.answer(model, task.kind, one, vocab_size=tokenizer.vocab_size)
            for one in examples
        ]
        clock.append(now())
        spent = clock[1] - clock[0], clock[2] - clock[1]
        seconds = [a + b for a, b in zip(seconds, spent, strict=True)]
        examples_seen += len(examples)
        other = sum(a.answer.pred != b.pred for a, b in zip(ours, theirs, strict=True))
        differ += other
        ids = sum(one.longest for one in examples) / len(examples)
        print(
            f"{task.label:32} {ids:6.0f} ids, fast {1e3 * spent[0] / len(examples):7.1f} ms, "
            f"one at a time {1e3 * spent[1] / len(examples):8.1f} ms an example, "
            f"ratio {spent[1] / spent[0]:5.2f}, rescored {sum(one.rescored for one in ours)}, "
            f"different {other}",
            flush=True,
        )
    print(
        f"{examples_seen} examples: {examples_seen / seconds[0]:.2f} a second fast, "
        f"{examples_seen / seconds[1]:.2f} one at a time, ratio {seconds[1] / seconds[0]:.2f}, "
        f"{differ} decisions differ"
    )


def trained() -> tuple[Any, Any]:
    from lib.data.tokenizer import load_tokenizer
    from lib.train.final import Final

    folder = Path("checkpoints/gpt/final")
    return Final.open(folder).model(), load_tokenizer(folder)


def random_gpt2(folder: Path) -> tuple[Any, Any]:
    """The small GPT's shape over GPT-2's vocabulary; its zeros are stirred."""
    from lib.data.tokenizer import Tokenizer, take_gpt2
    from lib.models import gpt
    from lib.models.base import build

    tokenizer = Tokenizer(take_gpt2(folder, None))
    config = gpt.Config(depth=4, width=256, heads=4, context=8192)
    model = build(gpt, config, tokenizer.vocab_size, seed=1).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model, tokenizer


if __name__ == "__main__":
    main()
