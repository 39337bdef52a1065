"""`calibrate` for every target: what it promises, what it refuses, what the certificate says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget_synthetic import RULE, Given, latency, synthetic, trace_of

from offramp.budget import (
    CRC,
    LTT,
    RCPS,
    All,
    DesignedPath,
    DriftMonitor,
    DriftReference,
    ExitShares,
    ExponentialWeights,
    GeometricShares,
    HoeffdingBentkus,
    Latency,
    MeanCost,
    OptimalStopping,
    PeakCost,
    PointEstimate,
    QuantileCost,
    Risk,
    SharedThreshold,
    Utility,
    calibrate,
    evaluate,
    exit_latency_ms,
    leave_at,
)
from offramp.budget.drift import chi_square, psi
from offramp.core.certificate import Plan
from offramp.core.errors import BudgetInfeasible, FingerprintMismatch, InvalidInput, NoEffectWarning, NotReplayable
from offramp.core.parts import part_key
from offramp.core.trace import Trace

INF = math.inf


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthetic(4000, seed=0)


def certificate_fits(plan: Plan, trace: Trace) -> None:
    c = plan.certificate
    assert c is not None and c.fingerprint == plan.fingerprint == trace.fingerprint
    assert set(c.requested) - {"delta", "beta"} <= set(c.realised)
    assert all(e.low <= e.value <= e.high for e in c.realised.values())
    assert type(c).from_dict(c.to_dict()) == c
    assert "requested" in str(plan)


@pytest.mark.parametrize("method", [None, GeometricShares(), QuantileCost(), ExponentialWeights(), OptimalStopping()])
def test_mean_cost(trace: Trace, method: OptimalStopping | None) -> None:
    plan = calibrate(trace, RULE, MeanCost(0.5), method=method)
    certificate_fits(plan, trace)
    assert 0.5 - 1 / 4000 <= plan.mean_cost <= 0.5
    assert plan.certificate is not None and not plan.certificate.guaranteed and plan.certificate.items == 4000
    assert plan.certificate.realised["mean_cost"].value == plan.mean_cost
    assert plan.certificate.method == type(method or OptimalStopping()).__name__
    assert sum(s * c for s, c in zip(plan.shares, trace.cost.tolist(), strict=True)) / trace.base_cost == pytest.approx(plan.mean_cost)


def test_mean_cost_without_labels_takes_geometric_shares(trace: Trace) -> None:
    plan = calibrate(replace(trace, losses=None), RULE, MeanCost(0.5))
    assert plan.certificate is not None and plan.certificate.method == "GeometricShares"
    assert "error" not in plan.certificate.realised and "disagreement" in plan.certificate.realised


def test_infeasible_mean_cost_names_the_best(trace: Trace) -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        calibrate(trace, RULE, MeanCost(0.2))
    assert caught.value.best == 0.25 and caught.value.requested == 0.2


@pytest.mark.parametrize("limit", ["max_drop", "max_error", "max_disagreement"])
@pytest.mark.parametrize("method", [None, LTT(HoeffdingBentkus()), LTT(family=DesignedPath()), LTT(starts=3), RCPS(), PointEstimate()])
def test_risk(trace: Trace, limit: str, method: LTT | None) -> None:
    value = {"max_drop": 0.08, "max_error": 0.35, "max_disagreement": 0.2}[limit]
    plan = calibrate(trace, RULE, Risk(**{limit: value}, delta=0.1), method=method)
    certificate_fits(plan, trace)
    c = plan.certificate
    assert c is not None and c.realised[limit].value <= value and plan.mean_cost < 1
    assert c.guaranteed is not isinstance(method, PointEstimate)
    assert c.delta == (None if isinstance(method, PointEstimate) else 0.1)
    split = 1200 if isinstance(method, LTT) and method.family is not None else 0
    assert c.items == 4000 - split
    # A promise costs something: the naive choice goes at least as deep into the limit.
    naive = calibrate(trace, RULE, Risk(**{limit: value}), method=PointEstimate(getattr(method, "family", None)))
    assert naive.mean_cost <= plan.mean_cost + 1e-12


def test_risk_in_expectation(trace: Trace) -> None:
    plan = calibrate(trace, RULE, Risk(max_disagreement=0.2, in_expectation=True))
    assert plan.certificate is not None and plan.certificate.method.startswith("CRC") and plan.certificate.delta is None
    assert plan.certificate.guaranteed and "expectation" in plan.certificate.statement
    with pytest.raises(InvalidInput, match="CRC"):
        calibrate(trace, RULE, Risk(max_drop=0.1), method=CRC())
    with pytest.raises(InvalidInput, match="CRC"):
        calibrate(trace, RULE, Risk(max_drop=0.1, in_expectation=True), method=LTT())


def test_positive_part_is_stricter_than_the_signed_drop(trace: Trace) -> None:
    grid = RCPS(family=SharedThreshold())  # the same bound for both; by default the positive part has an exact one
    signed = calibrate(trace, RULE, Risk(max_drop=0.08), method=grid)
    positive = calibrate(trace, RULE, Risk(max_drop=0.08, signed=False), method=grid)
    assert signed.mean_cost <= positive.mean_cost
    measured = [p.certificate.realised["max_drop"].value for p in (signed, positive) if p.certificate is not None]
    assert measured[1] <= measured[0] <= 0.08


def test_disagreement_needs_no_labels(trace: Trace) -> None:
    with_labels = calibrate(trace, RULE, Risk(max_disagreement=0.2))
    without = calibrate(replace(trace, losses=None), RULE, Risk(max_disagreement=0.2))
    assert with_labels.thresholds == without.thresholds
    with pytest.raises(InvalidInput, match="no losses"):
        calibrate(replace(trace, losses=None), RULE, Risk(max_drop=0.1))


def test_what_never_leaving_cannot_meet_is_infeasible(trace: Trace) -> None:
    assert trace.losses is not None
    full = float(trace.losses[:, -1].mean())
    with pytest.raises(BudgetInfeasible) as caught:
        calibrate(trace, RULE, Risk(max_error=full / 4))
    assert caught.value.best > full / 4
    with pytest.warns(NoEffectWarning):
        plan = calibrate(trace.subset(torch.arange(60)), RULE, Risk(max_drop=0.001))
    assert plan.shares[-1] == 1 and plan.certificate is not None and plan.certificate.guaranteed
    assert plan.certificate.realised["drop"].value == 0


def test_the_design_items_are_not_certifying_items(trace: Trace) -> None:
    design, certify = DesignedPath().split(4000)
    assert len(design) == 1200 and len(certify) == 2800 and not set(design) & set(certify)
    assert len(DesignedPath(most=100).split(4000)[0]) == 100
    plan = calibrate(trace, RULE, Risk(max_drop=0.08), method=LTT(family=DesignedPath()))
    realised = evaluate(trace.subset(torch.from_numpy(certify)), RULE, plan.thresholds)
    assert plan.shares == pytest.approx(realised.shares)
    # Changing what certifies must not change the path: the settings depend on the design items alone.
    assert trace.losses is not None
    other = trace.losses.clone()
    other[certify] = other[certify].flip(0)
    from offramp.budget.replay import columns, drop_loss
    from offramp.budget.risk_control import gather_evidence

    cols, cost = columns(trace.scores(RULE)), trace.cost.numpy()
    a = gather_evidence(cols, cost, drop_loss(trace), RULE, DesignedPath())
    b = gather_evidence(cols, cost, drop_loss(replace(trace, losses=other)), RULE, DesignedPath())
    assert np.array_equal(a.path, b.path) and not np.array_equal(a.sample.mean, b.sample.mean)


def test_a_fixed_grid_needs_a_range(trace: Trace) -> None:
    rule = Given(bounds=None)
    unbounded = trace_of(trace.scores(RULE), trace.losses, rule=rule)
    calibrate(unbounded, rule, Risk(max_drop=0.08))
    calibrate(unbounded, rule, Risk(max_drop=0.08), method=LTT(family=SharedThreshold(low=0, high=1)))
    with pytest.raises(InvalidInput, match="range"):
        calibrate(unbounded, rule, Risk(max_drop=0.08), method=LTT(family=SharedThreshold()))


def test_latency() -> None:
    trace = synthetic(3000, seed=1, latency=latency(4))
    assert exit_latency_ms(trace).tolist() == pytest.approx([1.3, 2.6, 3.9, 4.9])
    assert exit_latency_ms(trace, 5).tolist() == pytest.approx([2.3, 4.6, 6.9, 8.9])
    plan = calibrate(trace, RULE, Latency(mean_ms=3.0))
    certificate_fits(plan, trace)
    assert plan.certificate is not None and 3.0 - 3.6 / 3000 <= plan.certificate.realised["mean_ms"].value <= 3.0
    tail = calibrate(trace, RULE, Latency(p95_ms=4.0))
    certificate_fits(tail, trace)
    assert tail.certificate is not None and tail.certificate.realised["p95_ms"].value <= 4.0
    assert tail.shares[-1] <= 0.05
    for target, best in [(Latency(mean_ms=1.0), 1.3), (Latency(p95_ms=1.0), 1.3)]:
        with pytest.raises(BudgetInfeasible) as caught:
            calibrate(trace, RULE, target)
        assert caught.value.best == pytest.approx(best)
    with pytest.raises(InvalidInput, match="not timed"):
        calibrate(trace, RULE, Latency(mean_ms=3.0, batch_size=9))
    with pytest.raises(InvalidInput, match="no latency table"):
        calibrate(replace(trace, latency=None), RULE, Latency(mean_ms=3.0))


def test_peak_cost(trace: Trace) -> None:
    plan = calibrate(trace, RULE, PeakCost(0.75))
    certificate_fits(plan, trace)
    assert plan.shares == (0, 0, 1, 0) and plan.mean_cost == 0.75
    both = calibrate(trace, RULE, All(PeakCost(0.75), MeanCost(0.5)))
    certificate_fits(both, trace)
    assert both.shares[3] == 0 and both.shares[0] > 0 and 0.4995 < both.mean_cost <= 0.5
    with pytest.raises(BudgetInfeasible) as caught:
        calibrate(trace, RULE, PeakCost(0.1))
    assert caught.value.best == 0.25
    with pytest.warns(NoEffectWarning):
        calibrate(trace, RULE, PeakCost(1.0))


def test_utility_trades_loss_for_cost(trace: Trace) -> None:
    plans = [calibrate(trace, RULE, Utility(b)) for b in (0.05, 0.3, 1.0)]
    assert plans[0].mean_cost > plans[1].mean_cost > plans[2].mean_cost

    def utility(plan: Plan, beta: float) -> float:
        r = evaluate(trace, RULE, plan.thresholds)
        assert r.accuracy is not None
        return r.accuracy - beta * r.mean_cost.value

    for beta, plan in zip((0.05, 0.3, 1.0), plans, strict=True):
        assert utility(plan, beta) >= max(utility(p, beta) for p in plans) - 1e-9
    assert calibrate(trace, RULE, Utility(100.0)).shares[0] == 1


def test_exit_shares(trace: Trace) -> None:
    plan = calibrate(trace, RULE, ExitShares((0.4, 0.3, 0.2, 0.1)))
    certificate_fits(plan, trace)
    assert plan.shares == pytest.approx((0.4, 0.3, 0.2, 0.1), abs=1 / 4000)
    with pytest.raises(InvalidInput, match="4 shares"):
        calibrate(trace, RULE, ExitShares((0.5, 0.5)))
    skip = calibrate(trace, RULE, ExitShares((0.5, 0, 0.5, 0)))
    assert skip.thresholds[1] == INF and skip.shares == pytest.approx((0.5, 0, 0.5, 0))


def test_targets_combine() -> None:
    trace = synthetic(4000, seed=5, latency=latency(4))
    risk, cheap = Risk(max_drop=0.08), calibrate(synthetic(4000, seed=5), RULE, Risk(max_drop=0.08)).mean_cost
    plan = calibrate(trace, RULE, All(risk, MeanCost(cheap + 0.1)))
    certificate_fits(plan, trace)
    assert plan.certificate is not None and plan.certificate.guaranteed
    assert cheap - 1e-9 <= plan.mean_cost <= cheap + 0.1
    with pytest.raises(BudgetInfeasible) as caught:
        calibrate(trace, RULE, All(risk, MeanCost(0.3)))
    assert caught.value.best == pytest.approx(cheap)
    both = calibrate(trace, RULE, All(MeanCost(0.6), Latency(p95_ms=4.0)))
    assert both.certificate is not None and both.mean_cost <= 0.6 and both.certificate.realised["p95_ms"].value <= 4.0
    capped = calibrate(trace, RULE, All(PeakCost(0.75), Risk(max_drop=0.2)))
    assert capped.shares[3] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Risk(),
        lambda: Risk(max_drop=0.1, max_error=0.1),
        lambda: Risk(max_drop=0.1, delta=0),
        lambda: Risk(max_drop=1.5),
        lambda: MeanCost(0.0),
        lambda: MeanCost(float("nan")),
        lambda: Latency(),
        lambda: Latency(mean_ms=1, p95_ms=1),
        lambda: Latency(mean_ms=1, batch_size=0),
        lambda: Utility(-1),
        lambda: ExitShares((0.5, 0.6)),
        lambda: All(),
        lambda: All(Utility(0.1), MeanCost(0.5)),
        lambda: All(Risk(max_drop=0.1), Risk(max_error=0.1)),
        lambda: DesignedPath(design_share=1.0),
        lambda: LTT(starts=0),
        lambda: ExponentialWeights(beta=-1),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(InvalidInput):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("rule", "target", "message"),
    [
        (RULE, 0.5, "target, as in MeanCost"),
        (RULE, MeanCost, "target, as in MeanCost"),
        (type(RULE), MeanCost(0.5), "rule, as in Confidence"),
        (MeanCost(0.5), RULE, "rule, as in Confidence"),
    ],
)
def test_arguments_of_other_kinds_are_refused(trace: Trace, rule: object, target: object, message: str) -> None:
    """A bare number was once taken for no constraint at all, and gave the full model."""
    with pytest.raises(InvalidInput, match=message):
        calibrate(trace, rule, target)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="takes a Trace first"):
        calibrate(RULE, trace, MeanCost(0.5))  # type: ignore[arg-type]


def test_statements_are_sentences(trace: Trace) -> None:
    certificate = calibrate(trace, RULE, MeanCost(0.5)).certificate
    assert certificate is not None and certificate.statement == "Mean cost at most 0.5 of the full model's FLOPs."


def test_bad_traces_are_refused(trace: Trace) -> None:
    with pytest.raises(NotReplayable, match="copied cache"):
        calibrate(replace(trace, why_not_replayable="later tokens read a copied cache"), RULE, MeanCost(0.5))
    bad = trace.scores(RULE).clone()
    bad[:7, 1] = float("inf")
    with pytest.raises(InvalidInput, match=r"7 of 4000 scores at exit 1 \('e1'\)"):
        calibrate(trace_of(bad, trace.losses), RULE, MeanCost(0.5))
    with pytest.raises(InvalidInput, match="empty"):
        calibrate(trace.subset(torch.arange(0)), RULE, MeanCost(0.5))
    with pytest.raises(InvalidInput, match="mean-cost method"):
        calibrate(trace, RULE, MeanCost(0.5), method=LTT())
    with pytest.raises(InvalidInput, match="risk procedure"):
        calibrate(trace, RULE, Risk(max_drop=0.1), method=GeometricShares())


def test_never_leaving_warns(trace: Trace) -> None:
    with pytest.warns(NoEffectWarning, match="never leaves"):
        calibrate(trace, RULE, MeanCost(2.0), method=GeometricShares())


def test_same_input_same_plan(trace: Trace) -> None:
    for target in (MeanCost(0.5), Risk(max_drop=0.08)):
        assert calibrate(trace, RULE, target) == calibrate(trace, RULE, target)


# ------------------------------------------------------------------------------------------------------------------------ drift


def test_psi_and_chi_square_known_values() -> None:
    assert psi(np.array([100.0, 100]), np.array([50.0, 50])) == pytest.approx(0, abs=1e-12)
    assert psi(np.array([5e5, 5e5]), np.array([6e5, 4e5])) == pytest.approx(0.1 * math.log(1.2) - 0.1 * math.log(0.8), rel=1e-3)
    # 2 x 2 table [[90, 110], [60, 40]]: chi-square 6.0 with one degree of freedom, p = erfc(sqrt(3)).
    assert chi_square(np.array([90.0, 110]), np.array([60.0, 40])) == pytest.approx(math.erfc(math.sqrt(3.0)))
    assert chi_square(np.array([10.0, 0]), np.array([5.0, 0])) == 1.0


def test_drift_monitor_is_quiet_on_the_same_data_and_alarms_on_other(trace: Trace) -> None:
    plan = calibrate(trace, RULE, MeanCost(0.5))
    reference = DriftReference.of(trace, plan)

    def serve(seed: int, shift: float, windows: int) -> list[bool]:
        served = synthetic(500 * windows, seed=seed)
        scores = (served.scores(RULE) - shift).clamp(0, 1)
        exits = evaluate(served, scores, plan.thresholds).exits
        monitor = DriftMonitor(reference, window=500)
        reports = [r for part in range(0, len(exits), 333) for r in monitor.update(exits[part : part + 333], scores[part : part + 333, 0])]
        assert [r.window for r in reports] == list(range(1, windows + 1))
        return [r.drifted for r in reports]

    quiet = [any(serve(seed, 0.0, 10)) for seed in range(100, 130)]
    assert sum(quiet) <= 2
    assert serve(99, 0.15, 2)[0]


def test_drift_monitor_refuses_what_does_not_belong(trace: Trace) -> None:
    plan = calibrate(trace, RULE, MeanCost(0.5))
    with pytest.raises(FingerprintMismatch):
        DriftReference.of(replace(trace, fingerprint="other"), plan)
    monitor = DriftMonitor(DriftReference.of(trace, plan))
    with pytest.raises(InvalidInput, match="Exit indices"):
        monitor.update(torch.tensor([4]))
    monitor.update(torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match="every update"):
        monitor.update(torch.tensor([0]), torch.tensor([0.5]))
    with pytest.raises(InvalidInput, match="window"):
        DriftMonitor(DriftReference.of(trace, plan), window=3)


def test_an_exit_without_scores_is_switched_off():
    trace = synthetic(600, 4)
    scores = trace.scores(RULE).clone()
    scores[:, 1] = -math.inf
    closed = replace(trace, recorded={part_key(RULE): scores}, latency=latency(4))
    for target in (MeanCost(0.6), Risk(max_drop=0.2, delta=0.1), Latency(mean_ms=float(exit_latency_ms(closed, 1)[2]))):
        plan = calibrate(closed, RULE, target)
        assert plan.exits == trace.exits and plan.thresholds[1] == math.inf and plan.shares[1] == 0
        left = leave_at(scores, plan.thresholds)
        assert (torch.bincount(left, minlength=4) / len(left)).tolist() == pytest.approx(list(plan.shares))


def test_a_counter_does_better_than_leaving_at_once():
    """With tied scores no threshold vector may lie between "all leave at once" and "nearly nobody": one later exit can."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.zeros(400), torch.randint(0, 2, (400,), generator=generator).float(), torch.zeros(400)], dim=1)
    losses = torch.stack([torch.rand(400, generator=generator) < p for p in (0.6, 0.2, 0.1)], dim=1).float()
    plan = calibrate(trace_of(scores, losses), RULE, MeanCost(0.7))
    assert plan.mean_cost <= 0.7 and plan.shares[1] == 1
