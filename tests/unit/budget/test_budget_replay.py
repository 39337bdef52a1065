"""Replay: leaving, evaluation, curves and placing thresholds, each against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from budget_synthetic import RULE, synthetic, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.budget import disagreement_loss, drop_loss, error_loss, evaluate, leave_at, path_curve, risk_table
from offramp.budget.replay import between, clamp, columns, leave_columns, meet, paired_estimate, share_estimate, share_thresholds
from offramp.core.errors import InvalidInput

INF = math.inf


def test_leave_at_is_the_first_exit_that_is_ready() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.2, 0.1, 0.0], [0.5, 0.9, 0.0]])
    assert leave_at(scores, [0.5, 0.5, -INF]).tolist() == [0, 1, 2, 0]
    assert leave_at(scores, [INF, INF, -INF]).tolist() == [2] * 4
    assert leave_at(scores, [-INF, 0.0, -INF]).tolist() == [0] * 4
    assert np.array_equal(leave_columns(columns(scores), np.array([0.5, 0.5, -INF])), [0, 1, 2, 0])


def test_thresholds_are_compared_in_float32_as_an_engine_does() -> None:
    scores = torch.tensor([[0.9, 0.0]])
    assert leave_at(scores, [0.9, -INF]).item() == 0
    assert leave_columns(columns(scores), np.array([0.9, -INF]))[0] == 0


def test_evaluate_known_values() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.2, 0.1, 0.0], [0.9, 0.9, 0.0]])
    losses = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    got = evaluate(trace_of(scores, losses, [1.0, 2, 4]), RULE, [0.5, 0.5, -INF])
    assert got.shares == (0.5, 0.25, 0.25)
    assert got.mean_cost.value == pytest.approx((1 + 2 + 4 + 1) / 4 / 4)
    assert got.error is not None and got.error.value == 0.25
    assert got.accuracy == 0.75
    assert got.drop is not None and got.drop.value == 0.0
    assert got.disagreement is not None and got.disagreement.value == 0.5
    assert got.drop.low < 0 < got.drop.high  # two items changed in opposite ways: not a certain zero


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), exit_at=st.integers(0, 2), low=st.floats(0, 1), high=st.floats(0, 1))
def test_mean_cost_is_monotone_in_each_threshold(seed: int, exit_at: int, low: float, high: float) -> None:
    trace = synthetic(60, seed=seed)
    thresholds = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    costs = []
    for t in sorted((low, high)):
        thresholds[exit_at] = t
        costs.append(evaluate(trace, RULE, thresholds).mean_cost.value)
    assert costs[0] <= costs[1]


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize("kind", ["shared", "vector", "ties"])
def test_path_curve_equals_the_risk_table(kind: str, monotone: bool) -> None:
    trace = synthetic(333, seed=3)
    scores = trace.scores(RULE)
    if kind == "ties":
        scores = (scores * 5).round() / 5
    m = 17
    if kind == "vector":
        path = np.sort(np.random.default_rng(0).random((m, 4)), axis=0)[::-1].copy()
    else:
        path = np.repeat(np.linspace(1, 0, m)[:, None], 4, axis=1)  # hits tied scores exactly
    path[0, :-1], path[-1, :-1], path[:, -1] = INF, -INF, -INF
    loss = drop_loss(trace)
    table = risk_table(trace, scores, torch.from_numpy(path), loss)
    blocks = np.random.default_rng(1).permutation(333) * 7 // 333
    curve = path_curve(columns(scores), path, trace.cost.numpy(), loss.values, blocks=blocks, monotone=monotone)
    want = np.maximum.accumulate(table.loss.numpy(), axis=1) if monotone else table.loss.numpy()
    assert curve.loss is not None
    assert np.allclose(curve.loss, np.stack([want[blocks == b].mean(axis=0) for b in range(7)]), atol=1e-6)
    assert np.allclose(curve.mean_loss, want.mean(axis=0), atol=1e-6)
    assert np.allclose(curve.cost, table.cost.mean(dim=0).numpy())
    assert np.allclose(curve.shares.sum(axis=1), 1)
    rows = np.arange(0, 333, 3)
    part = path_curve(columns(scores), path, trace.cost.numpy(), loss.values, rows=rows, monotone=monotone)
    assert np.allclose(part.mean_loss, want[rows].mean(axis=0), atol=1e-6)
    assert table.loss_range == (-1.0, 1.0) and bool((table.thresholds[:, -1] == -INF).all())


def test_path_curve_on_crowded_scores() -> None:
    # Nearly all scores within one bin of the fast lookup, thresholds among them.
    g = np.random.default_rng(0)
    scores = np.concatenate([1 - g.random(2000) * 1e-6, [0.0, -1e6]]).astype(np.float32)
    path = np.stack([np.sort(g.choice(scores[:2000], 50))[::-1], np.full(50, -INF)], axis=1).astype(np.float64)
    curve = path_curve(scores[None], path, np.array([1.0, 2.0]))
    assert np.allclose(curve.shares[:, 0], [(scores >= np.float32(t)).mean() for t in path[:, 0]])


def test_path_must_be_ordered() -> None:
    trace = synthetic(10)
    with pytest.raises(InvalidInput, match="strict to permissive"):
        path_curve(columns(trace.scores(RULE)), np.array([[0.1] * 4, [0.2] * 4]), trace.cost.numpy())


def test_between_separates_even_neighbouring_floats() -> None:
    low = np.float32(0.7)
    high = np.nextafter(low, np.float32(1))
    for a, b in [(low, high), (np.float32(0.2), np.float32(0.4))]:
        t = np.float32(between(float(a), float(b)))
        assert a < t <= b
    assert between(0.25, 0.75) == 0.5


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), fraction=st.floats(0.01, 0.99), shared=st.booleans())
def test_meet_is_one_item_from_the_target(seed: int, fraction: float, shared: bool) -> None:
    trace = synthetic(200, seed=seed)
    cols, cost = columns(trace.scores(RULE)), trace.cost.numpy()
    target = cost[0] + fraction * (cost[-1] - cost[0])
    top, bottom = clamp(cols, np.full(3, INF)), clamp(cols, np.full(3, -INF))
    if shared:
        top, bottom = np.full(3, top.max()), np.full(3, bottom.min())
    thresholds = meet(cols, top, bottom, cost, target, shared=shared)
    mean = cost[leave_columns(cols, thresholds)].mean()
    assert target - (cost[-1] - cost[0]) / 200 - 1e-9 <= mean <= target + 1e-9
    if shared:
        assert len(set(thresholds[:-1])) == 1


def test_thresholds_are_halfway_between_scores() -> None:
    scores = torch.tensor([[0.1], [0.3], [0.7], [0.9]]).repeat(1, 2)
    got = share_thresholds(columns(scores), np.array([2]))
    assert got[0] == pytest.approx(0.5)
    noisy = scores + 0.1 * (torch.rand(4, 2, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert torch.equal(leave_at(noisy, got.tolist()), leave_at(scores, got.tolist()))


def test_scores_that_are_not_finite_are_named() -> None:
    scores = torch.rand(10, 3)
    scores[2:5, 1] = float("nan")
    with pytest.raises(InvalidInput, match=r"3 of 10 scores at exit 1 \('mid'\)"):
        columns(scores, ["a", "mid", "output"])
    scores[:, 1] = 0
    scores[:, 2] = float("nan")  # the last exit is never compared
    assert columns(scores).shape == (2, 10)
    with pytest.raises(InvalidInput, match="empty"):
        columns(torch.empty(0, 3))


def test_losses() -> None:
    losses = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    trace = trace_of(torch.rand(3, 2), losses)
    assert error_loss(trace).binary
    assert drop_loss(trace).values[:, 0].tolist() == [1, -1, 0]
    assert drop_loss(trace, signed=False).values[:, 0].tolist() == [1, 0, 0]
    assert disagreement_loss(trace).values[:, 0].tolist() == [1, 1, 0]
    assert not error_loss(trace_of(torch.rand(3, 2), losses * 0.5)).binary
    with pytest.raises(InvalidInput, match=r"\[0, 1\]"):
        error_loss(trace_of(torch.rand(3, 2), losses * 2))
    with pytest.raises(InvalidInput, match="no losses"):
        error_loss(trace_of(torch.rand(3, 2), None))
    with pytest.raises(InvalidInput, match="classes"):
        disagreement_loss(trace_of(torch.rand(3, 2), None, predictions=torch.rand(3, 2)))


def test_intervals() -> None:
    # Wilson 1927 for 8 of 10 at 95 %: textbook values 0.490 and 0.943.
    wilson = share_estimate(8, 10)
    assert (wilson.low, wilson.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    none = share_estimate(0, 10)
    assert none.low == 0 and none.high > 0.2
    gap = paired_estimate(np.zeros(50))
    assert gap.value == 0 and gap.low < 0 < gap.high
