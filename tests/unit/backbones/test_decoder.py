"""Models block by block: logits of every family, and what is refused and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from language_models import FAMILIES, VOCABULARY, build, prompts, shared
from offramp.backbones.decoder import Decoder, decoder
from offramp.core.errors import UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_pieces_of_any_size_give_the_models_logits(self, family: str) -> None:
        model = shared(family, torch.float64)
        made = decoder(model)
        texts = torch.tensor([prompts((19,))[0], prompts((30, 19))[1]])
        with torch.no_grad():
            expected = model(texts).logits
            cache = made.cache(2, 19)
            found, first = [], 0
            for width in (1, 6, 2, 9, 1):
                step = made.step(cache, torch.arange(first, first + width).expand(2, -1), length=first + width)
                half = made.run(made.embed(texts[:, first : first + width], step), 0, 2, step)
                found.append(made.logits(made.run(half, 2, 4, step)))
                first += width
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-6)

    def test_rows_stand_where_they_stand(self, family: str) -> None:
        """Two rows of unlike lengths in one call; tokens that do not count leave no trace."""
        model = shared(family, torch.float64)
        made = decoder(model)
        texts = torch.tensor([prompts((12,))[0], prompts((30, 12))[1]])
        with torch.no_grad():
            expected = model(texts).logits
            cache = made.cache(2, 12)
            for first, width, counts in (([0, 0], 7, [7, 3]), ([7, 3], 5, [2, 5]), ([9, 8], 3, [3, 1])):
                positions = torch.tensor(first)[:, None] + torch.arange(width)
                counted = torch.arange(width) < torch.tensor(counts)[:, None]
                step = made.step(cache, positions, counted)
                tokens = texts.gather(1, step.positions)
                logits = made.logits(made.run(made.embed(tokens, step), 0, 4, step))
                for row in range(2):
                    begun, count = first[row], counts[row]
                    torch.testing.assert_close(logits[row, :count], expected[row, begun : begun + count], rtol=1e-5, atol=1e-6)

    def test_what_it_says_of_itself(self, family: str) -> None:
        model = shared(family)
        made = decoder(model)
        assert len(made) == 4 and made.vocabulary == VOCABULARY and made.width == 32
        half = [5, None, 5, None]
        windows = {"qwen2_window": [None, None, 5, 5], "mistral": [5] * 4, "gemma2": half, "gemma3": half}
        windows |= {"olmo3": [5, 5, 5, None], "starcoder2": [5] * 4}
        assert made.windows == windows.get(family, [None] * 4)
        assert made.max_positions == (128 if family in ("gpt2", "opt", "opt_350m") else None)


class TestTrainingMode:
    @pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
    def test_dropout_of_a_model_in_training_is_off(self, family: str) -> None:
        model = build(family).train()
        made = decoder(model)
        assert model.training and not any(block.training for block in made.blocks)
        assert all(child.training for child in model.modules())


class TestLowPrecision:
    def test_bfloat16_passes_the_check(self) -> None:
        assert len(decoder(build("llama", torch.bfloat16))) == 4


def _bigcode() -> Any:
    """Its attention wants a mask of another shape."""
    return transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def _bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


def _mamba() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))


def _gptj() -> Any:
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    )


def _bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


def _dynamic() -> Any:
    return build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def _chunked() -> Any:
    model = build("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"] * 2
    return model


def _changed() -> Any:
    """A model whose forward does something besides."""

    class Louder(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 1.5
            return found

    return Louder(transformers.LlamaConfig(**_TINY))


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (_bigcode, "The blocks of GPTBigCodeForCausalLM do not run one by one over a cache.*RuntimeError"),
            (_changed, "Louder does more than its blocks, norm and output layer.*differ by"),
            (_bloom, "BloomForCausalLM has neither rotary positions.*nor a table of positions"),
            (_gptj, "GPTJForCausalLM has neither rotary positions.*nor a table of positions"),
            (_mamba, "MambaForCausalLM cannot be decoded block by block: it lacks a trunk"),
            (_bert, "BertForSequenceClassification .*"),
            (_t5, "T5ForConditionalGeneration .*lacks"),
            (_dynamic, "LlamaForCausalLM rotates by frequencies that change.*'dynamic'"),
            (_chunked, "blocks of the kinds chunked_attention"),
            (lambda: nn.Linear(2, 2), "Linear is not a causal language model of transformers"),
        ],
    )
    def test_says_what_is_missing(self, make: Any, message: str) -> None:
        model = make()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UnsupportedModel, match=message):
            decoder(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        if hasattr(model, "config") and hasattr(model.config, "_attn_implementation"):
            assert model.config._attn_implementation != "offramp_cached"

    def test_attention_without_its_index(self) -> None:
        model = build("llama")
        model.model.layers[1].self_attn.layer_idx = None
        with pytest.raises(UnsupportedModel, match="Block 1 of LlamaForCausalLM has no attention"):
            decoder(model)


class TestLongRotations:
    def test_are_bounded_by_the_length_beyond_which_they_change(self) -> None:
        width = 4
        model = build(
            "phi3",
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * width,
                "long_factor": [4.0] * width,
                "original_max_position_embeddings": 32,
            },
        )
        assert Decoder(model).max_positions == 32
