"""Curves with known fronts, areas and scores."""

from __future__ import annotations

import math

import pytest
import torch

from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.trace import Trace
from offramp.measure.pareto import (
    Curve,
    Point,
    anytime_curve,
    area,
    budgeted_curve,
    curve,
    fixed_exit_curve,
    interpolate,
    mixture_curve,
    pareto_front,
    plan_point,
    random_exit,
    relative_score,
    sweep,
    upper_hull,
)
from offramp.policies import Confidence

INF = float("inf")


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(f"{c},{q}", c, q) for c, q in pairs]


def pairs(found: tuple[Point, ...]) -> list[tuple[float, float]]:
    return [(p.cost, p.quality) for p in found]


def test_front_by_hand() -> None:
    given = points((3, 0.8), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.8), (1, 0.5))
    assert pairs(pareto_front(given)) == [(1, 0.5), (2, 0.7), (3, 0.8)]
    assert pareto_front([]) == ()


def test_hull_by_hand() -> None:
    assert pairs(upper_hull(points((0, 0.0), (1, 0.1), (2, 1.0)))) == [(0, 0.0), (2, 1.0)]
    assert pairs(upper_hull(points((0, 0.0), (1, 0.7), (2, 1.0), (3, 0.9)))) == [(0, 0.0), (1, 0.7), (2, 1.0)]
    # On a straight line the middle point adds nothing.
    assert pairs(upper_hull(points((0, 0.0), (1, 0.5), (2, 1.0)))) == [(0, 0.0), (2, 1.0)]


def test_interpolation() -> None:
    line = curve("c", points((3, 0.9), (1, 0.5), (3, 0.7)))
    assert interpolate(line, 1) == 0.5
    assert interpolate(line, 2) == pytest.approx(0.6)  # towards the first point reached at cost 3
    assert interpolate(line, 3) == 0.9
    assert interpolate(line, 99) == 0.9
    with pytest.raises(InvalidInput, match="starts at cost 1"):
        interpolate(line, 0.5)
    with pytest.raises(InvalidInput):
        interpolate(line, math.nan)


def test_area_is_a_mean_height() -> None:
    line = curve("c", points((1, 0.0), (3, 1.0)))
    assert area(line, 1, 3) == pytest.approx(0.5)
    assert area(line, 2, 3) == pytest.approx(0.75)
    assert area(line, 1, 5) == pytest.approx((0.5 * 2 + 1.0 * 2) / 4)  # the best is kept beyond the end
    # Mean over log cost of (c - 1) / 2 on [1, 3]: (2 / 2 - ln(3) / 2) / ln 3.
    assert area(line, 1, 3, log_cost=True) == pytest.approx((1 - math.log(3) / 2) / math.log(3))
    flat = curve("f", points((1, 0.25), (2, 0.25)))
    assert area(flat, 1, 2) == pytest.approx(0.25) and area(flat, 1, 10, log_cost=True) == pytest.approx(0.25)
    with pytest.raises(InvalidInput, match="low < high"):
        area(line, 2, 2)


def test_relative_score() -> None:
    reference = curve("fixed", points((1, 0.5), (2, 0.7), (4, 0.9)))
    assert relative_score(reference.points, reference) == 0.0
    # Leads 0.1 at cost 1.5 (reference 0.6) and 0 at cost 3 (reference 0.8).
    assert relative_score(points((1.5, 0.7), (3, 0.8)), reference) == pytest.approx(0.05)
    with pytest.raises(InvalidInput):
        relative_score([], reference)
    with pytest.raises(InvalidInput):
        relative_score(points((0.1, 0.9)), reference)


def test_points_and_curves_are_checked() -> None:
    with pytest.raises(InvalidInput, match="nan"):
        Point("x", math.nan, 0.5)
    with pytest.raises(InvalidInput, match="-1"):
        Point("x", -1, 0.5)
    with pytest.raises(InvalidInput, match="no points"):
        Curve("x", ())
    with pytest.raises(InvalidInput, match="ascending"):
        Curve("x", tuple(points((2, 0.1), (1, 0.1))))


@pytest.fixture
def trace() -> Trace:
    """A thousand items, two classes, three exits; the first exit is sure of the items it gets right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (1000,), generator=generator)
    strength = torch.stack([torch.randn(1000, generator=generator) * s + m for m, s in ((0.5, 1.5), (1.5, 1.5), (3.0, 1.5))], 1)
    sign = (2 * labels - 1).float()[:, None]
    logits = torch.stack([-strength * sign, strength * sign], -1)
    return Trace(("a", "b", "output"), logits.argmax(-1), torch.tensor([30.0, 65.0, 105.0]), 100.0, labels=labels, logits=logits)


def plan_of(a: float, b: float) -> Plan:
    return Plan(Confidence(), ("a", "b", "output"), (a, b, -INF), (1.0, 0.0, 0.0), 0.3)


def test_anytime_and_fixed_curves(trace: Trace) -> None:
    found = anytime_curve(trace)
    right = trace.predictions == trace.labels[:, None]  # type: ignore[index]
    assert found.cost == pytest.approx((0.3, 0.65, 1.05))
    assert found.quality == pytest.approx(right.double().mean(0).tolist())
    assert fixed_exit_curve(trace) == found
    alone = fixed_exit_curve(trace, torch.tensor([30.0, 60.0, 100.0]))
    assert alone.cost == pytest.approx((0.3, 0.6, 1.0)) and alone.quality == found.quality
    with pytest.raises(InvalidInput):
        fixed_exit_curve(trace, torch.tensor([1.0]))


def test_random_exit_equals_its_simulation(trace: Trace) -> None:
    shares = [0.2, 0.5, 0.3]
    found = random_exit(trace, shares)
    generator = torch.Generator().manual_seed(1)
    right = (trace.predictions == trace.labels[:, None]).double()  # type: ignore[index]
    drawn = torch.multinomial(torch.tensor(shares), 200_000, replacement=True, generator=generator)
    rows = torch.randint(0, 1000, (200_000,), generator=generator)
    assert found.quality == pytest.approx(float(right[rows, drawn].mean()), abs=0.005)
    assert found.cost == pytest.approx(0.2 * 0.3 + 0.5 * 0.65 + 0.3 * 1.05)
    assert random_exit(trace, [0, 0, 1]).quality == pytest.approx(anytime_curve(trace).quality[-1])
    with pytest.raises(InvalidInput, match="sum to 1"):
        random_exit(trace, [0.5, 0.5, 0.5])


def test_mixture_is_never_below_random(trace: Trace) -> None:
    blind = mixture_curve(trace)
    for shares in ([1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.5, 0.0, 0.5]):
        point = random_exit(trace, shares)
        assert interpolate(blind, point.cost) >= point.quality - 1e-12


def test_plans_on_a_trace(trace: Trace) -> None:
    always, never = plan_point(trace, plan_of(-INF, -INF)), plan_point(trace, plan_of(INF, INF))
    ends = anytime_curve(trace).points
    assert (always.cost, always.quality) == (pytest.approx(ends[0].cost), pytest.approx(ends[0].quality))
    assert (never.cost, never.quality) == (pytest.approx(ends[-1].cost), pytest.approx(ends[-1].quality))
    found = budgeted_curve(trace, [plan_of(INF, INF), plan_of(0.9, 0.9), plan_of(-INF, -INF)])
    assert list(found.cost) == sorted(found.cost) and len(found.points) == 3


def test_sweep_reaches_both_ends_and_beats_blind_exits(trace: Trace) -> None:
    found = sweep(trace, Confidence(), settings=30)
    ends = anytime_curve(trace)
    assert found.points[0].cost == pytest.approx(ends.cost[0])
    assert found.points[-1].cost == pytest.approx(ends.cost[-1])
    assert relative_score(found.points, mixture_curve(trace)) > 0.01
    with pytest.raises(InvalidInput, match="settings"):
        sweep(trace, Confidence(), settings=1)
