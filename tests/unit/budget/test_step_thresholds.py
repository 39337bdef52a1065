"""Thresholds found by running: bisection on noisy steps, and promises about drift that hold by Monte Carlo."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

from offramp.budget import (
    CRC,
    LTT,
    RCPS,
    DriftLimit,
    HoeffdingBentkus,
    PointEstimate,
    SharedThreshold,
    ThresholdPlan,
    run_settings,
    threshold_for_cost,
    threshold_for_quality,
)
from offramp.core.errors import ArtifactError, BudgetInfeasible, FingerprintMismatch, InvalidInput, NoEffectWarning

# --------------------------------------------------------------------------------------------------------------------- for a cost


def cache(threshold: float, samples: int = 64, steps: int = 30) -> torch.Tensor:
    """A cache that is really run: change piles up until it passes the threshold, then the step computes. Cost ``[samples]``."""
    change = np.random.default_rng(0).gamma(2, 0.05, (samples, steps))
    computed, pile = np.ones(samples), np.zeros(samples)
    for s in range(1, steps):
        pile += change[:, s]
        now = pile >= threshold
        computed += now
        pile[now] = 0
    return torch.from_numpy(0.2 + 0.8 * computed / steps)


@pytest.mark.parametrize("target", [0.9, 0.6, 0.5, 0.35])
def test_bisection_meets_the_budget_from_below(target):
    calls = []

    def run(threshold):
        calls.append(threshold)
        return cache(threshold)

    plan = threshold_for_cost(run, target, 0.0, 2.0, tolerance=0.01, runs=20, fingerprint="dit+ddim50")
    assert target * 0.99 <= plan.cost.value <= target + 1e-9
    assert plan.cost.value == pytest.approx(cache(plan.threshold).mean()) and plan.cost.low < plan.cost.value < plan.cost.high
    assert sorted(calls) == [t.threshold for t in plan.tried] and len(set(calls)) == len(calls) <= 20
    assert all(t.certified == (t.cost.value <= target + 1e-9) and t.drift is None for t in plan.tried)
    assert not plan.certificate.guaranteed and plan.certificate.requested == {"mean_cost": target} and plan.certificate.items == 64
    assert plan.certificate.realised["mean_cost"] == plan.cost and plan.certificate.fingerprint == "dit+ddim50"
    assert f"requested {target:>9.4g}" in str(plan) and "guarantee  none" in str(plan) and "> " in str(plan)


def test_cost_may_rise_with_the_threshold():
    """Scores of this library: a point fires at score >= threshold, so a higher one computes more."""
    down = threshold_for_cost(cache, 0.6, 0.0, 2.0, runs=16)
    up = threshold_for_cost(lambda t: cache(-t), 0.6, -2.0, 0.0, runs=16)
    assert up.threshold == -down.threshold and up.cost == down.cost


def test_noise_does_not_cost_the_budget():
    """Measured costs that are not quite monotone: what is returned was seen to be within the target, and is the dearest such."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        plan = threshold_for_cost(lambda t, draw=draw: cache(t) + draw.normal() * 0.02, 0.55, 0.0, 2.0, runs=14)
        within = [t.cost.value for t in plan.tried if t.cost.value <= 0.55 * (1 + 1e-9)]
        assert plan.cost.value == max(within)
        assert abs(cache(plan.threshold).mean() - 0.55) < 0.1


def test_a_jump_is_not_bridged_and_ends_the_search():
    plan = threshold_for_cost(lambda t: [1.0, 1.0] if t < 0.5 else [0.4, 0.4], 0.7, 0.0, 1.0, runs=200)
    assert plan.cost.value == 0.4 and plan.threshold == 0.5 and len(plan.tried) < 70


def test_ends_that_settle_it():
    with pytest.warns(NoEffectWarning, match="widen"):
        plan = threshold_for_cost(cache, 1.0, 0.5, 2.0)
    assert plan.threshold == 0.5 and len(plan.tried) == 2
    least = float(cache(2.0).mean())
    with pytest.raises(BudgetInfeasible, match="least seen") as caught:
        threshold_for_cost(cache, 0.1, 0.0, 2.0)
    assert caught.value.best == pytest.approx(least) and caught.value.requested == 0.1
    assert threshold_for_cost(cache, least, 0.0, 2.0).threshold == 2.0


def test_of_equal_costs_the_gentlest_setting():
    with pytest.warns(NoEffectWarning):
        assert threshold_for_cost(lambda t: [0.5], 0.6, 0.0, 1.0).threshold == 0.0
    assert threshold_for_cost(lambda t: [1.0 if t <= 0 else 0.5], 0.6, 0.0, 1.0, runs=6, tolerance=0).threshold == 1 / 16


@pytest.mark.parametrize("arguments", [(0.0, 0.0, 1.0), (0.5, 1.0, 1.0), (0.5, 0.0, math.inf), (math.nan, 0.0, 1.0)])
def test_bad_searches(arguments):
    with pytest.raises(InvalidInput, match="target above 0"):
        threshold_for_cost(cache, *arguments)


def test_bad_runs():
    with pytest.raises(InvalidInput, match="runs must"):
        threshold_for_cost(cache, 0.5, 0.0, 1.0, runs=1)
    for costs in ([], [math.nan], [[1.0]], 0.5):
        with pytest.raises(InvalidInput, match="one finite cost"):
            threshold_for_cost(lambda t, costs=costs: costs, 0.5, 0.0, 1.0)
    with pytest.raises(InvalidInput, match="same samples"):
        threshold_for_cost(lambda t: [1.0] * (1 + int(t)), 0.5, 0.0, 1.0)


# ------------------------------------------------------------------------------------------------------------------- for a quality

GRID = tuple(np.linspace(0, 1, 21).tolist())


def table(samples: int, seed: int, scale: float = 0.4):
    """Drift and cost ``[samples, 21]``: drift grows with the threshold at a pace of each sample's own."""
    draw = np.random.default_rng(seed)
    t = np.array(GRID)
    drift = scale * t[None] * draw.gamma(2, 0.5, (samples, 1)) * draw.uniform(0.7, 1.3, (samples, t.size))
    cost = 1 - 0.7 * t[None] * draw.uniform(0.9, 1.0, (samples, 1))
    return drift, cost


# Each limit is just missed by some setting of the grid, so that a test which errs at all shows it.
LIMITS = [
    pytest.param(DriftLimit(0.099), None, id="mean, LTT"),
    pytest.param(DriftLimit(0.099), RCPS(), id="mean, RCPS"),
    pytest.param(DriftLimit(0.099, cap=2.0), LTT(bound=HoeffdingBentkus()), id="mean, HB"),
    pytest.param(DriftLimit(0.095, above=0.2), None, id="share, LTT"),
    pytest.param(DriftLimit(0.099, in_expectation=True), None, id="mean, CRC"),
    pytest.param(DriftLimit(0.095, above=0.2, in_expectation=True), None, id="share, CRC"),
]


@pytest.mark.parametrize("limit, method", LIMITS)
def test_the_promise_holds_by_monte_carlo(limit, method):
    """Against the truth from 40,000 fresh samples. delta is 0.1; of 200 draws at most 10 % + 3 sigma may fail."""
    truth = limit.losses(table(40_000, 10**6)[0]).mean(axis=0)
    reached, used = [], 0
    for seed in range(200):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            plan = threshold_for_quality(GRID, *table(150, seed), limit, method=method, exact_first=True)
        reached.append(truth[GRID.index(plan.threshold)])
        used += plan.threshold > 0
        assert plan.certificate.guaranteed and plan.certificate.delta == (None if limit.in_expectation else 0.1)
    if limit.in_expectation:
        assert np.mean(reached) <= limit.limit
    else:
        assert np.mean(np.array(reached) > limit.limit) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)
    assert used > 190  # and something is saved


def test_the_point_estimate_breaks_its_word_where_a_test_keeps_it():
    limit = DriftLimit(0.099)
    truth = limit.losses(table(40_000, 10**6)[0]).mean(axis=0)
    broken = {}
    for method in (PointEstimate(), LTT()):
        plans = [threshold_for_quality(GRID, *table(150, seed), limit, method=method) for seed in range(100)]
        broken[method.name] = sum(truth[GRID.index(p.threshold)] > limit.limit for p in plans)
        assert all(p.certificate.guaranteed == method.guaranteed for p in plans)
    assert broken["point estimate"] > 30 and broken["LTT"] <= 10
    plan = threshold_for_quality(GRID, *table(150, 0), limit, method=PointEstimate())
    assert "measured" in plan.certificate.statement and plan.certificate.delta is None


def test_the_cheapest_certified_setting_is_chosen_and_all_are_shown():
    drift, cost = table(400, 0)
    plan = threshold_for_quality(GRID, drift, torch.from_numpy(cost), DriftLimit(0.1), fingerprint="f")
    certified = [t for t in plan.tried if t.certified]
    assert plan.cost.value == min(t.cost.value for t in certified) and plan.threshold == max(t.threshold for t in certified)
    assert [t.threshold for t in plan.tried] == list(GRID)
    assert plan.certificate.realised["drift"].value == pytest.approx(np.minimum(drift[:, GRID.index(plan.threshold)], 1).mean())
    assert plan.certificate.requested == {"drift": 0.1, "delta": 0.1} and plan.fingerprint == plan.certificate.fingerprint == "f"
    # The order of the settings says which is strict, not the sign of the threshold.
    turned = threshold_for_quality([-t for t in GRID], drift, cost, DriftLimit(0.1))
    assert turned.threshold == -plan.threshold
    assert [t.threshold for t in turned.tried] == sorted(-t for t in GRID)


def test_shares_of_samples_use_the_exact_test_and_means_do_not():
    drift, cost = np.zeros((60, 2)), np.ones((60, 2))
    assert "ClopperPearson" in threshold_for_quality([0, 1], drift, cost, DriftLimit(0.1, above=0.5)).certificate.method
    assert "WSR" in threshold_for_quality([0, 1], drift, cost, DriftLimit(0.1)).certificate.method
    # 22 samples without a drift certify a share of 0.1 at delta 0.1 (0.9^22 < 0.1), 21 do not.
    assert threshold_for_quality([1], drift[:22, :1], cost[:22, :1], DriftLimit(0.1, above=0.5)).threshold == 1
    with pytest.raises(BudgetInfeasible):
        threshold_for_quality([1], drift[:21, :1], cost[:21, :1], DriftLimit(0.1, above=0.5))


def test_what_is_not_finite_is_total_drift():
    limit = DriftLimit(0.5, cap=2.0)
    assert limit.losses(np.array([0.0, 1.0, 3.0, math.nan, math.inf])).tolist() == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert DriftLimit(0.5, above=1.0).losses(np.array([1.0, 1.1, math.nan])).tolist() == [0.0, 1.0, 1.0]


def test_nothing_certified():
    drift, cost = table(100, 0, scale=3.0)
    with pytest.raises(BudgetInfeasible, match="100 samples") as caught:
        threshold_for_quality(GRID[1:], drift[:, 1:], cost[:, 1:], DriftLimit(0.02))
    assert 0.02 < caught.value.best < 1 and caught.value.requested == 0.02
    with pytest.raises(BudgetInfeasible, match="conformal"):
        threshold_for_quality(GRID[1:], drift[:, 1:], cost[:, 1:], DriftLimit(0.02, in_expectation=True))
    with pytest.warns(NoEffectWarning, match="100 samples"):
        plan = threshold_for_quality(GRID, drift, cost, DriftLimit(0.02), exact_first=True)
    assert plan.threshold == 0 and plan.cost.value == 1
    with pytest.raises(InvalidInput, match="not exact"):
        threshold_for_quality(GRID, drift + 0.1, cost, DriftLimit(0.02), exact_first=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"thresholds": [0.0, 1.0, 1.0]}, "strictly rising or falling"),
        ({"thresholds": [0.0, 1.0]}, r"\[samples, 2 settings\]"),
        ({"thresholds": []}, "strictly rising or falling"),
        ({"cost": np.full((9, 3), np.nan)}, "finite"),
        ({"drift": np.full((9, 3), -1.0)}, "negative"),
        ({"drift": np.ones((8, 3))}, "alike"),
        ({"method": CRC()}, "CRC and only by it"),
        ({"limit": DriftLimit(0.1, in_expectation=True), "method": LTT()}, "CRC and only by it"),
        ({"method": LTT(family=SharedThreshold())}, "leave it out"),
    ],
)
def test_bad_tables(change, message):
    arguments = {"thresholds": [0.0, 1.0, 2.0], "drift": np.zeros((9, 3)), "cost": np.ones((9, 3)), "limit": DriftLimit(0.1)} | change
    with pytest.raises(InvalidInput, match=message):
        threshold_for_quality(**arguments)


@pytest.mark.parametrize(
    "bad", [{"limit": 0.0}, {"limit": 1.0}, {"limit": 0.1, "delta": 0}, {"limit": 0.1, "cap": 0}, {"limit": 0.1, "above": -1}]
)
def test_bad_limits(bad):
    with pytest.raises(InvalidInput, match="DriftLimit"):
        DriftLimit(**bad)


def test_settings_are_run_one_after_another_on_the_same_samples():
    drift, cost = run_settings(lambda t: (torch.full((5,), t), np.full(5, 1 - t)), [0.0, 0.25, 0.5])
    assert drift.tolist() == [[0.0, 0.25, 0.5]] * 5 and cost.tolist() == [[1.0, 0.75, 0.5]] * 5
    with pytest.raises(InvalidInput, match="same samples"):
        run_settings(lambda t: (np.zeros(3 + int(t)), np.zeros(3)), [0.0, 1.0])
    with pytest.raises(InvalidInput, match="one setting"):
        run_settings(lambda t: (np.zeros(3), np.zeros(3)), [])


# ------------------------------------------------------------------------------------------------------------------------- file


def test_save_load_and_the_fingerprint(tmp_path):
    for name, plan in {
        "cost": threshold_for_cost(cache, 0.6, 0.0, 2.0, fingerprint="model|sampler"),
        "quality": threshold_for_quality(GRID, *table(200, 0), DriftLimit(0.1), fingerprint="model|sampler"),
    }.items():
        plan.save(tmp_path / name)
        assert ThresholdPlan.load(tmp_path / name) == plan
        plan.check("model|sampler")
        with pytest.raises(FingerprintMismatch, match="measure again"):
            plan.check("model|another sampler")
    path = tmp_path / "cost" / "threshold.json"
    data = json.loads(path.read_text())
    data["content"]["threshold"] = "0.9"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="altered"):
        ThresholdPlan.load(tmp_path / "cost")
    del data["sha256"], data["content"]["tried"]
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="lacks"):
        ThresholdPlan.load(tmp_path / "cost")
