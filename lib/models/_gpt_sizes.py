"""What a GPT counts: scaling parameters, FLOPs, bytes of state; pure, from its config alone.

Letters as in gpt.py; Vp padded vocabulary. Source: gpt.md 3, 7 and 8.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.models.gpt import Config

GATE_INPUTS = 12  # channels of the normed input that a value gate reads
SMEAR_INPUTS = 24  # channels of the embedding that the smear gate reads


def scaling_params(config: Config, vocab_size: int) -> int:
    """P of tokens per parameter: all of base; block matrices, gates and head of modern."""
    (d, H, K), s = config.shape, config.switches
    rows, tables = config.padded(vocab_size), len(config.value_layers())
    matrices = _block_matrices(config) + _gates(config) + rows * d
    if s.optim == "modern":
        return matrices
    scalars = 2 * config.depth * s.resid_mix + s.smear * (min(SMEAR_INPUTS, d) + 1) + s.backout
    return matrices + (rows + s.bigram) * d + tables * rows * K * d // H + scalars


def reference_params(config: Config, vocab_size: int) -> int:
    """`scaling_params` of depth 12 with the same switches and vocabulary."""
    start = {f.name: f.default for f in fields(config) if f.name in ("aspect_ratio", "head_dim")}
    d12 = replace(config, depth=12, width=None, heads=None, kv_heads=None, **start)
    return scaling_params(d12, vocab_size)


def training_flops(config: Config, vocab_size: int, T: int) -> int:
    """Of one token: 6 a weight, 12 a visible key channel; causality is not halved (2204.02311)."""
    return 6 * _matmul_weights(config, vocab_size) + 12 * _visible(config, T)


def decode_flops(config: Config, vocab_size: int, n: int) -> int:
    """Of one new token after n others."""
    return 2 * _matmul_weights(config, vocab_size) + 4 * _visible(config, n)


def kv_bytes_per_token(config: Config, element_bytes: int) -> int:
    """Bytes that one position adds to the state of a row (windowed layers stop growing)."""
    d, H, K = config.shape
    return 2 * config.depth * K * d // H * element_bytes


def _block_matrices(config: Config) -> int:
    d, H, K = config.shape
    return config.depth * (2 * d * d + 2 * d * K * d // H + 2 * config.mlp_ratio * d * d)


def _gates(config: Config) -> int:
    d, _, K = config.shape
    return len(config.value_layers()) * min(GATE_INPUTS, d) * K


def _matmul_weights(config: Config, vocab_size: int) -> int:
    """Of all linear layers: blocks, gates, head, smear's gate."""
    d = config.shape[0]
    smear = min(SMEAR_INPUTS, d) * config.switches.smear
    return _block_matrices(config) + _gates(config) + config.padded(vocab_size) * d + smear


def _visible(config: Config, T: int) -> int:
    """Sum over layers of H D min(w, T)."""
    return sum(config.shape[0] * min(w or T, T) for w in config.layer_windows())
