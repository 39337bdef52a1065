"""A language small enough to be learned in seconds, and a model that speaks it."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.engines.text.generate import generate
from offramp.language import attach_lm
from offramp.policies.decoding import Plain, Verify
from offramp.train import FinalOnly, Joint, fit, packed, text_loader

WORDS = ["the", "cat", "dog", "sees", "bird", "likes", "red", "old", "tree", "house", "and", "sings"]
LETTERS = " abcdefghijklmnopqrstuvwxyz."


def tokenizer(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def texts(count: int, seed: int) -> list[str]:
    """Sentences in which the next word depends on the two before it."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        one, two = draw.randrange(12), draw.randrange(12)
        words = [WORDS[one], WORDS[two]]
        for _ in range(8):
            one, two = two, (3 * one + 5 * two + draw.choice([1, 1, 1, 4])) % 12
            words.append(WORDS[two])
        found.append(" ".join(words) + ".")
    return found


def llama(depth: int = 4) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=48, intermediate_size=96, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@cache
def corpus() -> torch.Tensor:
    """Blocks of 64 letters."""
    return packed(texts(150, 1), tokenizer, 64)


@cache
def _weights() -> dict[str, torch.Tensor]:
    model = llama()
    lm = attach_lm(model, [1])
    loader = text_loader(corpus(), 16)
    result = fit(lm, loader, Joint(FinalOnly()), epochs=8, optimizer=lambda p: torch.optim.AdamW(p, 5e-3), progress=False)
    losses = [r["loss"] for r in result.history if r["event"] == "epoch"]
    assert losses[-1] < 0.6 * losses[0]
    return {k: v.clone() for k, v in model.state_dict().items()}


def speaker() -> Any:
    """A model that was trained on the corpus."""
    made = llama()
    made.load_state_dict(_weights())
    return made.eval()


PROMPTS = [tokenizer(t[:20]) for t in texts(6, 2)]


def acceptance(lm: Any) -> float:
    """Share of drafts that the full model keeps; its text is checked on the way."""
    found = generate(lm, PROMPTS, Verify(draft_length=4), max_new_tokens=40)
    assert found.tokens == generate(lm, PROMPTS, Plain(), max_new_tokens=40).tokens
    return found.acceptance
