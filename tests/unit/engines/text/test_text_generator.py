"""The engine that users hold: the reference's text whatever runs it, captured rounds kept and bounded, drafting only where it pays."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from language_models import build, left_padded, own_greedy, prompts, word_tokenizer
from offramp.budget.agreement import certify_agreement
from offramp.budget.depth_schedule import LinearDepth
from offramp.budget.risk_control import SharedThreshold
from offramp.budget.targets import Risk
from offramp.core.errors import FingerprintMismatch, InvalidInput
from offramp.engines.text import generator as module
from offramp.engines.text import round_times as times_module
from offramp.engines.text.agreement import Acceptance
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.generate import generate
from offramp.engines.text.generator import LENGTHS, TextGenerator, text_generator
from offramp.engines.text.kept_rounds import KeptRounds
from offramp.engines.text.planner import SpeculationPlan, choose, fingerprint_of
from offramp.engines.text.round_times import Candidate, Times
from offramp.engines.text.rounds import Rounds
from offramp.exits.lm import OwnNorm
from offramp.language import LanguageModel, attach_lm, load_lm
from offramp.policies.decoding import Accept, CatchUp, Plain, Recompute, Scheduled, Verify
from offramp.policies.draft_stop import BelowProbability
from offramp.policies.threshold import Margin
from offramp.verbs import load_plan

WAYS = [Plain(), Verify(3), Verify(2, BelowProbability(0.2), exit_index=1), Accept(0.3), Accept(0.055, fill=CatchUp(3), exits=(1,))]
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 10, "seed": 7}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    model = build("llama")
    with torch.no_grad():  # so that exits are often right
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.mul_(0.3)
            block.mlp.down_proj.weight.mul_(0.3)
    return attach_lm(model, [1, 2])


def planned(lm: LanguageModel, draft: float, rows: int = 1, tokens: tuple[float, ...] = (1.8, 2.4, 2.8, 3.1, 3.3, 3.4)) -> SpeculationPlan:
    """A plan with a draft of this cost, in plain steps."""
    candidate = Candidate(0, lm.exits[0], "own", draft, 0.0, (1.0,) * 7)
    times, about = Times(1.0, (candidate,), rows, 4, "nowhere"), {"own": fingerprint_of(lm)}
    return choose(times, [Acceptance((1.0, *tokens))], margin=0.02, fingerprints=about)


# ---- the same text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_captured_or_not_the_text_is_the_references(lm, way):
    given = prompts((5, 1, 9))
    captured, plain = TextGenerator(lm, way, captured=True), TextGenerator(lm, way, captured=False)
    for asked in ({}, SAMPLED, {"repetition_penalty": 1.3}):
        expected = generate(lm, given, way, max_new_tokens=12, **asked)
        for run in (captured, plain):
            found = run.generate(given, max_new_tokens=12, **asked)
            assert (found.tokens, found.depth, found.prompts) == (expected.tokens, expected.depth, given)
            assert torch.equal(found.sequences, expected.sequences)
            assert (found.audited, found.disagreed) == (expected.audited, expected.disagreed)
    several = isinstance(way, Accept) and way.exits is None
    assert captured.captures == (0 if several else 2), "greedy and sampled, and the penalty is the reference's"
    assert plain.captures == 0
    assert ("the reference engine" in str(captured)) == several and "the reference engine" in str(plain)


def test_as_transformers_writes(lm):
    """Its arguments, its padding, its text."""
    given = prompts((5, 1, 9))
    expected = own_greedy(lm.model, given, 15)
    for captured in (False, True):
        run = TextGenerator(lm, Verify(3), captured=captured)
        assert torch.equal(run.generate(**left_padded(given), max_new_tokens=15, eos_token_id=[]).sequences, expected)


def test_texts_stop_strings_and_streams(lm):
    tokenizer = word_tokenizer()

    class Heard(list):
        def put(self, value: torch.Tensor) -> None:
            self.append(value.flatten().tolist())

        def end(self) -> None:
            self.append("end")

    plain = TextGenerator(lm, Plain(), tokenizer=tokenizer).generate("w3 w9 w1", max_new_tokens=12)
    stop = tokenizer.decode([plain.tokens[0][5]])
    expected = plain.tokens[0][: plain.tokens[0].index(plain.tokens[0][5]) + 1]
    for captured in (False, True):
        heard = Heard()
        run = TextGenerator(lm, Verify(3), tokenizer=tokenizer, captured=captured)
        assert run.generate("w3 w9 w1", max_new_tokens=12, stop_strings=stop, streamer=heard).tokens == [expected]
        assert (
            heard[0] == tokenizer("w3 w9 w1")["input_ids"]
            and [t for heard_now in heard[1:-1] for t in heard_now] == expected
            and heard[-1] == "end"
        )
        with pytest.raises(InvalidInput, match="one text"):
            run.generate(["w1", "w2"], streamer=Heard())


def test_schedules(lm):
    way = Scheduled(LinearDepth(4, 4, 2))
    given = prompts((4, 4))
    run = TextGenerator(lm, way, captured=True)
    assert run.generate(given, max_new_tokens=6).depth == generate(lm, given, way, max_new_tokens=6).depth and run.captures == 0
    with pytest.raises(InvalidInput, match="8 blocks"):
        TextGenerator(lm, Scheduled(LinearDepth(8, 8, 2)))


# ---- what is kept ------------------------------------------------------------------------------------------------------------


def test_rounds_are_shared_and_bounded(lm):
    run = TextGenerator(lm, Verify(2), captured=True, keep=2, max_rows=4)
    for count in (3, 4, 3):
        run.generate(prompts((4,) * count), max_new_tokens=3)
    assert run.captures == 1, "three rows and four share a bucket"
    run.generate(prompts((4,)), max_new_tokens=3)
    run.generate(prompts((4,) * 3), max_new_tokens=3)
    assert run.captures == 2
    run.generate(prompts((4,) * 2), max_new_tokens=3)  # a third: the one unused for longest goes, which is that of one row
    assert run.captures == 3 and len(run.kept.all) == 2
    run.generate(prompts((4,) * 3), max_new_tokens=3)
    assert run.captures == 3
    run.generate(prompts((4,)), max_new_tokens=3)
    assert run.captures == 4


def test_more_rows_than_at_a_time(lm):
    given = prompts()
    run = TextGenerator(lm, Verify(2), captured=True, max_rows=3)
    expected, found = generate(lm, given, Verify(2), max_new_tokens=8, **SAMPLED), run.generate(given, max_new_tokens=8, **SAMPLED)
    assert found.tokens == expected.tokens and found.prompts == given
    assert (found.drafted, found.accepted) == (expected.drafted, expected.accepted)
    assert run.captures == 2


def test_more_rows_than_at_a_time_that_leave(lm):
    """What was seen of each row is that of the row, in whichever part it was written."""
    given, way = prompts(), Accept(0.055, fill=CatchUp(3), exits=(1,))
    expected = generate(lm, given, way, max_new_tokens=8)
    found = TextGenerator(lm, way, captured=True, max_rows=3).generate(given, max_new_tokens=8)
    assert (found.tokens, found.depth, found.audited, found.disagreed) == (
        expected.tokens, expected.depth, expected.audited, expected.disagreed
    )  # fmt: skip
    assert 0 < found.audited < len(found.audit)
    for name in ("row", "place", "exit_index", "agreed", "left"):
        assert torch.equal(getattr(found.audit, name), getattr(expected.audit, name)), name
    assert [row[1:] for row in found.scores] == [pytest.approx(row[1:], abs=1e-5) for row in expected.scores]


def test_prepared_is_not_captured_again(lm):
    run = TextGenerator(lm, Verify(2), captured=True)
    run.prepare(rows=2, tokens=100)
    before = dict(run.kept.all[0].rounds.prompt._graphs)
    for lengths in ((5, 6), (1, 33), (70, 3)):
        run.generate(prompts(lengths), max_new_tokens=10)
    assert run.captures == 1 and run.kept.all[0].rounds.prompt._graphs == before and len(before) == 5
    run.prepare(rows=2, tokens=700)
    assert run.captures == 2 and [k.need.slots for k in run.kept.all] == [256, 768]
    run.generate(prompts((3, 4)), max_new_tokens=300)  # between the two, and the longer ones serve it
    assert run.captures == 2
    many = TextGenerator(lm, Verify(2), captured=True, max_rows=2)
    many.prepare(rows=3, tokens=40)  # two and one
    assert [(k.need.rows, len(k.rounds.prompt._graphs)) for k in many.kept.all] == [(2, 3), (1, 3)]
    with pytest.raises(InvalidInput, match="tokens at least 2"):
        run.prepare(tokens=1)


def test_slots_end_where_positions_do():
    lm = attach_lm(build("gpt2"), [1])
    run = TextGenerator(lm, Verify(2), captured=True)
    given = prompts((9,))
    expected = generate(lm, given, Plain(), max_new_tokens=120)
    assert run.generate(given, max_new_tokens=120).tokens == expected.tokens
    with pytest.raises(InvalidInput, match="positions"):
        run.generate(given, max_new_tokens=121)


# ---- plans -------------------------------------------------------------------------------------------------------------------


def test_a_plan_that_pays_drafts_and_one_that_does_not_does_not(lm):
    given = prompts((5,))
    for draft, way in ((0.1, Verify), (5.0, Plain)):
        run = text_generator(lm, planned(lm, draft), captured=False)
        assert isinstance(run.way(1), way)
        found = run.generate(given, max_new_tokens=20)
        assert found.tokens == generate(lm, given, Plain(), max_new_tokens=20).tokens
        assert bool(found.drafted) == (way is Verify)


def test_each_size_of_batch_is_planned_by_its_own_times(lm, monkeypatch):
    """More rows: drafts that paid for one row no longer do."""
    asked: list[int] = []

    def measured(lm: LanguageModel, *, rows: int, exits: Any, most: int, **_: Any) -> Times:
        asked.append(rows)
        assert list(exits) == [0] and most == 6
        return Times(1.0, (Candidate(0, 1, "own", 0.1 * rows, 0.0, (1.0,) * 7),), rows)

    monkeypatch.setattr(module, "measure", measured)
    run = text_generator(lm, planned(lm, 0.1), captured=False)
    assert isinstance(run.way(1), Verify) and asked == []
    assert isinstance(run.way(2), Verify) and isinstance(run.way(16), Plain) and isinstance(run.way(15), Plain)
    assert asked == [2, 16], "each size is measured once"
    assert run.way(2).draft_length < run.way(1).draft_length


@pytest.mark.parametrize("draft", [0.01, 3.0])
def test_captured_rounds_follow_measured_times(lm, monkeypatch, draft):
    """Greedy: where a round with drafts is dear the rounds are plain, but for a try now and then; the text stays."""
    monkeypatch.setattr(module, "times_of", lambda rounds, prompts, **_: {k: 1 + draft * k for k in rounds.lengths})
    run = text_generator(lm, planned(lm, 0.1), captured=True)
    given = prompts((5, 3))
    expected = generate(lm, given, Plain(), max_new_tokens=60)
    found = run.generate(given, max_new_tokens=60)
    assert found.tokens == expected.tokens
    tried = found.drafted[0] / 2
    assert tried > 8 if draft < 1 else tried <= 2
    sampled = run.generate(given, max_new_tokens=10, **SAMPLED)
    way = Verify(6) if draft < 1 else Plain()
    assert sampled.tokens == generate(lm, given, way, max_new_tokens=10, **SAMPLED).tokens if draft > 1 else sampled.drafted[5] > 0


@pytest.mark.parametrize(("place", "longest"), [(0.01, True), (3.0, False)])
def test_rounds_in_which_tokens_leave_follow_measured_times(lm, monkeypatch, place, longest):
    """Where a place costs little many are tried at a time, else one; the text stays."""
    asked: list[tuple[int, ...]] = []

    def measured(rounds: Any, prompts: Any, **_: Any) -> dict[int, float]:
        asked.append(rounds.lengths)
        return {k: 1 + place * k for k in rounds.lengths}

    monkeypatch.setattr(module, "times_of", measured)
    way = Accept(0.04, fill=CatchUp(6), exits=(1,))
    run = TextGenerator(lm, way, captured=True)
    for given in (prompts((5,)), prompts((3,))):
        expected, found = generate(lm, given, way, max_new_tokens=40), run.generate(given, max_new_tokens=40)
        assert found.tokens == expected.tokens and expected.audited > 20
        assert found.deep_passes == expected.deep_passes if longest else found.deep_passes > 32
    assert asked == [(0, 1, 3, 5)], "measured once"
    few = TextGenerator(lm, replace(way, fill=CatchUp(1)), captured=True)
    few.generate(prompts((5,)), max_new_tokens=4)
    assert [k.need.lengths for k in few.kept.all] == [(0,)] and len(asked) == 1, "nothing to choose from"
    many = TextGenerator(lm, replace(way, fill=CatchUp(1000)), captured=True)
    many.generate(prompts((5,)), max_new_tokens=4)
    assert asked[1:] == [(0, 1, 3, 7, 15)]


def test_other_fills_are_the_references(lm):
    way = Accept(0.055, fill=Recompute(3), exits=(1,))
    run = TextGenerator(lm, way, captured=True)
    assert run.generate(prompts((5,)), max_new_tokens=9).blocks_run > 0 and run.captures == 0


@pytest.mark.parametrize("pays", [True, False])
def test_rounds_that_were_planned_with_serve(lm, monkeypatch, pays):
    """What planning captured is what the texts need; a length that the plan adds is captured besides, and other ways are let go."""
    monkeypatch.setattr(times_module, "times_of", lambda rounds, *_, **__: {k: 1 + (0.05 if pays else 2.0) * k for k in rounds.lengths})
    made: list[Any] = []
    monkeypatch.setattr(KeptRounds, "_make", lambda self, need, once=KeptRounds._make: made.append(need) or once(self, need))
    given = prompts((5, 9, 3))
    wrote = generate(lm, given, Plain(), max_new_tokens=30)
    texts = [p + t for p, t in zip(given, wrote.tokens, strict=True)]
    run = text_generator(lm, texts=texts, starts=[len(p) for p in given], captured=True)
    planned_with = len(made)
    assert planned_with == 1 + len(lm.exits) and (run.plan.chosen is not None) is pays
    assert len(run.kept.all) == 1 and isinstance(run.kept.all[0].need.way, Verify if pays else Plain)
    for prompt, text in zip(given, wrote.tokens, strict=True):
        assert run.generate([prompt], max_new_tokens=30).tokens == [text]
    assert len(made) == planned_with == run.captures
    wanted = {0, *LENGTHS, run.plan.chosen.draft_length} if pays else {0}
    assert set(run.kept.all[0].rounds.lengths) == wanted


def test_lengths_that_are_added(lm):
    run = Rounds(lm, 1, slots=40, draft_length=(0, 4))
    given = prompts((5,))
    run.allow((2, 4))
    assert run.lengths == (0, 2, 4)
    choice = LengthChoice((2,), (1.0,))
    found, expected = run.generate(given, 20, choice=choice), generate(lm, given, Verify(2), max_new_tokens=20)
    assert (found.tokens, found.drafted[:2]) == (expected.tokens, expected.drafted)
    with pytest.raises(InvalidInput, match="from 0 to 4; got 5"):
        run.allow((1, 5))


def test_off_for_the_planned_rows_is_off_for_more(lm):
    run = text_generator(lm, planned(lm, 5.0, rows=2), captured=True)
    found = run.generate(prompts((5, 3)), max_new_tokens=10)
    assert found.drafted == [] and [k.need.lengths for k in run.kept.all] == [(0,)]


@pytest.mark.parametrize("captured", [False, True])
def test_planned_here(lm, captured):
    """With texts alone: times are measured, drafts are made or not, and the text is the model's own."""
    given = prompts((5, 3))
    wrote = generate(lm, given, Plain(), max_new_tokens=40)
    texts = [p + t for p, t in zip(given, wrote.tokens, strict=True)]
    run = text_generator(lm, texts=texts, starts=[5, 3], captured=captured, compiled=False)
    assert run.plan is not None and run.plan.margin == 0.02 and len(run.plan.predictions) == 12
    assert run.generate(given, max_new_tokens=40).tokens == wrote.tokens
    assert "captured rounds" in str(run) if captured else "the reference engine" in str(run)


def test_a_certified_plan_writes_as_it_was_calibrated(lm, tmp_path):
    """Its rule, fill and exit: the threshold of another rule promises nothing here."""
    given = [[i % 40 + 5, i % 7 + 5, i % 11 + 5] for i in range(180)]
    way = Accept(math.inf, Margin(), CatchUp(3), exits=(1,))
    looks = text_generator(lm, way).generate(given[:120], max_new_tokens=12).audit
    risk, grid = Risk(max_disagreement=0.15), SharedThreshold(size=200, low=0.0, high=float(looks.score.max()))
    plan = certify_agreement(looks.score, looks.agreed, looks.row, risk, way=way, fingerprint=fingerprint_of(lm), grid=grid)
    assert 0.05 < plan.left.value < 1
    plan.save(tmp_path)
    run = text_generator(lm, load_plan(tmp_path))
    assert run.way() == replace(way, threshold=plan.threshold) and math.isfinite(plan.threshold)
    found = run.generate(given[120:], max_new_tokens=12)
    assert found.audited and found.disagreed / (60 * 11) <= 0.15
    careless = text_generator(lm, Accept(plan.threshold, exits=(1,))).generate(given[120:], max_new_tokens=12)
    assert careless.disagreed / (60 * 11) > 0.15, "the same number with another rule breaks the promise"


def test_plans_of_another_model_are_refused(lm, tmp_path):
    """Other weights, other exits, exits trained further; the same ones loaded again are the same."""
    scores = torch.linspace(0, 1, 4000)
    certified = certify_agreement(
        scores, scores > 0.3, torch.arange(4000) % 400, Risk(max_disagreement=0.2), way=Accept(exits=(0,)), fingerprint=fingerprint_of(lm)
    )
    own = attach_lm(lm.model, [1, 2], OwnNorm())
    drafting = planned(own, 0.1)
    own.save(tmp_path / "exits")
    again = load_lm(lm.model, tmp_path / "exits")
    assert text_generator(again, drafting).plan == drafting
    with torch.no_grad():
        again.heads[1].norm.weight.add_(0.5)
    changed = build("llama")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    assert text_generator(lm, certified).way() == certified.way
    rounded = copy.deepcopy(lm.model).bfloat16()
    for other in (attach_lm(lm.model, [1, 3]), attach_lm(lm.model, [1]), own, attach_lm(changed, [1, 2]), attach_lm(rounded, [1, 2])):
        with pytest.raises(FingerprintMismatch, match="certify again"):
            text_generator(other, certified)
    for other in (lm, again, attach_lm(changed, [1, 2], OwnNorm())):
        with pytest.raises(FingerprintMismatch, match="plan again"):
            text_generator(other, drafting)
    with pytest.raises(FingerprintMismatch, match="does not say which model"):
        text_generator(own, replace(drafting, fingerprints={}))


# ---- what is refused ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said(lm):
    with pytest.raises(InvalidInput, match="needs texts"):
        text_generator(lm)
    with pytest.raises(InvalidInput, match="SpeculationPlan or an AcceptPlan"):
        text_generator(lm, "verify")
    with pytest.raises(InvalidInput, match="exit_index"):
        text_generator(lm, Verify(2, exit_index=2))
    bad = planned(lm, 0.1)
    with pytest.raises(InvalidInput, match="exit_index"):
        text_generator(lm, replace(bad, chosen=replace(bad.chosen, exit_index=3)))
    for options in ({"keep": 0}, {"max_rows": 0}):
        with pytest.raises(InvalidInput, match="at least 1"):
            TextGenerator(lm, Plain(), **options)
    run = TextGenerator(lm, Plain(), captured=True)
    with pytest.raises(InvalidInput, match="prompts or input_ids"):
        run.generate()
    with pytest.raises(InvalidInput, match="num_beams"):
        run.generate([[5]], num_beams=2)
    with pytest.raises(InvalidInput, match="seed"):
        run.generate([[5], [6]], seed=[1])
