"""Layer 4: every family trained for 32 steps with kernels on and off, on a GPU.

Also as production runs them: under autocast, with activation checkpointing, and with the kill
switch, which must give the reference's bits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib import kernels
from lib.train.job import Batch
from lib.train.precision import autocast
from tests.test_family_contract import T, V, every_family, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="training with kernels needs a GPU"),
]
DEVICE = torch.device("cuda")
# Losses, parameters: relative RMS that a summation order may cost in 32 steps (kernels.md 7.5).
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2)}


def trained(
    name: str, i: int, dtype: torch.dtype, *, checkpointed: bool = False, steps: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the steps and the parameters behind them."""
    model = make(name, i).to(DEVICE)
    model.activation_checkpointing = checkpointed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw, found = torch.Generator().manual_seed(4), []
    for step in range(steps):
        ids = torch.randint(V, (4, T + 1), generator=draw).to(DEVICE)
        batch = Batch(tokens=ids[:, :-1], targets=ids[:, 1:], step=step)
        total, losses = torch.zeros((), device=DEVICE), iter(model.losses(batch))
        while True:
            with autocast(DEVICE, dtype):
                loss = next(losses, None)
            if loss is None:
                break
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return torch.stack(found), {n: p.detach() for n, p in model.named_parameters()}


@every_family
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_twins_with_and_without_kernels_stay_together(name, i, dtype, checkpointed):
    runs = {}
    for choice in ("reference", "auto"):
        kernels.configure(choice, "a test", DEVICE)
        runs[choice] = trained(name, i, dtype, checkpointed=checkpointed)
    assert "=triton" in kernels.summary()
    (want, weights), (losses, ours) = runs["reference"], runs["auto"]
    of_losses, of_weights = BOUNDS[dtype]
    assert ((losses - want).abs() / want.abs()).max() < of_losses
    for key, value in weights.items():
        error = (ours[key] - value).norm() / value.norm().clamp(min=1e-3)
        assert error < of_weights, f"{key}: {error:.1e}"


@every_family
def test_the_kill_switch_gives_the_references_bits(name, i, monkeypatch):
    with kernels.forced("reference"):
        want, _ = trained(name, i, torch.float32, steps=4)
    monkeypatch.setenv("KUMIKI_KERNELS", "reference")
    kernels.configure("auto", "a test", DEVICE)
    losses, _ = trained(name, i, torch.float32, steps=4)
    assert torch.equal(losses, want)
