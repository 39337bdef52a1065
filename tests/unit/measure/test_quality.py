"""Quality metrics on traces small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput, NotReplayable
from offramp.core.trace import Trace
from offramp.measure import outcome
from offramp.measure.quality import (
    adaptive_calibration_error,
    brier,
    calibration_error,
    correct,
    disagreement,
    exit_accuracy,
    exit_quality,
    exit_reliability,
    first_exit,
    item_quality,
    monotonicity,
    nll,
    overthinking,
    r_squared,
    r_squared_groups,
    reliability,
)
from offramp.policies import Confidence

INF = float("inf")
EXITS = ("a", "b", "output")


def trace_of(predictions: list[list[int]], labels: list[int] | None, **more: object) -> Trace:
    return Trace(
        EXITS,
        torch.tensor(predictions),
        torch.tensor([20.0, 60.0, 110.0]),
        100.0,
        labels=None if labels is None else torch.tensor(labels),
        **more,
    )  # type: ignore[arg-type]


# Items: always right; right only early; right only at the end; never right.
PREDICTIONS = [[1, 1, 1], [0, 2, 2], [1, 2, 0], [1, 1, 1]]
LABELS = [1, 0, 0, 2]


def logits_of(p: list[list[float]]) -> Tensor:
    """Two-class logits [N, K, 2] with the given probability of class 1."""
    q = torch.tensor(p)
    return torch.stack([torch.log(1 - q), torch.log(q)], -1)


def test_right_or_wrong_per_exit() -> None:
    trace = trace_of(PREDICTIONS, LABELS)
    assert correct(trace).tolist() == [[True, True, True], [True, False, False], [False, False, True], [False, False, False]]
    assert exit_accuracy(trace).tolist() == [0.5, 0.25, 0.5]
    assert disagreement(trace).tolist() == [0.5, 0.25, 0.0]


def test_item_quality_falls_back() -> None:
    assert item_quality(trace_of(PREDICTIONS, LABELS)).name == "accuracy"
    unlabelled = item_quality(trace_of(PREDICTIONS, None))
    assert unlabelled.name == "agreement with the full model" and unlabelled.values[:, -1].tolist() == [1.0] * 4
    losses = torch.tensor([[0.25, 0.5, 0.0]])
    regression = Trace(EXITS, torch.zeros(1, 3), torch.tensor([1.0, 2.0, 3.0]), 3.0, losses=losses)
    found = item_quality(regression)
    assert found.name == "quality" and not found.binary and found.values.tolist() == [[0.75, 0.5, 1.0]]
    with pytest.raises(InvalidInput, match="losses"):
        item_quality(Trace(EXITS, torch.zeros(1, 3), torch.tensor([1.0, 2.0, 3.0]), 3.0))
    with pytest.raises(InvalidInput, match="float"):
        correct(regression)


def test_nll_and_brier_by_hand() -> None:
    logits, labels = logits_of([[0.9, 0.5, 0.2]]), torch.tensor([1])
    assert nll(logits, labels).tolist() == pytest.approx([-math.log(0.9), math.log(2), -math.log(0.2)])
    assert brier(logits, labels).tolist() == pytest.approx([2 * 0.01, 0.5, 2 * 0.64])
    assert float(nll(logits[:, 0], labels)) == pytest.approx(-math.log(0.9))
    certain = torch.tensor([[50.0, -50.0]])
    assert float(brier(certain, torch.tensor([1]))) == pytest.approx(2.0)
    assert float(brier(certain, torch.tensor([0]))) == pytest.approx(0.0)


def test_equal_width_ece_by_hand() -> None:
    confidence = torch.tensor([0.55, 0.65, 0.95, 0.85])
    right = torch.tensor([True, False, True, True])
    # Two bins, (0.5, 1] holds all: mean confidence 0.75, accuracy 0.75.
    assert calibration_error(confidence, right, bins=2) == pytest.approx(0.0, abs=1e-7)
    # Ten bins, one item each: gaps 0.45, 0.65, 0.05, 0.15.
    assert calibration_error(confidence, right, bins=10) == pytest.approx((0.45 + 0.65 + 0.05 + 0.15) / 4, abs=1e-7)
    found = reliability(confidence, right, bins=10)
    assert found.count.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 1]
    assert found.max_error == pytest.approx(0.65, abs=1e-7)


def test_bin_edges_are_upper_closed_and_ends_are_kept() -> None:
    found = reliability(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), torch.tensor([True, True, True]), bins=2)
    assert found.count.tolist() == [2, 1]


def test_equal_mass_bins_hold_equal_shares() -> None:
    confidence = torch.rand(1001, generator=torch.Generator().manual_seed(0)) ** 4
    found = reliability(confidence, confidence > 0.5, bins=10, equal_mass=True)
    assert int(found.count.sum()) == 1001 and int(found.count.max() - found.count.min()) <= 1
    assert found.edges.numel() == 11 and bool((found.edges.diff() >= 0).all())
    # Every bin's mean lies between its edges.
    assert bool((found.confidence >= found.edges[:-1] - 1e-12).all() and (found.confidence <= found.edges[1:] + 1e-12).all())


def test_ece_of_calibrated_and_overconfident_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=generator)
    right = torch.rand(200_000, generator=generator) < p
    for equal_mass in (False, True):
        assert calibration_error(p, right, equal_mass=equal_mass) < 0.01
    assert calibration_error(torch.ones(200_000), right) == pytest.approx(0.5, abs=0.01)


def test_more_bins_than_items() -> None:
    found = reliability(torch.tensor([0.2, 0.7]), torch.tensor([False, True]), bins=5, equal_mass=True)
    assert int(found.count.sum()) == 2
    assert found.ece == pytest.approx((0.2 + 0.3) / 2, abs=1e-7)


def test_exit_reliability_and_quality() -> None:
    logits = logits_of([[0.6, 0.9, 0.9], [0.6, 0.1, 0.9]])
    trace = trace_of([[1, 1, 1], [1, 0, 1]], [1, 1], logits=logits)
    facts = exit_quality(trace)
    assert facts.accuracy.tolist() == [1.0, 0.5, 1.0]
    # Confidences .6 (right), .9 (half right), .9 (right).
    assert facts.ece.tolist() == pytest.approx([0.4, 0.4, 0.1], abs=1e-6)
    assert facts.nll[0] == pytest.approx(-math.log(0.6), abs=1e-6)
    assert len(exit_reliability(trace)) == 3
    with pytest.raises(InvalidInput, match="logits"):
        exit_reliability(trace_of(PREDICTIONS, LABELS))


def test_overthinking_by_hand() -> None:
    facts = overthinking(trace_of(PREDICTIONS, LABELS))
    assert facts.destructive == 0.25  # item 1
    assert facts.wasteful == 0.25  # item 0
    assert facts.oracle == 0.75
    assert facts.first_right.tolist() == [0, 0, 2, 3]
    assert facts.oracle_cost == pytest.approx((20 + 20 + 110 + 20) / 4 / 100)
    assert facts.lost_after.tolist() == [0.25, 0.0]
    assert facts.gained_after.tolist() == [0.25, 0.25]


def test_monotonicity_by_hand() -> None:
    logits = logits_of([[0.2, 0.5, 0.9], [0.8, 0.3, 0.6], [0.5, 0.5, 0.45]])
    facts = monotonicity(trace_of([[0, 1, 1], [1, 0, 1], [1, 1, 0]], [1, 1, 1], logits=logits), tolerances=(0.01, 0.1, 0.49))
    assert facts.worst_drop.tolist() == pytest.approx([0.0, 0.5, 0.05], abs=1e-6)
    assert facts.violations.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert facts.conditional == pytest.approx(1 / 3)
    assert facts.marginal.tolist() == pytest.approx([0.0, 0.0])


def test_first_exit_is_first_and_inclusive() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.0], [0.49, 0.9, 0.0], [0.1, 0.1, -5.0]])
    assert first_exit(scores, [0.5, 0.8, -INF]).tolist() == [0, 1, 2]
    assert first_exit(scores, [INF, INF, -INF]).tolist() == [2, 2, 2]
    assert first_exit(scores, [-INF, 0.0, -INF]).tolist() == [0, 0, 0]
    with pytest.raises(InvalidInput, match=r"\[items, 2\]"):
        first_exit(scores, [0.5, -INF])


def plan_of(thresholds: tuple[float, float], exits: tuple[str, ...] = EXITS) -> Plan:
    return Plan(Confidence(), exits, (*thresholds, -INF), (0.25, 0.25, 0.5), 0.8)


def test_outcome_by_hand() -> None:
    logits = logits_of([[0.9, 0.9, 0.9], [0.4, 0.2, 0.9], [0.45, 0.6, 0.7]])
    trace = trace_of([[1, 1, 1], [0, 0, 1], [0, 1, 1]], [1, 0, 1], logits=logits)
    result = outcome(trace, plan_of((0.85, 0.75)))
    assert result.exits.tolist() == [0, 1, 2]
    assert result.predictions.tolist() == [1, 0, 1]
    assert result.quality.tolist() == [1.0, 1.0, 1.0] and result.full_quality.tolist() == [1.0, 0.0, 1.0]
    assert result.cost.tolist() == pytest.approx([0.2, 0.6, 1.1])
    assert result.mean_cost == pytest.approx(1.9 / 3) and result.mean_quality == 1.0
    assert result.shares.tolist() == pytest.approx([1 / 3] * 3)
    # Confidences of the answers given: .9, .8, .7, all right.
    assert adaptive_calibration_error(trace, result, bins=3) == pytest.approx((0.1 + 0.2 + 0.3) / 3, abs=1e-6)


def test_outcome_refuses_what_it_cannot_replay() -> None:
    trace = trace_of(PREDICTIONS, LABELS, logits=torch.zeros(4, 3, 3))
    with pytest.raises(InvalidInput, match="'x'"):
        outcome(trace, plan_of((0.5, 0.5), ("x", "b", "output")))
    with pytest.raises(NotReplayable, match="needs logits"):
        outcome(trace_of(PREDICTIONS, LABELS), plan_of((0.5, 0.5)))
    with pytest.raises(NotReplayable, match="cache"):
        outcome(trace_of(PREDICTIONS, LABELS, why_not_replayable="copied cache"), plan_of((0.5, 0.5)))


def test_r_squared_known() -> None:
    x = torch.arange(100.0)
    assert r_squared((2 * x + 1).long(), x) == pytest.approx(1.0)
    # Depth 0, 1, 1, 0 over 0..3 has no linear part, yet the position explains it wholly.
    depth, place = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 2, 3])
    assert r_squared(depth, place) == pytest.approx(0.0, abs=1e-12)
    assert r_squared_groups(depth, place) == pytest.approx(1.0)
    # Anscombe-like hand case: y = 1, 2, 2 on x = 0, 1, 2: r = 0.866, r^2 = 3/4.
    assert r_squared(torch.tensor([1, 2, 2]), torch.tensor([0, 1, 2])) == pytest.approx(0.75)
    assert r_squared(torch.tensor([3, 3, 3]), torch.tensor([0, 1, 2])) == 0.0
    assert r_squared(torch.tensor([1, 2, 3]), torch.tensor([5, 5, 5])) == 0.0
    both = torch.stack([x, x**2], 1)
    assert r_squared(x**2, x) < 0.95 and r_squared(x**2, both) == pytest.approx(1.0)


def test_r_squared_groups_by_hand() -> None:
    # Groups with means 1 and 3 around 2; total 2*(0.25*2+...): within 0.5 each side.
    depth = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert r_squared_groups(depth, torch.tensor([7, 7, 9, 9])) == pytest.approx(4 / 5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 6, (20_000,), generator=generator)
    assert r_squared_groups(noise, torch.randint(0, 10, (20_000,), generator=generator)) < 0.002
    with pytest.raises(InvalidInput, match="integer"):
        r_squared_groups(depth, torch.zeros(4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: reliability(torch.tensor([1.2]), torch.tensor([True])),
        lambda: reliability(torch.tensor([0.2]), torch.tensor([True]), bins=0),
        lambda: reliability(torch.tensor([0.2]), torch.tensor([True, False])),
        lambda: reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool)),
        lambda: exit_accuracy(trace_of(PREDICTIONS, None)),
        lambda: r_squared(torch.zeros(3), torch.zeros(4)),
    ],
)
def test_refusals(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput):
        call()
