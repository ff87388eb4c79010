"""Whether a model of any family keeps its promises at its own sizes: what `doctor --full` asks.

In:    a family, its Config, a vocabulary.   Out: check -> True, or what was wrong.
Note:  first weights are disturbed, so that a zero head or gate hides no dependency. Costs a few
       forward passes and one backward; nothing is written.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lib.cli.measure import reached_by_gradient
from lib.core.rng import torch_generator
from lib.models.base import Family, build, load_family
from lib.train.job import Batch

TOKENS = 64  # of the rows that are looked at, where the context is not shorter


def verify(
    family: str, config: Any, vocab_size: int, device: torch.device | str = "cpu"
) -> dict[str, bool | str]:
    """Gradients, causality, decoding, export of `family` under `config`; each True or a reason."""
    module = load_family(family)
    model = build(module, config, vocab_size, seed=1, device=device)
    n = min(TOKENS, model.max_context or TOKENS)
    draw = torch_generator(1, "self-check", vocab_size)
    ids = torch.randint(vocab_size, (2, n + 1), generator=draw).to(device)
    batch = Batch(tokens=ids[:, :-1], targets=ids[:, 1:], step=0)
    checks = {"first loss": _first_loss(model, batch, vocab_size)}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw).to(p) * 0.02)
    checks["gradients"] = _gradients(model, batch)
    with torch.no_grad():
        model.eval()
        tokens = ids[:, :n]
        whole, _ = model(tokens)
        checks["causality"] = _causality(model, tokens, whole, vocab_size)
        checks["decoding"] = _decoding(model, tokens, whole)
        _, exported = model.exported(config)
        # An export is small enough for the host, wherever the model is.
        error = _relative(exported.to(device)(tokens)[0], whole)
        checks["export"] = error < 1e-5 or f"logits of the export differ by {error:.1e}"
    return checks


def _first_loss(model: Family, batch: Batch, vocab_size: int) -> bool | str:
    """Near ln V, as long as nothing has been learned."""
    with torch.no_grad():
        first = float(model.token_losses(batch.tokens, batch.targets).mean())
    expected = math.log(vocab_size)
    return abs(first - expected) < 0.25 or f"{first:.3f}, ln V is {expected:.3f}"


def _gradients(model: Family, batch: Batch) -> bool | str:
    """A gradient, finite and not zero, of every parameter that is trained."""
    for loss in model.losses(batch):
        if isinstance(loss, torch.Tensor):  # a family may ask for updates within a batch
            loss.backward()
    reached = reached_by_gradient(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    silent = [name for name in trained if name not in reached]
    model.zero_grad(set_to_none=True)
    return not silent or f"none, or not finite: {', '.join(silent[:5])}"


def _causality(
    model: Family, tokens: torch.Tensor, whole: torch.Tensor, vocab_size: int
) -> bool | str:
    """Logits before an edited token keep their bits."""
    for t in (0, 1, tokens.shape[1] // 2, tokens.shape[1] - 1):
        edited = tokens.clone()
        edited[:, t] = (edited[:, t] + 1) % vocab_size
        if not torch.equal(model(edited)[0][:, :t], whole[:, :t]):
            return f"editing token {t} changes logits before it"
    return True


def _decoding(model: Family, tokens: torch.Tensor, whole: torch.Tensor) -> bool | str:
    """Chunks with a state give the full forward's logits."""
    for size in (1, 7):
        parts, state = [], None
        for part in tokens.split(size, dim=1):
            logits, state = model(part, state)
            parts.append(logits)
        if (error := _relative(torch.cat(parts, dim=1), whole)) > 1e-4:
            return f"in chunks of {size} logits differ by {error:.1e}"
    return True


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
