"""What a plan was made with: samplers, noise levels, steps and guidance that differ are told, and a plan that cannot hold is refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from denoise_models import autoencoder, dit

import offramp
from offramp import systems
from offramp.backbones.diffusers import noise_scale
from offramp.budget import DriftLimit, MeanCost
from offramp.core.errors import FingerprintMismatch, OfframpWarning
from offramp.core.noise import FlowMatching, LogSigma, NoiseScale
from offramp.engines.diffusion.model import DiffusionModel
from offramp.engines.diffusion.plan import DenoisingPlan
from offramp.engines.diffusion.sampler import differing, kept_levels, same_levels, sampler_settings

pytest.importorskip("diffusers")

STEPS = 4
CALL: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": STEPS}


@cache
def attached(name: str) -> DiffusionModel:
    from diffusers import DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    pipe = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return offramp.attach(pipe, system=systems.build(name))


def elsewhere(name: str, scheduler: Any, noise: NoiseScale | None = None) -> DiffusionModel:
    """The same method on the same denoiser with another sampler, and called at other noise levels."""
    fast = attached(name)
    net = copy.copy(fast.net)
    net.noise = noise or net.noise
    return DiffusionModel(fast.system, net, fast.layout, fast.pipe, scheduler)


@pytest.fixture(scope="module")
def cached() -> DenoisingPlan:
    return offramp.calibrate(attached("first-block-cache"), MeanCost(0.8), calls=[CALL], runs=4)


@pytest.fixture(scope="module")
def scheduled() -> DenoisingPlan:
    return offramp.calibrate(attached("static-schedule"), MeanCost(0.8), calls=[CALL])


def test_the_sampler_s_settings_are_kept_and_come_back(cached: DenoisingPlan, tmp_path: Path) -> None:
    settings = cached.made_with["sampler_settings"]
    assert settings["beta_schedule"] == "linear" and settings["prediction_type"] == "epsilon" and settings["timestep_spacing"] == "leading"
    assert len(cached.made_with["noise_levels"]) == 9
    cached.save(tmp_path)
    assert DenoisingPlan.load(tmp_path) == cached
    assert "beta_schedule" not in str(cached), "a page of settings is no summary"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached.check(attached("first-block-cache"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type was 'epsilon' and is 'v_prediction'"),
        ({"timestep_spacing": "trailing"}, "another DDIMScheduler: timestep_spacing was 'leading' and is 'trailing'"),
    ],
)
def test_another_setting_of_the_same_sampler_is_told(scheduled: DenoisingPlan, changed: dict[str, Any], words: str) -> None:
    from diffusers import DDIMScheduler

    with pytest.warns(OfframpWarning, match=f"{words}.*It goes by noise level and stays valid"):
        scheduled.check(elsewhere("static-schedule", DDIMScheduler(**changed)))


def test_another_sampler_is_told_with_what_both_say_differently(cached: DenoisingPlan) -> None:
    from diffusers import DPMSolverMultistepScheduler

    with pytest.warns(
        OfframpWarning, match=r"DDIMScheduler and runs with DPMSolver.*timestep_spacing was 'leading' and is 'linspace'.* Its"
    ):
        cached.check(elsewhere("first-block-cache", DPMSolverMultistepScheduler()))


def test_other_betas_refuse_a_plan_by_noise_level_and_warn_of_one_that_measures(cached: DenoisingPlan, scheduled: DenoisingPlan) -> None:
    from diffusers import DDIMScheduler

    other = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    noise = noise_scale(other)
    with pytest.raises(FingerprintMismatch, match=r"log-SNRs from .* goes by noise level, so it does not hold here: calibrate again"):
        scheduled.check(elsewhere("static-schedule", other, noise))
    with pytest.warns() as told:
        cached.check(elsewhere("first-block-cache", other, noise))
    words = " ".join(str(w.message) for w in told)
    assert "stand for other noise levels" in words and "beta_schedule was 'linear' and is 'squaredcos_cap_v2'" in words


def test_a_plan_of_another_method_says_whose_it_is(cached: DenoisingPlan) -> None:
    with pytest.raises(FingerprintMismatch, match="is of first-block-cache and the method here is deepcache"):
        cached.check(attached("deepcache"))


def test_a_plan_from_before_settings_were_kept_compares_classes_alone(cached: DenoisingPlan) -> None:
    from diffusers import DDIMScheduler

    old = replace(cached, made_with={k: v for k, v in cached.made_with.items() if k not in ("sampler_settings", "noise_levels")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old.check(elsewhere("first-block-cache", DDIMScheduler(prediction_type="v_prediction")))


def test_steps_are_compared_where_the_plan_depends_on_them(cached: DenoisingPlan, scheduled: DenoisingPlan) -> None:
    few = offramp.calibrate(attached("few-steps"), MeanCost(0.5), calls=[CALL])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan, steps in ((cached, STEPS), (scheduled, 50), (few, 50), (cached, None)):
            plan.check_call(steps, None)
    with pytest.warns(OfframpWarning, match="measured with 4 steps and this call takes 50"):
        cached.check_call(50, None)
    with pytest.warns(OfframpWarning, match="takes 1 of 1 steps, a share of 1, and was measured at 0.5"):
        few.check_call(1, None)


def test_a_watched_pipeline_compares_its_calls(cached: DenoisingPlan) -> None:
    fast = attached("first-block-cache")
    run = cached.watch(fast.view(cached.points, steps=cached.steps))
    assert isinstance(run, type(fast.pipe)), "it is still the user's class"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = run(**CALL, generator=torch.Generator().manual_seed(0), output_type="pt").images
        plain = fast.view(cached.points)(**CALL, generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert torch.equal(torch.as_tensor(images), torch.as_tensor(plain))
    with pytest.warns(OfframpWarning, match="plan of first-block-cache has no figures for this call.*takes 2"):
        run([1], num_inference_steps=2)
    alone = fast.run(())
    assert cached.watch(alone) is alone


def test_guidance_matters_to_what_was_promised_about_images(cached: DenoisingPlan) -> None:
    calls = [{**CALL, "class_labels": list(range(8)), "guidance_scale": 4.0}]
    limited = offramp.calibrate(attached("deepcache"), DriftLimit(0.9, above=10.0, delta=0.5), calls=calls)
    with pytest.warns(OfframpWarning, match="at guidance 4 and this call has 1"):
        limited.check_call(STEPS, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limited.check_call(STEPS, 4.0)
        cached.check_call(STEPS, 1.0)


def test_settings_are_json_data_and_lists_are_compared_by_what_they_hold() -> None:
    class Sampler:
        config: ClassVar[dict[str, Any]] = {
            "trained_betas": torch.linspace(0, 1, 20),
            "shift": 3.0,
            "_class_name": "x",
            "big": float("inf"),
            "few": (1, 2),
            "odd": object(),
        }

    one = sampler_settings(Sampler())
    assert one["shift"] == 3.0 and one["big"] == "inf" and one["few"] == [1, 2] and one["odd"] == "object" and "_class_name" not in one
    Sampler.config = {**Sampler.config, "trained_betas": torch.linspace(0, 2, 20)}
    assert [w.split(" was")[0] for w in differing(one, sampler_settings(Sampler()))] == ["trained_betas"]
    assert sampler_settings(None) == sampler_settings(object()) == {}
    assert differing({"a": 1.0, "b": True}, {"a": 1, "b": 1, "c": 2}) == []


def test_a_flow_s_levels_do_not_depend_on_how_its_time_is_counted() -> None:
    assert same_levels(kept_levels(FlowMatching()), kept_levels(FlowMatching(1.0))) and kept_levels(LogSigma(0.25)) == []
    assert same_levels([], kept_levels(FlowMatching())) and not same_levels([1.0], [1.1])
