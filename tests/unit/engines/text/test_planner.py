"""The planner: its arithmetic against simulation, its choice against all choices, its estimates against rounds that were really made."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.budget.agreement import tolerant_thresholds
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.engines.text.agreement import Acceptance, agreement
from offramp.engines.text.generate import generate
from offramp.engines.text.planner import SpeculationPlan, choose, fingerprint_of, plan_speculation
from offramp.engines.text.round_times import Candidate, Times, measure, measure_rounds
from offramp.engines.text.sampling import Sampling
from offramp.exits.cached import Adapter
from offramp.exits.lm import OwnNorm, Trimmed
from offramp.language import LanguageModel, attach_lm
from offramp.policies.decoding import Accept, CatchUp, Plain, Verify
from offramp.policies.draft_stop import MarginalValue


def tiny(head: Any = None, exits: tuple[int, ...] = (1, 3)) -> LanguageModel:
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return attach_lm(model.eval(), exits, head)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny()


def simulated(chances: list[float], rounds: int, seed: int) -> float:
    """Tokens of a round whose drafts are kept with these chances."""
    coin = random.Random(seed)
    total = 0
    for _ in range(rounds):
        total += 1
        for c in chances:
            if coin.random() >= c:
                break
            total += 1
    return total / rounds


# -------------------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.8, 1.0])
def test_tokens_of_a_round_by_simulation_and_by_formula(chance):
    tokens = Acceptance.constant(chance, 6).tokens
    for k in (1, 3, 6):
        assert tokens[k] == pytest.approx(k + 1 if chance == 1 else (1 - chance ** (k + 1)) / (1 - chance))
        assert tokens[k] == pytest.approx(simulated([chance] * k, 20_000, k), abs=0.05)


def test_tokens_by_place_by_simulation():
    chances = [0.9, 0.5, 0.8, 0.2]
    tokens = Acceptance.by_place(chances).tokens
    for k in range(5):
        assert tokens[k] == pytest.approx(simulated(chances[:k], 20_000, k), abs=0.04)


def walked(chances: list[float], drafts: int, coin: random.Random) -> tuple[int, int]:
    """Rounds and tokens of one walk through a text."""
    t = rounds = tokens = 0
    while t < len(chances) - drafts:
        kept = 0
        while kept < drafts and coin.random() < chances[t + kept]:
            kept += 1
        t, rounds, tokens = t + kept + 1, rounds + 1, tokens + kept + 1
    return rounds, tokens


def test_runs_are_followed():
    """Easy and hard stretches: the walk agrees with simulation, and the mean chance does not."""
    g = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(5):
        easy = torch.rand(30, generator=g) < 0.6
        texts.append(torch.where(easy, 0.98, 0.15).repeat_interleave(12))
    found = Acceptance.of_runs(texts, 5)
    coin = random.Random(1)
    for k in (1, 2, 5):
        counted = [walked(t.tolist(), k, coin) for t in texts for _ in range(60)]
        assert found.tokens[k] == pytest.approx(sum(c[1] for c in counted) / sum(c[0] for c in counted), rel=0.02)
    mean = float(torch.cat(texts).mean())
    assert abs(Acceptance.constant(mean, 5).tokens[5] - found.tokens[5]) > 0.2


def test_even_texts_need_no_correction():
    found = Acceptance.of_runs([torch.full((50,), 0.7)], 4)
    assert found.tokens == pytest.approx(Acceptance.constant(0.7, 4).tokens)


def test_agreement_says_what_is_kept_of_drafts():
    """On greedy texts of the model, the walk is the verified run itself: same rounds, same drafts kept."""
    for head in (None, Adapter(), Trimmed(tuple(range(0, 48, 2)))):
        lm = tiny(head, (2,))
        prompt = [5, 9, 2]
        text = generate(lm, [prompt], Plain(), max_new_tokens=60).tokens[0]
        seen = agreement(lm, [prompt + text], starts=[len(prompt) + 1], chunk=7)
        assert seen.chance.shape == (59, 1) and torch.equal(seen.chance.bool(), seen.agreed)
        for k in (1, 3):
            made = generate(lm, [prompt], Verify(k), max_new_tokens=60)
            expected, t = [0] * k, 0
            while t < 59:
                kept = 0
                while kept < min(k, 59 - t - 1) and bool(seen.agreed[t + kept, 0]):
                    expected[kept] += 1
                    kept += 1
                t += kept + 1
            assert made.accepted == expected
            assert sum(expected) > 0


def test_a_threshold_without_tolerance_leaves_the_text_as_it_is(lm):
    """From agreement to a threshold to an accepting run: where all that leave agree, the text is the full model's by induction."""
    left = 0
    for prompt in ([5, 9, 2], [3], [17, 40, 8, 1], [7, 7], [30, 2], [12]):
        text = generate(lm, [prompt], Plain(), max_new_tokens=50).tokens[0]
        seen = agreement(lm, [prompt + text], starts=[len(prompt) + 1])
        for e, threshold in enumerate(tolerant_thresholds(seen.confidence, seen.agreed, 0.0)):
            made = generate(lm, [prompt], Accept(threshold, fill=CatchUp(4), exits=(e,)), max_new_tokens=50)
            assert made.tokens[0] == text
            left += sum(d == lm.exits[e] for d in made.depth[0])
    assert left >= 8


def test_agreement_when_sampling(lm):
    texts = [list(range(1, 20)), [7, 3, 3, 9, 1, 0]]
    asked = Sampling(do_sample=True, temperature=0.8)
    drawn, fixed = agreement(lm, texts, sampling=asked), agreement(lm, texts, sampling=asked, sample_drafts=False)
    greedy = agreement(lm, texts)
    assert drawn.text.tolist() == [0] * 18 + [1] * 5
    assert [len(t) for t in drawn.by_text(0)] == [18, 5]
    with torch.no_grad():
        p = (lm.model(torch.tensor([texts[1]])).logits[0, :-1] / 0.8).softmax(-1)
        hidden = lm.model.model(torch.tensor([texts[1]]), output_hidden_states=True).hidden_states[1]
        raw = lm.model.lm_head(lm.model.model.norm(hidden))[0, :-1]
        q = (raw / 0.8).softmax(-1)
    torch.testing.assert_close(drawn.by_text(0)[1], torch.minimum(p, q).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed.by_text(0)[1], p.gather(1, raw.argmax(-1, keepdim=True))[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(greedy.confidence[18:, 0], raw.softmax(-1).amax(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(greedy.agreed[18:, 0], raw.argmax(-1) == p.argmax(-1))


# -------------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("blocks", "head", "exit_", "chance", "speedup", "trimmed"),
    [(32, 0.65, 4, 0.8, 2.15, 2.27), (32, 2.41, 4, 0.9, 2.47, 3.07), (16, 4.32, 2, 0.6, 1.22, 1.58), (12, 0.89, 1, 0.7, 1.76, 2.06)],
)  # fmt: skip
def test_counting_blocks_gives_figures_worked_out_by_hand(blocks, head, exit_, chance, speedup, trimmed):
    times = Times.modelled(blocks, head, [exit_], heads={"own": head, "trimmed": head / 8}, most=12)
    plan = choose(times, [Acceptance.constant(chance, 12)] * 2)
    best = {p.head: p.speedup for p in reversed(plan.predictions)}
    assert best["own"] == pytest.approx(speedup, abs=0.015)
    assert best["trimmed"] == pytest.approx(trimmed, abs=0.015)
    assert plan.chosen is not None and plan.chosen.head == "trimmed"


def random_times(seed: int) -> tuple[Times, list[list[float]]]:
    coin = random.Random(seed)
    candidates, chances = [], []
    for e in range(3):
        deep = coin.uniform(2, 8)
        candidates.append(
            Candidate(
                e,
                e + 1,
                "own",
                coin.uniform(0.3, 2),
                coin.uniform(0.1, 1),
                tuple(deep * (1 + 0.1 * w) for w in range(6)),
                coin.uniform(0, 1),
            )
        )
        chances.append([coin.uniform(0.1, 0.95) for _ in range(5)])
    return Times(coin.uniform(4, 9), tuple(candidates), 2, 10, "none"), chances


def test_the_choice_is_the_best_of_simulated_rounds():
    on = off = 0
    for seed in range(12):
        times, chances = random_times(seed)
        plan = choose(times, [Acceptance.by_place(c) for c in chances])
        rates = {}
        for c, given in zip(times.candidates, chances):
            for k in range(1, 6):
                spent = k * (c.shallow + c.draft) + c.shallow + c.deep[k] + c.rest
                rates[c.exit_index, k] = simulated(given[:k], 4000, seed) / spent * times.full
        best = max(rates.values())
        found = 1.0 if plan.chosen is None else rates[plan.chosen.exit_index, plan.chosen.draft_length]
        assert found >= max(1.0, best) * 0.97
        assert plan.speedup == pytest.approx(max(1.0, best), rel=0.04)
        on, off = on + (plan.chosen is not None), off + (plan.chosen is None)
    assert on and off


def test_never_worse_than_plain_by_its_own_numbers():
    for seed in range(60):
        times, chances = random_times(seed)
        for margin in (0.0, 0.3):
            plan = choose(times, [Acceptance.by_place(c) for c in chances], margin=margin)
            best = max(p.speedup for p in plan.predictions)
            assert plan.speedup >= 1 and plan.predictions[0].speedup == best
            assert (plan.chosen is None) == (best <= 1 + margin)
            assert isinstance(plan.mode(), Plain if plan.chosen is None else Verify)
    assert isinstance(choose(Times.modelled(8, 1, [4]), [Acceptance.constant(0.3, 8)]).mode(), Plain)


def test_whole_rounds_in_place_of_parts():
    parts = Candidate(0, 2, "own", 1.0, 0.5, (3.0, 3.1, 3.2, 3.3), 0.4)
    whole = Candidate.of_rounds(0, 2, "own", [parts.round(k) for k in (1, 2, 3)])
    assert [whole.round(k) for k in (1, 2, 3)] == pytest.approx([parts.round(k) for k in (1, 2, 3)])
    assert whole.step == pytest.approx(parts.step) == pytest.approx(1.6)
    a = [Acceptance.constant(0.8, 3)]
    assert choose(Times(6.0, (whole,)), a).speedup == pytest.approx(choose(Times(6.0, (parts,)), a).speedup)


def test_marginal_rule_of_a_plan():
    times = Times(10.0, (Candidate(0, 2, "own", 1.0, 0.5, (7.0,) * 5, 0.2),))
    plan = choose(times, [Acceptance.constant(0.8, 4)])
    rule = plan.marginal()
    assert isinstance(rule, MarginalValue)
    assert (rule.draft, rule.verify, rule.plain) == pytest.approx((1.5, 8.2, 10.0)) and rule.acceptance == pytest.approx(0.8, abs=1e-3)
    mode = plan.mode(rule)
    assert isinstance(mode, Verify) and mode.stop == rule


def test_a_plan_is_printed_and_saved(tmp_path):
    times, chances = random_times(3)
    for margin in (0.0, 50.0):
        plan = choose(times, [Acceptance.by_place(c) for c in chances], margin=margin, fingerprints={"own": "abc", "norm": "abd"})
        plan.save(tmp_path)
        assert SpeculationPlan.load(tmp_path) == plan and plan.fingerprints["norm"] == "abd"
        assert [p.name for p in tmp_path.iterdir()] == ["speculation_plan.json"], "and nothing half-written beside it"
        assert SpeculationPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert ("off" in str(plan)) == (plan.chosen is None)
        assert all(str(c.depth) in str(plan) for c in times.candidates)
        assert f"{times.full:.4g} {times.unit} a step" in str(plan) and f"round, {times.unit}" in str(plan)
    counted = choose(Times.modelled(8, 0.5, [1]), [Acceptance.constant(0.8, 8)])
    assert "8.5 blocks a step" in str(counted) and "round, blocks" in str(counted)
    data = plan.to_dict()
    del data["times"]["full"]
    with pytest.raises(ArtifactError):
        SpeculationPlan.from_dict(data)


# -------------------------------------------------------------------------------------------------------------------- measured


def test_measured_and_planned(lm):
    named = {"own": lm, "norm": attach_lm(lm.model, [1, 3], OwnNorm())}
    texts = [generate(lm, [[s, 3]], Plain(), max_new_tokens=24).tokens[0] for s in (1, 2)]
    plan = plan_speculation(named, texts, rows=2, context=9, most=3)
    assert [(c.head, c.depth) for c in plan.times.candidates] == [("own", 1), ("own", 3), ("norm", 1), ("norm", 3)]
    assert plan.times.full > 0 and all(min(c.shallow, c.draft, *c.deep) > 0 for c in plan.times.candidates)
    assert len(plan.predictions) == 12 and plan.tokens_per_second >= 2000 / plan.times.full
    deeper = {c.depth: c.shallow for c in plan.times.candidates if c.head == "own"}
    assert deeper[3] > deeper[1]
    again = plan_speculation(named, texts, times=plan.times, most=3)
    assert again == plan and plan.fingerprints == {name: fingerprint_of(each) for name, each in named.items()}
    assert len(set(plan.fingerprints.values())) == 2, "the heads are others, the model is one"
    drafting = replace(plan, chosen=next(p for p in plan.predictions if p.head == "norm"))
    drafting.check(named["norm"])
    with pytest.raises(FingerprintMismatch, match="heads 'norm'"):
        drafting.check(lm)


def test_measuring_heads_that_attend():
    times = measure(tiny(Adapter(), (2,)), rows=1, context=5, most=2, warmup=1, repeats=3)
    assert len(times.candidates) == 1 and times.candidates[0].most == 2


def test_whole_rounds_are_timed_and_those_between_interpolated(lm):
    before = generate(lm, [[5, 9, 2]], Plain(), max_new_tokens=8).tokens
    times = measure_rounds(lm, rows=2, context=7, lengths=(2, 4), warmup=1, repeats=5)
    assert [c.most for c in times.candidates] == [4, 4] and times.full > 0
    for c in times.candidates:
        assert c.round(3) == pytest.approx((c.round(2) + c.round(4)) / 2)
        assert c.round(1) == pytest.approx((times.full + c.round(2)) / 2)
        assert c.round(4) > times.full  # nine passes over parts of the model
    assert choose(times, [Acceptance.constant(0.9, 4)] * 2).predictions
    assert generate(lm, [[5, 9, 2]], Plain(), max_new_tokens=8).tokens == before


@pytest.mark.parametrize(
    "make",
    [
        lambda lm: measure_rounds(lm, lengths=(2, 1)),
        lambda lm: measure_rounds(lm, lengths=(0, 1)),
        lambda lm: Acceptance((1.0,)),
        lambda lm: Acceptance((1.0, 2.5)),
        lambda lm: Acceptance.by_place([1.2]),
        lambda lm: Acceptance.seen([3, 0], [1, 0]),
        lambda lm: Acceptance.of_runs([torch.ones(3)], 3),
        lambda lm: Candidate(0, 1, "own", 1.0, 1.0, (1.0,)),
        lambda lm: Candidate(0, 1, "own", -1.0, 1.0, (1.0, 1.0)),
        lambda lm: Times(0.0, (Candidate(0, 1, "own", 1.0, 1.0, (1.0, 1.0)),)),
        lambda lm: choose(Times.modelled(8, 1, [2]), []),
        lambda lm: agreement(lm, [[1]]),
        lambda lm: agreement(lm, [[1, 2]], starts=[2]),
        lambda lm: measure(lm, most=0),
    ],
)
def test_refuses(lm, make):
    with pytest.raises(InvalidInput):
        make(lm)


def test_acceptance_seen_while_writing(lm):
    made = generate(lm, [[5, 9, 2], [3]], Verify(3, exit_index=1), max_new_tokens=60)
    seen = Acceptance.seen(made.drafted, made.accepted)
    assert seen.tokens[1] == pytest.approx(1 + made.accepted[0] / made.drafted[0]) and seen.tokens[3] > 1
