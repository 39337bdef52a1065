"""Bidirectional models block by block: logits of every family, attention that is looked at, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from language_models import VOCABULARY, build, prompts
from masked_models import CAUSAL, ENCODERS, MASK, looking_both_ways
from offramp.backbones.masked_lm import Call, Look, MaskedLM, bidirectional, masked_lm
from offramp.backbones.state_cache import StateCache
from offramp.core.errors import InvalidInput, UnsupportedModel
from offramp.core.flops import counter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def through(lm: MaskedLM, tokens: torch.Tensor, call: Call) -> torch.Tensor:
    hidden = lm.embed(tokens, call)
    for k in range(len(lm)):
        hidden = lm.run(hidden, k, call)
    return lm.logits(hidden)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
class TestFamilies:
    def test_rows_of_unlike_length_and_some_positions_alone(self, family: str) -> None:
        """All positions of padded rows, then a few of them over the cache: the logits of each text by itself, whatever is padded with."""
        model = looking_both_ways(family)
        lm = masked_lm(model, MASK)
        texts = torch.tensor([prompts((12,))[0], prompts((30, 12))[1]])
        totals = torch.tensor([12, 9])
        cache, rows = StateCache(len(lm), 2, 12), torch.arange(2)
        mask = (torch.arange(12) < totals[:, None])[:, None, None]
        picked = torch.tensor([[1, 5, 11, 0], [8, 2, 3, 0]])
        slots = torch.tensor([[1, 5, 11, cache.nowhere], [8, 2, cache.nowhere, cache.nowhere]])
        with torch.no_grad():
            alone = [bidirectional(model, text[None, :total])[0] for text, total in zip(texts, totals.tolist(), strict=True)]
            whole = through(lm, texts, Call(cache, rows, torch.arange(12).expand(2, -1), None, mask))
            again = through(lm, texts.gather(1, picked), Call(cache, rows, picked, slots, mask))
            once_more = through(lm, texts.gather(1, picked)[1:], Call(cache, rows[1:], picked[1:], slots[1:], mask[1:]))
        for row, total in enumerate(totals.tolist()):
            torch.testing.assert_close(whole[row, :total], alone[row], rtol=1e-6, atol=1e-8)
            for place in range(3 if row == 0 else 2):
                torch.testing.assert_close(again[row, place], alone[row][picked[row, place]], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(once_more[0, :2], again[1, :2], rtol=1e-6, atol=1e-8)

    def test_every_position_sees_every_other(self, family: str) -> None:
        model = looking_both_ways(family)
        text = torch.tensor(prompts((8,)))
        other = text.clone()
        other[0, -1] = text[0, -1] % 90 + 3
        with torch.no_grad():
            assert not torch.allclose(bidirectional(model, text)[:, 0], bidirectional(model, other)[:, 0])

    def test_the_users_model_stays_what_it_was(self, family: str) -> None:
        model = looking_both_ways(family)
        text = torch.tensor(prompts((8,)))
        with torch.no_grad():
            before = model(text).logits
            lm = masked_lm(model.train(), MASK)
            assert model.training
            model.eval()
            through(lm, text, Call(StateCache(len(lm), 1, 8), torch.arange(1), torch.arange(8)[None]))
            assert torch.equal(model(text).logits, before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "Bert"])
def test_flops_are_those_that_are_counted(family: str) -> None:
    lm = masked_lm(looking_both_ways(family), MASK)
    cache, rows, everywhere = StateCache(len(lm), 1, 10), torch.arange(1), torch.arange(10)[None]
    picked = torch.tensor([[2, 3, 7]])
    with torch.no_grad():
        whole = Call(cache, rows, everywhere)
        hidden = lm.embed(torch.tensor(prompts((10,))), whole)
        with counter() as counted:
            lm.run(hidden, 0, whole)
        assert counted.get_total_flops() == 10 * lm.block_flops(10)
        with counter() as counted:
            lm.run(hidden[:, [2, 3, 7]], 0, Call(cache, rows, picked, picked))
        assert counted.get_total_flops() == 3 * lm.block_flops(10)
        with counter() as counted:
            lm.logits(hidden)
        assert counted.get_total_flops() == 10 * lm.head_flops()
        with counter() as counted:
            lm.run(hidden, 0, Call(cache, rows, everywhere, watch=lambda look: look.rows(look.queries(picked))))
        assert counted.get_total_flops() == 10 * lm.block_flops(10) + 3 * lm.look_flops(10)


class TestAttention:
    def test_rows_are_those_of_the_models_own_map(self) -> None:
        model = looking_both_ways("llama", attn_implementation="eager")
        lm = masked_lm(model, MASK)
        text = torch.tensor(prompts((9, 9)))
        zeros = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
        places = torch.tensor([[4, 0], [8, 3]])
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            maps = model(text, attention_mask=zeros, output_attentions=True).attentions
            call = Call(
                StateCache(4, 2, 9),
                torch.arange(2),
                torch.arange(9).expand(2, -1),
                watch=lambda look: seen.append(look.rows(look.queries(places))),
            )
            through(lm, text, call)
        for found, full in zip(seen, maps, strict=True):
            expected = full.mean(1).gather(1, places[..., None].expand(-1, -1, 9))
            torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)

    def test_groups_softcap_scale_and_mask(self) -> None:
        query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8)
        mask = (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, None]
        scores = 3.0 * torch.tanh(query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.7 / 3.0)
        expected = scores.masked_fill(~mask, float("-inf")).softmax(-1).mean(1)
        places = torch.tensor([[0, 4, 4], [2, 1, 3]])
        look = Look(query, key, mask, 0.7, 3.0)
        found = look.rows(look.queries(places))
        torch.testing.assert_close(found, expected.gather(1, places[..., None].expand(-1, -1, 7)))
        assert found[1, :, 4:].eq(0).all()


class TestCache:
    def test_rows_that_leave_take_what_is_known_of_them(self) -> None:
        cache = StateCache(2, 3, 4, states=True)
        key = torch.arange(3 * 4, dtype=torch.float32).view(3, 1, 4, 1)
        cache.exchange(0, torch.arange(3), None, key, -key)
        cache.keep(0, torch.arange(3), None, key[:, 0])
        other = cache.take(torch.tensor([2, 0]))
        slots = torch.tensor([[1], [other.nowhere]])
        keys, values = other.exchange(0, torch.arange(2), slots, torch.full((2, 1, 1, 1), 9.0), torch.zeros(2, 1, 1, 1))
        assert keys.flatten(1).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
        assert values.flatten(1).tolist() == [[-8, 0, -10, -11], [0, -1, -2, -3]]
        assert other.kept(0, torch.tensor([1])).flatten().tolist() == [0, 1, 2, 3]
        assert cache.bytes == 4 * (3 * 5) * 3 and other.bytes == 4 * (2 * 5) * 3

    def test_states_that_nobody_kept(self) -> None:
        with pytest.raises(InvalidInput, match="states=True"):
            StateCache(2, 1, 4).kept(0, torch.arange(1))
        with pytest.raises(InvalidInput, match="0"):
            StateCache(2, 0, 4)


class TestRefused:
    def test_sliding_windows(self) -> None:
        with pytest.raises(UnsupportedModel, match="sliding window"):
            masked_lm(build("mistral"), MASK)

    def test_no_mask_token(self) -> None:
        with pytest.raises(InvalidInput, match="mask_token_id"):
            masked_lm(build("llama"))
        with pytest.raises(InvalidInput, match=f"0 to {VOCABULARY - 1}"):
            masked_lm(build("llama"), VOCABULARY)

    def test_a_mask_token_of_the_configuration_is_found(self) -> None:
        assert masked_lm(looking_both_ways("Bert")).mask_token_id == MASK

    def test_other_architectures(self) -> None:
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        albert = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes, intermediate_size=64, pad_token_id=0)).eval()
        with pytest.raises(UnsupportedModel, match="AlbertForMaskedLM"):
            masked_lm(albert, MASK)
        with pytest.raises(UnsupportedModel, match="Linear is not a language model"):
            masked_lm(nn.Linear(2, 2), MASK)

    def test_a_model_that_does_more(self) -> None:
        class More(transformers.LlamaForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                found = super().forward(*args, **kwargs)
                found.logits = found.logits + found.logits.roll(1, dims=1)
                return found

        with pytest.raises(UnsupportedModel, match="differ by"):
            masked_lm(More(build("llama").config).eval(), MASK)

    def test_a_model_that_stays_causal(self) -> None:
        class Deaf(transformers.LlamaForCausalLM):
            def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
                return super().forward(input_ids, **kwargs)

        model = Deaf(build("llama").config)
        model.load_state_dict(build("llama").state_dict())
        with pytest.raises(UnsupportedModel, match="4-D attention mask"):
            masked_lm(model.eval(), MASK)
