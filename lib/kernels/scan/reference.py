"""Linear recurrence h_t = exp(log_a_t) h_{t-1} + b_t: the specification (kernels.md 5.5).

`loop` is the definition; `forward` doubles the reach of each element log2(T) times with the
associative combine (a1, b1) o (a2, b2) = (a1 a2, a2 b1 + b2), the form for CPUs and for checks.
All fp32, or fp64. Letters: B batch, T length, r channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The map of two steps, (log a, b) each; associative: a scan may be cut anywhere."""
    (log_a1, b1), (log_a2, b2) = first, then
    return log_a1 + log_a2, torch.exp(log_a2) * b1 + b2


def loop(log_a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The definition by ordinary autograd: (B, T, r), (B, T, r), (B, r) -> h (B, T, r)."""
    h, states = h0, []
    for t in range(b.shape[1]):
        h = torch.exp(log_a[:, t]) * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def forward(log_a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h (B, T, r) of all steps, in log2(T) sweeps over whole tensors."""
    log_a, h = log_a.clone(), b.clone()
    h[:, 0] += torch.exp(log_a[:, 0]) * h0
    reach = 1
    while reach < h.shape[1]:
        head = log_a[:, :-reach], h[:, :-reach]
        log_a[:, reach:], h[:, reach:] = combine(head, (log_a[:, reach:], h[:, reach:]))
        reach *= 2
    return h


def backward(log_a: Tensor, h: Tensor, h0: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_a, b, h0: delta_t = dh_t + a_{t+1} delta_{t+1}, the same scan backwards."""
    later = torch.cat((log_a[:, 1:], torch.zeros_like(log_a[:, :1])), dim=1)  # a_{t+1}
    delta = forward(later.flip(1), dh.flip(1), torch.zeros_like(h0)).flip(1)
    before = torch.cat((h0[:, None], h[:, :-1]), dim=1)  # h_{t-1}
    pulled = torch.exp(log_a) * delta
    return pulled * before, delta, pulled[:, 0]
