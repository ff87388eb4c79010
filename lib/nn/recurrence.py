"""The recurrence of few channels beside attention, and which of its channels stay (AR-SSM v2).

In: normed rows.   Out: a short convolution plus r gated, decaying sums (phase7.md 3.4, 3.5).
Law: gates of channels are exactly 0 or 1, and depend on scores alone. Letters: B batch, n
positions, d width, r channels, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.kernels.scan import scan
from lib.nn.conv import CausalConv
from lib.nn.linear import Linear

TEMPERATURE = 0.1  # of the gate's slope
LEAST_DECAY = 1e-6  # of -log a: bounds the gradient of sqrt(1 - a^2) by 710
CHANNELS = {  # what has a row or column for each channel: its name, its dimension
    "u.weight": 0, "v.weight": 0, "decay.weight": 0, "gate.weight": 0, "o.weight": 1,
    "decay_bias": 0, "gate_bias": 0, "lam": 0,
}  # fmt: skip


class Recurrence(nn.Module):
    """S: a short convolution plus r gated channels with input-dependent decay (phase7.md 3.4).

    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) w_t u_t (RG-LRU, arXiv 2402.19427 eq. 4): the root keeps the
    variance of h bounded.
    """

    def __init__(self, width: int, rank: int, kernel: int) -> None:
        super().__init__()
        d, r, gate = width, rank, max(1, width // 4)
        self.conv = CausalConv(d, kernel)
        self.u, self.v, self.decay = Linear(d, r), Linear(d, r), Linear(d, r)
        self.decay_bias = nn.Parameter(torch.empty(r))
        self.lam = nn.Parameter(torch.empty(r))  # Lambda
        self.hidden, self.gate = Linear(d, gate), Linear(gate, r)
        self.hidden_bias = nn.Parameter(torch.empty(gate))
        self.gate_bias = nn.Parameter(torch.empty(r))
        self.o = Linear(r, d)

    def forward(
        self, n: Tensor, z: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """normed n (B, n, d), channel gate z (r,), past (inputs, h) -> S(n), and these."""
        local, inputs = self.conv(n, None if past is None else past[0])
        opened = self.gate(F.relu(self.hidden(n) + self.hidden_bias)) + self.gate_bias
        w = torch.sigmoid(opened.to(self.lam.dtype))  # (B, n, r), fp32
        with torch.autocast(n.device.type, enabled=False):
            x = n.to(self.lam.dtype)
            strength = F.softplus(self.lam) * torch.sigmoid(self.decay(x) + self.decay_bias)
            log_a = -(8 * strength).clamp(min=LEAST_DECAY)
            b = torch.sqrt(-torch.expm1(2 * log_a)) * w * self.u(x)
            h0 = b.new_zeros(len(b), b.shape[2]) if past is None else past[1]
            h, last = scan(log_a, b, h0)
        y = w * self.v(n) * h
        return local + self.o(y if z is None else y * z), inputs, last


def channel_gates(alpha: Tensor, least: int) -> Tensor:
    """z (L, r), exactly 0 or 1, of scores alpha: above 0, or among the layer's `least` largest.

    Backward as if z were sigmoid(alpha / 0.1), so that a channel that is off may return.
    """
    largest = alpha.topk(least, dim=-1).indices
    hard = (alpha > 0).to(alpha.dtype).scatter(-1, largest, 1.0)
    soft = torch.sigmoid(alpha / TEMPERATURE)
    return hard + (soft - soft.detach())


def expected_share(alpha: Tensor) -> Tensor:
    """rho: mean of sigmoid(alpha / 0.1) over layers and channels."""
    return torch.sigmoid(alpha / TEMPERATURE).mean()


def staggered(r: int) -> Tensor:
    """First scores (r,): 0.05 to 1, neither equal nor in the channels' order.

    Equal ones would cross 0 together; sorted ones would go by time constant (phase7.md 3.5.3).
    """
    stride = next(s for s in range(7, 7 + r + 1) if math.gcd(s, r) == 1)
    return 0.05 + 0.95 * (torch.arange(r) * stride % r) / max(1, r - 1)
