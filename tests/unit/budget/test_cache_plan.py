"""Which steps compute and which reuse: the search against brute force, and the usual plans."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from offramp.budget import PARTS, CachePlan, best_cache_plan, cache_front, power_plan, uniform_plan
from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.core.noise import FlowMatching
from offramp.core.parts import part_from_dict, part_to_dict


def every_plan(steps: int, max_gap: int, last: bool) -> list[CachePlan]:
    free = range(1, steps - 1 if last else steps)
    fixed = {0, steps - 1} if last else {0}
    out = []
    for n in range(len(free) + 1):
        for chosen in itertools.combinations(free, n):
            plan = CachePlan(steps, tuple(sorted(fixed | set(chosen))))
            if max(plan.gaps) <= max_gap:
                out.append(plan)
    return out


@pytest.mark.parametrize("last", [True, False])
def test_front_and_best_equal_brute_force(last):
    for seed in range(40):
        draw = np.random.default_rng(seed)
        steps, gap = int(draw.integers(1, 9)), int(draw.integers(0, 5))
        table = draw.random((steps, gap + 1)) if seed % 3 else draw.integers(0, 3, (steps, gap + 1)) * 0.5
        if seed % 4 == 0:
            table = np.where(draw.random(table.shape) < 0.2, np.inf, table)
            table[:, 0] = 0.0
        max_gap = int(draw.integers(0, gap + 1))
        full, reuse = 1.0, float(draw.choice([0.0, 0.3, 1.0]))
        plans = [p for p in every_plan(steps, max_gap, last) if math.isfinite(p.loss(table))]
        front = cache_front(table, full, reuse, max_gap=max_gap, last=last)
        assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front))
        for choice in front:
            assert max(choice.plan.gaps) <= max_gap and (not last or choice.plan.gaps[-1] == 0)
            assert choice.loss == choice.plan.loss(table) and choice.cost == choice.plan.mean_cost(full, reuse)
        for plan in plans:
            within = [c.loss for c in front if c.cost <= plan.mean_cost(full, reuse) + 1e-9]
            assert min(within) <= plan.loss(table) + 1e-9
        cheapest = min(p.mean_cost(full, reuse) for p in plans)
        for budget in (cheapest, cheapest + 0.2, 1.0):
            found = best_cache_plan(table, full, reuse, budget, max_gap, last=last)
            assert found.mean_cost(full, reuse) <= budget + 1e-9
            assert found.loss(table) == pytest.approx(min(p.loss(table) for p in plans if p.mean_cost(full, reuse) <= budget + 1e-9))
        with pytest.raises(BudgetInfeasible) as caught:
            best_cache_plan(table, full, reuse, cheapest - 0.01, max_gap, last=last)
        assert caught.value.best == pytest.approx(cheapest)


def test_gaps_cost_and_loss_of_a_plan():
    plan = CachePlan(7, (0, 1, 4))
    assert plan.gaps == (0, 0, 1, 2, 0, 1, 2)
    assert plan.mean_cost(1.0, 0.3) == pytest.approx((3 + 4 * 0.3) / 7)
    table = torch.arange(21, dtype=torch.float32).reshape(7, 3)
    assert plan.loss(table) == pytest.approx((0 + 3 + 7 + 11 + 12 + 16 + 20) / 7)
    assert part_from_dict(json.loads(json.dumps(part_to_dict(plan))), PARTS) == plan
    with pytest.raises(InvalidInput, match="more than 2"):
        plan.loss(table[:, :2])
    for computed in ((), (1, 2), (0, 0), (0, 7), (0, 3, 2)):
        with pytest.raises(InvalidInput, match="ascend"):
            CachePlan(7, computed)


def test_computed_steps_crowd_where_reuse_hurts():
    """Reuse hurts in the middle of 40 steps ten times as much as elsewhere: the best plan computes there, and beats every usual one."""
    hurt = np.where(np.abs(np.arange(40) - 20) < 6, 10.0, 1.0)
    table = hurt[:, None] * np.arange(8)[None, :] ** 1.5
    for plan in (uniform_plan(40, 2), uniform_plan(40, 3), *(power_plan(40, 14, c, p) for c in (10, 20) for p in (1.0, 1.2, 1.4))):
        best = best_cache_plan(table, 1.0, 0.2, plan.mean_cost(1.0, 0.2))
        assert best.loss(table) < plan.loss(table)
    middle = sum(14 < c < 26 for c in best.computed) / 11
    assert middle > 1.5 * (len(best.computed) - middle * 11) / 29
    # Where every step and age is alike, nothing beats equal spacing.
    flat = np.tile(np.arange(8.0), (41, 1))
    even = uniform_plan(41, 4)
    assert best_cache_plan(flat, 1.0, 0.0, even.mean_cost(1.0, 0.0)).loss(flat) == pytest.approx(even.loss(flat))


def test_hundreds_of_steps_take_a_moment():
    draw = np.random.default_rng(0)
    table = np.cumsum(draw.random((400, 6)), axis=1)
    table[:, 0] = 0
    plan = best_cache_plan(table, 1.0, 0.25, 0.5)
    assert plan.mean_cost(1.0, 0.25) <= 0.5 and plan.loss(table) < uniform_plan(400, 3).loss(table)


def test_uniform_plan():
    assert uniform_plan(10, 3).computed == (0, 3, 6, 9)
    assert uniform_plan(9, 3).computed == (0, 3, 6, 8)
    assert uniform_plan(9, 3, last=False).computed == (0, 3, 6)
    assert uniform_plan(4, 1).gaps == (0, 0, 0, 0)
    assert uniform_plan(1, 5).computed == (0,)
    with pytest.raises(InvalidInput, match="at least 1"):
        uniform_plan(10, 0)


@pytest.mark.parametrize("last", [True, False])
def test_power_plan_has_the_asked_number_of_distinct_steps_and_crowds_around_its_centre(last):
    for steps, count, centre, power in itertools.product((1, 2, 20, 50), (1, 2, 5, 10, 20, 50), (0, 0.3, 1), (1.0, 1.2, 1.4, 3.0)):
        if not (2 if last and steps > 1 else 1) <= count <= steps:
            continue
        plan = power_plan(steps, count, centre * steps, power, last=last)
        assert len(plan.computed) == count and (not last or plan.gaps[-1] == 0)
    spread = [power_plan(50, 10, 15, power, last=last).computed for power in (1.0, 1.4)]
    distance = [sum(abs(c - 15) for c in p) for p in spread]
    assert distance[1] < distance[0]
    gaps = np.diff(spread[0])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("arguments", [(10, 11, 5.0), (10, 1, 5.0), (10, 0, 5.0), (10, 5, 11.0), (10, 5, -1.0), (10, 5, 5.0, 0.9)])
def test_bad_power_plans(arguments):
    with pytest.raises(InvalidInput, match="10 steps need"):
        power_plan(*arguments)


def test_a_plan_by_noise_level_computes_the_same_steps_and_serves_another_sampler():
    scale = FlowMatching()
    plan = CachePlan(20, (0, 1, 2, 5, 9, 14, 19))
    levels = scale.log_snr(torch.linspace(1000, 50, 20))
    bins = plan.refresh_bins(levels)

    def computed(at):
        found = bins.bins_of(at)
        return tuple(np.flatnonzero(np.append(True, np.diff(found) > 0)).tolist())

    assert computed(levels) == plan.computed
    finer = computed(scale.log_snr(torch.linspace(1000, 10, 100)))
    assert len(finer) == len(plan.computed) and finer[1] > 1
    with pytest.raises(InvalidInput, match="20 strictly rising"):
        plan.refresh_bins(levels.flip(0))


@pytest.mark.parametrize(
    "table, costs, options, message",
    [
        ([1.0, 2.0], (1.0, 0.1), {}, r"\[steps, gaps\]"),
        ([[math.nan]], (1.0, 0.1), {}, r"\[steps, gaps\]"),
        ([[0.0, 1.0]], (1.0, 0.1), {"max_gap": 2}, "from 0 to 1"),
        ([[0.0, 1.0]], (1.0, 2.0), {}, "cost_reuse"),
        ([[math.inf, 1.0]], (1.0, 0.1), {}, "allow no plan"),
    ],
)
def test_bad_problems(table, costs, options, message):
    with pytest.raises(InvalidInput, match=message):
        cache_front(table, *costs, **options)
