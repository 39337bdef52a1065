"""Thresholds for a mean cost: geometric shares, a shared level, exponential weights, optimal stopping.

Every method solves a `Problem`: choose thresholds whose mean cost on the given items is at most the target and, without tied scores,
within ``(cost[-1] - cost[0]) / N`` of it (one item more would exceed it). Tied scores leave together, so with them the step is a
group. A method may stay further below the target only where spending more would not help it: optimal stopping and exponential weights
do when leaving earlier is already the better answer (overthinking).

Every threshold lies halfway between two scores that occur, so rounding at run time does not move an item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.budget.replay import F32, F64, Floats, between, clamp, columns, leave_columns, meet, path_curve, share_thresholds
from offramp.core.errors import BudgetInfeasible, InvalidInput


@dataclass(frozen=True)
class Problem:
    """A mean-cost problem.

    Attributes:
        cols: scores ``[K-1, N]``, finite.
        cost: ``[K]`` cost to leave at each exit, non-decreasing; any unit.
        target: mean cost to meet, same unit.
        losses: ``[N, K]`` loss of each exit's answer, or ``None``.
        unit: of the cost, for messages.
    """

    cols: F32
    cost: F64
    target: float
    losses: Tensor | None = None
    unit: str = "fraction of the full model's FLOPs"

    def __post_init__(self) -> None:
        if self.cost.shape != (self.cols.shape[0] + 1,) or np.any(np.diff(self.cost) < 0) or not np.all(np.isfinite(self.cost)):
            raise InvalidInput(f"cost must be {self.cols.shape[0] + 1} finite numbers that do not fall, got {self.cost}.")
        if self.target < self.cost[0] * (1 - 1e-9):
            raise BudgetInfeasible(
                f"A mean cost of {self.target:.4g} ({self.unit}) cannot be met: leaving at the first exit costs {self.cost[0]:.4g}. "
                "Ask for at least that, or place an exit earlier.",
                requested=float(self.target),
                best=float(self.cost[0]),
                unit=self.unit,
            )

    @property
    def items(self) -> int:
        return int(self.cols.shape[1])

    @property
    def never(self) -> F64:
        """Thresholds that nobody reaches."""
        return np.append(np.full(self.cols.shape[0], np.inf), -np.inf)

    def mean_cost(self, thresholds: Floats) -> float:
        counts = np.bincount(leave_columns(self.cols, thresholds), minlength=self.cost.size)
        return float(counts @ self.cost) / self.items

    def mean_loss(self, thresholds: Floats) -> float:
        leave = torch.from_numpy(leave_columns(self.cols, thresholds)).to(torch.int64)
        return float(self._need_losses("this method").gather(1, leave[:, None]).sum(dtype=torch.float64)) / self.items

    def _need_losses(self, who: str) -> Tensor:
        if self.losses is None:
            raise InvalidInput(f"{who} needs losses. Record the trace with labels, or use GeometricShares() or QuantileCost().")
        return self.losses

    def part(self, size: int, seed: int) -> Problem:
        """At most ``size`` random items."""
        if self.items <= size:
            return self
        rows = np.random.default_rng(seed).choice(self.items, size, replace=False)
        rows.sort()
        losses = None if self.losses is None else self.losses[torch.from_numpy(rows)]
        return Problem(np.ascontiguousarray(self.cols[:, rows]), self.cost, self.target, losses, self.unit)


class CostMethod(ABC):
    """Chooses thresholds for a mean cost. Subclasses are frozen data."""

    @abstractmethod
    def fit(self, problem: Problem) -> F64:
        """``[K]`` thresholds, the last ``-inf``."""

    @abstractmethod
    def path(self, problem: Problem, size: int) -> F64:
        """Settings ``[size, K]`` from never leaving to leaving at once, no threshold rising; ``problem.target`` is not used."""

    def thresholds(self, scores: Tensor, cost: Tensor, target: float, losses: Tensor | None = None) -> Tensor:
        """`fit` on plain tensors: scores ``[N, K]``, cost ``[K]``, losses ``[N, K]``; returns ``[K]`` float64."""
        problem = Problem(columns(scores), np.asarray(cost.detach().cpu(), np.float64), float(target), losses)
        return torch.from_numpy(self.fit(problem))


def monotone_path(problem: Problem, nodes: list[F64], size: int) -> F64:
    """A path of ``size`` settings through given ones (strict first), evenly spaced in mean cost.

    Neighbouring nodes may disagree by estimation noise; the mean of the running minimum from the strict end and the running maximum
    from the permissive end does not rise and leaves an orderly path as it is. All averaging is on ranks, since scores crowd.
    """
    cols, (exits, n) = problem.cols, problem.cols.shape
    top = np.nextafter(cols.max(axis=1, keepdims=True), np.float32(np.inf)) if exits else np.empty((0, 1), np.float32)
    ranked = np.concatenate([np.sort(cols, axis=1), top], axis=1)

    def place(ranks: F64) -> F64:
        out = np.full((len(ranks), exits + 1), -np.inf)
        for k in range(exits):
            out[:, k] = np.interp(ranks[:, k], np.arange(n + 1), ranked[k])
        return np.minimum.accumulate(out)

    ends = np.stack([np.full(exits, np.inf), *[node[:exits] for node in nodes], np.full(exits, -np.inf)])
    rough = np.stack([np.searchsorted(ranked[k, :-1], ends[:, k].astype(np.float32)) for k in range(exits)], axis=1).astype(np.float64)
    smooth = (np.minimum.accumulate(rough) + np.maximum.accumulate(rough[::-1])[::-1]) / 2
    at = np.arange(0, len(smooth) - 1 + 1e-9, 1 / 16)
    dense = np.stack([np.interp(at, np.arange(len(smooth)), smooth[:, k]) for k in range(exits)], axis=1)
    cost = path_curve(cols, place(dense), problem.cost).cost
    wanted = np.linspace(cost[0], cost[-1], size)
    # np.interp wants a rising abscissa; a sliver per node separates nodes of equal cost.
    sliver = np.arange(len(cost)) * 1e-12 * max(1.0, float(cost[0]))
    out = place(np.stack([np.interp(-wanted, sliver - cost, dense[:, k]) for k in range(exits)], axis=1))
    out[0, :exits] = np.inf
    return out


# --------------------------------------------------------------------------------------------------------------- geometric shares


def geometric_shares(q: float, exits: int) -> F64:
    """``P_k = q^k / sum_j q^j`` for K exits."""
    power = np.arange(exits) * np.log(q)
    weights = np.exp(power - power.max())
    out: F64 = weights / weights.sum()
    return out


def _geometric_counts(q: float, exits: int, items: int) -> NDArray[np.int64]:
    # A share that is a whole number of items in exact arithmetic must not lose one to rounding.
    return np.floor(items * geometric_shares(q, exits)[:-1] * (1 + 1e-12)).astype(np.int64)


def geometric_thresholds(scores: Tensor, q: float) -> Tensor:
    """Thresholds ``[K]`` from geometric exit shares: ``floor(N P_k)`` items leave at exit k, the highest scores first.

    The budgeted-batch procedure of MSDNet (Huang et al. 2018, section 5 and released code), with each threshold halfway to the next
    score instead of on one. Equal scores leave together, which can only raise a share; the last exit takes the rest.

    Args:
        scores: ``[N, K]``.
        q: ratio of neighbouring shares, > 0; small leaves early, large leaves late.
    """
    if not (np.isfinite(q) and q > 0):
        raise InvalidInput(f"q must be a positive finite number, got {q}.")
    cols = columns(scores)
    return torch.from_numpy(_geometric(cols, q))


def _geometric(cols: F32, q: float) -> F64:
    counts = _geometric_counts(q, cols.shape[0] + 1, cols.shape[1])
    # Shares are per exit here (ties add to the total), so the cumulative targets follow what has really left.
    out = np.full(cols.shape[0] + 1, -np.inf)
    rows: NDArray[np.int64] | None = None
    for k, column in enumerate(cols):
        here = column if rows is None else column[rows]
        if here.size == 0:
            break
        out[k] = share_thresholds(here[None], counts[k : k + 1])[0]
        stay = np.flatnonzero(here < np.float32(out[k]))
        rows = stay if rows is None else rows[stay]
    return out


@dataclass(frozen=True)
class GeometricShares(CostMethod):
    """MSDNet's geometric exit shares, the ratio q found by bisection. Reads scores only.

    For distinct scores the number that leaves at each exit depends on q alone, so the search needs no scores and one pass places the
    thresholds. Where q makes several shares cross a whole number at once (q = 1 with N a multiple of K), as many items move together.
    """

    def fit(self, problem: Problem) -> F64:
        exits, n, cost = problem.cost.size, problem.items, problem.cost
        if problem.target >= cost[-1]:
            return problem.never

        def mean(log_q: float) -> float:
            counts = _geometric_counts(float(np.exp(log_q)), exits, n)
            return float(cost[-1]) - float(counts @ (cost[-1] - cost[:-1])) / n

        slack = 1e-12 * float(cost[-1])
        low, high = -np.log(n) - 3.0, np.log(n) + 3.0
        if mean(low) > problem.target + slack:
            low = -700.0 / max(exits - 1, 1)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) <= problem.target + slack else (low, middle)
        return _geometric(problem.cols, float(np.exp(low)))

    def path(self, problem: Problem, size: int) -> F64:
        part = problem.part(20_000, 0)
        return monotone_path(part, [_geometric(part.cols, float(q)) for q in np.geomspace(20, 0.05, 24)], size)


# ------------------------------------------------------------------------------------------------------------------- shared level


@dataclass(frozen=True)
class QuantileCost(CostMethod):
    """One level for all exits. Reads scores only.

    Attributes:
        per_exit: use the same quantile of each exit's own scores, for rules whose scores differ in scale between exits. Otherwise one
            threshold is shared.
    """

    per_exit: bool = False

    def fit(self, problem: Problem) -> F64:
        cols = problem.cols
        if cols.shape[0] == 0 or problem.target >= problem.cost[-1]:
            return problem.never
        if self.per_exit:
            nodes = self._nodes(problem, 257)
            curve = path_curve(cols, nodes, problem.cost)
            at = max(1, int(np.argmax(curve.cost <= problem.target)) if curve.cost[-1] <= problem.target else len(nodes) - 1)
            return meet(cols, clamp(cols, nodes[at - 1]), clamp(cols, nodes[at]), problem.cost, problem.target)
        low, high = float(cols.min()), float(np.nextafter(cols.max(), np.float32(np.inf)))
        return meet(cols, np.full(len(cols), high), np.full(len(cols), low), problem.cost, problem.target, shared=True)

    def _nodes(self, problem: Problem, size: int) -> F64:
        cols = problem.part(100_000, 0).cols
        if not self.per_exit:
            cols = np.broadcast_to(cols.ravel(), (1, cols.size))
        levels = np.quantile(cols, np.linspace(1, 0, size), axis=1)
        out = np.full((size, len(problem.cols) + 1), -np.inf)
        out[:, :-1] = levels
        out[0, :-1], out[-1, :-1] = np.inf, -np.inf
        return out

    def path(self, problem: Problem, size: int) -> F64:
        part = problem.part(20_000, 0)
        return monotone_path(part, list(self._nodes(part, 129)), size)


# ------------------------------------------------------------------------------------------------------------ exponential weights


@dataclass(frozen=True)
class ExponentialWeights(CostMethod):
    """Exit shares by exponential weights under a budget, then reject-option quantiles (EERO, Valade et al., arXiv 2402.03779).

    ``pi_k ~ exp(-beta R_k - nu c_k)``, ``R_k`` the mean loss of exit k, ``nu >= 0`` the smallest that keeps ``sum_k pi_k c_k`` within
    the target. At exit k the part ``pi_k / (1 - sum_{j<k} pi_j)`` of the items that are still there leaves, the highest scores first.

    Deviation: the paper adds noise to scores so that ties break. A run compares plain scores, so here a group of equal scores at the
    cut leaves or stays as a whole, by a seeded coin with the probability that such noise would give.

    Attributes:
        beta: trust in the measured losses, >= 0, per unit of loss. 0 gives the flattest shares that the budget allows.
        seed: of the coin.
    """

    beta: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.beta) and self.beta >= 0):
            raise InvalidInput(f"ExponentialWeights.beta must be a finite number >= 0, got {self.beta}.")

    def shares(self, problem: Problem) -> F64:
        """``pi`` ``[K]``."""
        risk = problem._need_losses("ExponentialWeights").mean(dim=0, dtype=torch.float64).cpu().numpy()
        span = max(float(problem.cost[-1] - problem.cost[0]), 1e-300)

        def weights(nu: float) -> F64:
            power = -self.beta * risk - nu * (problem.cost - problem.cost[0]) / span
            out: F64 = np.exp(power - power.max())
            out /= out.sum()
            return out

        if weights(0.0) @ problem.cost <= problem.target:
            return weights(0.0)
        low, high = 0.0, 1.0
        while weights(high) @ problem.cost > problem.target and high < 1e9:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if weights(middle) @ problem.cost > problem.target else (low, middle)
        return weights(high)

    def _place(self, problem: Problem) -> F64:
        # Rounding the cumulative shares up keeps the mean cost at or below the target and within one item of it.
        left_by = np.minimum(np.ceil(np.cumsum(self.shares(problem))[:-1] * problem.items * (1 - 1e-12) - 1e-9), problem.items)
        return share_thresholds(problem.cols, left_by.astype(np.int64), coin=np.random.default_rng(self.seed))

    def fit(self, problem: Problem) -> F64:
        return self._place(problem)

    def path(self, problem: Problem, size: int) -> F64:
        part = problem.part(20_000, 0)
        targets = np.linspace(part.cost[-1], part.cost[0], 26)[1:-1]
        nodes = [self._place(Problem(part.cols, part.cost, float(t), part.losses, part.unit)) for t in targets]
        return monotone_path(part, nodes, size)


# --------------------------------------------------------------------------------------------------------------- optimal stopping


class _Stopping:
    """Backward induction on fixed items; the sorting is done once for all prices."""

    def __init__(self, problem: Problem) -> None:
        self.cols, self.cost = problem.cols, problem.cost
        self.losses = np.ascontiguousarray(problem._need_losses("OptimalStopping").t().to(torch.float64).cpu().numpy())
        self.order = np.argsort(-self.cols, axis=1, kind="stable")
        ranked = np.take_along_axis(self.cols, self.order, axis=1)
        # Position j means that the j + 1 highest scores leave; impossible inside a group of equal scores.
        self.blocked = np.zeros(ranked.shape, bool)
        self.blocked[:, :-1] = ranked[:, :-1] == ranked[:, 1:]
        self.ranked = ranked

    def solve(self, price: float, sweeps: int) -> F64:
        """Thresholds ``[K]`` that minimise mean ``loss + price * cost``, locally: no single one can be improved after enough sweeps."""
        exits, n = self.cols.shape
        out = np.append(np.full(exits, np.inf), -np.inf)
        for sweep in range(1 + sweeps):
            before = out.copy()
            here = np.ones((exits, n), bool)
            if sweep:
                for k in range(1, exits):
                    here[k] = here[k - 1] & (self.cols[k - 1] < np.float32(out[k - 1]))
            later = self.losses[-1] + price * self.cost[-1]
            for k in range(exits - 1, -1, -1):
                now = self.losses[k] + price * self.cost[k]
                gain = later - now
                if sweep:
                    gain = gain * here[k]
                order = self.order[k]
                total = np.cumsum(gain[order])
                total[self.blocked[k]] = -np.inf
                best = int(np.argmax(total))
                if total[best] <= 1e-12 * n:
                    out[k] = np.inf
                elif best == n - 1:
                    out[k] = -np.inf
                else:
                    out[k] = between(float(self.ranked[k, best + 1]), float(self.ranked[k, best]))
                later = np.where(self.cols[k] >= np.float32(out[k]), now, later)
            if sweep and np.array_equal(before, out):
                break
        return out


@dataclass(frozen=True)
class OptimalStopping(CostMethod):
    """The threshold vector that loses least at a mean cost: backward induction over calibrated correctness.

    At exit k an item should leave when its expected loss here is below the expected loss plus priced cost of going on under the best
    later decisions, both given its score. The estimate of that difference is isotonic in the score; the zero of an isotonic regression
    is the peak of the running sum of the differences in score order, so one sort per exit and one running sum per price do the whole
    induction exactly, without bins. The first pass lets every item vote at every exit (right when a score sums up the past); further
    sweeps let only items vote that get there. The price of cost (a Lagrange multiplier) is found by bisection, and the last fraction
    of an item by moving along the line between the two solutions beside the target. The best shared threshold and the best single exit
    are also tried and kept if they lose less, so on the items that shape the vector this method never loses more than `QuantileCost`.

    Needs losses. The realised loss is measured on the items that chose the thresholds and is optimistic; for a promise use `Risk`. With
    few items per exit a vector can overfit by more than it gains on one shared threshold (`QuantileCost`).

    Attributes:
        design_items: random items that shape the vector, >= 2; all items place it at the target.
        steps: bisections of the price.
        sweeps: further passes.
        seed: of the choice of items.
    """

    design_items: int = 30_000
    steps: int = 16
    sweeps: int = 1
    seed: int = 0

    def at_price(self, problem: Problem, price: float) -> F64:
        """Thresholds for ``mean loss + price * mean cost``; ``problem.target`` is not used."""
        return _Stopping(problem.part(self.design_items, self.seed)).solve(price, self.sweeps)

    def fit(self, problem: Problem) -> F64:
        part = problem.part(self.design_items, self.seed)
        if part.cols.shape[0] == 0:
            return problem.never
        solver = _Stopping(part)
        free = solver.solve(0.0, self.sweeps)
        if problem.mean_cost(free) <= problem.target:
            return free
        found = [(0.0, free, part.mean_cost(free))]
        span = max(float(part.cost[-1] - part.cost[0]), 1e-300)
        low, high = 0.0, 0.25 / span
        for _ in range(60):
            vector = solver.solve(high, self.sweeps)
            found.append((high, vector, part.mean_cost(vector)))
            if found[-1][2] <= part.target:
                break
            low, high = high, high * 4
        for _ in range(self.steps):
            price = (low + high) / 2
            vector = solver.solve(price, self.sweeps)
            value = part.mean_cost(vector)
            found.append((price, vector, value))
            low, high = (price, high) if value > part.target else (low, price)
            if abs(value - part.target) <= 1e-4 * span:
                break
        found.sort(key=lambda f: f[0])
        vectors = [f[1] for f in found] + [np.full(part.cost.size, -np.inf)]
        # On all items the crossing may lie beside the one that the design items gave.
        at = next((i for i, f in enumerate(found) if f[2] <= part.target), len(found))
        while at < len(vectors) - 1 and problem.mean_cost(vectors[at]) > problem.target:
            at += 1
        while at > 1 and problem.mean_cost(vectors[at - 1]) <= problem.target:
            at -= 1
        cols = problem.cols
        dear, cheap = clamp(cols, vectors[at - 1]), clamp(cols, vectors[at])
        # Neighbouring solutions may cross; the smaller of both at each exit is surely within the target.
        best = meet(cols, dear, np.minimum(dear, cheap), problem.cost, problem.target, near=True)
        shared = QuantileCost().fit(part)
        if part.mean_loss(shared) < part.mean_loss(best):
            rival = shared if part is problem else QuantileCost().fit(problem)
            best = min(best, rival, key=problem.mean_loss)
        # Scores with heavy ties (counters) leave gaps between the solutions; one exit for everybody may fill them.
        one = [np.where(np.arange(part.cost.size) < k, np.inf, -np.inf) for k, c in enumerate(part.cost[:-1]) if c <= part.target]
        alone = min(one, key=part.mean_loss, default=best)
        return min(best, alone, key=problem.mean_loss) if part.mean_loss(alone) < part.mean_loss(best) else best

    def path(self, problem: Problem, size: int) -> F64:
        part = problem.part(min(self.design_items, 20_000), self.seed)
        if part.cols.shape[0] == 0:
            return np.full((1, 1), -np.inf)
        solver = _Stopping(part)
        span = max(float(part.cost[-1] - part.cost[0]), 1e-300)
        # Backward induction alone: its thresholds fall steadily with the price. Sweeps switch exits that nobody reaches off and on.
        return monotone_path(part, [solver.solve(float(p), 0) for p in [0.0, *np.geomspace(3e-3, 10, 23) / span]], size)
