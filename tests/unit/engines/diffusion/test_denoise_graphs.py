from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from denoise_models import ToyHead, attached, dit, example, toy
from test_denoise import PLANS, TIMES, draw, trajectory
from torch import Tensor, nn

from offramp.backbones import cut
from offramp.backbones.shared_code import SharedCode
from offramp.core.errors import InvalidInput
from offramp.diffusion import DenoisingNet
from offramp.engines.capture import Mailbox, Tuning
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.row_graphs import CapturedRows
from offramp.policies.denoising import (
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
    depth_schedule,
)
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated, HeadOutput, Identity

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("plain_and_tapes")


@pytest.fixture(scope="module")
def net() -> DenoisingNet:
    torch.manual_seed(6)
    return toy({"blocks.0": ToyHead(), "blocks.1": ToyHead()})


@pytest.mark.parametrize("plan", PLANS)
def test_captured_segments_give_what_plain_ones_give(net: DenoisingNet, plan: str) -> None:
    x, y = draw(8)
    plain, captured = Denoiser(net, PLANS[plan]), Denoiser(net, PLANS[plan], run=Captured(CPU, compiled=False))
    for _ in range(2):  # the second time from the graphs of the first
        for got, want in zip(trajectory(captured, x, y), trajectory(plain, x, y), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert torch.equal(captured.report.depth, plain.report.depth)


def test_without_points_it_is_one_graph_and_bit_exact(net: DenoisingNet) -> None:
    run = Captured(CPU, compiled=False)
    x, y = draw(3)
    assert all(torch.equal(a, b) for a, b in zip(trajectory(Denoiser(net, run=run), x, y), trajectory(net.model, x, y), strict=True))
    assert not run._parts and len(run._steps) == 1


def test_a_schedule_is_one_graph_per_depth(net: DenoisingNet) -> None:
    run = Captured(CPU, compiled=False)
    runner = Denoiser(net, depth_schedule((-2.0, 1.0), (0, 2, None)), run=run)
    for _ in range(2):
        trajectory(runner, *draw(5))
    assert not run._parts and len(run._steps) == 3
    assert sorted(set(runner.report.depth[0].tolist())) == [2, 4, 6]


def test_parts_between_decisions_are_captured_where_a_step_is_not_known_beforehand(net: DenoisingNet) -> None:
    run = Captured(CPU, compiled=False)
    runner = Denoiser(net, [Point("blocks.1", -1, Identity(), NoiseLevel(), 0.0)], run=run)
    runner.straight = False
    trajectory(runner, *draw(5))
    parts = [key[1:] for key in run._parts if isinstance(key[1], int)]
    assert sorted(parts) == [(0, 3, 5), (3, 5, 5), (5, 6, 5)]


@pytest.mark.parametrize("plan", PLANS)
def test_segments_share_compiled_code(net: DenoisingNet, plan: str) -> None:
    """As much code as there are kinds of segments, for every plan, whichever parts of the model it runs; another model of the kind too."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        made.append(len(inputs))
        return graph.forward

    code = SharedCode(dynamic=False, backend=backend)
    x, y = draw(4)
    run = Captured(CPU, compiled=Tuning(shared_blocks=True), sizes=(4,), code=code)
    found, wanted = trajectory(Denoiser(net, PLANS[plan], run=run), x, y), trajectory(Denoiser(net, PLANS[plan]), x, y)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    kinds, graphs = len(code), len(made)
    assert 0 < kinds < len(net.cut().segments)
    again = Captured(CPU, compiled=True, sizes=(4,), code=code)
    trajectory(Denoiser(net, PLANS[plan], run=again), x, y)
    assert (len(code), len(made)) == (kinds, graphs)


def test_shared_code_is_asked_for_by_a_tuning() -> None:
    assert Captured(CPU, compiled=True).code is None is Captured(CPU, compiled=False).code
    asked = Captured(CPU, compiled=Tuning(shared_blocks=True, max_autotune=True)).code
    assert asked is not None and asked.options == {"dynamic": False, "options": {"max_autotune": True}}


KNOWN = {
    "noise level": PLANS["noise level"],
    "noise schedule": PLANS["noise schedule"],
    "interval, extrapolated": PLANS["interval, extrapolated"],
    "interval, residual": [Point("blocks.0", -1, CachedResidual(), Every(3), guard=Guard(max_reuse=1))],
    "output, extrapolated": [Point(INPUT, OUTPUT, Extrapolated(1), Every(2))],
    "an output layer": [Point("blocks.1", OUTPUT, HeadOutput(), NoiseLevel(), 0.5)],
    "nested": [
        Point("inlet", "blocks.2", CachedOutput(), Every(2)),
        Point("blocks.0", "blocks.1", Identity(), NoiseSchedule((-1.0,), (True, False))),
        Point("blocks.2", OUTPUT, Extrapolated(2), NoiseSchedule((0.0, 2.0), (False, True, False))),
    ],
}


@pytest.mark.parametrize("plan", KNOWN)
def test_steps_that_are_known_beforehand_are_the_walk_in_one_piece(net: DenoisingNet, plan: str) -> None:
    x, y = draw(3)
    runners = [Denoiser(net, KNOWN[plan], run=run) for run in (None, None, Captured(CPU, compiled=False))]
    runners[0].straight = False
    for _ in range(2):
        walk, eager, captured = (trajectory(r, x, y) for r in runners)
        for a, b, c in zip(walk, eager, captured, strict=True):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(c, a, atol=1e-6, rtol=1e-6)
        first, *others = (r.report for r in runners)
        for other in others:
            assert torch.equal(first.depth, other.depth) and torch.equal(first.flops, other.flops)
            assert torch.equal(first.fired, other.fired) and first.reasons == other.reasons
    assert first.cost < 1


def test_both_ways_share_their_memories(net: DenoisingNet) -> None:
    x, y = draw(2)
    levels = [(900, 900), (800, 800), (700, 650), (600, 550), (500, 400), (300, 300), (200, 200), (980, 980), (900, 900)]
    plan = [Point("inlet", -1, Extrapolated(1), NoiseSchedule((-0.5, 0.5), (False, True, False))), *KNOWN["interval, residual"]]
    runners = [Denoiser(net, plan, run=run) for run in (None, None, Captured(CPU, compiled=False))]
    runners[0].straight = False
    for k, times in enumerate(levels):
        walk, eager, captured = (r(x * (1 - 0.02 * k), torch.tensor(times), y) for r in runners)
        torch.testing.assert_close(eager, walk, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(captured, walk, atol=1e-6, rtol=1e-6)


def test_what_was_newest_moves_before_it_is_written_over(net: DenoisingNet) -> None:
    x, y = draw(2)
    plan = [Point("inlet", -1, Extrapolated(1), NoiseSchedule((-0.5,), (False, True)))]
    runners = [Denoiser(net, plan, run=run) for run in (None, Captured(CPU, compiled=False))]
    for time in (900, 700, 500, 300):
        runners[1].straight = time != 700  # a walk in between leaves its memories where it made them
        want, got = (r(x * time, torch.full((2,), time), y) for r in runners)
        torch.testing.assert_close(got, want)
    assert runners[0].report.depth.tolist() == [[6, 6, 2, 2]] * 2


def test_guidance_branches_do_not_share_captured_memories(net: DenoisingNet) -> None:
    (x, y), (x2, y2) = draw(2), draw(2, seed=9)
    plan = KNOWN["interval, extrapolated"]
    both, lone = Denoiser(net, plan, run=Captured(CPU, compiled=False)), Denoiser(net, plan)
    for time in (900, 700, 600, 300, 200):
        t = torch.full((2,), time)
        got = both(x * time, t, y)
        both(x2, t, y2)
        torch.testing.assert_close(got, lone(x * time, t, y), atol=1e-6, rtol=1e-6)


def test_rows_run_in_the_next_size_and_what_was_there_before_does_not_matter(net: DenoisingNet) -> None:
    run = Captured(CPU, compiled=False)
    assert (run.size(5, 5), run.size(64, 64)) == (5, 64)
    assert [run.size(r, 6) for r in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert sorted({run.size(r, 64) for r in range(1, 65)}) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert all(r <= run.size(r, 64) < r + 8 for r in range(1, 65))
    finer = Captured(CPU, compiled=False, code=SharedCode(dynamic=False))  # where one more size compiles little
    assert sorted({finer.size(r, 128) for r in range(1, 129)}) == [1, 2, 4, *range(8, 129, 8)]
    few = Captured(CPU, compiled=False, sizes=(3,))
    assert [few.size(r, 6) for r in (1, 3, 4)] == [3, 3, 6]
    with pytest.raises(InvalidInput, match="ascending"):
        Captured(CPU, sizes=(4, 2))
    x, y = draw(4)
    levels = torch.tensor([950, 900, 800, 100])  # three leave, one goes on
    runner = Denoiser(net, [Point("blocks.1", -1, Identity(), NoiseSchedule((0.0,), (True, False)))], run=run)
    want = runner(x, levels, y)
    for board in run._boards.values():
        for tensor in board.values.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    assert torch.equal(runner(x, levels + 1, y)[3:], net.model(x, levels + 1, y)[3:])
    assert torch.isfinite(want).all()


def test_what_is_kept_or_returned_does_not_change_with_the_next_call(net: DenoisingNet) -> None:
    x, y = draw(2)
    runner = Denoiser(net, [Point(INPUT, OUTPUT, CachedOutput(), Every(3))], run=Captured(CPU, compiled=False))
    first = runner(x, torch.full((2,), 900), y)
    kept = first.clone()
    for step in runner.run._steps.values():  # type: ignore[attr-defined]
        for tensor in step.outputs.values():
            tensor.fill_(7.0)  # as the next replay would
    assert torch.equal(first, kept)
    assert torch.equal(runner(x, torch.full((2,), 800), y), kept)


def test_a_diffusers_model_in_captured_segments() -> None:
    net = attached(dit(4))
    plan = [Point(0, -1, CachedOutput(), Every(2)), Point(1, -1, Identity(), NoiseLevel(), 0.0)]
    runs = [Denoiser(net, plan, run=run) for run in (None, Captured(CPU, compiled=False))]
    for time in (900.0, 700.0, 300.0):
        inputs = {**example(3), "timestep": torch.full((3,), time), "hidden_states": torch.ones(3, 4, 8, 8)}
        a, b = (run(**inputs).sample for run in runs)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", ["interval, extrapolated", "state change"])
def test_weights_may_move(plan: str) -> None:
    net = toy()
    x, y = draw(3)
    runner = Denoiser(net, PLANS[plan], run=Captured(CPU, compiled=False))
    trajectory(runner, x, y)
    for p in net.model.parameters():
        p.data = p.data * 1.1  # as ``to`` does: other memory
    for got, want in zip(trajectory(runner, x, y), trajectory(Denoiser(net, PLANS[plan]), x, y), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Transposed(nn.Module):
    """Crosses the cut with strides that are not in order, and views what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = self.a(x).transpose(1, 2)
        return self.b(state).transpose(1, 2).reshape(x.shape[0], -1) + state.transpose(1, 2).view(x.shape[0], -1)


def test_strides_are_kept() -> None:
    made = cut(Transposed().eval(), ["b"], (torch.randn(2, 3, 5),))
    run = Captured(CPU, compiled=False)
    x = torch.randn(3, 3, 5)
    with torch.no_grad():
        state = made.begin(x)
        for gone in (0, 1, 2):
            rows = run.rows(made, (), state.values, x, [0.0] * 3, None)
            there = np.array([r for r in range(3) if r != gone])
            rows.run(np.arange(3), 0, 1)
            rows.run(there, 1, 2)
            answer = made.end(replace(state, values=rows.outputs(), at=2))
            torch.testing.assert_close(answer[there], made(x)[there])


def random_plan(net: DenoisingNet, rng: random.Random) -> list[Point]:
    """One to four points anywhere, overlapping as they happen to."""
    points = []
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, 5)
        stop = rng.randint(start + 1, 6)
        at, to = (INPUT if start == 0 else start - 1), (OUTPUT if stop == 6 else stop - 1)
        bins = NoiseSchedule((-2.0, 0.0, 2.0), tuple(rng.random() < 0.5 for _ in range(4)))
        signal, threshold = rng.choice([(bins, 0.5), (Every(rng.randint(1, 4)), 0.5), (StateChange(), -0.3), (InputChange(), -0.2)])
        fills = [CachedOutput(), Extrapolated(rng.randint(1, 3))]
        if start > 0 and stop < 6:
            fills += [Identity(), CachedResidual(), Extrapolated(1, residual=True)]
        guard = rng.choice([None, Guard(rng.choice([None, 1, 2]), rng.randint(0, 2), rng.random() < 0.5)])
        points.append(Point(at, to, rng.choice(fills), signal, threshold, guard))
    return points


@pytest.mark.parametrize("seed", range(15))
def test_any_plan_gives_the_same_in_every_way_of_running_it(net: DenoisingNet, seed: int) -> None:
    plan = random_plan(net, random.Random(seed))
    x, y = draw(4, seed)
    runners = [Denoiser(net, plan, run=run) for run in (None, None, Captured(CPU, compiled=False))]
    runners[0].straight = False
    for shift in (0, 9):  # all rows at one noise level, and the last row ahead of the others now and then
        answers = []
        for runner in runners:
            runner.reset(None if shift else torch.tensor(TIMES))
            moved, each = x, []
            for k, time in enumerate(TIMES):
                each.append(runner(moved, torch.tensor([time, time, time, time - shift * (k % 3 == 1)]), y))
                moved = 0.95 * moved + 0.02 * each[-1].clamp(-3, 3)
            answers.append(torch.stack(each))
        walk, *others = (r.report for r in runners)
        for answer, report in zip(answers[1:], others, strict=True):
            torch.testing.assert_close(answer, answers[0], atol=1e-4, rtol=1e-4)
            assert torch.equal(report.depth, walk.depth) and torch.equal(report.flops, walk.flops) and report.reasons == walk.reasons


def test_where_hardly_a_row_left_the_others_go_on_before_the_answer(net: DenoisingNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the guess was wrong: rows that are sent away after all have their own answer, and are not remembered as computed."""
    events: list[str] = []
    read, run = Mailbox.arrived, CapturedRows.run

    def reading(self: Mailbox) -> Any:
        events.append("read")
        return read(self)

    def running(self: CapturedRows, rows: Any, start: int, stop: int) -> None:
        events.append("run")
        run(self, rows, start, stop)

    monkeypatch.setattr(Mailbox, "arrived", reading)
    monkeypatch.setattr(CapturedRows, "run", running)
    plan = [Point("blocks.1", -1, CachedResidual(), InputChange(), -0.2, Guard(max_reuse=None, last=False))]
    eager, captured = Denoiser(net, plan), Denoiser(net, plan, run=Captured(CPU, compiled=False))
    x, y = draw(4)
    scales = torch.tensor([[1.0] * 4, [1.5] * 4, [2.2] * 4, [2.2, 3.0, 2.2, 3.0], [2.2, 3.0, 2.2, 3.0], [4.0] * 4])
    order, gone = [], []
    for k, (scale, time) in enumerate(zip(scales, TIMES, strict=False)):
        events.clear()
        wanted, got = (d(x * scale.view(-1, 1, 1), torch.full((4,), time), y) for d in (eager, captured))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        order.append(" ".join(events))
        gone.append(captured.trajectory.branches[0].memories[0].gone)
        assert gone[k] == eager.trajectory.branches[0].memories[0].gone
    assert torch.equal(eager.report.depth, captured.report.depth) and eager.report.reasons == captured.report.reasons
    assert gone == [None, 0, 0, 2, 4, 0]
    assert captured.report.ran == eager.report.ran and eager.report.ran[3] == 24 - 6, "whoever left did not run, as far as is counted"
    waited, ahead = "run read run run", "run run read run"
    assert order == ["run run run", waited, ahead, ahead, "run read run", waited], "the first time nothing is known"


def test_a_signal_that_looks_back_is_asked_of_the_rows_that_were_there(net: DenoisingNet) -> None:
    plan = [
        Point("inlet", "blocks.1", Identity(), NoiseLevel(), 0.0),
        Point("blocks.2", -1, CachedOutput(), ResidualChange("blocks.0"), -1e9, Guard(max_reuse=None, last=False)),
    ]
    x, y = draw(2)
    rows = ((300, 250, 200, 150), (800, 700, 200, 100))
    for run in (None, Captured(CPU, compiled=False)):
        together = Denoiser(net, plan, run=run)
        got = [together(x, torch.tensor(times), y) for times in zip(*rows, strict=True)]
        for row, times in enumerate(rows):
            alone = Denoiser(net, plan)
            for k, time in enumerate(times):
                want = alone(x[row : row + 1], torch.tensor([time]), y[row : row + 1])
                torch.testing.assert_close(got[k][row : row + 1], want, atol=1e-5, rtol=1e-5)
            assert torch.equal(alone.report.depth[0], together.report.depth[row])
        assert len({tuple(d) for d in together.report.depth.tolist()}) == 2, "one of them jumped over the place at first"


@pytest.mark.parametrize("plan", ["state change", "residual change"])
def test_after_an_answer_the_first_segment_is_launched_alone(net: DenoisingNet, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where code is shared, so that it costs no compiling; the answers stay what they are."""
    spans: list[tuple[int, int]] = []
    part = CapturedRows._capture_run

    def capturing(self: CapturedRows, start: int, stop: int, size: int) -> Any:
        spans.append((start, stop))
        return part(self, start, stop, size)

    monkeypatch.setattr(CapturedRows, "_capture_run", capturing)
    code = SharedCode(dynamic=False, backend="eager")
    x, y = draw(4)
    found = trajectory(Denoiser(net, PLANS[plan], run=Captured(CPU, compiled=True, code=code)), x, y)
    for got, want in zip(found, trajectory(Denoiser(net, PLANS[plan]), x, y), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    at = net.boundary("blocks.0")
    assert (at, at + 1) in spans and any(start == at + 1 for start, _ in spans)


@pytest.mark.parametrize("plan", ["state change", "residual change", "input change", "uncertainty", "several"])
@pytest.mark.parametrize("quick", [True, False], ids=["short segments", "long segments"])
def test_rows_go_on_before_the_answer_where_that_takes_less_than_waiting(
    net: DenoisingNet, plan: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many leave after all: their own answers, and what is counted, are those of a runner that waits."""
    asked: list[tuple[int, int, bool]] = []
    ahead = CapturedRows.ahead

    def asking(self: CapturedRows, rows: int, staying: int, start: int, stop: int) -> bool:
        asked.append((rows, staying, ahead(self, rows, staying, start, stop)))
        return asked[-1][2]

    monkeypatch.setattr(CapturedRows, "ahead", asking)
    monkeypatch.setattr(Captured, "milliseconds", lambda self, board, start, stop, size: (0.01 if quick else 1.0) * size)
    x, y = draw(8)
    eager, captured = Denoiser(net, PLANS[plan]), Denoiser(net, PLANS[plan], run=Captured(CPU, compiled=False))
    for _ in range(3):  # later with parts that were timed
        for got, want in zip(trajectory(captured, x, y), trajectory(eager, x, y), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        a, b = captured.report, eager.report
        assert torch.equal(a.depth, b.depth) and torch.equal(a.flops, b.flops) and a.reasons == b.reasons and a.ran == b.ran
    size = captured.run.size  # type: ignore[attr-defined]
    other = [answer for rows, staying, answer in asked if staying == 0 or size(staying, 8) < size(rows, 8)]
    assert other and all(answer is quick for answer in other)


def test_times_of_segments_are_those_of_the_graphs_that_were_made(net: DenoisingNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.engines.capture.Graph.milliseconds", lambda self: 2.0)
    monkeypatch.setattr("tape.Tape.milliseconds", lambda self: 2.0)
    run = Captured(CPU, compiled=False)
    trajectory(Denoiser(net, [Point("blocks.1", -1, Identity(), Chance(), 0.5)], run=run), *draw(8))
    (board,) = run._boards.values()
    at = net.boundary("blocks.1")
    assert run.milliseconds(board, 0, at, 8) == 2.0
    assert run.milliseconds(board, 0, at + 1, 8) is None, "never made"
    run._parts[board, 0, 1, 8] = run._parts[board, 1, at, 8] = run._parts.pop((board, 0, at, 8))
    assert run.milliseconds(board, 0, at, 8) == 4.0, "made as two"
