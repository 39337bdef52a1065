from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.policies.denoising import (
    DENOISING_PARTS,
    FREE,
    SIGNALS,
    Chance,
    Every,
    Guard,
    InputChange,
    Measured,
    Moment,
    NoiseLevel,
    NoiseSchedule,
    Point,
    ResidualChange,
    Seen,
    StateChange,
    Uncertainty,
    bin_of,
    depth_schedule,
)
from offramp.policies.fills import FILLS, CachedOutput, CachedResidual, Extrapolated, HeadOutput, Identity


def moment(*levels: float, step: int = 0, keys: tuple[int, ...] = ()) -> Moment:
    return Moment(list(levels), [step] * len(levels), keys=list(keys))


def test_scheduled_signals_say_what_their_docstrings_say() -> None:
    assert NoiseLevel().known(moment(-3.0, 2.0), 0) == [3.0, -2.0]
    schedule = NoiseSchedule((-1.0, 1.0), (True, False, True))
    assert schedule.known(moment(-5.0, -1.0, 0.9, 1.0), 0) == [1.0, 0.0, 0.0, 1.0]
    assert [Every(3).known(moment(0.0, step=s), 0)[0] for s in range(7)] == [0, 1, 1, 0, 1, 1, 0]
    assert Every(1).known(moment(0.0, step=5), 0) == [0.0]
    for bad in (lambda: NoiseSchedule((1.0, -1.0), (True, False, True)), lambda: NoiseSchedule((1.0,), (True,)), lambda: Every(0)):
        with pytest.raises(InvalidInput):
            bad()


def test_chance_is_uniform_and_depends_on_row_step_point_and_seed_alone() -> None:
    draws = torch.tensor([Chance().known(moment(0.0, step=s, keys=(k,)), 0) for s in range(100) for k in range(100)]).flatten()
    share = (draws[None] < torch.linspace(0.1, 0.9, 9)[:, None]).double().mean(1)
    assert (share - torch.linspace(0.1, 0.9, 9)).abs().max() < 5 * 0.5 / math.sqrt(10_000)
    one = Chance(4).known(moment(0.0, step=3, keys=(7,)), 1)
    assert one == Chance(4).known(moment(0.0, 0.0, step=3, keys=(9, 7)), 1)[1:]
    others = [Chance(5).known(moment(0.0, step=3, keys=(7,)), 1), Chance(4).known(moment(0.0, step=4, keys=(7,)), 1)]
    others += [Chance(4).known(moment(0.0, step=3, keys=(7,)), 2), Chance(4).known(moment(0.0, step=3, keys=(8,)), 1)]
    assert all(one != other for other in others)


def test_changes_are_relative_per_row_and_below_zero() -> None:
    old = torch.ones(4, 2, 3)
    new = old.clone()
    new[1] += 0.25
    new[2] -= 0.5
    new[3, 0, 0] = math.nan
    score = StateChange().score((new,), (old,), torch.zeros(4), None)
    assert score[:3].tolist() == pytest.approx([0, -0.25, -0.5]) and score[0] < 0 and score[3].isnan()
    two = StateChange().score((new[:3], torch.zeros(3, 1)), (old[:3], torch.ones(3, 1)), torch.zeros(3), None)
    assert two.tolist() == pytest.approx([-1 / 7, -2.5 / 7, -4 / 7])
    assert StateChange().score((old,), (old * 0,), torch.zeros(4), None).max() < -1e30  # from nothing to something
    with pytest.raises(InvalidInput, match="last computed step"):
        StateChange().score((new,), None, torch.zeros(4), None)


def test_what_is_watched() -> None:
    state, since, sample = torch.full((2, 3), 5.0), torch.full((2, 3), 2.0), torch.zeros(2, 4)
    seen = Seen((state,), since, sample)
    assert StateChange().watch(seen)[0] is state and InputChange().watch(seen)[0] is sample
    assert torch.equal(ResidualChange().watch(seen)[0], torch.full((2, 3), 3.0))
    for wrong in (None, torch.zeros(2, 7)):
        with pytest.raises(InvalidInput, match="shaped like"):
            ResidualChange().watch(Seen((state,), wrong, sample))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1))
def test_extrapolation_is_exact_for_polynomials_of_its_order(factors: list[float], order: int, known: int, now: float) -> None:
    def value(u: float) -> float:
        return sum(f * u**k for k, f in enumerate(factors[: min(order, known - 1, 2) + 1]))

    nodes = [0.9, 0.75, 0.5, 0.2, 0.05][:known]
    fill = Extrapolated(order)
    weights = fill.coefficients(now, nodes[: fill.keeps])
    assert len(weights) == order + 1 == fill.keeps and sum(weights) == pytest.approx(1)
    made = [{"h": torch.full((1, 2), value(u), dtype=torch.float64)} for u in nodes[: fill.keeps]]
    made += [{"h": torch.full((1, 2), math.nan, dtype=torch.float64)}] * (fill.keeps - len(made))  # no step there
    got = fill.fill({}, made, torch.tensor([weights], dtype=torch.float64))["h"]
    torch.testing.assert_close(got, torch.full((1, 2), value(now), dtype=torch.float64), atol=1e-8, rtol=1e-8)


def test_steps_at_one_noise_level_are_one_node() -> None:
    assert Extrapolated(1).coefficients(0.3, [0.5, 0.5]) == [1.0, 0.0]
    assert Extrapolated(2).coefficients(0.3, [0.5, 0.5, 0.7])[1] == 0.0


def test_caches_and_identity() -> None:
    start, made = {"h": torch.tensor([[1.0]])}, {"h": torch.tensor([[5.0]])}
    later = {"h": torch.tensor([[2.0]])}
    assert CachedOutput().fill({}, [CachedOutput().remember({}, made)], None) == made
    assert CachedResidual().fill(later, [CachedResidual().remember(start, made)], None)["h"].item() == 6.0
    assert Identity().fill(later, [], None) == later
    assert [f.keeps for f in (Identity(), HeadOutput(), CachedOutput(), CachedResidual(), Extrapolated(2))] == [0, 0, 1, 1, 3]
    with pytest.raises(InvalidInput, match="order"):
        Extrapolated(0)


def test_guards_hold_where_a_measured_signal_decides_about_reuse() -> None:
    assert Point(0, 1, CachedOutput(), StateChange(), -0.1).limits == Guard()
    assert Point(0, 1, Identity(), Uncertainty(), -0.1).limits == FREE
    assert Point(0, 1, CachedOutput(), Every(3)).limits == FREE
    assert Point(0, 1, CachedOutput(), Every(3), guard=Guard(1)).limits == Guard(1)
    with pytest.raises(InvalidInput, match="NaN"):
        Point(0, 1, CachedOutput(), Every(3), math.nan)
    with pytest.raises(InvalidInput, match="signal must be a part"):
        Point(0, 1, CachedOutput(), StateChange)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="fill must be a part"):
        Point(0, 1, "cached", StateChange())  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="max_reuse"):
        Guard(max_reuse=-1)


def test_a_depth_schedule_is_one_point_per_depth() -> None:
    points = depth_schedule((-2.0, 0.0, 3.0), (1, 3, 1, None))
    assert [p.at for p in points] == [1, 3]
    assert points[0].signal == NoiseSchedule((-2.0, 0.0, 3.0), (True, False, True, False)) and points[0].fill == Identity()
    assert [bin_of(x, (-2.0, 0.0)) for x in (-2.1, -2.0, -0.1, 0.0)] == [0, 1, 1, 2]
    with pytest.raises(InvalidInput, match="4 bins"):
        depth_schedule((-2.0, 0.0, 3.0), (1, 2))


def test_a_plan_is_data() -> None:
    plan = [
        Point(0, "output", Extrapolated(2, residual=True), ResidualChange("input"), -0.1, Guard(3, 2, False)),
        Point("a.b", -1, CachedResidual(), Chance(3), 0.2),
        *depth_schedule((1.0,), (0, None)),
    ]
    text = json.dumps(part_to_dict(plan))
    assert part_from_dict(json.loads(text), DENOISING_PARTS) == tuple(plan)
    assert {*SIGNALS, *FILLS} < set(DENOISING_PARTS)
    assert [n for n, c in SIGNALS.items() if issubclass(c, Measured)] == ["StateChange", "ResidualChange", "InputChange", "Uncertainty"]
