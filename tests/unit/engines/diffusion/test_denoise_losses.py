"""Tables of losses by noise level: against single runs, and as the budgets take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoise_models import ToyHead, toy
from torch import Tensor

from offramp.budget import best_cache_plan, best_schedule
from offramp.budget.noise_schedule import NoiseBins
from offramp.core.errors import InvalidInput
from offramp.diffusion import DenoisingNet
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.losses import depth_losses, reuse_losses
from offramp.engines.diffusion.pipeline import sample
from offramp.policies.denoising import OUTPUT, Every, NoiseLevel, Point
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated, HeadOutput, Identity

EDGES = (-1.0, 1.0)


@pytest.fixture(scope="module")
def net() -> DenoisingNet:
    return toy({"blocks.0": ToyHead(), "blocks.1": ToyHead()})


def batches(rows: int = 12, count: int = 2) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(rows, 6, 4, generator=g),
            "t": torch.linspace(40 + k, 960 + k, rows),
            "y": torch.randint(0, 10, (rows,), generator=g),
            "labels": torch.randn(rows, 6, 4, generator=g),
        }
        for k in range(count)
    ]


def test_losses_are_those_of_single_runs(net: DenoisingNet) -> None:
    given = batches()
    found = depth_losses(net, given, EDGES)
    assert found.places == (*net.at[:-1], "output") and found.count.sum() == 24
    for option, place in enumerate(found.places):
        points = [] if place == "output" else [Point(place, -1, Identity(), NoiseLevel(), float("-inf"))]
        engine, full = Denoiser(net, points), Denoiser(net)
        sums, drift = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for b in given:
            inputs = {n: v for n, v in b.items() if n != "labels"}
            bins = torch.bucketize(net.noise.log_snr(b["t"]), torch.tensor(EDGES, dtype=torch.float64), right=True)
            answer = engine(**inputs)
            sums.index_add_(0, bins, (answer - b["labels"]).square().mean((1, 2)).double())
            drift.index_add_(0, bins, (answer - full(**inputs)).square().mean((1, 2)).double())
        torch.testing.assert_close(found.loss[:, option], sums / found.count, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.drift[:, option], drift / found.count, rtol=1e-5, atol=1e-7)
        assert found.flops[option] == pytest.approx(float(engine.report.flops.mean()))
    assert bool((found.drift[:, :-1] > 0).all()) and bool((found.drift[:, -1] == 0).all())


def test_learned_exits_are_measured_with_their_own_output_and_uncertainty(net: DenoisingNet) -> None:
    given = batches(count=1)
    found = depth_losses(net, given, EDGES, at=["blocks.0", "blocks.1"], to=OUTPUT, fill=HeadOutput())
    engine = Denoiser(net, [Point("blocks.1", OUTPUT, HeadOutput(), NoiseLevel(), float("-inf"))])
    inputs = {n: v for n, v in given[0].items() if n != "labels"}
    per_row = (engine(**inputs) - given[0]["labels"]).square().mean((1, 2))
    assert float((found.loss[:, 1] * found.count).sum() / found.count.sum()) == pytest.approx(float(per_row.mean()), rel=1e-5)
    assert bool(((found.uncertainty > 0) & (found.uncertainty < 1)).all())
    assert found.flops[1] == pytest.approx(float(engine.report.flops.mean()))


def test_the_best_schedule_is_chosen_from_the_table(net: DenoisingNet) -> None:
    found = depth_losses(net, batches(), EDGES)
    bins = NoiseBins(found.edges)
    half = 0.6 * found.flops[-1]
    chosen = best_schedule(bins, found.drift, found.flops, [1.0] * bins.size, half)
    assert sum(found.flops[d] for d in chosen.depths) / bins.size <= half
    assert best_schedule(bins, found.drift, found.flops, [1.0] * bins.size, found.flops[-1]).depths == (len(net.at) - 1,) * 3


class _Scheduler:
    """Euler steps of a flow."""

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(1000, 0, steps + 1)[:-1]
        self.width = 1 / steps

    def step(self, answer: Tensor, time: Tensor, current: Tensor) -> tuple[Tensor]:
        return (current - self.width * answer,)


@pytest.mark.parametrize("fill", [CachedOutput(), CachedResidual()])
def test_reuse_is_what_the_engine_does_at_the_step_after_a_computed_one(net: DenoisingNet, fill: Any) -> None:
    noise, labels = torch.randn(3, 6, 4), {"y": torch.tensor([1, 2, 3])}
    point = Point("blocks.0", -1, fill, Every(2))
    found = reuse_losses(net, point, _Scheduler(), noise, steps=5, max_gap=3, inputs=labels)
    assert found.loss.shape == (5, 4) and bool((found.loss[:, 0] == 0).all())
    assert [int(r.isfinite().sum()) for r in found.loss] == [1, 2, 3, 4, 4]
    assert found.flops_reuse < found.flops_full and list(found.log_snr) == sorted(found.log_snr)
    # Two steps by hand: the second reuses what the first made, on the full model's trajectory.
    scheduler, engine, full = _Scheduler(), Denoiser(net, [point]), Denoiser(net)
    scheduler.set_timesteps(5)
    engine(noise, scheduler.timesteps[0].expand(3), labels["y"])
    ahead = scheduler.step(full(noise, scheduler.timesteps[0].expand(3), labels["y"]), scheduler.timesteps[0], noise)[0]
    reused = engine(ahead, scheduler.timesteps[1].expand(3), labels["y"])
    gap = (reused - full(ahead, scheduler.timesteps[1].expand(3), labels["y"])).square().mean()
    assert float(found.loss[1, 1]) == pytest.approx(float(gap), rel=1e-4)
    assert best_cache_plan(found.loss, found.flops_full, found.flops_reuse, found.flops_full).computed == (0, 1, 2, 3, 4)
    assert sample(full, _Scheduler(), noise, steps=5, inputs=labels).shape == noise.shape


def test_errors(net: DenoisingNet) -> None:
    with pytest.raises(InvalidInput, match="No rows in bins"):
        depth_losses(net, batches(), (-1.0, 30.0))
    with pytest.raises(InvalidInput, match="labels"):
        depth_losses(net, [{n: v for n, v in batches()[0].items() if n != "labels"}], EDGES)
    with pytest.raises(InvalidInput, match="reuse_losses"):
        depth_losses(net, batches(), EDGES, fill=CachedOutput())
    with pytest.raises(InvalidInput, match="remember one step"):
        reuse_losses(net, Point(0, -1, Extrapolated(1), Every(2)), _Scheduler(), torch.randn(2, 6, 4), steps=3, max_gap=1)
    with pytest.raises(InvalidInput, match="max_gap"):
        reuse_losses(net, Point(0, -1, CachedOutput(), Every(2)), _Scheduler(), torch.randn(2, 6, 4), steps=3, max_gap=0)
