"""Depth by noise level: bins, the published schedule, and the search for the best one against brute force."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch

from offramp.budget import (
    PARTS,
    PUBLISHED_DEPTHS,
    DepthByNoise,
    NoiseBins,
    SamplerSteps,
    ScheduleChoice,
    best_schedule,
    joint_front,
    published_schedule,
    schedule_front,
)
from offramp.core.errors import ArtifactError, BudgetInfeasible, InvalidInput
from offramp.core.noise import FlowMatching, VariancePreserving
from offramp.core.parts import part_from_dict, part_to_dict

# ------------------------------------------------------------------------------------------------------------------------- bins


def ddpm() -> VariancePreserving:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return VariancePreserving.from_alphas(torch.cumprod(1 - beta, 0))


def test_bins_cover_every_level_and_an_edge_belongs_to_the_cleaner_one():
    bins = NoiseBins((-2.0, 0.0, 3.0))
    levels = [-math.inf, -2.5, -2.0, -0.1, 0.0, 2.9, 3.0, math.inf]
    assert [bins.bin_of(x) for x in levels] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bins.bins_of(levels).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bins.bins_of(torch.tensor(levels)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bins.counts(levels) == (2, 2, 2, 2)
    assert NoiseBins(()).bin_of(1.0) == 0


@pytest.mark.parametrize("edges", [(1.0, 1.0), (1.0, 0.0), (math.nan,), (0.0, math.inf)])
def test_bad_edges(edges):
    with pytest.raises(InvalidInput, match="ascending"):
        NoiseBins(edges)


def test_nan_is_no_level():
    bins = NoiseBins((0.0,))
    with pytest.raises(InvalidInput, match="not a number"):
        bins.bin_of(math.nan)
    with pytest.raises(InvalidInput, match="NaN"):
        bins.bins_of([0.0, math.nan])
    with pytest.raises(InvalidInput, match="one or more"):
        bins.bins_of([])


@pytest.mark.parametrize("steps, size", [(50, 10), (17, 5), (4, 4), (6, 1)])
def test_equal_shares_of_a_samplers_steps(steps, size):
    levels = ddpm().log_snr(torch.linspace(999, 0, steps).round())
    counts = NoiseBins.equal_shares(levels, size).counts(levels)
    assert sum(counts) == steps and len(counts) == size and max(counts) - min(counts) <= 1


def test_equal_shares_with_levels_that_repeat_or_are_infinite():
    bins = NoiseBins.equal_shares([-math.inf, 0.0, 0.0, 0.0, 0.0, math.inf], 3)
    assert bins.counts([-math.inf, 0.0, 0.0, 0.0, 0.0, math.inf]) == (1, 4, 1)
    # Rounding to half precision moves no level across an edge: edges are midway.
    assert bins.counts(torch.tensor([-math.inf, 0.0, math.inf], dtype=torch.float16)) == (1, 1, 1)
    assert NoiseBins.equal_shares([-math.inf, math.inf], 2).edges == (0.0,)
    far = NoiseBins.equal_shares([-math.inf, -500.0, -400.0, 500.0, 1e4, math.inf], 6)
    assert [far.bin_of(x) for x in (-math.inf, -501.0, -450.1, -449.9, -1.0, 1.0, 1e4, 1e9)] == [0, 1, 1, 2, 2, 3, 4, 5]
    flow = FlowMatching(1.0)
    assert NoiseBins.equal_shares(flow.log_snr(torch.tensor([1.0, 0.9])), 2).edges == pytest.approx(
        flow.log_snr(torch.tensor([0.95])), abs=1e-2
    )
    with pytest.raises(InvalidInput, match="3 distinct"):
        NoiseBins.equal_shares([-math.inf, 0.0, 0.0, math.inf], 4)


@pytest.mark.parametrize("scale", [ddpm(), FlowMatching()], ids=["diffusion", "flow"])
def test_equal_parts_of_time(scale):
    time_steps = torch.arange(1000)
    levels = scale.log_snr(time_steps)
    bins = NoiseBins.by_timestep(levels)
    assert bins.bins_of(levels).tolist() == (9 - time_steps // 100).tolist()
    assert NoiseBins.by_timestep(levels[:7], 3).counts(levels[:7]) == (2, 2, 3)


@pytest.mark.parametrize("levels, size", [([0.0, 1.0, 2.0], 2), ([2.0, 1.0, 0.0], 4), ([2.0, 1.0, 0.0], 0), ([2.0, 1.0, 1.0, 0.0], 2)])
def test_times_that_cannot_be_binned(levels, size):
    with pytest.raises(InvalidInput, match="equal time"):
        NoiseBins.by_timestep(levels, size)


# --------------------------------------------------------------------------------------------------------------------- schedules


def test_published_schedule_at_its_own_depth_and_scaled():
    scale = ddpm()
    bins = NoiseBins.by_timestep(scale.levels)
    own = published_schedule(28, bins)
    assert own.depths_at(scale.log_snr(torch.arange(50, 1000, 100))) == PUBLISHED_DEPTHS
    assert own.mean_cost(scale.levels, range(29)) == pytest.approx(20.0)
    assert own.monotone
    assert published_schedule(12, bins).depths == (5, 5, 7, 7, 9, 9, 10, 10, 12, 12)
    assert published_schedule(1, bins).depths == (1,) * 10
    for blocks in range(1, 60):
        made = published_schedule(blocks, bins)
        assert made.depths[-1] == blocks and made.monotone
        assert all(abs(d - p * blocks / 28) <= 0.5 or d == 1 for d, p in zip(made.depths, reversed(PUBLISHED_DEPTHS)))
    with pytest.raises(InvalidInput, match="10 bins"):
        published_schedule(28, NoiseBins((0.0,)))


def test_one_schedule_serves_samplers_of_any_length():
    scale = ddpm()
    made = published_schedule(28, NoiseBins.by_timestep(scale.levels))
    means = [made.mean_cost(scale.log_snr(torch.linspace(999, 0, n)), range(29)) for n in (10, 50, 250)]
    assert all(abs(m - 20) < 1.5 for m in means)


def test_a_schedule_survives_json_and_refuses_nonsense():
    made = DepthByNoise(NoiseBins((-1.5, 2.25)), (2, 4, 3))
    assert part_from_dict(json.loads(json.dumps(part_to_dict(made))), PARTS) == made
    assert not made.monotone and made.depth(0.0) == 4
    assert made.mean_cost([-2.0, 5.0], {2: 1.0, 3: 5.0}) == 3.0
    with pytest.raises(InvalidInput, match=r"depth \[4\]"):
        made.mean_cost([0.0], [1.0, 1.0, 1.0, 1.0])
    for depths in ((1, 2), (1, 2, -1), (1, 2, 2.5)):
        with pytest.raises(InvalidInput, match="whole number"):
            DepthByNoise(NoiseBins((-1.5, 2.25)), depths)
    with pytest.raises(ArtifactError):
        part_from_dict({"type": "DepthByNoise", "args": {"bins": None}}, PARTS)


# ------------------------------------------------------------------------------------------------------------------------ search


def brute(loss, cost, weight, monotone):
    """Mean cost, mean loss and options of every allowed choice over the bins with weight."""
    used = np.flatnonzero(weight > 0)
    out = []
    for options in itertools.product(range(cost.size), repeat=used.size):
        if monotone and any(cost[a] > cost[b] for a, b in itertools.pairwise(options)):
            continue
        row = list(options)
        total = weight.sum()
        lost = float((weight[used] * loss[used, row]).sum() / total)
        if math.isfinite(lost):
            out.append((float((weight[used] * cost[row]).sum() / total), lost))
    return out


def example(seed):
    """Small problems of every kind: whole, shared and irregular costs, options that are not allowed, bins without steps, ties."""
    draw = np.random.default_rng(seed)
    bins, options = int(draw.integers(1, 6)), int(draw.integers(1, 5))
    cost = [np.arange(options) * 1.0, 0.1 * (1 + np.arange(options)), draw.random(options), draw.integers(0, 3, options) * 0.5][seed % 4]
    loss = draw.random((bins, options)) if seed % 3 else draw.integers(0, 4, (bins, options)) * 0.25
    if seed % 5 == 0:
        forbid = draw.random((bins, options)) < 0.3
        forbid[:, -1] = False
        loss = np.where(forbid, np.inf, loss)
    weight = draw.integers(0, 4, bins).astype(float) if seed % 2 else draw.random(bins)
    weight[0] = max(weight[0], 1.0)
    return NoiseBins(tuple(range(bins - 1))), loss, draw.permutation(cost) if seed % 7 else cost, weight, draw


@pytest.mark.parametrize("monotone", [False, True])
def test_front_and_best_equal_brute_force(monotone):
    refused = 0
    for seed in range(84):
        bins, loss, cost, weight, draw = example(seed)
        every = brute(loss, cost, weight, monotone)
        if not every:
            refused += 1
            with pytest.raises(InvalidInput, match="No monotone"):
                schedule_front(bins, loss, cost, weight, monotone=monotone)
            continue
        front = schedule_front(bins, loss, cost, weight, monotone=monotone)
        assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front))
        for point in front:
            check_point(point, loss, cost, weight, monotone)
        for c, lost in every:  # nothing beats the front
            assert min(p.loss for p in front if p.cost <= c + 1e-9) <= lost + 1e-9
        cheapest = min(c for c, _ in every)
        for budget in (*draw.uniform(cheapest, max(c for c, _ in every) + 0.1, 4), cheapest, math.inf):
            made = best_schedule(bins, loss, cost, weight, float(budget), monotone=monotone)
            options = [made.depths[b] for b in np.flatnonzero(weight > 0)]
            found = float((weight[weight > 0] * loss[weight > 0, options]).sum() / weight.sum())
            spent = float((weight[weight > 0] * cost[options]).sum() / weight.sum())
            assert spent <= budget + 1e-9
            assert found == pytest.approx(min(lost for c, lost in every if c <= budget + 1e-9), abs=1e-9)
        with pytest.raises(BudgetInfeasible) as caught:
            best_schedule(bins, loss, cost, weight, cheapest - 0.01, monotone=monotone)
        assert caught.value.best == pytest.approx(cheapest)
    assert refused < 9


def check_point(point: ScheduleChoice, loss, cost, weight, monotone):
    used = np.flatnonzero(weight > 0)
    options = [point.schedule.depths[b] for b in used]
    assert point.cost == pytest.approx((weight[used] * cost[options]).sum() / weight.sum())
    assert point.loss == pytest.approx((weight[used] * loss[used, options]).sum() / weight.sum())
    if monotone:
        assert all(cost[a] <= cost[b] for a, b in itertools.pairwise(point.schedule.depths))


def test_bins_without_steps_take_the_depth_of_the_next_cleaner_bin():
    bins = NoiseBins((0.0, 1.0, 2.0))
    loss = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    assert best_schedule(bins, loss, [1.0, 2.0], [0, 3, 0, 0], 2.0, depths=(6, 12)).depths == (12, 12, 12, 12)
    assert best_schedule(bins, loss, [1.0, 2.0], [0, 3, 1, 0], 2.0, depths=(6, 12)).depths == (12, 12, 6, 6)


def smooth(bins, options, seed=0):
    draw = np.random.default_rng(seed)
    depth = np.arange(1, options + 1)
    loss = draw.gamma(1, 1, bins)[:, None] * np.exp(-depth / draw.uniform(3, 15, bins)[:, None]) + draw.gamma(1, 0.02, (bins, options))
    return NoiseBins(tuple(range(bins - 1))), loss, depth


@pytest.mark.parametrize("monotone", [False, True])
def test_many_bins_and_options_are_fast_and_the_bounded_search_agrees_with_the_front(monotone):
    bins, loss, depth = smooth(60, 20)
    cost, weight = 0.013 + 0.0357 * depth, np.ones(60)
    start = time.process_time()
    front = schedule_front(bins, loss, cost, weight, monotone=monotone)
    budgets = [0.2, 0.35, 0.5]
    chosen = schedule_front(bins, loss, cost, weight, monotone=monotone, budgets=[*budgets, 0.0])
    assert time.process_time() - start < 20
    # Sums of whole numbers of blocks, no more: the same sum reached in another order is not another cost.
    assert 100 < len(front) <= 60 * 20
    assert [c.loss for c in chosen] == pytest.approx([min(p.loss for p in front if p.cost <= b + 1e-12) for b in budgets])


def test_measured_times_as_costs_are_exact_with_many_bins():
    bins, loss, _ = smooth(12, 28)
    cost = np.sort(np.random.default_rng(1).random(28))
    front = schedule_front(bins, loss, cost, np.ones(12))
    for budget in (0.3, 0.5, 0.7):
        made = best_schedule(bins, loss, cost, np.ones(12), budget)
        assert made == [p for p in front if p.cost <= budget][-1].schedule


def test_the_best_schedule_is_no_worse_than_the_published_at_its_cost():
    scale = ddpm()
    bins = NoiseBins.by_timestep(scale.levels)
    levels = scale.log_snr(torch.linspace(999, 0, 50).round())
    published, weight = published_schedule(28, bins), bins.counts(levels)
    draw = np.random.default_rng(3)
    for _ in range(5):
        loss = np.cumsum(draw.random((10, 29)), axis=1)[:, ::-1]
        budget = published.mean_cost(levels, range(29))
        made = best_schedule(bins, loss, range(29), weight, budget, monotone=True)
        assert made.monotone and made.mean_cost(levels, range(29)) <= budget + 1e-9
        lost = [sum(w * loss[b, s.depths[b]] for b, w in enumerate(weight)) for s in (made, published)]
        assert lost[0] <= lost[1]


@pytest.mark.parametrize(
    "loss, cost, weight, message",
    [
        ([[1.0, 2.0]], [1.0, 2.0], [1.0, 1.0], r"must be \[bins, options\]"),
        ([[1.0, 2.0]] * 2, [1.0, -2.0], [1.0, 1.0], "finite and >= 0"),
        ([[1.0, 2.0]] * 2, [1.0, 2.0], [0.0, 0.0], "some weight above 0"),
        ([[1.0, math.nan]] * 2, [1.0, 2.0], [1.0, 1.0], "NaN"),
        ([[1.0, 2.0], [math.inf, math.inf]], [1.0, 2.0], [1.0, 1.0], r"forbidden .* \[1\]"),
        ([[math.inf, 2.0], [1.0, math.inf]], [1.0, 2.0], [1.0, 1.0], "No monotone"),
    ],
)
def test_bad_problems(loss, cost, weight, message):
    with pytest.raises(InvalidInput, match=message):
        best_schedule(NoiseBins((0.0,)), loss, cost, weight, 5.0, monotone=True)


def test_bad_options_and_budgets():
    problem = (NoiseBins((0.0,)), [[1.0, 2.0]] * 2, [1.0, 2.0], [1.0, 1.0])
    with pytest.raises(InvalidInput, match="name each"):
        best_schedule(*problem, 2.0, depths=(1,))
    with pytest.raises(InvalidInput, match="not a number"):
        best_schedule(*problem, math.nan)
    with pytest.raises(InvalidInput, match="budgets"):
        schedule_front(*problem, budgets=[])
    with pytest.raises(BudgetInfeasible) as caught:
        schedule_front(*problem, budgets=[0.1, 0.2])
    assert caught.value.requested == 0.2 and caught.value.best == 1.0


# ----------------------------------------------------------------------------------------------------------- depth and step count


def test_depth_and_steps_chosen_together_equal_brute_force():
    bins = NoiseBins((0.0,))
    cost = np.array([1.0, 2.0, 4.0])
    draw = np.random.default_rng(0)
    samplers = [SamplerSteps(f"{n} steps", (n // 2, n // 2), draw.random((2, 3)), 6.0 / n) for n in (2, 4, 8)]
    front = joint_front(bins, samplers, cost)
    every = [
        (n @ cost[list(o)], s.base + n @ s.loss[[0, 1], o], s.name)
        for s in samplers
        for n in [np.asarray(s.weight, float)]
        for o in itertools.product(range(3), repeat=2)
    ]
    undercut = [p for p in every if not any(q[:2] != p[:2] and q[0] <= p[0] and q[1] <= p[1] for q in every)]
    assert [(p.cost, p.loss, p.sampler) for p in front] == [
        (pytest.approx(c), pytest.approx(lost), name) for c, lost, name in sorted(undercut)
    ]
    assert len({p.sampler for p in front}) > 1
    with pytest.raises(InvalidInput, match="distinct names"):
        joint_front(bins, [samplers[0], samplers[0]], cost)
