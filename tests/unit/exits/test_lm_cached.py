"""Exits that attend: whatever they draft the text is the model's own, and their cache is that of one pass over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from offramp.backbones.kv import KVCache
from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import generate
from offramp.exits.cached import Adapter, Block
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Accept, Plain, Verify
from offramp.policies.draft_stop import BelowProbability

PROMPTS = [[5, 9, 2, 7, 1], [3], [8, 8, 4, 1, 6, 2, 9, 30], [11, 12], [1, 2, 3], [40, 41, 42, 43], [7], [6, 5, 4, 3, 2, 1]]
HEADS = [Adapter(), Adapter(heads=2, key_heads=1), Block(), Block(like=1, fresh=True)]
MODELS = ["llama", "gpt2"]


def tiny(name: str) -> Any:
    torch.manual_seed(3)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None)
        )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)  # untrained models otherwise all but repeat one token
    return model.eval()


def randomised(lm: LanguageModel) -> LanguageModel:
    with torch.no_grad():
        for p in lm.heads.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return lm


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_verified_text_is_that_of_plain_decoding(name, head, rows):
    lm = randomised(attach_lm(tiny(name), [2], head))
    plain = generate(lm, PROMPTS[:rows], Plain(), max_new_tokens=20)
    for mode in (Verify(draft_length=1), Verify(draft_length=4), Verify(draft_length=4, stop=BelowProbability(0.4))):
        found = generate(lm, PROMPTS[:rows], mode, max_new_tokens=20)
        assert found.tokens == plain.tokens
        assert sum(found.drafted) > 0
    never = generate(lm, PROMPTS[:rows], Accept(threshold=1.1), max_new_tokens=20)
    assert never.tokens == plain.tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("good", [True, False])
def test_the_cache_of_a_head_is_that_of_one_pass(name, head, good, monkeypatch):
    """Also after rounds in which every draft was kept, where Kangaroo's adapter would lack the last token."""
    model = tiny(name)
    lm = randomised(attach_lm(model, [2], head))
    if good:  # the blocks behind the exit do nothing, and the head agrees with them
        with torch.no_grad():
            for block in lm.decoder.blocks[2:]:
                for part, p in block.named_parameters():
                    if part.startswith(("self_attn.o_proj", "mlp.down_proj", "attn.c_proj", "mlp.c_proj")):
                        p.zero_()
            for part, p in lm.heads[0].named_parameters():
                if "after" in part:
                    p.copy_(dict(lm.decoder.norm_module.named_parameters())[part.removeprefix("after.")])
                elif part.startswith("out.") or "o_proj" in part or "down_proj" in part or "c_proj" in part:
                    p.zero_()
    made: list[KVCache] = []
    original = LanguageModel.own_cache

    def remember(self, *args):
        made.append(original(self, *args))
        return made[-1]

    monkeypatch.setattr(LanguageModel, "own_cache", remember)
    prompts = PROMPTS[:3]
    found = generate(lm, prompts, Verify(draft_length=3), max_new_tokens=15)
    assert (found.acceptance == 1) is good
    assert len(made) == 1
    for row, prompt in enumerate(prompts):
        text = torch.tensor([prompt + found.tokens[row]])
        with torch.no_grad():
            cache = lm.decoder.cache(1, text.shape[1])
            step = lm.decoder.step(cache, torch.arange(text.shape[1])[None])
            states = lm.decoder.run(lm.decoder.embed(text, step), 0, 2, step)
            own = original(lm, 0, 1, text.shape[1])
            step.cache = own
            logits = lm.draft(states, 0, step)
            torch.testing.assert_close(lm.teach(states), logits)
        seen = text.shape[1] - 1  # nobody has seen the newest token
        for kept, expected in zip((made[0].keys[0], made[0].values[0]), (own.keys[0], own.values[0]), strict=True):
            torch.testing.assert_close(kept[row, :seen], expected[0, :seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", HEADS[:3], ids=str)
def test_token_by_token_equals_one_pass(name, head):
    lm = randomised(attach_lm(tiny(name), [2], head))
    states = torch.randn(2, 9, 32)
    cache = lm.own_cache(0, 2, 9)
    whole = lm.teach(states)
    for first, last, draft in ((0, 4, False), (4, 5, True), (5, 8, False), (8, 9, True)):
        step = lm.decoder.step(cache, torch.arange(first, last).expand(2, -1))
        if draft:
            torch.testing.assert_close(lm.draft(states[:, first:last], 0, step), whole[:, first:last], rtol=1e-4, atol=1e-4)
        else:
            lm.observe(states[:, first:last], 0, step)


SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)  # fmt: skip
FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=6)  # windows, soft capping
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),  # parallel blocks
    "opt-350m": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)  # projections, no last norm
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_heads_fit_every_family(family, head):
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    lm = randomised(attach_lm(model, [2], head))
    plain = generate(lm, PROMPTS[:3], Plain(), max_new_tokens=10)
    assert generate(lm, PROMPTS[:3], Verify(), max_new_tokens=10).tokens == plain.tokens
    states = torch.randn(2, 9, 32)
    cache, whole = lm.own_cache(0, 2, 9), lm.teach(states)
    for t in range(9):
        step = lm.decoder.step(cache, torch.full((2, 1), t))
        torch.testing.assert_close(lm.draft(states[:, t : t + 1], 0, step), whole[:, t : t + 1], rtol=1e-3, atol=1e-3)


def test_an_untrained_adapter_is_the_shared_exit():
    model = tiny("llama")
    states = torch.randn(2, 6, 32)
    torch.testing.assert_close(attach_lm(model, [2], Adapter()).teach(states), attach_lm(model, [2]).teach(states))


def test_heads_have_weights_of_their_own():
    for name in MODELS:
        model = tiny(name)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for head in HEADS:
            lm = attach_lm(model, [1, 2], head)
            inside = {p.data_ptr() for p in model.parameters()}
            assert not any(p.data_ptr() in inside for p in lm.heads.parameters())
            randomised(lm)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_does_not_fit_is_refused():
    model = tiny("llama")
    with pytest.raises(InvalidInput, match="key heads must divide"):
        attach_lm(model, [2], Adapter(heads=3))
    with pytest.raises(InvalidInput, match="no block 4"):
        attach_lm(model, [2], Block(like=4))
    lm = attach_lm(model, [2], Adapter())
    with pytest.raises(InvalidInput, match="attends to earlier tokens"):
        lm.draft(torch.randn(1, 1, 32))
