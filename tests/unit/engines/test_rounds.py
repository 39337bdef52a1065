"""Captured rounds write what the reference writes: the same tokens, depths and counts of drafts, whatever was written before."""

from __future__ import annotations

import pytest
import torch

from offramp.core.errors import InvalidInput
from offramp.engines.generate import generate
from offramp.engines.rounds import Rounds
from offramp.engines.sampling import Sampling
from offramp.exits.cached import Adapter
from offramp.exits.lm import Trimmed
from offramp.language import attach_lm
from offramp.policies.decoding import Plain, Verify

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return attach_lm(model, [1, 3])


def prompts(count: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 17, 9, 3, 11, 2][:count]
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("draft_length", "exit_index"), [(0, 0), (1, 0), (4, 1)])
def test_same_as_the_reference(lm, rows, draft_length, exit_index):
    run = Rounds(lm, rows, slots=60, draft_length=draft_length, exit_index=exit_index)
    mode = Verify(draft_length=draft_length, exit_index=exit_index) if draft_length else Plain()
    for start in range(0, 7, rows):  # the last batch is smaller, and every batch after the first finds used memory
        given = prompts()[start : start + rows]
        for new in (25, 1):
            expected, found = generate(lm, given, mode, max_new_tokens=new), run.generate(given, new)
            assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
            assert found.drafted == expected.drafted or new == 1
            assert found.accepted == expected.accepted or new == 1


def test_sampled_and_ended_as_the_reference(lm):
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    run = Rounds(lm, 4, slots=60, draft_length=3, exit_index=1, sampling=Sampling(**sampling), eos_token_id=[5, 7])
    mode = Verify(draft_length=3, exit_index=1)
    expected = generate(lm, prompts(3), mode, max_new_tokens=30, eos_token_id=[5, 7], **sampling)
    found = run.generate(prompts(3), 30)
    assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
    assert any(len(t) < 30 for t in found.tokens), "no row met an end token, so that was not tested"


@pytest.mark.parametrize("head", [Adapter(), Trimmed(tuple(range(60)))], ids=lambda h: type(h).__name__)
def test_other_exits(lm, head):
    """An adapter sees every token once, also those that nothing is drafted from."""
    other = attach_lm(lm.model, [2], head)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    run = Rounds(other, 2, slots=60, draft_length=3)
    for start in (0, 2, 4):
        given = prompts()[start : start + 2]
        expected, found = generate(other, given, Verify(draft_length=3), max_new_tokens=25), run.generate(given, 25)
        assert (found.tokens, found.depth, found.accepted) == (expected.tokens, expected.depth, expected.accepted)


def test_what_does_not_fit_is_refused(lm):
    with pytest.raises(InvalidInput, match="up to 2 texts of 30 tokens"):
        Rounds(lm, 2, slots=30).generate(prompts(3), 5)
    with pytest.raises(InvalidInput, match="17 tokens and 20 to come"):
        Rounds(lm, 3, slots=30).generate(prompts(3), 20)
    with pytest.raises(InvalidInput, match="exit_index"):
        Rounds(lm, 1, draft_length=2, exit_index=2)
    with pytest.raises(InvalidInput, match="repetition_penalty"):
        Rounds(lm, 1, sampling=Sampling(repetition_penalty=1.2))
