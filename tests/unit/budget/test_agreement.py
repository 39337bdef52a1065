"""When a language model may leave: known answers, brute force, and promises that hold by Monte Carlo."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.budget import CRC, LTT, RCPS, Hoeffding, PointEstimate, Risk, SharedThreshold
from offramp.budget.agreement import AcceptPlan, BetaMixture, certify_agreement, certify_table, tolerant_thresholds
from offramp.budget.depth_schedule import LinearDepth
from offramp.core.errors import ArtifactError, BudgetInfeasible, FingerprintMismatch, InvalidInput, NoEffectWarning
from offramp.policies import PARTS, WAYS, Accept, CatchUp, Copy, Decaying, Energy, LearnedGate, Margin, Plain

ABOUT = {"way": Accept(exits=(0,)), "fingerprint": "abc"}
LIMIT = Risk(max_disagreement=0.1)
T2 = np.array([0.9, 0.5])
Z2 = np.zeros((4, 2))

# ------------------------------------------------------------------------------------------------------------------- by tolerance


def loosest(scores: list[float], agreed: list[bool], tolerance: float) -> float:
    good = [math.inf]
    for limit in set(scores):
        passed = [a for s, a in zip(scores, agreed) if s >= limit]
        if sum(passed) >= (1 - tolerance) * len(passed) - 1e-9:
            good.append(limit)
    return min(good)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.2, 0.5])
def test_tolerance_by_brute_force(tolerance):
    g = torch.Generator().manual_seed(0)
    for digits in (1, 6):  # with ties, and without
        scores = (torch.rand(150, 3, generator=g) * 10**digits).round() / 10**digits
        agreed = torch.rand(150, 3, generator=g) < scores * torch.tensor([1.0, 0.9, 0.3])
        found = tolerant_thresholds(scores, agreed, tolerance)
        assert found == pytest.approx([loosest(scores[:, k].double().tolist(), agreed[:, k].tolist(), tolerance) for k in range(3)])


def test_tolerance_none_and_all():
    scores, wrong = torch.tensor([0.2, 0.9]), torch.tensor([False, False])
    assert tolerant_thresholds(scores, wrong, 0.5) == (math.inf,)
    assert tolerant_thresholds(scores, ~wrong, 0.0) == pytest.approx((0.2,))
    assert tolerant_thresholds(-scores, ~wrong, 0.0) == pytest.approx((-0.9,))  # minus the entropy, say


# --------------------------------------------------------------------------------------------------------------------- Beta mixture


def pairs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    agreed = draw.random(n) < 0.7
    confidence = np.where(agreed, draw.beta(6, 2, n), draw.beta(2, 4, n))
    return torch.from_numpy(confidence), torch.from_numpy(agreed)


def test_moments_are_those_of_the_pairs_however_they_come():
    confidence, agreed = pairs(20_000, 0)
    once = BetaMixture().seen(confidence, agreed)
    parts = BetaMixture()
    for c, a in zip(confidence.split(777), agreed.split(777), strict=True):
        parts = parts.seen(c, a)
    assert once.agree.beta() == pytest.approx(parts.agree.beta()) and once.disagree.beta() == pytest.approx(parts.disagree.beta())
    assert once.agree.beta() == pytest.approx((6, 2), rel=0.05) and once.disagree.beta() == pytest.approx((2, 4), rel=0.05)
    assert BetaMixture().seen(confidence[:0], agreed[:0]) == BetaMixture()


def test_mixture_threshold_is_the_first_grid_point_that_is_likely_enough():
    found = BetaMixture().seen(*pairs(20_000, 1))
    at = torch.tensor(found.grid, dtype=torch.float64)
    beta = torch.distributions.Beta
    f = [beta(*(torch.tensor(v, dtype=torch.float64) for v in m.beta())).log_prob(at).exp() for m in (found.agree, found.disagree)]
    likely = f[0] / (f[0] + f[1])
    assert [found.likely(c) for c in found.grid] == pytest.approx(likely.tolist())
    assert len(found.grid) == 10 and found.grid[0] == pytest.approx(0.3) and found.grid[-1] == pytest.approx(0.9)
    expected = next(c for c, p in zip(found.grid, likely.tolist()) if p > 0.4)
    assert found.grid[0] < expected < found.grid[-1] and found.threshold() == expected
    strict = BetaMixture(zeta=0.95, agree=found.agree, disagree=found.disagree)
    assert strict.threshold() > found.threshold()
    swapped = BetaMixture(zeta=0.95, agree=found.disagree, disagree=found.agree)
    assert BetaMixture(zeta=0.95, low=0.6, agree=swapped.agree, disagree=swapped.disagree).threshold() == math.inf


def test_mixture_before_and_at_the_edge_of_knowledge():
    one = BetaMixture().seen(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, True, False]))
    assert one.threshold() == pytest.approx(0.9) == BetaMixture().threshold()
    same = BetaMixture().seen(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, False, False]))
    assert math.isfinite(same.likely(0.5)) and same.threshold() > 0.3


# ---------------------------------------------------------------------------------------------------------------------- promises


def corpus(texts: int, seed: int, tokens: int = 30, steep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of different difficulty and length: their tokens are far from independent."""
    draw = np.random.default_rng(seed)
    hard = draw.beta(0.6, 2.0, texts)
    length = draw.integers(tokens // 2, tokens + 1, texts)
    index = np.repeat(np.arange(texts), length)
    score = draw.random(index.size)
    chance = (1 - score) ** 2 if steep else np.full(index.size, 0.35)
    agreed = draw.random(index.size) >= 2 * hard[index] * chance
    return torch.from_numpy(score), torch.from_numpy(agreed), torch.from_numpy(index)


def true_risk(steep: bool, grid: np.ndarray) -> np.ndarray:
    """Of every threshold, from many texts, the way it is defined."""
    score, agreed, index = (t.numpy() for t in corpus(60_000, 10**6, steep=steep))
    count = np.bincount(index)
    return np.array([(np.bincount(index, weights=(score >= t) & ~agreed) / count).mean() for t in grid])


@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize("method", [LTT(), RCPS(), LTT(bound=Hoeffding())], ids=["LTT", "RCPS", "Hoeffding"])
def test_disagreement_is_kept_as_often_as_promised(steep, method):
    grid = SharedThreshold(size=40, low=0.0, high=1.0)
    truth = dict(zip(grid.settings(None, 2)[:, 0].tolist(), true_risk(steep, grid.settings(None, 2)[:, 0])))
    risk = Risk(max_disagreement=0.08, delta=0.1)
    runs, broken, left = 150, 0, 0.0
    for seed in range(runs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            plan = certify_agreement(*corpus(80, seed, steep=steep), risk, **ABOUT, method=method, grid=grid)
        broken += truth[plan.threshold] > 0.08
        left += plan.left.value / runs
    assert broken / runs <= 0.1 + 2.5 * (0.1 * 0.9 / runs) ** 0.5
    if not (isinstance(method, LTT) and method.bound is not None):
        assert left > 0.1  # a promise that lets nothing leave would be easy to keep


def test_the_point_estimate_breaks_what_the_others_promise():
    grid = SharedThreshold(size=40, low=0.0, high=1.0)
    truth = dict(zip(grid.settings(None, 2)[:, 0].tolist(), true_risk(True, grid.settings(None, 2)[:, 0])))
    broken, runs = 0, 100
    for seed in range(runs):
        plan = certify_agreement(*corpus(80, seed, steep=True), Risk(max_disagreement=0.08), **ABOUT, method=PointEstimate(), grid=grid)
        assert not plan.certificate.guaranteed and plan.certificate.delta is None
        broken += truth[plan.threshold] > 0.08
    assert broken / runs > 0.2


def test_risk_in_expectation_by_crc():
    grid = SharedThreshold(size=40, low=0.0, high=1.0)
    truth = dict(zip(grid.settings(None, 2)[:, 0].tolist(), true_risk(True, grid.settings(None, 2)[:, 0])))
    risk = Risk(max_disagreement=0.08, in_expectation=True)
    found = [truth[certify_agreement(*corpus(80, s, steep=True), risk, **ABOUT, grid=grid).threshold] for s in range(120)]
    assert 0.04 < np.mean(found) <= 0.08 + 2.5 * np.std(found) / len(found) ** 0.5


def test_a_text_counts_once_and_losses_are_what_they_say():
    score, agreed, index = corpus(40, 3)
    shuffled = torch.randperm(len(score), generator=torch.Generator().manual_seed(0))
    risk = Risk(max_disagreement=0.2)
    plan = certify_agreement(score, agreed, index, risk, **ABOUT)
    assert certify_agreement(score[shuffled], agreed[shuffled], index[shuffled], risk, **ABOUT) == plan
    t = plan.threshold
    assert math.isfinite(t)
    per_text = [float(((score >= t) & ~agreed)[index == i].double().mean()) for i in range(40)]
    gone = [float((score >= t)[index == i].double().mean()) for i in range(40)]
    assert plan.certificate.realised["max_disagreement"].value == pytest.approx(np.mean(per_text))
    assert plan.left.value == pytest.approx(np.mean(gone))
    assert plan.certificate.items == 40 and plan.certificate.delta == 0.1


def test_where_nothing_can_be_promised_nothing_leaves():
    score, agreed, index = corpus(5, 0)
    with pytest.warns(NoEffectWarning):
        plan = certify_agreement(score, agreed, index, Risk(max_disagreement=0.01), **ABOUT)
    assert plan.threshold == math.inf and plan.left.value == 0
    table = np.full((5, 2), 0.9)
    with pytest.warns(NoEffectWarning):
        assert certify_table(np.array([0.9, 0.5]), table, table, Risk(max_disagreement=0.01), **ABOUT).threshold == math.inf


@pytest.mark.parametrize("limit", [0.2, 0.001])
@pytest.mark.parametrize(
    "way",
    [Accept(exits=(0,)), Accept(math.inf, Margin(), CatchUp(3), exits=(2,)), Accept(0.1, Energy(temperature=2.0), Copy(), exits=(1,))],
    ids=["all as usual", "margin", "energy, copied"],
)
def test_a_plan_keeps_the_way_it_was_calibrated_with_and_is_saved(limit, way, tmp_path):
    """Rule, fill and exit: what a threshold means is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        plan = certify_agreement(*corpus(60, 1), Risk(max_disagreement=limit), way=way, fingerprint="abc")
    assert plan.way == replace(way, threshold=plan.threshold) and plan.certificate.fingerprint == "abc"
    assert math.isinf(plan.threshold) == (limit == 0.001)
    assert AcceptPlan.from_dict(json.loads(json.dumps(plan.to_dict())), PARTS | WAYS) == plan
    plan.save(tmp_path)
    assert AcceptPlan.load(tmp_path, PARTS | WAYS) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["accept_plan.json"], "and nothing half-written beside it"
    assert f"at most {limit:g}" in str(plan) and type(way.rule).__name__ in str(plan)


def test_a_threshold_that_decays_still_does():
    table = np.zeros((40, 2))
    calm = Accept(Decaying(0.9, temperature=2.0), Margin(), Copy())
    plan = certify_table(T2, table, table, LIMIT, way=calm, fingerprint="abc")
    assert plan.way == Accept(Decaying(0.5, temperature=2.0), Margin(), Copy()) and plan.threshold == 0.5
    assert AcceptPlan.from_dict(json.loads(json.dumps(plan.to_dict())), PARTS | WAYS) == plan
    with pytest.warns(NoEffectWarning):
        nothing = certify_table(np.array([math.inf, 0.5]), table + T2, table, LIMIT, way=calm, fingerprint="abc")
    assert nothing.way == Accept(math.inf, Margin(), Copy())


def test_weights_of_a_learned_rule_are_saved_with_the_plan(tmp_path):
    torch.manual_seed(0)
    gate = LearnedGate(exits=1)
    plan = certify_agreement(*corpus(60, 1), Risk(max_disagreement=0.2), way=Accept(rule=gate, exits=(0,)), fingerprint="abc")
    with pytest.raises(InvalidInput, match=r"use save\(folder\)"):
        plan.to_dict()
    plan.save(tmp_path)
    again = AcceptPlan.load(tmp_path, PARTS | WAYS)
    kept, own = again.way.rule.state_dict(), gate.state_dict()
    assert kept.keys() == own.keys() and all(torch.equal(kept[k], own[k]) for k in own)
    (tmp_path / "accept_plan.safetensors").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        AcceptPlan.load(tmp_path, PARTS | WAYS)


def test_a_garbled_plan_is_refused():
    data = certify_agreement(*corpus(60, 1), Risk(max_disagreement=0.2), **ABOUT).to_dict()
    for broken in ({k: v for k, v in data.items() if k != "way"}, data | {"threshold": "much"}, data | {"way": 3}):
        with pytest.raises(ArtifactError):
            AcceptPlan.from_dict(broken, PARTS | WAYS)
    with pytest.raises(ArtifactError, match="known types"):
        AcceptPlan.from_dict(data, WAYS)


def test_a_plan_is_of_one_model():
    plan = certify_agreement(*corpus(60, 1), Risk(max_disagreement=0.2), **ABOUT)
    plan.check("abc")
    for other in ("abd", ""):
        with pytest.raises(FingerprintMismatch, match="certify again"):
            plan.check(other)
    with pytest.raises(TypeError, match="fingerprint"):
        certify_agreement(*corpus(9, 0), LIMIT, way=Accept(exits=(0,)))


# ---------------------------------------------------------------------------------------------------------------------- schedule


def test_schedule_falls_linearly_and_needs_no_missing_key():
    s = LinearDepth(24, 20, 5, warmup=2)
    depths = [s.depth(t, 31) for t in range(31)]
    assert depths[0] == 20 and depths[-1] == 5 and depths[10] == 15 and sorted(depths, reverse=True) == depths
    ran = [set(s.executed(t, 31)) for t in range(31)]
    assert all(len(r) == d and {0, 1, 23} <= r for r, d in zip(ran, depths))
    assert all(later <= earlier for earlier, later in pairwise(ran))
    assert s.mean_cost(31) == pytest.approx(sum(depths) / (31 * 24))
    assert s.depth(0, 1) == 20


@pytest.mark.parametrize(("blocks", "speedup", "length", "warmup"), [(24, 2.0, 64, 1), (12, 1.5, 20, 2), (32, 5.0, 128, 1), (6, 1.0, 9, 0)])
def test_schedule_of_a_speedup_by_brute_force(blocks, speedup, length, warmup):
    found = LinearDepth.for_speedup(blocks, speedup, length, warmup=warmup)
    every = [LinearDepth(blocks, top, least, warmup) for top in range(warmup + 1, blocks + 1) for least in range(warmup + 1, top + 1)]
    within = [(s.mean_cost(length), s.most) for s in every if s.mean_cost(length) <= 1 / speedup + 1e-12]
    assert (found.mean_cost(length), found.most) == max(within)
    assert 1 / found.mean_cost(length) >= speedup - 1e-9


def test_schedule_that_cannot_be():
    with pytest.raises(BudgetInfeasible) as e:
        LinearDepth.for_speedup(12, 8.0, 10, warmup=2)
    assert e.value.best == pytest.approx(4.0)
    assert LinearDepth.for_speedup(12, 3.99, 10, warmup=2).mean_cost(10) <= 1 / 3.99
    settled = LinearDepth.for_speedup(24, 2.0, 50, most=18)
    assert settled.most == 18 and settled.least < 18


@pytest.mark.parametrize(
    "make",
    [
        lambda: tolerant_thresholds(torch.rand(3), torch.ones(4, dtype=torch.bool), 0.1),
        lambda: tolerant_thresholds(torch.rand(3), torch.ones(3), 0.1),
        lambda: tolerant_thresholds(torch.tensor([math.nan]), torch.tensor([True]), 0.1),
        lambda: tolerant_thresholds(torch.rand(3), torch.ones(3, dtype=torch.bool), 1.0),
        lambda: BetaMixture(zeta=1.0),
        lambda: BetaMixture().seen(torch.tensor([1.5]), torch.tensor([True])),
        lambda: certify_agreement(*corpus(9, 0), Risk(max_drop=0.1), **ABOUT),
        lambda: certify_agreement(torch.rand(3), torch.ones(3, dtype=torch.bool), torch.zeros(3), LIMIT, **ABOUT),
        lambda: certify_table(T2[::-1], Z2, Z2, LIMIT, **ABOUT),
        lambda: certify_table(T2, Z2, Z2[:, :1], LIMIT, **ABOUT),
        lambda: certify_table(T2, Z2, Z2, LIMIT, **ABOUT, method=CRC()),
        lambda: certify_table(T2, Z2, Z2, Risk(max_disagreement=0.1, in_expectation=True), **ABOUT, method=LTT()),
        lambda: certify_agreement(*corpus(9, 0), LIMIT, way=Accept(exits=(0,)), fingerprint=""),
        lambda: certify_agreement(*corpus(9, 0), LIMIT, way=Accept(), fingerprint="abc"),  # scores of which exit?
        lambda: certify_agreement(*corpus(9, 0), LIMIT, way=Accept(exits=(0, 1)), fingerprint="abc"),
        lambda: certify_agreement(*corpus(9, 0), LIMIT, way=Accept(Decaying(0.5), exits=(0,)), fingerprint="abc"),
        lambda: certify_agreement(*corpus(9, 0), LIMIT, way=Plain(), fingerprint="abc"),
        lambda: certify_table(T2, Z2, Z2, LIMIT, way=Accept(BetaMixture()), fingerprint="abc"),
        lambda: certify_table(T2, Z2, Z2, LIMIT, way=Accept((0.5, 0.4)), fingerprint="abc"),
        lambda: certify_table(T2, Z2, Z2, LIMIT, way=Accept(), fingerprint=None),
        lambda: LinearDepth(12, 4, 6),
        lambda: LinearDepth(12, 6, 4).depth(5, 5),
        lambda: LinearDepth.for_speedup(12, 0.5, 10),
        lambda: LinearDepth.for_speedup(12, 2.0, 10, most=1),
    ],
)
def test_refuses(make):
    with pytest.raises(InvalidInput):
        make()
