"""One option per group, least total loss within a total cost: the multiple-choice knapsack, solved exactly for real-valued costs.

Dynamic programming over the sums of cost that can be reached (Nemhauser and Ullmann 1969): after each group only choices survive that no
other undercuts in both cost and loss, so costs need no grid. `best_choice` also drops what cannot beat the best found so far, by
the linear relaxation of the groups to come (Sinha and Zoltners 1979); that changes the time it takes, not the answer.

Shapes: ``G`` groups, ``O`` options, ``P`` points of the front.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.budget.replay import F64

I64 = NDArray[np.int64]

RELATIVE = 1e-12
"""Sums of cost that differ by less than this share of the largest sum are equal: the same options added in another order."""

BEAM = 256


class Choices(NamedTuple):
    """Choices that no other undercuts in cost and loss.

    Attributes:
        cost: ``[P]`` rising.
        loss: ``[P]`` falling.
        options: ``[P, G]`` the option of each group.
    """

    cost: F64
    loss: F64
    options: I64


class _Layer(NamedTuple):
    cost: F64
    loss: F64
    rank: I64
    parent: I64
    option: I64

    def at(self, rows: I64) -> _Layer:
        return _Layer(self.cost[rows], self.loss[rows], self.rank[rows], self.parent[rows], self.option[rows])


def _undominated(cost: F64, loss: F64, tolerance: float) -> I64:
    """Rows by rising cost and falling loss; of equal costs the least loss, of equal losses the least cost."""
    order = np.lexsort((loss, cost)).astype(np.int64)
    sorted_loss = loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])
    order = order[sorted_loss < before]
    gap = np.diff(cost[order])
    return order[np.append(gap > tolerance, True)] if order.size else order


def _extend(layer: _Layer, cost: F64, loss: F64, rank: I64, tolerance: float) -> _Layer:
    """Every state with every option of one group, less what is undercut. A state may only take options of its rank or above."""
    parts: list[_Layer] = []
    reachable = np.empty(0, np.int64)
    for r in np.unique(rank):
        reachable = np.concatenate([reachable, np.flatnonzero(layer.rank == r)])
        # A state of lower rank leaves more open, so it may undercut one of higher rank.
        reachable = reachable[_undominated(layer.cost[reachable], layer.loss[reachable], tolerance)]
        options = np.flatnonzero((rank == r) & (loss < np.inf))
        if not options.size or not reachable.size:
            continue
        total = (layer.cost[reachable, None] + cost[options]).ravel()
        lost = (layer.loss[reachable, None] + loss[options]).ravel()
        keep = _undominated(total, lost, tolerance)
        parent, option = reachable[keep // options.size], options[keep % options.size]
        parts.append(_Layer(total[keep], lost[keep], np.full(keep.size, r, np.int64), parent, option))
    if not parts:
        return layer.at(np.empty(0, np.int64))
    return _Layer(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class _Relaxation(NamedTuple):
    """Least loss of the groups to come against what may be spent on them, were options divisible: piecewise linear and convex."""

    spent: F64
    loss: F64

    def at(self, rest: F64) -> F64:
        out: F64 = np.interp(rest, self.spent, self.loss)
        return np.where(rest < self.spent[0], np.inf, out)


def _relaxations(cost: F64, loss: F64) -> list[_Relaxation]:
    """For each group the relaxation of all groups after it; the last is zero."""
    base_cost, base_loss = 0.0, 0.0
    steps = np.empty((0, 2))
    out = [_Relaxation(np.zeros(1), np.zeros(1))]
    for c, lost in zip(cost[:0:-1], loss[:0:-1], strict=True):
        hull: list[tuple[float, float]] = []
        for i in _undominated(c[lost < np.inf], lost[lost < np.inf], 0.0):
            x, y = float(c[lost < np.inf][i]), float(lost[lost < np.inf][i])
            while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
                hull.pop()
            hull.append((x, y))
        base_cost, base_loss = base_cost + hull[0][0], base_loss + hull[0][1]
        steps = np.concatenate([steps, np.diff(np.array(hull), axis=0)])
        ordered = steps[np.argsort(steps[:, 1] / steps[:, 0], kind="stable")]
        along = np.concatenate([[[base_cost, base_loss]], ordered]).cumsum(axis=0)
        out.append(_Relaxation(along[:, 0], along[:, 1]))
    return out[::-1]


def _search(
    cost: F64, loss: F64, rank: I64, limit: float, relaxed: list[_Relaxation] | None = None, bar: float = math.inf, beam: int | None = None
) -> Choices:
    """All undominated choices within the limit, or, with relaxations, those that may still have a loss of at most ``bar``."""
    tolerance = RELATIVE * float(cost.max(axis=1).sum())
    slack = cost.shape[0] * tolerance
    layer = _Layer(np.zeros(1), np.zeros(1), np.full(1, rank.min(), np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))
    layers: list[_Layer] = []
    for group in range(cost.shape[0]):
        layer = _extend(layer, cost[group], loss[group], rank, tolerance)
        if relaxed is None:
            layer = layer.at(np.flatnonzero(layer.cost <= limit + slack))
        else:
            least = layer.loss + relaxed[group].at(limit + slack - layer.cost)
            keep = np.flatnonzero((least < np.inf) & (least <= bar))
            if beam is not None and keep.size > beam:
                keep = keep[np.argsort(least[keep], kind="stable")[:beam]]
            layer = layer.at(keep)
        layers.append(layer)
    rows = _undominated(layer.cost, layer.loss, tolerance)
    options = np.empty((rows.size, cost.shape[0]), np.int64)
    at = rows
    for group in range(cost.shape[0] - 1, -1, -1):
        options[:, group] = layers[group].option[at]
        at = layers[group].parent[at]
    return Choices(layer.cost[rows], layer.loss[rows], options)


def least_cost(cost: F64, loss: F64, rank: I64) -> float:
    """The smallest sum of cost over choices with finite loss; infinite if there is none. Arguments as for `front_of_choices`."""
    ranks = np.unique(rank)
    reach = np.zeros(ranks.size)
    for c, lost in zip(cost, loss, strict=True):
        allowed = np.where(lost < np.inf, c, np.inf)
        reach = np.minimum.accumulate(reach) + np.array([allowed[rank == r].min() for r in ranks])
    return float(reach.min())


def front_of_choices(cost: F64, loss: F64, rank: I64, limit: float = math.inf) -> Choices:
    """Every undominated choice with a sum of cost within the limit.

    Args:
        cost: ``[G, O]`` finite, >= 0.
        loss: ``[G, O]`` finite, or ``inf`` where an option is not allowed.
        rank: ``[O]``; the option of a group has at least the rank of that of the group before it. All equal: any options.
        limit: of the sum.

    Returns:
        Choices; none if none is allowed.
    """
    return _search(cost, loss, rank, limit)


def best_choice(cost: F64, loss: F64, rank: I64, limit: float) -> Choices:
    """The choice of least loss within the limit, the cheapest of equals: one point, or none. Arguments as for `front_of_choices`."""
    if least_cost(cost, loss, rank) == math.inf:
        return _search(cost, loss, rank, limit)
    relaxed = _relaxations(cost, loss)
    # A narrow search first: the better its answer, the more the wide one may drop.
    found = _search(cost, loss, rank, limit, relaxed, beam=BEAM)
    scale = float(np.abs(loss[loss < np.inf]).max()) * cost.shape[0]
    bar = float(found.loss[-1]) + RELATIVE * scale if found.loss.size else math.inf
    exact = _search(cost, loss, rank, limit, relaxed, bar)
    return Choices(exact.cost[-1:], exact.loss[-1:], exact.options[-1:])
