"""Samples to calibrate with: what a sampler draws on the way is the same at every run, so that settings differ by what they skip alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoise_models import Toy, autoencoder, dit
from torch import Tensor

import offramp
from offramp import systems
from offramp.budget import DriftLimit, MeanCost, Quality
from offramp.cli.image_nets import EulerFlow
from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching
from offramp.engines.diffusion.calibrate import calibrate_denoiser
from offramp.engines.diffusion.model import DiffusionModel, attach_diffusion
from offramp.engines.diffusion.samples import FromCalls, FromNoise
from offramp.measure.image_quality import relative_l2

STEPS = 6


class Noisy(EulerFlow):
    """A sampler that adds noise of torch's own generator at every step, as pipelines leave it to do."""

    def step(self, output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor]:
        drawn = torch.randn_like(sample)
        if hasattr(type(self), "log"):
            type(self).log.append(drawn)
        return (super().step(output, timestep, sample)[0] + 0.3 * drawn,)


def attached(name: str, **arguments: Any) -> DiffusionModel:
    torch.manual_seed(5)
    example = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500.0, 300.0]), "y": torch.tensor([1, 2])}
    return attach_diffusion(Toy().eval(), system=systems.build(name, **arguments), scheduler=Noisy(), noise=FlowMatching(), example=example)


def given(count: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(count, 6, 4, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return {"noise": noise, "inputs": {"y": labels}, "steps": STEPS}


def test_a_sampler_that_adds_noise_gives_the_same_images_at_every_run_and_leaves_the_generator_alone() -> None:
    fast, some = attached("first-block-cache"), given()
    rows = FromNoise(Noisy(), some["noise"], STEPS, 3, range(8), range(8, 16), {"inputs": some["inputs"]}, 1.0, 0)
    before = torch.random.get_rng_state()
    first, second = (rows.run(lambda: fast.run(()), held).images for held in (True, True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, second)
    other = FromNoise(Noisy(), some["noise"], STEPS, 3, range(8), range(8, 16), {"inputs": some["inputs"]}, 1.0, 1)
    assert not torch.equal(other.run(lambda: fast.run(()), True).images, first), "another seed is other noise"


def test_what_is_drawn_on_the_way_is_new_in_every_batch_and_none_of_what_samples_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noisy, "log", [], raising=False)
    fast = attached("few-steps")
    noise = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0))
    FromNoise(Noisy(), noise, STEPS, 4, range(4), range(4, 8), {"inputs": {"y": torch.zeros(8, dtype=torch.int64)}}, 1.0, 0).run(
        lambda: fast.run(()), False
    )
    FromNoise(Noisy(), noise, STEPS, 4, range(4), range(4, 8), {"inputs": {"y": torch.zeros(8, dtype=torch.int64)}}, 1.0, 0).run(
        lambda: fast.run(()), True
    )
    drawn = torch.cat([noise.reshape(2, -1), *(d.reshape(1, -1) for d in Noisy.log)])  # type: ignore[attr-defined]
    assert len(drawn) == 2 + 2 * STEPS
    assert float(torch.cdist(drawn, drawn).fill_diagonal_(99).min()) > 1


def test_a_plan_depends_on_the_seed_and_not_on_what_was_drawn_before() -> None:
    plans = []
    for k in range(2):
        torch.manual_seed(k)
        plans.append(calibrate_denoiser(attached("first-block-cache", change=0.3), MeanCost(0.7), **given(), runs=8))
        plans.append(calibrate_denoiser(attached("first-block-cache", change=0.3), DriftLimit(0.5, above=0.8, delta=0.3), **given(64)))
    assert plans[0] == plans[2] and plans[1] == plans[3]
    assert plans[0] != calibrate_denoiser(attached("first-block-cache", change=0.3), MeanCost(0.7), **given(), runs=8, seed=1)


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
def test_the_full_model_is_as_good_as_itself_by_fid_where_noise_is_added() -> None:
    fast, real = attached("first-block-cache", change=0.3), torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    target = Quality(0.0, lambda images: images.flatten(1)[:, :2], real, 16)
    first, second = (calibrate_denoiser(fast, target, **given(32), runs=3, progress=False) for _ in range(2))
    assert first == second and first.tried[0].fid == second.tried[0].fid


def test_a_pipeline_that_gives_its_sampler_no_generator_is_paired_too() -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler, DiTPipeline

    pipe = DiTPipeline(dit(), autoencoder(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    calls = FromCalls(fast, [{"class_labels": [1, 2], "num_inference_steps": 4}], None, 0)
    first, second = (calls.run(lambda: fast.run(()), True).images for _ in range(2))
    assert float(relative_l2(first, second).max()) == 0
    assert float(relative_l2(calls.run(lambda: fast.run(()), False).images, first).min()) > 0, "held out is other noise"


def test_calls_that_do_not_fit_are_named() -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, DiTPipeline

    fast = offramp.attach(DiTPipeline(dit(), autoencoder(), DDIMScheduler()), system=systems.build("deepcache"))
    for calls, words in [
        ({"class_labels": [1]}, "a list of mappings"),
        ([{"class_labels": [1], "generator": None}], "leave generator out"),
    ]:
        with pytest.raises(InvalidInput, match=words):
            offramp.calibrate(fast, MeanCost(0.7), calls=calls)
