"""Quality against cost: curves, fronts, comparisons at equal cost, and the baselines every method should meet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.core.trace import Trace
from offramp.measure.quality import Outcome, first_exit, item_quality, outcome


@dataclass(frozen=True)
class Point:
    """One way to run a model.

    Attributes:
        name: what it is.
        cost: mean FLOPs per item over the base model's (or any unit, the same within a figure), >= 0.
        quality: mean accuracy or other quality, higher is better.
        latency_ms: measured milliseconds per item, if it was measured.
        batch_size: at which ``latency_ms`` was measured.
    """

    name: str
    cost: float
    quality: float
    latency_ms: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and math.isfinite(self.quality)) or self.cost < 0:
            raise InvalidInput(
                f"A point needs a finite cost >= 0 and a finite quality, got {self.cost} and {self.quality} ({self.name!r})."
            )


@dataclass(frozen=True)
class Curve:
    """Points in order of cost, joined by straight lines.

    Attributes:
        name: what it is.
        points: ascending cost, at least one.
    """

    name: str
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise InvalidInput(f"The curve {self.name!r} has no points.")
        if any(a.cost > b.cost for a, b in zip(self.points, self.points[1:], strict=False)):
            raise InvalidInput(f"The points of {self.name!r} must be in ascending cost; make it with curve().")

    @property
    def cost(self) -> tuple[float, ...]:
        return tuple(p.cost for p in self.points)

    @property
    def quality(self) -> tuple[float, ...]:
        return tuple(p.quality for p in self.points)


def curve(name: str, points: Iterable[Point]) -> Curve:
    """A curve through points in any order."""
    return Curve(name, tuple(sorted(points, key=lambda p: (p.cost, p.quality))))


def pareto_front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other beats: ascending in cost and strictly ascending in quality. Of equal points one is kept."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return tuple(front)


def upper_hull(points: Iterable[Point]) -> tuple[Point, ...]:
    """The concave front: what choosing at random between points, blind to the input, can reach at each mean cost."""
    hull: list[Point] = []
    for point in pareto_front(points):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (b.quality - a.quality) * (point.cost - a.cost) > (point.quality - a.quality) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(point)
    return tuple(hull)


def interpolate(reference: Curve, cost: float) -> float:
    """Quality of a curve at a cost, by straight lines; where several points share a cost the best counts.

    Beyond the dearest point its quality is kept: a larger budget need not be spent.

    Raises:
        InvalidInput: ``cost`` is below the cheapest point, where the curve says nothing.
    """
    points = reference.points
    if math.isclose(cost, points[0].cost, rel_tol=1e-9):
        cost = points[0].cost  # the mean of equal costs may be off by a rounding
    if not cost >= points[0].cost:
        raise InvalidInput(f"The curve {reference.name!r} starts at cost {points[0].cost:.4g}; it says nothing about cost {cost:.4g}.")
    same = [p.quality for p in points if p.cost == cost]
    if same:
        return max(same)
    if cost > points[-1].cost:
        dearest = points[-1].cost
        return max(p.quality for p in points if p.cost == dearest)
    left, right = next((a, b) for a, b in itertools.pairwise(points) if a.cost < cost < b.cost)
    start = max(p.quality for p in points if p.cost == left.cost)
    return start + (right.quality - start) * (cost - left.cost) / (right.cost - left.cost)


def area(reference: Curve, low: float, high: float, *, log_cost: bool = False) -> float:
    """Mean quality of a curve over a range of cost, in the unit of quality: area under it over the width of the range.

    Args:
        reference: the curve.
        low: start of the range, not below the curve's cheapest point (and > 0 with ``log_cost``).
        high: end, > ``low``.
        log_cost: weigh equal *ratios* of cost equally (lines stay straight in cost; the integral is exact either way).
    """
    if not high > low or (log_cost and low <= 0):
        raise InvalidInput(f"The range must have low < high (and low > 0 on a log scale), got {low} .. {high}.")
    places = [low, *(c for c in sorted(set(reference.cost)) if low < c < high), high]
    total = 0.0
    for a, b in itertools.pairwise(places):
        qa, qb = interpolate(reference, a), _left_limit(reference, b)
        if log_cost:
            slope = (qb - qa) / (b - a)  # integral of (qa + slope * (c - a)) / c
            total += (qa - slope * a) * math.log(b / a) + slope * (b - a)
        else:
            total += (qa + qb) / 2 * (b - a)
    return total / (math.log(high / low) if log_cost else high - low)


def _left_limit(reference: Curve, cost: float) -> float:
    """Quality just below ``cost``: the first point of that cost ends the line that comes from the left."""
    if cost > reference.points[-1].cost:
        return interpolate(reference, cost)
    here = [p.quality for p in reference.points if p.cost == cost]
    return here[0] if here else interpolate(reference, cost)


def relative_score(points: Sequence[Point], reference: Curve) -> float:
    """Mean lead over a reference at equal cost: ``mean(quality_i - reference(cost_i))``.

    The score of the ELUE benchmark (Liu et al. 2022) for any reference; the library's own is the fixed-exit curve.

    Raises:
        InvalidInput: no points, or a point cheaper than the reference's cheapest.
    """
    if not points:
        raise InvalidInput("A relative score needs at least one point.")
    return math.fsum(p.quality - interpolate(reference, p.cost) for p in points) / len(points)


# ------------------------------------------------------------------------------------------------ curves from a trace


def anytime_curve(trace: Trace) -> Curve:
    """Every item stopped at the same exit, heads passed on the way paid for (anytime prediction, MSDNet section 5)."""
    quality = item_quality(trace).values.double().mean(0)
    cost = trace.cost.double() / trace.base_cost
    return curve("fixed exit", [Point(n, float(c), float(q)) for n, c, q in zip(trace.exits, cost, quality, strict=True)])


def fixed_exit_curve(trace: Trace, cost: Tensor | None = None) -> Curve:
    """The same network cut off at one exit for good: what no rule at all achieves.

    Args:
        trace: gives the quality of each exit.
        cost: ``[K]`` FLOPs per item of the network up to exit k with that head alone. A trace does not know them; without them
            the heads passed on the way count too, which favours no exit but overstates the later ones by their share.
    """
    if cost is None:
        return anytime_curve(trace)
    if cost.shape != trace.cost.shape:
        raise InvalidInput(f"cost must be {tuple(trace.cost.shape)}, got {tuple(cost.shape)}.")
    quality = item_quality(trace).values.double().mean(0)
    scaled = cost.double() / trace.base_cost
    return curve("fixed exit", [Point(n, float(c), float(q)) for n, c, q in zip(trace.exits, scaled, quality, strict=True)])


def mixture_curve(trace: Trace) -> Curve:
    """The best blind choice: each item's exit drawn at random from the best two exits for the budget. Exact, no sampling."""
    return Curve("best random mix of exits", upper_hull(anytime_curve(trace).points))


def random_exit(trace: Trace, shares: Sequence[float] | Tensor) -> Point:
    """Exits drawn at random with given shares: a plan's own histogram without its knowledge, at exactly its cost. In expectation.

    Args:
        trace: gives quality and cost of each exit.
        shares: K numbers >= 0 that sum to 1.
    """
    weight = torch.as_tensor(shares, dtype=torch.float64)
    if weight.shape != (len(trace.exits),) or float(weight.min()) < 0 or abs(float(weight.sum()) - 1) > 1e-6:
        raise InvalidInput(f"shares must be {len(trace.exits)} numbers >= 0 that sum to 1, got {weight.tolist()}.")
    quality = item_quality(trace).values.double().mean(0)
    return Point("random exits, same shares", float(weight @ trace.cost.double()) / trace.base_cost, float(weight @ quality))


def plan_point(trace: Trace, plan: Plan, name: str = "plan") -> Point:
    """Where a plan lands on the items of a trace."""
    return outcome_point(outcome(trace, plan), name)


def outcome_point(result: Outcome, name: str = "plan") -> Point:
    """Mean cost and quality of a replayed plan."""
    return Point(name, result.mean_cost, result.mean_quality)


def budgeted_curve(trace: Trace, plans: Iterable[Plan], name: str = "budgeted batch") -> Curve:
    """Several plans, one per budget, on the items of a trace (budgeted batch classification, MSDNet section 5).

    Thresholds should come from other items than those of ``trace``.
    """
    return curve(name, [plan_point(trace, plan, f"budget {i + 1}") for i, plan in enumerate(plans)])


def sweep(trace: Trace, rule: Rule, settings: int = 40, name: str = "") -> Curve:
    """One threshold shared by all exits, swept over the range of the rule's scores.

    Settings are quantiles of the scores of the early exits, with "always leave first" and "never leave" at the ends. No
    setting is picked, so nothing is fitted to these items.

    Args:
        trace: the items.
        rule: gives the scores.
        settings: >= 2.
        name: of the curve; the rule's type by default.
    """
    if settings < 2:
        raise InvalidInput(f"settings must be >= 2, got {settings}.")
    exits = len(trace.exits)
    scores = trace.scores(rule).detach().cpu()
    quality, cost = item_quality(trace).values.double(), trace.cost.double() / trace.base_cost
    flat = scores[:, :-1].flatten().sort().values
    chosen: list[float] = [float("inf")]
    if flat.numel():
        places = torch.linspace(0, flat.numel() - 1, settings - 1).round().long()
        chosen += flat[places].unique().tolist()
    points = []
    for threshold in chosen:
        taken = first_exit(scores, [threshold] * (exits - 1) + [float("-inf")])
        points.append(Point(f"{threshold:.4g}", float(cost[taken].mean()), float(quality.gather(1, taken[:, None]).mean())))
    return curve(name or f"{type(rule).__name__}, one threshold", points)
