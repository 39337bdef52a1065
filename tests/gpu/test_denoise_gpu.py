"""A denoiser on CUDA: compiled and captured it gives what the walk in eager mode gives, per sample and by schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.core.noise import FlowMatching
from offramp.diffusion import DenoisingNet, attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.graphs import Captured
from offramp.policies.denoising import Every, Guard, NoiseSchedule, Point, ResidualChange, StateChange, depth_schedule
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated

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


def net() -> DenoisingNet:
    torch.manual_seed(0)
    places = ["inlet", *(f"blocks.{k}" for k in range(6))]
    example = {"x": torch.randn(2, 16, 8), "t": torch.tensor([500, 300])}
    return attach_denoiser(Tokens().eval().to(DEVICE), places, noise=FlowMatching(), example=example)


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
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_captured_equals_eager(plan: str, compiled: bool) -> None:
    made = net()
    eager, captured = Denoiser(made, PLANS[plan]), Denoiser(made, PLANS[plan], run=Captured(DEVICE, compiled=compiled))
    eager.straight = False
    want = trajectory(eager, 6)
    for _ in range(2):
        torch.testing.assert_close(trajectory(captured, 6), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(captured.report.depth, eager.report.depth)


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
