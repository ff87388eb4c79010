"""transformers' nanochat class for a GPT of variant base: its config and names (gpt.md 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from lib.core.errors import UserError
from lib.models.base import Native
from lib.nn.norm import EPS

if TYPE_CHECKING:
    from lib.models.gpt import Config, Switches

FREE = {"init", "optim", "vocab_pad"}  # no part of the forward


def native(config: Config, base: Switches, vocab_size: int, tensors: Sequence[str]) -> Native:
    """base: what the class has. UserError names the first switch that it has not."""
    for name in (f.name for f in fields(base) if f.name not in FREE):
        if (value := getattr(config.switches, name)) != getattr(base, name):
            raise UserError(f"transformers' nanochat class has no {name}", value=value)
    d, H, K = config.shape
    described = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "hidden_size": d,
        "num_hidden_layers": config.depth,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "intermediate_size": config.mlp_ratio * d,
        "hidden_act": "relu2",
        "max_position_embeddings": config.context,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": base.rope_theta},
        "final_logit_softcapping": base.softcap,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    theirs = {"wte.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    for i in range(config.depth):
        ours, layer = f"blocks.{i}", f"model.layers.{i}"
        for part in "qkvo":
            theirs[f"{ours}.attn.{part}.weight"] = f"{layer}.self_attn.{part}_proj.weight"
        theirs[f"{ours}.up.weight"] = f"{layer}.mlp.fc1.weight"
        theirs[f"{ours}.down.weight"] = f"{layer}.mlp.fc2.weight"
    rows: dict[str, int] = dict.fromkeys(("wte.weight", "head.weight"), vocab_size)
    return Native(config=described, names={theirs[name]: name for name in tensors}, rows=rows)
