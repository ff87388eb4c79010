"""Small models for the streaming tests: GPT-2, and one whose blocks are applied twice."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.core.run_settings import Runtime
from lib.models import gpt, ramgpt
from lib.nn.stream import Engine, Streaming, open_stream
from lib.train.job import Batch

V, T = 61, 12


class Looped(ramgpt.Model):
    """Every block is applied twice, the second time after all others."""

    def stream_units(self):
        return [*self.blocks, *self.blocks]

    def apply_unit(self, application, x, moment):
        with self._draws(moment, application, x.device):
            return self.blocks[application % len(self.blocks)](x)[0]

    def losses(self, batch):
        moment = (batch.step, batch.first_row)
        if self.engine is not None:
            yield self.engine.loss(batch.tokens, batch.targets, moment)
            return
        h = self.embed(batch.tokens, moment)
        for a in range(2 * len(self.blocks)):
            h = self.run_block(self.apply_unit, a, h, moment)
        yield self.head_loss(h, batch.targets)


KINDS: dict[str, Any] = {"gpt2": ramgpt.Model, "looped": Looped, "gpt": gpt.Model}


def make(
    kind: str = "gpt2", *, stream: bool = True, dtype: torch.dtype = torch.float32,
    frozen: str = "", executor: Any = None, rows: int = 2, device: str = "cpu",
    config: dict | None = None, grad_dtype: torch.dtype = torch.float32, **runtime: Any,
) -> Any:  # fmt: skip
    """Three blocks, first weights of seed 3, resident or streamed. frozen: a prefix of names."""
    sizes: dict[str, Any] = {"depth": 3, "width": 32, "heads": 4, "context": T, **(config or {})}
    module = gpt if kind == "gpt" else ramgpt
    with torch.device("meta"):
        model = KINDS[kind](module.Config(**sizes), V)
    model.vocab_size = V
    model.to_empty(device="cpu")
    model.init_weights(3)
    stir(model)
    for name, parameter in model.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)
    asked = Runtime(stream="on", **{"stream_group": 1, "device_batch_size": rows, **runtime})
    request = Streaming(runtime=asked, context=T, grad_dtype=grad_dtype)
    if stream and executor is not None:
        model.engine = Engine(model, torch.device(device), dtype, request, executor)
    else:
        model.streamer = partial(open_stream, request=request) if stream else None
        model.place(device, dtype)
    if model.engine is not None:
        model.engine.rows = rows
    return model.train()


def stir(model: torch.nn.Module) -> None:
    """Zeros and ones of first weights would hide an error in their gradients."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)


def ids(rows: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))


def losses_of(
    model: Any, tokens: Tensor, rows: int, step: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The trainer's loop over one step, `rows` to a call; gradients are added up."""
    found, device = [], next(iter(tokens.split(1))).device.type
    count = len(tokens) // rows
    for n, part in enumerate(tokens.split(rows)):
        half = dtype != torch.float32
        # Without the cache a looped block casts its weights at each use, as a streamed one does.
        cast = torch.autocast(device, dtype, cache_enabled=False) if half else nullcontext()
        with cast:
            batch = Batch(tokens=part[:, :-1], targets=part[:, 1:], step=step, first_row=n * rows)
            loss = next(iter(model.losses(batch)))
        (loss / count).backward()
        found.append(loss.detach())
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative RMS difference of two sets of gradients."""
    assert a.keys() == b.keys()
    return max(float((a[n].cpu() - b[n].cpu()).norm() / b[n].norm().clamp(min=1e-30)) for n in b)
