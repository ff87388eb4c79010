"""GPT where few logits are asked for: the same numbers, and no product that nobody looks at."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_gpt import V, config_of, every_case, make


@every_case
@torch.no_grad()
def test_marked_positions_are_the_forwards_under_every_switch(case):
    """Rows of their own, and three rows that continue one."""
    model = make(config_of(case)).eval()
    n = model.config.context
    tokens = torch.randint(V, (3, n), generator=torch.Generator().manual_seed(1))
    where = torch.zeros(3, n, dtype=torch.bool)
    where[:, -2:] = where[1, n // 2] = True
    whole, _ = model(tokens)
    found, _ = model.logits_at(tokens, where)
    assert torch.allclose(found, whole[where], atol=1e-5)
    begun = n - 4
    tokens[:, :begun] = tokens[:1, :begun]
    whole, _ = model(tokens)
    nothing = torch.zeros(1, begun, dtype=torch.bool)
    _, state = model.logits_at(tokens[:1, :begun], nothing)
    for since in (0, 2):
        tail = torch.ones(3, 4, dtype=torch.bool)
        tail[:, :since] = False
        found, _ = model.logits_at(tokens[:, begun:], tail, model.repeat_state(state, 3), False)
        assert torch.allclose(found, whole[:, begun + since :].flatten(0, 1), atol=1e-5)


@torch.no_grad()
def test_the_last_block_and_the_head_run_only_where_logits_are_asked_for():
    """2 FLOPs a weight: k and v of the last block everywhere, all else of it at one position."""
    model = make(config_of("base")).eval()
    d, L, n = model.width, model.config.depth, 20
    where = torch.zeros(1, n, dtype=torch.bool)
    where[0, -1] = True
    with FlopCounterMode(display=False) as counter:
        model.logits_at(torch.zeros(1, n, dtype=torch.int64), where)
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "attention" not in str(op))
    assert products == 2 * (n * ((L - 1) * 12 + 2) * d * d + 10 * d * d + d * V)
