"""Captured rounds write what the reference writes: the same tokens, depths, counts of drafts and audits, whatever was written before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from language_models import word_tokenizer
from offramp.budget.agreement import BetaMixture
from offramp.core.errors import InvalidInput
from offramp.engines.text.arguments import StopStrings
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.rounds import Rounds, can_capture
from offramp.engines.text.sampling import Sampling
from offramp.engines.text.written import Generation
from offramp.exits.cached import Adapter
from offramp.exits.lm import Trimmed
from offramp.language import LanguageModel, attach_lm
from offramp.policies import Entropy, Margin
from offramp.policies.decoding import Accept, CatchUp, Copy, Decaying, Plain, Recompute, Verify, Way
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


def test_caches_stand_before_anything_is_compiled(lm):
    run = Rounds(lm, 3, slots=40, draft_length=2)
    cache = run.state.cache
    before = [t.data_ptr() for t in (*cache.keys, *cache.values)]
    run.generate(prompts(3), 6)
    assert [t.data_ptr() for t in (*cache.keys, *cache.values)] == before


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


# ---- tokens that leave -------------------------------------------------------------------------------------------------------


def same_looks(found: Generation, expected: Generation) -> None:
    """What exits said of which token, and whether the full model says so too."""
    assert len(found.scores) == len(expected.scores)
    for row, wanted in zip(found.scores, expected.scores, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5, nan_ok=True)
    assert (found.audited, found.disagreed) == (expected.audited, expected.disagreed)
    for name in ("row", "place", "exit_index", "agreed", "left"):
        assert torch.equal(getattr(found.audit, name), getattr(expected.audit, name)), name
    torch.testing.assert_close(found.audit.score, expected.audit.score)


def same(found: Generation, expected: Generation) -> None:
    assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
    assert found.drafted == found.accepted == []
    same_looks(found, expected)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cap", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_leave_as_in_the_reference(good: LanguageModel, rows: int, cap: int, sampling: dict[str, Any]) -> None:
    mode = Accept(0.055, fill=CatchUp(cap))
    run = Rounds(good, rows, 60, sampling=Sampling(**sampling), way=mode)
    wrong = stayed = 0
    for start in range(0, 5, rows):  # the last batch is smaller, and every batch after the first finds used memory
        given = prompts(5)[start : start + rows]
        for new in (25, 1):
            expected, found = generate(good, given, mode, max_new_tokens=new, **sampling), run.generate(given, new)
            same(found, expected)
            if rows == 1:
                assert found.deep_passes == expected.deep_passes
            wrong, stayed = wrong + found.disagreed, stayed + int((~found.audit.left).sum())
            assert new != 25 or found.deep_passes < 24 or cap == 1, "no round wrote more than a token"
    assert wrong and stayed, "no token that left was wrong, or all left, so that was not tested"


@pytest.mark.parametrize(
    ("mode", "least", "most"),
    [
        (Accept(math.inf, fill=CatchUp(4)), 0, 0),
        (Accept(0.0, fill=CatchUp(4)), 72, 72),
        (Accept((0.012,), Margin(), CatchUp(4)), 1, 71),
        (Accept(-4.25, Entropy(), CatchUp(4)), 1, 71),
        (Accept(Decaying(0.06, 30.0), fill=CatchUp(4)), 1, 71),
    ],
    ids=["none", "all", "margin", "entropy", "decaying"],
)
def test_rules_and_thresholds(good: LanguageModel, mode: Accept, least: int, most: int) -> None:
    run = Rounds(good, 3, 60, way=mode)
    expected, found = generate(good, prompts(3), mode, max_new_tokens=25), run.generate(prompts(3), 25)
    same(found, expected)
    assert least <= found.audited <= most
    judged, kept = run.round.count[5:].tolist()  # by which the host chooses lengths; a round may look beyond the end of a text
    assert judged >= len(found.audit) == 72 and kept >= found.audited and (kept < judged or least == 72)
    assert kept == 0 or least > 0


def test_rows_that_left_and_ended(lm: LanguageModel) -> None:
    """At an end token in the middle of a round, behind a wait, or at the limit."""
    mode = Accept(0.05, fill=CatchUp(4), exits=(1,))
    run = Rounds(lm, 4, 60, eos_token_id=[8, 33], way=mode)
    for given in (prompts(4), prompts()[4:7]):
        expected = generate(lm, given, mode, max_new_tokens=30, eos_token_id=[8, 33])
        same(run.generate(given, 30), expected)
        assert {1} == set(expected.audit.exit_index.tolist()) and 0 < expected.audited < len(expected.audit)
        assert any(1 < len(t) < 30 for t in expected.tokens), "no row met an end token, so that was not tested"


def test_a_head_with_a_cache_sees_every_token_once(good: LanguageModel) -> None:
    other = attach_lm(good.model, [1], Adapter())
    with torch.no_grad():
        for parameter in other.heads.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    mode = Accept(0.08, fill=CatchUp(4))
    run = Rounds(other, 3, 60, (0, 3), way=mode)
    for choice in (None, LengthChoice((0, 3), (1.0, 1.9), 0.3, weight=2.0, patience=2)):
        for given in (prompts(3), prompts()[3:5]):
            expected = generate(other, given, mode, max_new_tokens=30)
            same(run.generate(given, 30, choice=choice), expected)
            assert 0 < expected.audited < len(expected.audit)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("start", [0.02, 0.98])
def test_where_tokens_leave_the_text_stays_whatever_length_is_chosen(good: LanguageModel, start: float, sampling: dict[str, Any]) -> None:
    mode = Accept(0.055, fill=CatchUp(6))
    run = Rounds(good, 3, 120, (0, 1, 3, 5), sampling=Sampling(**sampling), way=mode)
    known = LengthChoice((0, 1, 3, 5), (1.0, 1.3, 1.9, 2.5), start, weight=4.0, patience=3)
    for given in (prompts(3), prompts()[3:6]):
        found = run.generate(given, 80, choice=known)
        same(found, generate(good, given, mode, max_new_tokens=80, **sampling))
        assert found.deep_passes < 79, "no round wrote more than a token"


def test_ways_that_rounds_do_not_know(lm: LanguageModel, good: LanguageModel) -> None:
    for wrong in (
        Accept(0.1),
        Accept(0.1, fill=Copy(), exits=(0,)),
        Accept(BetaMixture(), exits=(0,)),
        Accept(0.1, fill=Recompute(), exits=(0,)),
    ):
        assert not can_capture(lm, wrong)
        with pytest.raises(InvalidInput, match="at one exit, with fill=CatchUp"):
            Rounds(lm, 1, 40, way=wrong)
    assert can_capture(lm, Accept(0.1, exits=(1,))) and can_capture(good, Accept(0.1)) and can_capture(lm, Verify(2))
    with pytest.raises(InvalidInput, match="lengths from 0 to 3"):
        Rounds(good, 1, 40, 4, way=Accept(0.1, fill=CatchUp(4)))
    with pytest.raises(InvalidInput, match="parts of a way"):
        Rounds(good, 1, 40, way=Verify(4), stop=BelowProbability(0.1))


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


WAYS = [Plain(), Verify(4), Accept(0.055, fill=CatchUp(3))]


@pytest.mark.parametrize("mode", WAYS, ids=lambda w: type(w).__name__)
def test_stop_strings_cut_where_the_reference_does(good: LanguageModel, mode: Way) -> None:
    tokenizer = word_tokenizer()
    run = Rounds(good, 3, 60, way=mode)
    plain = generate(good, prompts(3), mode, max_new_tokens=30)
    words = [tokenizer.decode([row[place]]).strip() for row, place in ((plain.tokens[0], 9), (plain.tokens[1], 4))]
    for stops in (words, [tokenizer.decode([plain.tokens[2][0]]).strip()]):
        expected = generate(good, prompts(3), mode, max_new_tokens=30, tokenizer=tokenizer, stop_strings=stops)
        found = run.generate(prompts(3), 30, stops=StopStrings(tokenizer, stops))
        assert (found.tokens, found.depth) == (expected.tokens, expected.depth)
        same_looks(found, expected)
        assert any(len(t) < 30 for t in found.tokens), "no stop string was met, so that was not tested"


@pytest.mark.parametrize("mode", WAYS[1:], ids=lambda w: type(w).__name__)
def test_a_streamer_hears_what_is_written(good: LanguageModel, mode: Way) -> None:
    tokenizer = word_tokenizer()
    run, given = Rounds(good, 1, 60, way=mode), prompts(1)
    for stops in (None, StopStrings(tokenizer, ["w1"])):
        heard = Heard()
        found = run.generate(given, 30, stops=stops, streamer=heard)
        assert heard.ended == 1 and heard.values[0].tolist() == given
        assert torch.cat(heard.values[1:]).tolist() == found.tokens[0]
        assert len(heard.values) > min(4, len(found.tokens[0]) // 2) and max(v.numel() for v in heard.values[1:]) <= 8, (
            "tokens came at the end, not on the way"
        )
    with pytest.raises(InvalidInput, match="one text"):
        Rounds(good, 2, 60).generate(prompts(2), 3, streamer=Heard())
