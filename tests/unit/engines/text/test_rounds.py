"""Captured rounds write what the reference writes: the same tokens, depths and counts of drafts, whatever was written before."""

from __future__ import annotations

import pytest
import torch

from language_models import word_tokenizer
from offramp.core.errors import InvalidInput
from offramp.engines.text.arguments import StopStrings
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.rounds import Rounds
from offramp.engines.text.sampling import Sampling
from offramp.exits.cached import Adapter
from offramp.exits.lm import Trimmed
from offramp.language import attach_lm
from offramp.policies.decoding import Plain, Verify
from offramp.policies.draft_stop import BelowProbability, BetaThompson, CalibratedThompson, MarginalValue

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
    for start in range(0, 5, rows):  # the last batch is smaller, and every batch after the first finds used memory
        given = prompts(5)[start : start + rows]
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


# ---- rules that stop drafting ------------------------------------------------------------------------------------------------

STOPS = [
    BelowProbability(0.1),
    BetaThompson(2.0, 1.0),
    CalibratedThompson(),
    MarginalValue(0.2, 3.0),
]
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20}


@pytest.fixture(scope="module")
def good(lm):
    """A model whose exit is often right, so that rules have something to stop."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(lm.model.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.mul_(0.3)
            block.mlp.down_proj.weight.mul_(0.3)
    model.generation_config.eos_token_id = None
    return attach_lm(model, [2])


@pytest.mark.parametrize("stop", STOPS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampling", [{}, SAMPLED, {**SAMPLED, "sampled_drafts": False}], ids=["greedy", "sampled", "likely_drafts"])
def test_rules_stop_as_in_the_reference(good, stop, sampling):
    """The same drafts are made and kept, row by row, round by round: a rule's state is what it would be."""
    asked = {k: v for k, v in sampling.items() if k != "sampled_drafts"}
    mode = Verify(4, stop, sampling.get("sampled_drafts", True))
    run = Rounds(good, 3, 60, 4, sampling=Sampling(**asked), stop=stop, sample_drafts=mode.sample_drafts)
    for given in (prompts(3), prompts()[3:5]):
        expected, found = generate(good, given, mode, max_new_tokens=20, **asked), run.generate(given, 20)
        assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
        assert (found.drafted, found.accepted, found.deep_passes) == (expected.drafted, expected.accepted, expected.deep_passes)
        assert 0 < found.drafted[1] < found.drafted[0], "the rule never stopped or always did, so that was not tested"


def test_a_rule_and_a_head_with_a_cache(good):
    other = attach_lm(good.model, [1], Adapter())
    with torch.no_grad():
        for parameter in other.heads.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    stop = BelowProbability(0.3)
    run = Rounds(other, 3, 60, 3, stop=stop)
    expected, found = generate(other, prompts(3), Verify(3, stop), max_new_tokens=30), run.generate(prompts(3), 30)
    assert (found.tokens, found.depth, found.accepted) == (expected.tokens, expected.depth, expected.accepted)


# ---- several lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.02, 0.98])
def test_lengths_are_chosen_and_the_text_stays(good, start):
    """Greedy: whatever is chosen, and the choice moves."""
    run = Rounds(good, 3, 120, (0, 1, 3, 5))
    lengths = []
    kept = run._graphs
    known = LengthChoice((0, 1, 3, 5), (1.0, 1.2, 1.5, 1.9), start, weight=4.0, patience=3)
    for given in (prompts(3), prompts()[3:6]):
        expected = generate(good, given, Plain(), max_new_tokens=80)
        found = run.generate(given, 80, choice=known)
        assert found.tokens == expected.tokens
        assert found.drafted[0] > found.drafted[4] and sum(found.accepted) > 0
        lengths.append(found.deep_passes)
    assert {k for k, _ in kept} == {0, 1, 3, 5}
    assert max(lengths) < 79, "no round wrote more than a token"


def test_the_choice_knows_one_round_less_than_has_run(good, monkeypatch):
    """Whether the round in flight has arrived or not, the host decides by the same numbers, so that runs repeat."""
    run = Rounds(good, 1, 80, (1, 3))
    at_least, seen = run.mail.at_least, []
    known = LengthChoice((1, 3), (1.0, 1.3), 0.5)
    saw = type(known.start()).saw
    monkeypatch.setattr(type(known.start()), "saw", lambda self, judged, kept: seen.append((judged, kept)) or saw(self, judged, kept))
    run.generate(prompts(1), 40, choice=known)
    early = list(seen)
    seen.clear()
    history: list[list[int]] = []

    def late(first: int) -> list[int]:
        """As on a device where the round in flight is still running: what the mailbox held after the one before."""
        history.append(at_least(first))
        return history[-2] if len(history) > 1 else [1, 1, *history[0][2:3], 0, 0, *history[0][3:5]]

    monkeypatch.setattr(run.mail, "at_least", late)
    run.generate(prompts(1), 40, choice=known)
    assert early and seen[: len(early)] == early


def test_lengths_that_were_not_asked_for(good):
    run = Rounds(good, 1, 40, (1, 2))
    with pytest.raises(InvalidInput, match="draft lengths"):
        run.generate(prompts(1), 4, choice=LengthChoice((4,), (1.0,)))
    for wrong in ((), (2, 1), (-1, 2)):
        with pytest.raises(InvalidInput, match="ascending"):
            Rounds(good, 1, 40, wrong)


# ---- stop strings and streaming ----------------------------------------------------------------------------------------------


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("draft_length", [0, 4])
def test_stop_strings_cut_where_the_reference_does(good, draft_length):
    tokenizer = word_tokenizer()
    mode = Verify(draft_length) if draft_length else Plain()
    run = Rounds(good, 3, 60, draft_length)
    plain = generate(good, prompts(3), Plain(), max_new_tokens=30)
    words = [tokenizer.decode([row[place]]).strip() for row, place in ((plain.tokens[0], 9), (plain.tokens[1], 4))]
    for stops in (words, [tokenizer.decode([plain.tokens[2][0]]).strip()]):
        expected = generate(good, prompts(3), mode, max_new_tokens=30, tokenizer=tokenizer, stop_strings=stops)
        found = run.generate(prompts(3), 30, stops=StopStrings(tokenizer, stops))
        assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
        assert any(len(t) < 30 for t in found.tokens), "no stop string was met, so that was not tested"


def test_a_streamer_hears_what_is_written(good):
    tokenizer = word_tokenizer()
    run, given = Rounds(good, 1, 60, 3), prompts(1)
    for stops in (None, StopStrings(tokenizer, ["w1"])):
        heard = Heard()
        found = run.generate(given, 30, stops=stops, streamer=heard)
        assert heard.ended == 1 and heard.values[0].tolist() == given
        assert torch.cat(heard.values[1:]).tolist() == found.tokens[0]
        assert len(heard.values) > 4 and max(v.numel() for v in heard.values[1:]) <= 8, "tokens came at the end, not on the way"
    with pytest.raises(InvalidInput, match="one text"):
        Rounds(good, 2, 60).generate(prompts(2), 3, streamer=Heard())
