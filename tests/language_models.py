"""Small random causal language models of every family that is decoded block by block, and what transformers says about them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

VOCABULARY = 97
POSITIONS = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": POSITIONS}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": POSITIONS,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_COMMON, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {**_COMMON, "num_key_value_heads": 2}),
    "qwen2_window": (
        "Qwen2",
        {**_COMMON, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("Mistral", {**_COMMON, "num_key_value_heads": 2, "sliding_window": 5}),
    "gemma": ("Gemma", {**_COMMON, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3", {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "opt": ("OPT", {**_OPT, "word_embed_proj_dim": 32}),
    "opt_350m": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi3": ("Phi3", {**_COMMON, "num_key_value_heads": 2}),
    "olmo2": ("Olmo2", {**_COMMON, "num_key_value_heads": 2}),
    "olmo3": ("Olmo3", {**_COMMON, "num_key_value_heads": 2, "sliding_window": 5}),
    "starcoder2": ("Starcoder2", {**_COMMON, "num_key_value_heads": 2, "sliding_window": 5}),
    "phi": ("Phi", _COMMON),
    "cohere": ("Cohere", {**_COMMON, "num_key_value_heads": 2, "logit_scale": 0.3}),
    "granite": (
        "Granite",
        {**_COMMON, "num_key_value_heads": 2, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
}
FULL_ATTENTION = ("llama", "qwen3", "gemma", "gpt2", "gpt_neox", "opt", "opt_350m", "phi3", "olmo2", "phi", "cohere", "granite")


def build(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A new model of a family in evaluation mode, with texts that do not end."""
    import transformers

    name, config = FAMILIES[family]
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    made = getattr(transformers, kind)(**{**config, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options})
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(made).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def shared(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model that tests only read."""
    return build(family, dtype)


def prompts(lengths: Sequence[int] = (5, 1, 17, 9, 3, 11, 2, 8), vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random prompts without padding tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` as transformers wants them."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(r)) + list(r) for r in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }


def own_greedy(model: Any, rows: Sequence[Sequence[int]], new: int, **options: Any) -> torch.Tensor:
    """What transformers' own ``generate`` writes, prompts included, int64 ``[B, P + N]``."""
    written: torch.Tensor = model.generate(**left_padded(rows), max_new_tokens=new, do_sample=False, **options)
    return written


WORDS = ["[PAD]", "[UNK]", "[END]", "[BEGIN]", *(f"w{i}" for i in range(VOCABULARY - 5)), "abcdef"]


def word_tokenizer(**options: Any) -> Any:
    """A tokenizer of transformers with one token a word: ``w0`` to ``w91``, and one that transformers needs for stop strings."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[END]", "bos_token": "[BEGIN]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**special, "padding_side": "left", **options})


def byte_tokenizer() -> Any:
    """A tokenizer of transformers with one token a byte, the vocabulary's first 97 that are printable, so that characters may be split."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(ByteLevel.alphabet())[: VOCABULARY - 6]
    vocabulary = {c: i for i, c in enumerate(["[PAD]", *alphabet, "Ã", "ab", "Ġa", "the", "©"])}
    inner = Tokenizer(BPE(vocabulary, merges=[("a", "b"), ("Ġ", "a")] if "Ġ" in vocabulary else [("a", "b")]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
