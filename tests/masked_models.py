"""Small random models that look both ways: causal families run without their mask, and those that are made so."""

from __future__ import annotations

from typing import Any

import torch

from language_models import VOCABULARY, build

MASK = VOCABULARY - 1
CAUSAL = ("llama", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "phi3", "olmo2", "phi", "cohere", "granite")
ENCODERS = ("Bert", "Roberta", "EuroBert")
_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": MASK,
}


def looking_both_ways(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A new model in evaluation mode, of a causal family or of an encoder by the beginning of its class's name."""
    import transformers

    if family in CAUSAL:
        return build(family, dtype, **options)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_TINY, **options})
    model = getattr(transformers, f"{family}ForMaskedLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model
