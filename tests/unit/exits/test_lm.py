"""Exits that read a state alone: the model's own ending, a norm of their own, or some rows of the output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from language_models import shared
from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import generate
from offramp.exits.lm import OwnNorm, Trimmed, frequent
from offramp.language import attach_lm
from offramp.policies.decoding import Verify


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4.0)
    return made


def test_a_trimmed_exit_drafts_kept_tokens_and_the_text_stays_the_models(model):
    kept = (7, 3, 30, 12)
    lm = attach_lm(model, [2], Trimmed(kept))
    states = torch.randn(2, 3, 16)
    full, logits = attach_lm(model, [2]).draft(states), lm.draft(states)
    assert torch.isneginf(logits).sum() == 2 * 3 * (32 - len(kept))
    torch.testing.assert_close(logits[..., sorted(kept)], full[..., sorted(kept)])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    plain = generate(lm, prompts, max_new_tokens=12)
    verified = generate(lm, prompts, Verify(draft_length=3), max_new_tokens=12)
    assert verified.tokens == plain.tokens and sum(verified.drafted) > 0


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2"])
def test_kept_tokens_are_scaled_and_bounded_as_the_models_are(family):
    made = shared(family)
    states = torch.randn(1, 3, made.config.hidden_size)
    full, logits = (attach_lm(made, [2], head).draft(states) for head in (None, Trimmed((1, 4, 9))))
    torch.testing.assert_close(logits[..., [1, 4, 9]], full[..., [1, 4, 9]])


def test_kept_tokens_must_be_different_ids_of_the_vocabulary(model):
    for wrong in ((), (1, 1), (-1, 2), (32,)):
        with pytest.raises(InvalidInput, match="different token ids from 0 to 31"):
            attach_lm(model, [2], Trimmed(wrong))


def test_an_untrained_norm_is_the_shared_exit(model):
    states = torch.randn(2, 3, 16)
    assert torch.equal(attach_lm(model, [2], OwnNorm()).draft(states), attach_lm(model, [2]).draft(states))


def test_frequent_tokens_come_first_and_ties_by_id():
    assert frequent([[3, 3, 1], [2, 1]], 5, 4) == (1, 3, 2, 0)
