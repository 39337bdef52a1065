"""Which steps of a sampler compute and which reuse what an earlier one computed: the best such plan for a cost, and the usual ones.

DeepCache (Ma et al. 2024) computes the deep part of a denoiser at every N-th step and reuses its output in between. Which steps are worth
computing can be found exactly once it is known what reuse costs in quality at each step and age.

Shapes: ``S`` steps of a sampler; ``G`` the most steps that a result is reused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from offramp.budget.noise_schedule import Levels, NoiseBins, as_levels, edge_between
from offramp.budget.replay import F64
from offramp.core.errors import BudgetInfeasible, InvalidInput


@dataclass(frozen=True)
class CachePlan:
    """The steps that compute; all others reuse the result of the last one that did.

    Attributes:
        steps: of the sampler, at least 1.
        computed: their numbers, ascending; the first is 0.
    """

    steps: int
    computed: tuple[int, ...]

    def __post_init__(self) -> None:
        computed = tuple(int(c) for c in self.computed)
        if not computed or computed[0] != 0 or computed[-1] >= self.steps or any(a >= b for a, b in pairwise(computed)):
            raise InvalidInput(f"computed must ascend from 0 to at most {self.steps - 1}, got {self.computed}.")
        object.__setattr__(self, "computed", computed)

    @property
    def gaps(self) -> tuple[int, ...]:
        """For every step the number of steps since the last computed one; 0 where it computes."""
        ends = (*self.computed[1:], self.steps)
        return tuple(g for start, end in zip(self.computed, ends, strict=True) for g in range(end - start))

    def mean_cost(self, full: float, reuse: float) -> float:
        """Mean over steps, given the cost of a step that computes and of one that reuses."""
        n = len(self.computed)
        return (n * full + (self.steps - n) * reuse) / self.steps

    def loss(self, table: ArrayLike | Tensor) -> float:
        """Mean over steps of ``table[step, gap]``.

        Raises:
            InvalidInput: the table has other steps, or no entry for a gap of this plan.
        """
        values = _table(table)
        if values.shape[0] != self.steps or values.shape[1] <= max(self.gaps):
            raise InvalidInput(f"The table must be [{self.steps}, more than {max(self.gaps)}] for this plan, got {values.shape}.")
        return math.fsum(values[np.arange(self.steps), self.gaps]) / self.steps

    def refresh_bins(self, levels: Levels) -> NoiseBins:
        """The plan by noise level: a result is fresh until the level enters another bin.

        With the sampler that it was made for, "compute where the bin changes" computes the same steps; with another number of steps it
        computes as often along the way from noise to image.

        Args:
            levels: ``[S]`` log signal-to-noise ratios of the sampler's steps, strictly rising.

        Raises:
            InvalidInput: not one level per step, or they do not rise.
        """
        rise = as_levels(levels)
        if rise.size != self.steps or not np.all(rise[1:] > rise[:-1]):
            raise InvalidInput(f"levels must be {self.steps} strictly rising log signal-to-noise ratios, one per step; got {rise.size}.")
        return NoiseBins(tuple(edge_between(float(rise[c - 1]), float(rise[c])) for c in self.computed[1:]))


@dataclass(frozen=True)
class CacheChoice:
    """A plan that no other undercuts.

    Attributes:
        cost: mean of a step.
        loss: mean over steps.
        plan: the steps that compute.
    """

    cost: float
    loss: float
    plan: CachePlan


def _table(loss: ArrayLike | Tensor) -> F64:
    values = loss.detach().cpu().double().numpy() if isinstance(loss, Tensor) else np.asarray(loss, np.float64)
    if values.ndim != 2 or 0 in values.shape or np.isnan(values).any() or (values == -np.inf).any():
        raise InvalidInput(f"loss must be [steps, gaps] numbers, or inf where reuse is not allowed; got shape {values.shape}.")
    return values


def cache_front(
    loss: ArrayLike | Tensor, cost_full: float, cost_reuse: float, *, max_gap: int | None = None, last: bool = True
) -> tuple[CacheChoice, ...]:
    """Every plan that no other undercuts in cost and loss, by rising cost. Exact: dynamic programming over (computed steps, last of them).

    Losses of steps are taken to add up, and that of a reused step to depend on its age alone.

    Args:
        loss: ``[S, G + 1]``: at step s, reusing what was computed g steps before; ``g = 0`` is computing. ``inf``: not allowed.
        cost_full: of a step that computes, in any unit.
        cost_reuse: of one that reuses, from 0 to ``cost_full``.
        max_gap: most reuses in a row, from 0 to G; G by default.
        last: the last step computes, as the first always does.

    Raises:
        InvalidInput: an argument is out of range, or the entries that are inf allow no plan.
    """
    table = _table(loss)
    steps, most = table.shape[0], table.shape[1] - 1
    gap = most if max_gap is None else max_gap
    if not 0 <= gap <= most:
        raise InvalidInput(f"max_gap must be from 0 to {most}, the largest gap in the loss table, got {max_gap}.")
    if not (math.isfinite(cost_full) and 0 <= cost_reuse <= cost_full):
        raise InvalidInput(f"Costs must be finite with 0 <= cost_reuse <= cost_full, got {cost_reuse} and {cost_full}.")
    gap = min(gap, steps - 1)
    # run[i, g]: loss of computing at i and of the g reuses after it; inf past the end.
    run = np.full((steps, gap + 1), np.inf)
    run[:, 0] = table[:, 0]
    for g in range(1, gap + 1):
        run[: steps - g, g] = run[: steps - g, g - 1] + table[g:, g]
    # best[j]: least loss of the steps before j, if the n-th computed step is j; what came before it computed at j - 1 - g.
    best = np.full(steps, np.inf)
    best[0] = 0.0
    came = np.zeros((steps, steps), np.int64)
    ends: list[tuple[float, int]] = []  # for n = 1, 2, ... computed steps: loss of all steps, and the last computed one
    at, back = np.arange(steps)[:, None], np.arange(gap + 1)[None, :]
    source, final = at - 1 - back, np.arange(steps - 1 - gap, steps)  # steps that may compute before each, and as the last one
    for n in range(steps):
        tail = best[final] + run[final, steps - 1 - final]
        chosen = -1 if last else int(np.argmin(tail))
        ends.append((float(tail[chosen]), int(final[chosen])))
        reach = np.where(source >= 0, best[source] + run[source, back], np.inf)
        came[n] = source[np.arange(steps), reach.argmin(axis=1)]
        best = reach.min(axis=1)
    out: list[CacheChoice] = []
    lowest = math.inf
    for n, (total, j) in enumerate(ends):
        if not total < lowest:
            continue
        lowest = total
        computed = [j]
        for k in range(n - 1, -1, -1):
            computed.append(int(came[k, computed[-1]]))
        plan = CachePlan(steps, tuple(reversed(computed)))
        choice = CacheChoice(plan.mean_cost(cost_full, cost_reuse), plan.loss(table), plan)
        if out and not out[-1].cost < choice.cost:  # reuse as dear as computing
            out.pop()
        out.append(choice)
    if not out:
        raise InvalidInput(
            "The entries of the loss that are inf allow no plan: computing must be allowed at the first step and often enough."
        )
    return tuple(out)


def best_cache_plan(
    loss: ArrayLike | Tensor, cost_full: float, cost_reuse: float, budget: float, max_gap: int | None = None, *, last: bool = True
) -> CachePlan:
    """The plan of least loss whose mean cost of a step is within the budget; of equals the cheapest. Exact.

    Args:
        loss: ``[S, G + 1]``, see `cache_front`.
        cost_full: of a step that computes.
        cost_reuse: of one that reuses.
        budget: mean cost of a step, in the same unit.
        max_gap: most reuses in a row.
        last: the last step computes.

    Raises:
        InvalidInput: see `cache_front`.
        BudgetInfeasible: the cheapest plan costs more; carries its mean cost.
    """
    front = cache_front(loss, cost_full, cost_reuse, max_gap=max_gap, last=last)
    within = [c for c in front if c.cost <= budget * (1 + 1e-12)]
    if not within:
        raise BudgetInfeasible(
            f"No plan costs {budget:g} a step or less; the cheapest costs {front[0].cost:.6g} with {len(front[0].plan.computed)} of "
            f"{front[0].plan.steps} steps computed. Raise the budget or allow longer reuse.",
            requested=budget,
            best=front[0].cost,
            unit="mean cost of a step",
        )
    return within[-1].plan


# ----------------------------------------------------------------------------------------------------------------------- the usual


def uniform_plan(steps: int, every: int, *, last: bool = True) -> CachePlan:
    """DeepCache's 1:N plan (Ma et al. 2024, section 3.3): steps 0, N, 2N, ... compute, and the last if asked.

    Raises:
        InvalidInput: steps or every below 1.
    """
    if steps < 1 or every < 1:
        raise InvalidInput(f"steps and every must be at least 1, got {steps} and {every}.")
    return CachePlan(steps, tuple(sorted({*range(0, steps, every), *([steps - 1] if last else [])})))


def power_plan(steps: int, count: int, centre: float, power: float = 1.2, *, last: bool = True) -> CachePlan:
    """DeepCache's non-uniform 1:N plan (Ma et al. 2024, section 3.3 and its appendix): computed steps crowd around a centre.

    Positions are ``centre + sign(u) |u|^power`` at evenly spaced u, rounded down. Near the centre some may coincide; then the power is
    lowered, in steps of 0.02 and at last to even spacing, until all are distinct.

    Args:
        steps: of the sampler.
        count: computed steps, from 1 (2 with ``last``, unless there is one step) to ``steps``.
        centre: step around which they crowd, from 0 to ``steps``.
        power: at least 1, which spaces evenly.
        last: one of them is the last step.

    Raises:
        InvalidInput: an argument is out of range.
    """
    least = 2 if last and steps > 1 else 1
    if not (least <= count <= steps and 0 <= centre <= steps and math.isfinite(power) and power >= 1):
        raise InvalidInput(
            f"{steps} steps need count from {least} to {steps}, centre from 0 to {steps} and power >= 1; got {count}, {centre} and {power}."
        )
    end = steps - 1 if last else steps
    pieces = max(count - 1 if last else count, 1)
    while True:
        u = np.linspace(-(centre ** (1 / power)), math.copysign(abs(end - centre) ** (1 / power), end - centre), pieces + 1)
        places = np.floor(centre + np.sign(u) * np.abs(u) ** power + 1e-9)
        places[0], places[-1] = 0, end
        computed = np.unique(places[:count]).astype(int)
        if computed.size == count and computed[-1] < steps:
            return CachePlan(steps, tuple(computed.tolist()))
        if power == 1:
            return CachePlan(steps, tuple(k * end // pieces for k in range(count)))
        power = max(1.0, power - 0.02)
