"""CORE fast against CORE one prompt at a time: the same model, rows and decisions, in one run.

`python -m benchmarks.core --bundle FOLDER [--examples N] [--gpt2 FOLDER] [--max-context N]`
Examples are drawn evenly from each whole task; the last lines weigh tasks alike, and by their rows,
which is what a whole bundle takes. Bound: the ratio of products that both must compute.
Without --gpt2: the trained small GPT with its own tokenizer. With it: a GPT of the same shape with
weights at random and GPT-2's vocabulary of 50,257, whose files lie in FOLDER.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.eval import reference
from lib.eval.batched import Answerer
from lib.eval.bundle import Task, read_bundle, read_rows
from lib.eval.prompts import Example, make_examples


@dataclass(kw_only=True)
class Line:
    """Of one task; seconds and FLOPs of one example: one at a time, fast."""

    label: str
    rows: int
    seconds: np.ndarray
    flops: np.ndarray
    padding: float  # share of the ids that the fast path gives to the model
    rescored: int
    different: int

    def __str__(self) -> str:
        slow, fast = 1e3 * self.seconds
        return (
            f"{self.label:32} {self.rows:6} rows, one at a time {slow:8.1f}, fast {fast:7.1f} ms, "
            f"ratio {slow / fast:5.2f}, bound {self.flops[0] / self.flops[1]:5.2f}, "
            f"padding {self.padding:.3f}, rescored {self.rescored}, "
            f"different {self.different}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--examples", type=int, default=12, help="of each task")
    parser.add_argument("--tasks", default="", help="labels with commas; all without")
    parser.add_argument("--gpt2", help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds: for a busy machine")
    parser.add_argument("--budget", type=int, help="runtime.eval_tokens")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = random_gpt2(Path(given.gpt2)) if given.gpt2 else trained()
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    lines = []
    for task in read_bundle(Path(given.bundle)).tasks:
        if given.tasks and task.label not in given.tasks.split(","):
            continue
        rows = read_rows(task, 0)
        wanted = np.unique(np.linspace(0, len(rows) - 1, given.examples).astype(int)).tolist()
        examples = list(
            make_examples(
                task, rows, tokenizer.encode_batch,
                start_id=start, max_context=given.max_context, wanted=wanted,
            )
        )  # fmt: skip
        now = time.process_time if given.cpu else time.perf_counter
        lines.append(measure(model, tokenizer.vocab_size, task, examples, given.budget, now))
        lines[-1].rows = len(rows)
        print(lines[-1], flush=True)
    for name, weights in (("tasks weigh alike", None), ("a whole bundle", "rows")):
        weight = np.array([line.rows if weights else 1 for line in lines], float)
        total = lambda each, w=weight: sum(n * x for n, x in zip(w, each, strict=True)) / sum(w)  # noqa: E731
        slow, fast = total([line.seconds for line in lines])
        bound = total([line.flops for line in lines])
        print(
            f"{name}: {1 / fast:.2f} examples a second fast, {1 / slow:.2f} one at a time, "
            f"ratio {slow / fast:.2f}, bound {bound[0] / bound[1]:.2f}"
        )
    print(f"{sum(line.different for line in lines)} decisions differ")


class Counted:
    """A model that counts the ids it is given by the fast path."""

    def __init__(self, model: Any) -> None:
        self.inner, self.ids = model, 0
        self.train, self.repeat_state = model.train, model.repeat_state

    training = False

    def __call__(self, tokens: torch.Tensor, state: Any = None) -> Any:
        return self.inner(tokens, state)  # of examples that are asked again: no part of the count

    def logits_at(self, tokens: torch.Tensor, *more: Any, **named: Any) -> Any:
        self.ids += tokens.numel()
        return self.inner.logits_at(tokens, *more, **named)


def measure(
    model: Any, vocab_size: int, task: Task, examples: Sequence[Example], budget: Any, now: Any
) -> Line:
    """Both ways over `examples`; one example first, to warm up."""
    Answerer(model=model, vocab_size=vocab_size)(task, examples[:1])
    counted = Counted(model)
    fast = Answerer(model=counted, vocab_size=vocab_size, budget_tokens=budget)
    clock = [now()]
    ours = fast(task, examples)
    clock.append(now())
    theirs = [reference.answer(model, task.kind, one, vocab_size=vocab_size) for one in examples]
    clock.append(now())
    needed = sum(ids_needed(one, fast.shares(one)) for one in examples)
    flops = [both_flops(model, vocab_size, one, fast.shares(one)) for one in examples]
    return Line(
        label=task.label,
        rows=len(examples),
        seconds=np.array([clock[2] - clock[1], clock[1] - clock[0]]) / len(examples),
        flops=np.mean(flops, axis=0),
        padding=1 - needed / counted.ids,
        rescored=sum(one.rescored for one in ours),
        different=sum(a.answer.pred != b.pred for a, b in zip(ours, theirs, strict=True)),
    )


def ids_needed(example: Example, shared: bool) -> int:
    """Ids of the fast path without padding; the last id of a prompt predicts nothing."""
    lengths = [len(tail) - 1 for tail in example.tails]
    return sum(lengths) + len(example.shared) * (1 if shared else len(lengths))


def both_flops(model: Any, vocab_size: int, example: Example, shared: bool) -> tuple[float, float]:
    """Products of one at a time with all logits, and those that the fast path cannot leave out.

    A block costs 2 a weight and position and 4 d a position and key before it. The last block makes
    keys and values everywhere, the rest of it and the head only where logits are asked for.
    """
    d, L = model.config.shape[0], model.config.depth
    block = 2 * sum(p.numel() for p in model.blocks[0].parameters())
    attn = model.blocks[-1].attn
    last, head = 2 * (attn.k.weight.numel() + attn.v.weight.numel()), 2 * d * vocab_size
    pairs = lambda start, n: n * start + n * (n + 1) / 2  # noqa: E731
    slow = fast = 0.0
    begun = len(example.shared) if shared else 0
    fast += begun * ((L - 1) * block + last) + (L - 1) * 4 * d * pairs(0, begun)
    for j, (start, stop) in enumerate(example.spans):
        n, span = example.length(j), stop - start
        slow += n * (L * block + head) + L * 4 * d * pairs(0, n)
        own = n - 1 - begun
        fast += own * ((L - 1) * block + last) + (L - 1) * 4 * d * pairs(begun, own)
        fast += span * (block - last + head + 4 * d * n)
    return slow, fast


def trained() -> tuple[Any, Any]:
    from lib.data.vocab.tokenizer import load_tokenizer
    from lib.train.final import Final

    folder = Path("checkpoints/gpt/final")
    return Final.open(folder).model(), load_tokenizer(folder)


def random_gpt2(folder: Path) -> tuple[Any, Any]:
    """The small GPT's shape over GPT-2's vocabulary; its zeros are stirred."""
    from lib.data.vocab.tokenizer import Tokenizer, take_gpt2
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
