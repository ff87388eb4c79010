"""A family under transformers' interface: what `AutoModelForCausalLM` opens in an export.

The exporter copies this file and the family's own files into the folder and makes their imports
relative, so the folder needs torch and transformers and nothing of this project.
Note: no cache is handed to `generate`, which therefore runs whole rows; `kumiki generate` carries
the family's state. Rows are padded on the right only: causal models never see what comes later.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lib.models.base import load_family


class KumikiConfig(PretrainedConfig):
    """`family` names the architecture, `family_config` holds the fields of its `Config`."""

    model_type = "kumiki"

    def __init__(
        self,
        family: str = "",
        family_config: dict[str, Any] | None = None,
        vocab_size: int = 0,
        **others: Any,
    ) -> None:
        self.family, self.family_config = family, family_config or {}
        self.vocab_size = vocab_size
        super().__init__(**{"tie_word_embeddings": False, **others})


class KumikiForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits and loss of one family's `Model`, which keeps its own parameter names."""

    config_class = KumikiConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: KumikiConfig) -> None:
        super().__init__(config)
        family = load_family(config.family)
        self.model = family.Model(family.Config(**config.family_config), config.vocab_size)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        if module is self.model:  # buffers are no part of the weights file
            module.init_buffers()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """input_ids (B, T) -> logits (B, T, V); labels (B, T), -100 ignored, give the mean loss."""
        if attention_mask is not None and bool((attention_mask.diff(dim=1) > 0).any()):
            raise ValueError("pad on the right: this model has no mask for padding on the left")
        logits, _ = self.model.forward(input_ids)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]  # plain tensors

    def prepare_inputs_for_generation(self, input_ids: Tensor, **others: Any) -> dict[str, Any]:
        """The whole row at every step."""
        return {"input_ids": input_ids, "attention_mask": others.get("attention_mask")}
