"""The best depth schedule for a cost, all schedules worth having, and depth chosen together with the number of steps.

What an option is does not matter here: a number of blocks, a group of them, or the reuse of what an earlier step computed. It has a cost
and, at each level of noise, an estimate of the loss it brings.

Shapes: ``B`` bins, ``O`` options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from offramp.budget.knapsack import Choices, best_choice, front_of_choices, least_cost
from offramp.budget.noise_schedule import DepthByNoise, NoiseBins
from offramp.budget.replay import F64
from offramp.core.errors import BudgetInfeasible, InvalidInput

# ----------------------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule that no other undercuts.

    Attributes:
        cost: mean over the sampler's steps, in the unit of the costs given.
        loss: mean over the sampler's steps.
        schedule: the depths.
    """

    cost: float
    loss: float
    schedule: DepthByNoise


@dataclass(frozen=True)
class _Problem:
    """Checked arguments; groups are the bins in which the sampler has steps."""

    bins: NoiseBins
    loss: F64
    cost: F64
    weight: F64
    depths: tuple[int, ...]
    monotone: bool

    @classmethod
    def of(
        cls, bins: NoiseBins, loss: ArrayLike | Tensor, cost: ArrayLike, weight: ArrayLike, depths: Sequence[int] | None, monotone: bool
    ) -> _Problem:
        table = loss.detach().cpu().double().numpy() if isinstance(loss, Tensor) else np.asarray(loss, np.float64)
        price, times = np.asarray(cost, np.float64), np.asarray(weight, np.float64)
        if table.shape != (bins.size, price.size) or price.ndim != 1 or price.size == 0 or times.shape != (bins.size,):
            raise InvalidInput(
                f"loss must be [bins, options], cost [options] and weight [bins] for {bins.size} bins; got {table.shape}, {price.shape} "
                f"and {times.shape}."
            )
        if not (np.isfinite(price).all() and (price >= 0).all()) or not (np.isfinite(times).all() and (times >= 0).all() and times.any()):
            raise InvalidInput(f"cost and weight must be finite and >= 0, some weight above 0; got {price} and {times}.")
        if np.isnan(table).any() or (table == -np.inf).any():
            raise InvalidInput("A loss is NaN or minus infinity. Give inf for an option that is not allowed in a bin.")
        closed = np.flatnonzero((times > 0) & ~np.isfinite(table).any(axis=1))
        if closed.size:
            raise InvalidInput(f"Every option is forbidden (loss inf) in bins {closed.tolist()}, where the sampler has steps.")
        named = tuple(range(price.size)) if depths is None else tuple(depths)
        if len(named) != price.size:
            raise InvalidInput(f"depths must name each of the {price.size} options, got {named}.")
        made = cls(bins, table, price, times, named, monotone)
        if least_cost(*made.groups()) == math.inf:
            raise InvalidInput("No monotone schedule is allowed: the losses that are inf leave no option to some bin. Allow more of them.")
        return made

    def groups(self) -> tuple[F64, F64, NDArray[np.int64]]:
        """Cost and loss ``[G, O]`` as sums over the steps of a bin, and ranks ``[O]``."""
        used = self.weight > 0
        times = self.weight[used, None]
        rank = np.unique(self.cost, return_inverse=True)[1].reshape(-1) if self.monotone else np.zeros(self.cost.size)
        return times * self.cost, times * self.loss[used], rank.astype(np.int64)

    def schedules(self, found: Choices) -> tuple[ScheduleChoice, ...]:
        used = np.flatnonzero(self.weight > 0)
        # A bin without steps takes the depth of the next cleaner one that has some, or of the cleanest: another sampler may need it.
        source = np.minimum(np.searchsorted(used, np.arange(self.bins.size)), used.size - 1)
        total = math.fsum(self.weight)
        out = []
        for row in found.options:
            cost = math.fsum(self.weight[used] * self.cost[row]) / total
            loss = math.fsum(self.weight[used] * self.loss[used, row]) / total
            out.append(ScheduleChoice(cost, loss, DepthByNoise(self.bins, tuple(self.depths[o] for o in row[source]))))
        return tuple(out)

    def infeasible(self, budget: float, best: float) -> BudgetInfeasible:
        return BudgetInfeasible(
            f"No schedule costs {budget:g} a step or less on average; the cheapest{' that is monotone' if self.monotone else ''} costs "
            f"{best:.6g}. Raise the budget or add a cheaper option.",
            requested=budget,
            best=best,
            unit="mean cost of a step",
        )


def best_schedule(
    bins: NoiseBins,
    loss: ArrayLike | Tensor,
    cost: ArrayLike,
    weight: ArrayLike,
    budget: float,
    *,
    depths: Sequence[int] | None = None,
    monotone: bool = False,
) -> DepthByNoise:
    """The schedule of least loss whose mean cost over the sampler's steps is within the budget; of equals the cheapest. Exact.

    The losses of steps are taken to add up. That is an assumption about the model, not about the search: with the denoising loss of a step
    it ignores that an error made early is seen, and partly mended, by later steps.

    Args:
        bins: B intervals.
        loss: ``[B, O]`` of an option at a step in a bin; ``inf`` where an option is not allowed.
        cost: ``[O]`` of a step, >= 0, in any unit.
        weight: ``[B]`` the sampler's steps in each bin (`NoiseBins.counts`), or any weights >= 0.
        budget: mean cost of a step, in the same unit.
        depths: ``[O]`` what the schedule calls the options; 0, 1, ... by default.
        monotone: cost never rises towards pure noise.

    Returns:
        The schedule. A bin without steps has the depth of the next cleaner bin with some.

    Raises:
        InvalidInput: shapes differ or a value is out of range.
        BudgetInfeasible: the cheapest schedule costs more; carries its mean cost.

    Example:
        >>> bins = NoiseBins((0.0,))  # noisy and clean; 3 and 1 steps of the sampler fall there
        >>> loss = [[0.5, 0.4, 0.3], [0.9, 0.5, 0.1]]
        >>> best_schedule(bins, loss, cost=[1, 2, 3], weight=[3, 1], budget=1.5, depths=(4, 8, 12)).depths
        (4, 12)
    """
    problem = _Problem.of(bins, loss, cost, weight, depths, monotone)
    if math.isnan(budget):
        raise InvalidInput("The budget is not a number.")
    total = math.fsum(problem.weight)
    found = best_choice(*problem.groups(), budget * total)
    if not found.cost.size:
        raise problem.infeasible(budget, least_cost(*problem.groups()) / total)
    return problem.schedules(found)[0].schedule


def schedule_front(
    bins: NoiseBins,
    loss: ArrayLike | Tensor,
    cost: ArrayLike,
    weight: ArrayLike,
    *,
    depths: Sequence[int] | None = None,
    monotone: bool = False,
    budgets: Sequence[float] | None = None,
) -> tuple[ScheduleChoice, ...]:
    """Every schedule that no other undercuts in cost and loss, by rising cost: the cost-quality curve in one call.

    Where costs are whole multiples of one unit (blocks), there are at most as many as sums of them. Where they are not (measured times) and
    bins are many, undominated schedules can be very many: give ``budgets``.

    Args:
        bins: see `best_schedule`, also for the others.
        loss: ``[B, O]``.
        cost: ``[O]``.
        weight: ``[B]``.
        depths: ``[O]``.
        monotone: see there.
        budgets: only the best schedule for each of these mean costs; those that nothing meets are left out.

    Raises:
        InvalidInput: see `best_schedule`.
        BudgetInfeasible: with ``budgets``, none of them can be met.
    """
    problem = _Problem.of(bins, loss, cost, weight, depths, monotone)
    groups = problem.groups()
    if budgets is not None and (not budgets or any(map(math.isnan, budgets))):
        raise InvalidInput(f"budgets must be one or more numbers, got {budgets}.")
    if budgets is None:
        return problem.schedules(front_of_choices(*groups))
    total = math.fsum(problem.weight)
    found = [problem.schedules(best_choice(*groups, b * total)) for b in sorted(set(budgets))]
    distinct = dict.fromkeys(f[0] for f in found if f)
    if not distinct:
        raise problem.infeasible(max(budgets), least_cost(*groups) / total)
    return tuple(distinct)


# ----------------------------------------------------------------------------------------------------------- depth and step count


@dataclass(frozen=True, eq=False)
class SamplerSteps:
    """One sampler with one number of steps, as a candidate beside others.

    Attributes:
        name: shown with the result.
        weight: ``[B]`` its steps in each bin.
        loss: ``[B, O]`` what an option at one step of a bin adds to the loss of the final image; comparable between samplers.
        base: loss of its final images at full depth (fewer steps: more discretisation error), in the same unit.
    """

    name: str
    weight: ArrayLike
    loss: ArrayLike
    base: float = 0.0


@dataclass(frozen=True)
class JointChoice:
    """A sampler and a schedule that no other pair undercuts.

    Attributes:
        cost: of a whole image: the sum over steps.
        loss: ``base`` plus the sum over steps.
        sampler: its name.
        schedule: the depths.
    """

    cost: float
    loss: float
    sampler: str
    schedule: DepthByNoise


def joint_front(
    bins: NoiseBins, samplers: Sequence[SamplerSteps], cost: ArrayLike, *, depths: Sequence[int] | None = None, monotone: bool = False
) -> tuple[JointChoice, ...]:
    """Depth and number of steps chosen together: of all samplers and schedules those that no other pair undercuts, by rising cost.

    Args:
        bins: B intervals, the same for all.
        samplers: candidates, with distinct names.
        cost: ``[O]`` of a step.
        depths: ``[O]``, see `best_schedule`.
        monotone: see there.

    Raises:
        InvalidInput: no candidates, names repeat, or see `best_schedule`.
    """
    names = [s.name for s in samplers]
    if not names or len(set(names)) < len(names) or not all(math.isfinite(s.base) for s in samplers):
        raise InvalidInput(f"joint_front needs one or more samplers with distinct names and finite base losses, got {names}.")
    points = []
    for sampler in samplers:
        steps = math.fsum(np.asarray(sampler.weight, np.float64))
        for choice in schedule_front(bins, sampler.loss, cost, sampler.weight, depths=depths, monotone=monotone):
            points.append(JointChoice(choice.cost * steps, sampler.base + choice.loss * steps, sampler.name, choice.schedule))
    front: list[JointChoice] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return tuple(front)
