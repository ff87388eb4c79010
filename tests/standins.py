"""Small models and tokenizers with closed forms, for tests of what runs over any family."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lib.models.base import Family


class ByteTokenizer:
    """Bytes are ids 0..255; 256 is bos, 257 eos. Lossless."""

    kind, vocab_size, lossless = "bytes", 258, True
    bos_id, eos_id, pad_id, unk_id = 256, 257, None, None
    specials: ClassVar = {"<|bos|>": 256, "<|eos|>": 257}
    fingerprint = "b" * 64
    token_bytes = np.array([1] * 256 + [0, 0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode_bytes(self, ids) -> bytes:
        return bytes(i for i in ids if i < 256)


class PairTokenizer(ByteTokenizer):
    """As above with an id for every pair of equal bytes: another division of the same text."""

    kind, vocab_size = "pairs", 514
    bos_id, eos_id = 512, 513
    token_bytes = np.array([1] * 256 + [2] * 256 + [0, 0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            twin = at + 1 < len(data) and data[at] == data[at + 1]
            ids.append(data[at] + 256 * twin)
            at += 1 + twin
        return np.array(ids, np.int32)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(bytes([i % 256]) * (1 + i // 256) for i in ids if i < 512)


class Causal(Family):
    """Logits from the whole row so far, in fp64: c_t = sum_(s <= t) (x_s + 1)(s + 7) mod 1009.

    z[t, v] = 3 sin(0.37 c_t + 0.11 v + 0.7 (v mod 5)). State: (sum, position), one per row.
    """

    max_context = 16

    def __init__(self, vocab_size: int, extra: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.vocab_size, self.extra, self.dtype = vocab_size, extra, dtype
        self.largest_batch = 0  # padded tokens seen at once

    def forward(self, tokens: Tensor, state=None):
        self.largest_batch = max(self.largest_batch, tokens.numel())
        total, start = state if state is not None else (torch.zeros(len(tokens)).long(), 0)
        n = tokens.shape[1]
        steps = torch.arange(start, start + n) + 7
        c = (total[:, None] + ((tokens + 1) * steps).cumsum(1)) % 1009
        v = torch.arange(self.vocab_size, dtype=torch.float64)
        z = 3 * torch.sin(0.37 * c[..., None].double() + 0.11 * v + 0.7 * (v % 5))
        if self.extra:  # padded columns that would take nearly all the probability
            z = torch.cat((z, z.new_full((*z.shape[:2], self.extra), 9.0)), dim=-1)
        return z.to(self.dtype), (c[:, -1], start + n)

    def repeat_state(self, state, n: int):
        return state[0][:1].expand(n).contiguous(), state[1]


class Fixed(Family):
    """One distribution for every position: log-probabilities (V,)."""

    max_context = 16

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, tokens: Tensor, state=None):
        return self.log_probs.expand(*tokens.shape, -1), None


def uniform(vocab_size: int) -> Fixed:
    return Fixed(torch.full((vocab_size,), -math.log(vocab_size), dtype=torch.float64))
