"""Verified drafts: the text is the model's own whatever stops the drafting, word for word when greedy and by its law when sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.core.errors import InvalidInput
from offramp.engines.text.generate import generate
from offramp.language import LanguageModel, attach_lm
from offramp.policies.acceptance import AcceptanceBins
from offramp.policies.decoding import Plain, Verify
from offramp.policies.draft_stop import BelowProbability, BetaThompson, CalibratedThompson, DraftStop, FixedLength, MarginalValue

PROMPTS = [[5, 9, 2, 7, 1], [3], [8, 8, 4, 1, 6, 2, 9, 30], [11, 12], [1, 2, 3], [40, 41, 42, 43], [7], [6, 5, 4, 3, 2, 1]]
RULES: list[DraftStop] = [
    FixedLength(),
    BelowProbability(0.15),
    BetaThompson(),
    CalibratedThompson(AcceptanceBins.trusting(4, 0.5)),
    MarginalValue(1.0, 3.0, bins=AcceptanceBins.trusting(4, 0.5)),
]


def tiny(vocabulary: int, blocks: int = 4, scale: float = 4.0, seed: int = 3) -> LanguageModel:
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)  # untrained models otherwise all but repeat one token
    return attach_lm(model.eval(), [1, 2])


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny(64)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_text_is_that_of_plain_decoding(lm, rule, rows):
    plain = generate(lm, PROMPTS[:rows], Plain(), max_new_tokens=24)
    for length, index in ((1, 0), (5, 1)):
        found = generate(lm, PROMPTS[:rows], Verify(length, rule, exit_index=index), max_new_tokens=24)
        assert found.tokens == plain.tokens
        assert sum(found.drafted) > 0


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_does_not_know_who_is_beside_it(lm, rule, do_sample):
    mode = Verify(4, rule, exit_index=1)
    seeds = list(range(50, 58))
    together = generate(lm, PROMPTS, mode, max_new_tokens=16, seed=seeds, do_sample=do_sample)
    drafted = torch.zeros(4, dtype=torch.int64)
    for row in (0, 3, 7):
        alone = generate(lm, [PROMPTS[row]], mode, max_new_tokens=16, seed=[seeds[row]], do_sample=do_sample)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.depth[0] == together.depth[row]
        drafted += torch.tensor(alone.drafted)
    assert int(drafted[0]) > 0


def test_rules_do_stop(lm):
    """Otherwise the tests here would say nothing of them."""
    full = generate(lm, PROMPTS, Verify(5, FixedLength(), exit_index=1), max_new_tokens=24)
    for rule in RULES[1:]:
        found = generate(lm, PROMPTS, Verify(5, rule, exit_index=1), max_new_tokens=24)
        assert 0 < sum(found.drafted[1:]) < sum(full.drafted[1:])


# ------------------------------------------------------------------------------------------------------------------ the law of samples

VOCABULARY, WRITTEN, ROWS = 3, 5, 12_000


class Leaky(DraftStop):
    """Breaks the contract: remembers how likely the third draft was, although it was thrown away, and drafts on only if it was not."""

    def begin(self, rows, most, device):
        return {"third": torch.zeros(rows, device=device)}

    def go(self, state, made, probability, noise):
        if made == 3:
            return torch.ones_like(probability, dtype=torch.bool), {"next": probability, **state}
        return (state["third"] < 0.4) if made == 1 else torch.ones_like(probability, dtype=torch.bool), state

    def learn(self, state, drafts, kept):
        return {"third": torch.where((drafts == 3) & (kept == 0), state.get("next", state["third"]), torch.zeros_like(state["third"]))}


@pytest.fixture(scope="module")
def small() -> tuple[LanguageModel, Tensor]:
    """A model over three tokens and the exact chances of its continuations, in the order of their digits."""
    lm = tiny(VOCABULARY, blocks=3, scale=6.0, seed=4)
    every = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * WRITTEN)
    with torch.no_grad():
        logits = lm.model(torch.cat([torch.tensor([[1, 0]]).expand(len(every), -1), every], 1)).logits.double()
    chances = logits[:, 1:-1].log_softmax(-1).gather(-1, every[..., None]).squeeze(-1).sum(1).exp()
    assert float(chances.sum()) == pytest.approx(1)
    return lm, chances


def z_of_chi_square(lm: LanguageModel, chances: Tensor, mode: Verify) -> float:
    """How many standard deviations Pearson's statistic lies above its mean, cells with few expected texts put together."""
    found = generate(lm, [[1, 0]] * ROWS, mode, max_new_tokens=WRITTEN, seed=7, do_sample=True)
    assert 0.05 < found.acceptance < 0.95
    digits = VOCABULARY ** torch.arange(WRITTEN - 1, -1, -1)
    counts = torch.bincount((torch.tensor(found.tokens) * digits).sum(1), minlength=len(chances)).double()
    expected = chances * ROWS
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom > 30
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("sample_drafts", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_samples_follow_the_law_of_the_model(small, rule, sample_drafts):
    assert abs(z_of_chi_square(*small, Verify(3, rule, sample_drafts))) < 4


def test_the_law_is_lost_by_a_rule_that_remembers_discarded_drafts(small):
    """The test above can fail, and the contract of `DraftStop.learn` is needed."""
    assert z_of_chi_square(*small, Verify(3, Leaky())) > 6


@pytest.mark.parametrize(
    "make",
    [lambda: Verify(0), lambda: Verify("3"), lambda: Verify(2.5), lambda: Verify(2, exit_index=0.0), lambda: Verify(2, BelowProbability)],
    ids=["length", "text", "half", "exit", "class"],
)
def test_refuses(make):
    with pytest.raises(InvalidInput):
        make()
