"""A denoiser on CUDA: compiled and captured it gives what eager mode gives, per sample, by schedule and where some tokens are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.capture import Tuning
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.graphs import Captured
from offramp.engines.diffusion.region_graphs import CapturedRegions
from offramp.engines.diffusion.regions import RegionDenoiser, attach_regions
from offramp.policies.denoising import (
    OUTPUT,
    Chance,
    Every,
    Guard,
    NoiseSchedule,
    Point,
    ResidualChange,
    StateChange,
    Uncertainty,
    depth_schedule,
)
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated, HeadOutput
from offramp.reduce.regions import AtSteps, Regions

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TIMES = (950, 800, 640, 500, 350, 200, 60)


@pytest.fixture(autouse=True)
def _exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, state: Tensor, level: Tensor) -> Tensor:
        return state + self.mix(self.norm(state)) * (1 + level)


class Tokens(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.outlet = nn.Linear(width, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (t.float() / 1000).to(x.dtype).view(-1, 1, 1)
        state = self.inlet(x) + torch.sin(5 * level)
        for block in self.blocks:
            state = block(state, level)
        return self.outlet(state)


class Head(nn.Module):
    """Unsure of some rows, more so where there is much noise."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.out = nn.Linear(width, 8)

    def uncertainty(self, state: Tensor, level: Tensor) -> Tensor:
        return 0.5 + 0.2 * torch.tanh(state[:, 0, 0]) - 0.05 * level

    def output(self, state: Tensor, level: Tensor) -> Tensor:
        return self.out(state)


def net() -> DenoisingNet:
    torch.manual_seed(0)
    places = ["inlet", *(f"blocks.{k}" for k in range(6))]
    example = {"x": torch.randn(2, 16, 8), "t": torch.tensor([500, 300])}
    heads = {f"blocks.{k}": Head() for k in range(5)}
    return attach_denoiser(Tokens().eval().to(DEVICE), places, noise=FlowMatching(), example=example, heads=heads)


def trajectory(runner: Any, rows: int) -> Tensor:
    x = torch.randn(rows, 16, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    answers = []
    for k, time in enumerate(TIMES):
        answers.append(runner(x, torch.full((rows,), time, device=DEVICE)))
        x = x + ((TIMES[k + 1] if k + 1 < len(TIMES) else 0) - time) / 1000 * answers[-1]
    return torch.stack(answers)


PLANS = {
    "none": (),
    "depths": depth_schedule((-2.0, 1.0), (1, 3, None)),
    "interval": (Point("inlet", -1, CachedResidual(), Every(2)),),
    "extrapolated": (Point("inlet", -1, Extrapolated(2), NoiseSchedule((-1.0, 1.0), (False, True, False))),),
    "state change": (Point("blocks.0", -1, CachedResidual(), StateChange(), -0.3, Guard(last=False)),),
    "residual change": (Point("blocks.0", -1, CachedOutput(), ResidualChange("inlet"), -0.3, Guard(last=False)),),
    "state change, extrapolated": (Point("blocks.0", -1, Extrapolated(1, residual=True), StateChange(), -0.3, Guard(last=False)),),
    "chance": (Point("blocks.0", -1, CachedResidual(), Chance(3), 0.5),),
    "uncertainty": tuple(Point(f"blocks.{k}", OUTPUT, HeadOutput(), Uncertainty(), -0.5) for k in range(5)),
}


@pytest.mark.parametrize("compiled", [False, True, Tuning(shared_blocks=True)], ids=["captured", "compiled", "shared code"])
@pytest.mark.parametrize("plan", PLANS)
def test_captured_equals_eager(plan: str, compiled: bool | Tuning) -> None:
    made = net()
    eager, captured = Denoiser(made, PLANS[plan]), Denoiser(made, PLANS[plan], run=Captured(DEVICE, compiled=compiled))
    eager.straight = False
    want = trajectory(eager, 6)
    for _ in range(2):
        torch.testing.assert_close(trajectory(captured, 6), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(captured.report.depth, eager.report.depth)
    if plan in ("chance", "uncertainty"):
        assert len(captured.report.depth.unique()) > 1, "rows decide by themselves"


def test_rows_do_not_know_each_other_in_captured_parts() -> None:
    made = net()
    run = Captured(DEVICE, compiled=False)
    together = Denoiser(made, PLANS["state change"], run=run)
    want = trajectory(together, 5)
    x = torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for row in range(5):
        alone, current = Denoiser(made, PLANS["state change"], run=run), x[row : row + 1]
        for k, time in enumerate(TIMES):
            answer = alone(current, torch.full((1,), time, device=DEVICE))
            torch.testing.assert_close(answer, want[k, row : row + 1], atol=1e-5, rtol=1e-4)
            current = current + ((TIMES[k + 1] if k + 1 < len(TIMES) else 0) - time) / 1000 * answer


def test_a_sampler_s_timesteps_are_read_without_waiting_for_the_device() -> None:
    made = net()
    runner = Denoiser(made, PLANS["depths"])
    times = torch.tensor(TIMES, device=DEVICE)
    runner.reset(times)
    x = torch.randn(3, 16, 8, device=DEVICE)
    runner(x, times[0].expand(3))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for time in times[1:]:
            runner(x, time.expand(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runner.report.depth.shape == (3, len(TIMES))


# ---- some tokens of an image ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ImageBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm = Attention(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x) * (1 + level))
        return x + self.mix(x)


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.position = nn.Linear(16, width), nn.Parameter(torch.randn(1, 64, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + self.position


class Images(nn.Module):
    """A transformer over the 64 patches of an image ``[B, 4, 16, 16]``."""

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.blocks, self.out = Patches(width), nn.ModuleList(ImageBlock(width) for _ in range(blocks)), nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (t.float() / 1000).to(x.dtype)[:, None, None]
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, level)
        return nn.functional.pixel_shuffle(self.out(tokens).transpose(1, 2).unflatten(2, (8, 8)), 2)


SOME = Regions(0.4, multiple=8, first=2, resets=AtSteps((5,)))


def images() -> nn.Module:
    torch.manual_seed(0)
    return Images().eval().to(DEVICE)


def regional(model: nn.Module, run: Any = None, regions: Regions = SOME) -> RegionDenoiser:
    example = (torch.randn(2, 4, 16, 16), torch.tensor([500, 300]))
    return attach_regions(model, regions, noise=FlowMatching(), example=example, observe=True, run=run)


def drawn(runner: RegionDenoiser, rows: int) -> Tensor:
    x = torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    answers = []
    runner.reset()
    for k, time in enumerate(TIMES):
        answers.append(runner(x, torch.full((rows,), time, device=DEVICE)))
        x = x + ((TIMES[k + 1] if k + 1 < len(TIMES) else 0) - time) / 1000 * answers[-1]
    return torch.stack(answers)


def same_tokens(one: RegionDenoiser, other: RegionDenoiser) -> None:
    assert list(one.maps) == list(other.maps) and all(torch.equal(one.maps[k], other.maps[k]) for k in one.maps)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 6])
def test_some_tokens_captured_equal_eager(rows: int, compiled: bool) -> None:
    model = images()
    eager, captured = regional(model), regional(model, CapturedRegions(DEVICE, compiled=compiled))
    want = drawn(eager, rows)
    for _ in range(3):
        torch.testing.assert_close(drawn(captured, rows), want, atol=1e-3, rtol=1e-3)
        same_tokens(captured, eager)
    assert captured.report.reasons == eager.report.reasons and captured.report.reasons[0, "skipped"] == 4 * rows
    assert captured.report.cost == eager.report.cost < 0.85


def test_all_tokens_captured_are_the_model() -> None:
    model = images()
    captured = regional(model, CapturedRegions(DEVICE, compiled=False), Regions(first=100))
    x = torch.randn(3, 4, 16, 16, device=DEVICE)
    with torch.no_grad():
        for time in TIMES:
            t = torch.full((3,), time, device=DEVICE)
            torch.testing.assert_close(captured(x, t), model(x, t), atol=1e-5, rtol=1e-5)


def test_trajectories_that_take_turns_do_not_share_what_is_kept() -> None:
    model, run = images(), CapturedRegions(DEVICE, compiled=False)
    both, lone = regional(model, run), regional(model, run)
    alone = [regional(model) for _ in range(3)]
    g = torch.Generator().manual_seed(2)
    for time in TIMES:
        given = [torch.randn(2, 4, 16, 16, generator=g).to(DEVICE) for _ in range(3)]
        t = torch.full((2,), time, device=DEVICE)
        found = [runner(x, t) for runner, x in zip((both, both, lone), given, strict=True)]  # two guidance branches and another denoiser
        for got, runner, x in zip(found, alone, given, strict=True):
            torch.testing.assert_close(got, runner(x, t), atol=1e-4, rtol=1e-4)


def test_rows_at_different_steps_run_in_graphs_of_their_own() -> None:
    model = images()
    eager, captured = regional(model), regional(model, CapturedRegions(DEVICE, compiled=False))
    g = torch.Generator().manual_seed(3)
    for going, anew in ((700, 300), (600, 200), (500, 900), (400, 800), (300, 700), (200, 600), (100, 500)):
        x = torch.randn(5, 4, 16, 16, generator=g).to(DEVICE)
        t = torch.tensor([going, anew, going, going, anew], device=DEVICE)
        torch.testing.assert_close(captured(x, t), eager(x, t), atol=1e-4, rtol=1e-4)
        same_tokens(captured, eager)


def test_a_row_that_is_not_finite_is_computed_again_and_costs_the_others_nothing() -> None:
    model = images()
    eager, captured = regional(model), regional(model, CapturedRegions(DEVICE, compiled=False))
    g = torch.Generator().manual_seed(4)
    for step, time in enumerate(TIMES):
        x = torch.randn(3, 4, 16, 16, generator=g).to(DEVICE)
        if step == 2:
            x[1] = torch.nan
        t = torch.full((3,), time, device=DEVICE)
        torch.testing.assert_close(captured(x, t), eager(x, t), atol=1e-4, rtol=1e-4, equal_nan=True)
        same_tokens(captured, eager)
    assert captured.report.reasons[0, "not finite"] == 1 and captured.report.reasons == eager.report.reasons


def test_inference_mode_and_another_stream_change_nothing() -> None:
    captured = regional(images(), CapturedRegions(DEVICE, compiled=False))
    want = drawn(captured, 4)
    with torch.inference_mode():
        torch.testing.assert_close(drawn(captured, 4), want, atol=1e-5, rtol=1e-5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = drawn(captured, 4)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_steps_of_some_tokens_do_not_wait_for_the_device(way: str) -> None:
    """But for what the step before left, which is waited for once the next one is on its way; that is an event's, no synchronisation."""
    runner = regional(images(), CapturedRegions(DEVICE, compiled=False) if way == "captured" else None)
    runner.observe = False
    times = torch.tensor(TIMES, device=DEVICE)
    x = torch.randn(3, 4, 16, 16, device=DEVICE)
    for strict in (False, True):  # graphs are made by the first trajectory
        runner.reset(times)
        runner(x, times[0].expand(3))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            for time in times[1:]:
                runner(x, time.expand(3))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert runner.report.reasons[0, "skipped"] == 12 and runner.report.depth.shape == (3, len(TIMES))
