from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from denoise_models import BLOCKS, TOY_PLACES, Toy, ToyHead, dit, example, toy
from torch import Tensor

from offramp.core.noise import FlowMatching, noise_share
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.run import Eager
from offramp.policies.denoising import (
    FREE,
    INPUT,
    OUTPUT,
    Chance,
    Every,
    Guard,
    InputChange,
    NoiseLevel,
    NoiseSchedule,
    Point,
    ResidualChange,
    StateChange,
    Uncertainty,
    depth_schedule,
)
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated, HeadOutput, Identity

TIMES = (950, 800, 640, 500, 350, 200, 60)
ALWAYS = float("-inf")


@pytest.fixture(scope="module")
def net() -> DenoisingNet:
    torch.manual_seed(6)
    return toy({"blocks.0": ToyHead(), "blocks.1": ToyHead()})


def draw(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, 4, generator=generator), torch.randint(0, 10, (rows,), generator=generator)


def trajectory(runner: Any, x: Tensor, y: Tensor, times: Sequence[int] = TIMES) -> list[Tensor]:
    """Euler steps of a flow; the model's answers."""
    answers = []
    with torch.no_grad():
        for k, time in enumerate(times):
            answers.append(runner(x, torch.full((x.shape[0],), time), y))
            ahead = times[k + 1] if k + 1 < len(times) else 0
            x = x + (ahead - time) / 1000 * answers[-1]
    return answers


PLANS = {
    "noise level": [Point("blocks.1", -1, Identity(), NoiseLevel(), 0.0)],
    "noise schedule": depth_schedule([-2.0, 1.0], [1, 2, None]),
    "interval, extrapolated": [Point("inlet", -1, Extrapolated(2), Every(2))],
    "chance": [Point("blocks.0", -1, CachedResidual(), Chance(3), 0.5, Guard())],
    "state change": [Point("blocks.0", -1, CachedResidual(), StateChange(), -0.23)],
    "state change, extrapolated": [Point("blocks.0", -1, Extrapolated(1, residual=True), StateChange(), -0.23)],
    "residual change": [Point("blocks.0", -1, CachedOutput(), ResidualChange("inlet"), -0.2)],
    "input change": [Point(INPUT, OUTPUT, CachedOutput(), InputChange(), -0.23)],
    "uncertainty": [Point("blocks.0", OUTPUT, HeadOutput(), Uncertainty(), -0.52), Point("blocks.1", -1, Identity(), Uncertainty(), -0.5)],
    "several": [
        Point(INPUT, 1, CachedOutput(), InputChange(), -0.2),
        Point("blocks.1", "blocks.2", CachedResidual(), StateChange(), -0.25),
        Point("blocks.2", -1, Identity(), Chance(), 0.5),
    ],
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_row_gets_what_it_gets_alone_whatever_its_batch_mates(net: DenoisingNet, plan: str) -> None:
    x, y = draw(8)
    together = Denoiser(net, PLANS[plan])
    batch = trajectory(together, x, y)
    depth = []
    for row in range(8):
        alone = Denoiser(net, PLANS[plan])
        single = trajectory(alone, x[row : row + 1], y[row : row + 1])
        depth.append(alone.report.depth[0])
        for got, want in zip(batch, single, strict=True):
            torch.testing.assert_close(got[row : row + 1], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(together.report.depth, torch.stack(depth))
    assert together.report.cost < 1  # something was skipped, or this shows nothing


def test_measured_signals_tell_rows_apart(net: DenoisingNet) -> None:
    for plan in ("state change", "residual change", "input change", "uncertainty", "several"):
        runner = Denoiser(net, PLANS[plan])
        trajectory(runner, *draw(8))
        assert (runner.report.depth.amin(0) < runner.report.depth.amax(0)).any(), plan


@pytest.mark.parametrize("plan", PLANS)
def test_a_threshold_that_is_never_reached_gives_the_model_bit_for_bit(net: DenoisingNet, plan: str) -> None:
    x, y = draw(5)
    want = trajectory(net.model, x, y)
    for threshold in (math.inf, 1e9):
        points = [Point(p.at, p.to, p.fill, p.signal, threshold, p.guard) for p in PLANS[plan]]
        runner = Denoiser(net, points)
        assert all(torch.equal(a, b) for a, b in zip(trajectory(runner, x, y), want, strict=True))
        assert runner.report.cost >= 1
    assert all(torch.equal(a, b) for a, b in zip(trajectory(Denoiser(net), x, y), want, strict=True))


@pytest.mark.parametrize("signal", [StateChange(), ResidualChange("inlet"), InputChange()])
def test_threshold_zero_reuses_nothing_even_where_nothing_changes(net: DenoisingNet, signal: Any) -> None:
    runner = Denoiser(net, [Point("blocks.0", -1, CachedResidual(), signal, 0.0)])
    x, y = draw(2)
    for time in (500, 499, 498):  # the same input again and again
        assert torch.equal(runner(x, torch.full((2,), time), y), net.model(x, torch.full((2,), time), y))


def test_a_cached_residual_is_added_to_the_new_state(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.0", "blocks.3", CachedResidual(), Every(2))])
    x, y = draw(3)
    first, second = torch.full((3,), 700), torch.full((3,), 600)
    runner(x, first, y)
    got = runner(x + 0.1, second, y)
    with torch.no_grad():
        made = net.cut()
        old = made.run(made.begin(t=first, x=x, y=y), 0, 2).hidden, made.run(made.begin(t=first, x=x, y=y), 0, 5).hidden
        new = made.run(made.begin(t=second, x=x + 0.1, y=y), 0, 2).hidden
        level = (second.float() / 1000).view(-1, 1, 1)
        want = net.model.outlet(new + (old[1] - old[0])) * (1 + level)
    torch.testing.assert_close(got, want)


def test_the_model_is_extrapolated_along_the_noise_level(net: DenoisingNet) -> None:
    x, y = draw(2)
    seen = {}
    plan = [Point(INPUT, OUTPUT, Extrapolated(1), NoiseSchedule((0.5,), (False, True)))]
    runner = Denoiser(net, plan)
    for time in (900, 600, 300, 200):
        seen[time] = runner(x, torch.full((2,), time), y)
    for time in (300, 200):  # in a rectified flow the coordinate is the time itself
        slope = (seen[600] - seen[900]) / (600 - 900)
        torch.testing.assert_close(seen[time], seen[600] + slope * (time - 600), atol=1e-5, rtol=1e-4)


def test_an_exits_own_output_is_the_answer(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.1", OUTPUT, HeadOutput(), NoiseLevel(), ALWAYS)])
    x, y = draw(3)
    got = runner(x, torch.full((3,), 400), y)
    made = net.cut()
    with torch.no_grad():
        hidden = made.run(made.begin(t=torch.full((3,), 400), x=x, y=y), 0, 3).hidden
        assert torch.equal(got, net.heads["blocks/1"].output(hidden, torch.zeros(3)))
    assert runner.report.depth.tolist() == [[3]] * 3


def test_guards_compute_the_first_and_the_last_step_and_cap_reuse(net: DenoisingNet) -> None:
    point = Point("blocks.0", -1, CachedOutput(), StateChange(), ALWAYS)
    runner = Denoiser(net, [point])
    runner.reset(torch.tensor(TIMES))
    trajectory(runner, *draw(2))
    assert runner.report.depth.tolist() == [[6, 3, 3, 6, 3, 3, 6]] * 2
    assert runner.report.reasons == {(0, "first"): 2, (0, "skipped"): 8, (0, "cap"): 2, (0, "last"): 2}
    runner = Denoiser(net, [Point(point.at, point.to, point.fill, point.signal, ALWAYS, Guard(max_reuse=1, first=3))])
    trajectory(runner, *draw(2))  # nobody said which step is the last
    assert runner.report.depth[0].tolist() == [6, 6, 6, 3, 6, 3, 6]
    runner = Denoiser(net, [Point(point.at, point.to, point.fill, point.signal, ALWAYS, FREE)])
    trajectory(runner, *draw(2))
    assert runner.report.depth[0].tolist() == [6, *[3] * 6]


@pytest.mark.parametrize("signal", [NoiseLevel(), Uncertainty()])
def test_a_cap_holds_for_exits_that_remember_nothing(net: DenoisingNet, signal: Any) -> None:
    point = Point("blocks.0", OUTPUT if isinstance(signal, Uncertainty) else -1, Identity(), signal, ALWAYS, Guard(max_reuse=2, first=1))
    fill = HeadOutput() if isinstance(signal, Uncertainty) else Identity()
    runner = Denoiser(net, [Point(point.at, point.to, fill, signal, ALWAYS, point.guard)])
    trajectory(runner, *draw(2))
    assert (runner.report.depth == 6).tolist() == [[True, False, False, True, False, False, True]] * 2


def test_what_is_not_finite_is_computed_and_its_batch_mates_do_not_notice(net: DenoisingNet) -> None:
    point = Point("blocks.0", -1, CachedResidual(), StateChange(), ALWAYS, Guard(max_reuse=None))
    x, y = draw(3)
    clean, broken = Denoiser(net, [point]), Denoiser(net, [point])
    for k, time in enumerate((900, 800, 700)):
        spoilt = x.clone()
        if k == 1:
            spoilt[1] = math.nan
        want, got = clean(x, torch.full((3,), time), y), broken(spoilt, torch.full((3,), time), y)
        assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert broken.report.reasons[0, "not finite"] == 2  # when it came, and once more because what was remembered of it is no number
    assert broken.report.depth[1].tolist() == [6, 6, 6] and broken.report.depth[0].tolist() == [6, 3, 3]


def test_a_memory_that_is_not_finite_is_not_used(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.0", -1, Extrapolated(1), StateChange(), ALWAYS)])
    x, y = draw(2)
    for time in (900, 800):
        runner(x, torch.full((2,), time), y)
        if time == 900:
            runner.trajectory.branches[0].memories[0].broken[0][1] = True
    assert runner.report.depth.tolist() == [[6, 3], [6, 6]]


def test_separate_guidance_calls_have_memories_of_their_own(net: DenoisingNet) -> None:
    plan = PLANS["state change"]
    (x, y), (x2, y2) = draw(2), draw(2, seed=9)
    both, lone = Denoiser(net, plan), Denoiser(net, plan)
    for k, time in enumerate(TIMES):
        t = torch.full((2,), time)
        got = both(x * (1 - 0.01 * k), t, y)
        both(x2 * (1 - 0.02 * k), t, y2)
        if k == 1:  # poison the second branch
            for memory in both.trajectory.branches[1].memories:
                memory.snapshots = [{n: v * math.nan for n, v in s.items()} for s in memory.snapshots]
                memory.reference = tuple(v * math.nan for v in memory.reference)
        assert torch.equal(got, lone(x * (1 - 0.01 * k), t, y))
    assert both.report.depth.shape == (4, len(TIMES))
    assert torch.equal(both.report.depth[:2], lone.report.depth)
    assert len(both.trajectory.branches) == 2


def test_guidance_in_one_call_is_rows_that_do_not_know_each_other(net: DenoisingNet) -> None:
    runner, lone = Denoiser(net, PLANS["state change"]), Denoiser(net, PLANS["state change"])
    (x, y), (_, y2) = draw(2), draw(2, seed=9)
    for k, time in enumerate(TIMES):
        t = torch.full((4,), time)
        got = runner(torch.cat([x, x]) * (1 - 0.01 * k), t, torch.cat([y, y2]))
        if k == 1:
            for memory in runner.trajectory.branches[0].memories:
                for snapshot in memory.snapshots:
                    for tensor in snapshot.values():
                        tensor[2:] = math.nan
        torch.testing.assert_close(got[:2], lone(x * (1 - 0.01 * k), t[:2], y), atol=1e-5, rtol=1e-5)


def test_nothing_is_left_over_between_trajectories(net: DenoisingNet) -> None:
    runner = Denoiser(net, PLANS["state change"])
    want = trajectory(runner, *draw(3))
    again = trajectory(runner, *draw(3))  # the noise has risen: a new trajectory without being told
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    assert runner.report.depth.shape == (3, len(TIMES))
    trajectory(runner, *draw(5, seed=4))  # other rows
    runner.reset()
    assert runner.trajectory.cache_bytes == 0
    assert all(torch.equal(a, b) for a, b in zip(want, trajectory(runner, *draw(3)), strict=True))


def test_rows_of_one_call_may_stand_at_different_noise_levels_and_begin_at_different_times(net: DenoisingNet) -> None:
    plan = [Point("blocks.0", -1, Extrapolated(1), Every(2)), Point("blocks.2", -1, Identity(), NoiseLevel(), 1.0)]
    x, y = draw(2)
    rows = [(900, 750, 600, 450, 300, 150), (500, 250, 980, 700, 400, 100)]  # the second row ends and another image takes its place
    runner = Denoiser(net, plan)
    got = [runner(x * (1 + 0.1 * k), torch.tensor(times), y) for k, times in enumerate(zip(*rows, strict=True))]
    for row, pieces in ((0, [range(6)]), (1, [range(2), range(2, 6)])):
        for piece in pieces:
            alone = Denoiser(net, plan)
            for k in piece:
                want = alone(x[row : row + 1] * (1 + 0.1 * k), torch.tensor([rows[row][k]]), y[row : row + 1])
                torch.testing.assert_close(got[k][row : row + 1], want, atol=1e-5, rtol=1e-5)


def test_a_new_shape_or_type_forgets_and_says_so(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.0", -1, CachedOutput(), Every(10))])
    x, y = draw(2)
    runner(x, torch.full((2,), 900), y)
    runner(x, torch.full((2,), 800.0), y)  # float timesteps
    assert runner.report.reasons == {(0, "shape"): 2} and runner.report.depth.tolist() == [[6], [6]]


def test_a_branch_that_missed_a_step_begins_anew(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.0", -1, CachedOutput(), Every(10))])
    x, y = draw(1)
    for time, calls in ((900, 2), (800, 1), (700, 2)):
        for _ in range(calls):
            runner(x, torch.full((1,), time), y)
    assert runner.report.depth.tolist() == [[6, 3, 3], [6, -1, 6]]
    assert runner.report.reasons[0, "gap"] == 1


def test_a_step_that_was_cut_short_further_in_is_not_remembered_as_computed(net: DenoisingNet) -> None:
    inner = Point("blocks.2", "blocks.3", Identity(), NoiseSchedule((-1.0,), (True, False)))  # only in the first step
    runner = Denoiser(net, [Point("blocks.0", "blocks.3", CachedOutput(), Every(10)), inner])
    x, y = draw(1)
    for time in (900, 600, 500):
        runner(x, torch.full((1,), time), y)
    assert runner.report.depth[0].tolist() == [5, 6, 3]
    assert runner.report.reasons[0, "missing"] == 1


def test_the_callers_tensors_are_its_own(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point(INPUT, OUTPUT, CachedOutput(), Every(10))])
    x, y = draw(2)
    first = runner(x, torch.full((2,), 900), y)
    kept = first.clone()
    first.zero_()
    second = runner(x, torch.full((2,), 800), y)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(runner(x, torch.full((2,), 700), y), kept)


def test_executed_flops_and_memory_are_counted(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.0", "blocks.3", CachedResidual(), StateChange(), ALWAYS)], observe=True)
    x, y = draw(2)
    for time in (900, 800):
        runner(x, torch.full((2,), time), y)
    report, spec = runner.report, net.cut().spec
    skipped = sum(s.flops for s in spec.segments[2:5])
    assert report.flops.tolist() == [[spec.flops, spec.flops - skipped]] * 2
    assert report.cost == pytest.approx(1 - skipped / spec.flops / 2)
    one = 2 * 6 * 16 * 4  # a state of both rows
    assert report.cache_bytes == 2 * one + 2  # the residual, the state it is compared with, and a mark per row
    assert report.scores[0].isnan().tolist() == [[True, False]] * 2 and (report.scores[0][:, 1] < 0).all()
    assert report.row_cost.tolist() == pytest.approx([report.cost] * 2)


def test_heads_are_paid_for(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point("blocks.1", OUTPUT, HeadOutput(), Uncertainty(), -1.0)])
    x, y = draw(2)
    runner(x, torch.full((2,), 900), y)
    probe, out = 2 * 6 * 17, 2 * 6 * 16 * 4
    assert runner.report.flops.tolist() == [[sum(s.flops for s in net.cut().spec.segments[:3]) + probe + out]] * 2


def test_half_precision_and_gradients(net: DenoisingNet) -> None:
    x, y = draw(2)
    assert not Denoiser(net, PLANS["state change"])(x.requires_grad_(), torch.full((2,), 900), y).requires_grad
    half = toy()
    half.to(torch.bfloat16)
    runner = Denoiser(half, [Point("blocks.0", -1, Extrapolated(1), StateChange(), ALWAYS)])
    with torch.no_grad():
        for time in (900, 800, 700, 600):
            assert runner(x.detach().bfloat16(), torch.full((2,), time), y).dtype == torch.bfloat16
    assert runner.report.depth[0].tolist() == [6, 3, 3, 6]


def test_modes_may_change_between_calls(net: DenoisingNet) -> None:
    plan = [Point("blocks.0", -1, Extrapolated(1), Every(3)), *PLANS["several"]]
    x, y = draw(3)
    changing, steady = Denoiser(net, plan), Denoiser(net, plan)
    for k, time in enumerate(TIMES):
        t = torch.full((3,), time)
        with torch.inference_mode(k % 2 == 0):
            got = changing(x * 0.98**k, t, y)
        assert torch.equal(got, steady(x * 0.98**k, t, y))


def test_the_model_is_left_as_it_was() -> None:
    net = toy()
    model: Any = net.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Denoiser(net, PLANS["state change"])(*draw(2)[:1], torch.full((2,), 900), draw(2)[1])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert isinstance(model, Toy) and not any(m._forward_hooks for m in model.modules())


def test_the_bounded_coordinate_is_the_flows_own_time() -> None:
    for sigma in (0.05, 0.3, 0.9):
        assert noise_share(2 * math.log((1 - sigma) / sigma)) == pytest.approx(sigma)


def test_after_an_error_in_the_middle_of_a_call_a_trajectory_begins_anew(net: DenoisingNet) -> None:
    plan = PLANS["state change"]
    runner, plain = Denoiser(net, plan), Denoiser(net, plan)
    x, y = draw(2)
    runner(x, torch.full((2,), 900), y)

    class Fails(Eager):
        def rows(self, *args: Any) -> Any:
            raise RuntimeError("out of memory")

    run, runner.run = runner.run, Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        runner(x, torch.full((2,), 800), y)
    runner.run = run
    assert runner.trajectory.cache_bytes == 0
    for time in (800, 700):  # the step is tried again: it is no guidance branch of the one that failed
        assert torch.equal(runner(x, torch.full((2,), time), y), plain(x, torch.full((2,), time), y))
        assert runner.trajectory.branch == 0
    assert torch.equal(runner.report.depth, plain.report.depth)


class Texted(Toy):
    """Takes a text of any length, as its mean."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + text.mean(1, keepdim=True), t)


def test_guidance_branches_may_have_texts_of_different_lengths() -> None:
    torch.manual_seed(3)
    example = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500, 300]), "text": torch.randn(2, 5, 4)}
    net = attach_denoiser(Texted().eval(), TOY_PLACES, noise=FlowMatching(), example=example)
    runner = Denoiser(net, [Point("blocks.0", -1, CachedOutput(), Every(3))])
    x = torch.randn(2, 6, 4)
    for time in (900, 800, 700, 600):
        for length in (5, 9):
            runner(x, torch.full((2,), time), text=torch.ones(2, length, 4))
    assert runner.report.depth.tolist() == [[6, 3, 3, 6]] * 4
    assert (0, "shape") not in runner.report.reasons
    runner(x, torch.full((2,), 500), text=torch.ones(2, 7, 4))  # that of the first branch has changed: all begins anew
    assert runner.report.reasons == {(0, "shape"): 2}


def test_autocast_is_as_in_the_model() -> None:
    net = attach_denoiser(dit(3), BLOCKS[:3], noise=FlowMatching(), example=example())
    runner = Denoiser(net)
    given = example(2)
    assert torch.equal(runner(**given).sample, net.model(**given).sample)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        want = net.model(**given).sample
        assert torch.equal(runner(**given).sample, want) and want.dtype == torch.bfloat16
        assert torch.is_autocast_cache_enabled()
    assert torch.equal(runner(**given).sample, net.model(**given).sample)
    assert len(net._cuts) == 2


def test_heads_follow_a_model_that_is_moved_by_itself() -> None:
    net = toy({"blocks.1": ToyHead()})
    net.model.to(torch.bfloat16)
    runner = Denoiser(net, [Point("blocks.1", OUTPUT, HeadOutput(), NoiseLevel(), ALWAYS)])
    x, y = draw(2)
    assert runner(x.bfloat16(), torch.full((2,), 900), y).dtype == torch.bfloat16


def test_a_timestep_may_be_a_number(net: DenoisingNet) -> None:
    x, y = draw(3)
    runner = Denoiser(net)
    want = net.model(x, torch.full((3,), 400), y)
    for time in (400, torch.tensor(400), torch.tensor([400]), torch.full((3,), 400)):
        runner.reset()
        assert torch.equal(runner(x, time, y), want)
    assert len({id(net.cut(net.call(x, t, y))) for t in (400, torch.tensor(400))}) == 1


def test_points_that_never_fire_do_not_keep_a_step_from_running_in_one_piece(net: DenoisingNet) -> None:
    never = Point("blocks.0", -1, CachedOutput(), StateChange(), math.inf)
    run = Captured(torch.device("cpu"), compiled=False)
    x, y = draw(3)
    trajectory(Denoiser(net, [never, Point("blocks.1", -1, Identity(), NoiseLevel(), 0.0)], run=run), x, y)
    assert run._steps and not run._parts
