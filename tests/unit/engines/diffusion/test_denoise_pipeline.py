from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoise_models import BLOCKS, Toy, autoencoder, conditional_unet, dit, pixart, schedulers, sd3, unet
from torch import Tensor

from offramp.backbones.diffusers import deep_part, noise_scale
from offramp.core.errors import InvalidInput
from offramp.core.noise import FlowMatching, LogSigma, VariancePreserving
from offramp.diffusion import attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.pipeline import attach_pipeline, sample
from offramp.policies.denoising import INPUT, OUTPUT, Chance, Every, InputChange, NoiseLevel, Point, ResidualChange, StateChange
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated, Identity

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ALWAYS = float("-inf")
SIZE: dict[str, Any] = {"num_inference_steps": 4, "height": 8, "width": 8, "output_type": "np"}


def seeded(pipe: Any, **kwargs: Any) -> Tensor:
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(0), **kwargs).images)


@pytest.fixture(scope="module")
def dit_pipe() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dit_view(dit_pipe: Any) -> Any:
    return attach_pipeline(dit_pipe, at=BLOCKS)


def labelled(pipe: Any, labels: Any = (1, 2, 3), steps: int = 5) -> Tensor:
    return seeded(pipe, class_labels=list(labels), num_inference_steps=steps, output_type="np")


def test_a_view_without_points_gives_the_pipelines_images_bit_for_bit(dit_pipe: Any, dit_view: Any) -> None:
    for scheduler in schedulers()[:2]:  # this pipeline calls its scheduler in a way that flow matching has not
        dit_pipe.scheduler = dit_view.scheduler = scheduler()
        assert torch.equal(labelled(dit_view), labelled(dit_pipe))
        assert dit_view.denoiser.report.depth.tolist() == [[5] * 5] * 6  # both guidance branches


def test_sampling_without_a_pipeline_is_bit_exact_for_every_scheduler(dit_view: Any) -> None:
    net = dit_view.denoiser.net
    noise = torch.randn(2, 4, 8, 8)
    given: Any = {"inputs": {"class_labels": torch.tensor([1, 2])}, "unconditional": {"class_labels": torch.tensor([1000, 1000])}}
    for scheduler in schedulers():
        plain = sample(net.model, scheduler(), noise, steps=3, guidance=2.0, names=("hidden_states", "timestep"), **given)
        assert torch.equal(sample(Denoiser(net), scheduler(), noise, steps=3, guidance=2.0, **given), plain)
        assert not torch.equal(plain, sample(Denoiser(net), scheduler(), noise, steps=3, inputs=given["inputs"]))
    with pytest.raises(InvalidInput, match="unconditional"):
        sample(Denoiser(net), schedulers()[0](), noise, steps=3, guidance=2.0)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ancestral noise": ("EulerAncestralDiscreteScheduler", {}),
    "inputs scaled by sigma": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "two calls a step": ("HeunDiscreteScheduler", {}),
    "stochastic second order": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "velocity": ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "flow sigmas": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def either_kind(request: pytest.FixtureRequest) -> Any:
    kind = request.param
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=kind),
        "timestep": torch.tensor([900, 100]),
        "class_labels": torch.tensor([1, 2]),
    }
    return attach_denoiser(dit(2).to(kind), BLOCKS[:2], noise=FlowMatching(), example=given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_that_never_fires_is_bit_exact_whatever_the_sampler(variant: str, either_kind: Any) -> None:
    import diffusers

    name, options = VARIANTS[variant]
    net, made = either_kind, getattr(diffusers, name)
    net.noise = noise_scale(made(**options), net.model)
    noise = torch.randn(2, 4, 8, 8, dtype=net.dtype)
    inputs: Any = {"inputs": {"class_labels": torch.tensor([1, 2])}, "unconditional": {"class_labels": torch.tensor([1000, 1000])}}

    def run(denoiser: Any) -> Tensor:
        names = None if isinstance(denoiser, Denoiser) else ("hidden_states", "timestep")
        torch.manual_seed(4)  # for what the sampler draws
        return sample(denoiser, made(**options), noise, steps=3, guidance=2.0, names=names, **inputs)

    want = run(net.model)
    for point in (Point(0, -1, CachedResidual(), StateChange(), 0.0), Point(0, -1, CachedOutput(), InputChange(), 0.0)):
        runner = Denoiser(net, [point])
        assert torch.equal(run(runner), want) and bool(torch.isfinite(want).all())
        assert (runner.report.depth != 2).all() and runner.report.log_snr.shape[0] >= 4
    fires = Denoiser(net, [Point(0, -1, CachedResidual(), Every(2))])
    assert not torch.equal(run(fires), want)


def test_leaving_to_the_final_layers_equals_a_pipeline_without_the_last_blocks(dit_pipe: Any, dit_view: Any) -> None:
    shallow = copy.copy(dit_pipe)
    model: Any = copy.deepcopy(dit_pipe.transformer)
    model.transformer_blocks = model.transformer_blocks[:2]
    shallow.__dict__["transformer"] = model
    fast = attach_pipeline(dit_pipe, [Point(1, -1, Identity(), NoiseLevel(), ALWAYS)], net=dit_view.denoiser.net)
    assert torch.equal(labelled(fast), labelled(shallow))


def test_the_pipeline_is_not_changed_and_the_view_calls_like_it(dit_pipe: Any, dit_view: Any) -> None:
    assert type(dit_pipe.transformer).__name__ == "DiTTransformer2DModel" and not hasattr(dit_pipe, "denoiser")
    assert isinstance(dit_view, type(dit_pipe)) and dit_view.vae is dit_pipe.vae
    assert inspect.signature(dit_view.__call__) == inspect.signature(dit_pipe.__call__)
    assert dit_view.transformer.config is dit_pipe.transformer.config and dit_view.transformer.dtype == torch.float32
    assert "transformer" in dit_pipe.config and dit_pipe.config["transformer"][1] == "DiTTransformer2DModel"


def test_memories_end_with_the_call_also_by_an_error(dit_pipe: Any, dit_view: Any) -> None:
    fast = attach_pipeline(dit_pipe, [Point(0, -1, CachedOutput(), Every(2))], net=dit_view.denoiser.net)
    want = labelled(fast)
    assert fast.denoiser.trajectory.cache_bytes == 0 < fast.denoiser.report.cache_bytes

    def fails(*_: Any) -> None:
        raise RuntimeError("out of paint")

    step, fast.scheduler.step = fast.scheduler.step, fails
    with pytest.raises(RuntimeError, match="out of paint"):
        labelled(fast)
    fast.scheduler.step = step
    assert fast.denoiser.trajectory.cache_bytes == 0
    assert torch.equal(labelled(fast), want)


@pytest.mark.parametrize(
    "point",
    [
        Point(0, -1, CachedResidual(), StateChange(), ALWAYS),
        Point(1, -1, Extrapolated(1), ResidualChange(0), ALWAYS),
        Point(INPUT, OUTPUT, CachedOutput(), InputChange(), ALWAYS),
        Point(1, -1, Identity(), Chance(), 0.5),
    ],
    ids=lambda p: type(p.signal).__name__,
)
def test_an_image_does_not_depend_on_the_others_of_its_batch(dit_view: Any, point: Point) -> None:
    net = dit_view.denoiser.net
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    labels, null = torch.arange(8), torch.full((8,), 1000)
    flow = schedulers()[2]

    def run(runner: Denoiser, rows: slice) -> Tensor:
        inputs: Any = {"inputs": {"class_labels": labels[rows]}, "unconditional": {"class_labels": null[rows]}}
        return sample(runner, flow(), noise[rows], steps=5, guidance=2.0, **inputs)

    if point.threshold == ALWAYS:  # then one that half of the rows reach at the second step
        watching = Denoiser(net, [point], observe=True)
        run(watching, slice(8))
        scores = watching.report.scores[0][:, 1].sort().values
        point = replace(point, threshold=float(scores[7:9].mean()))
    together = Denoiser(net, [point])
    batch, depth = run(together, slice(8)), together.report.depth
    for k in range(8):
        alone = Denoiser(net, [point])
        torch.testing.assert_close(run(alone, slice(k, k + 1)), batch[k : k + 1], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.report.depth, depth[[k, k + 8]])
    assert (depth.amin(0) < depth.amax(0)).any() and together.report.cost < 1  # rows differ, or this shows nothing


def test_the_last_step_is_known_from_the_scheduler(dit_pipe: Any, dit_view: Any) -> None:
    fast = attach_pipeline(dit_pipe, [Point(0, -1, CachedOutput(), StateChange(), ALWAYS)], net=dit_view.denoiser.net)
    labelled(fast, steps=6)
    assert fast.denoiser.report.depth[0].tolist() == [5, 2, 2, 5, 2, 5]


class DeepCacheByHand:
    """The same reuse in the untouched U-Net: on every second call the deep feature is put in by a hook."""

    def __init__(self, model: Any, place: str) -> None:
        self.model, self.kept, self.calls = model, torch.empty(0), 0
        model.get_submodule(place).register_forward_hook(self.hook)

    def hook(self, module: Any, args: Any, output: Tensor) -> Tensor:
        if self.calls % 2 == 0:
            self.kept = output
        return self.kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        self.calls += 1
        return output


def test_a_cached_deep_feature_of_a_unet_equals_reuse_by_hand() -> None:
    model = unet()
    at = deep_part(model)
    level = noise_scale(schedulers()[0]())
    net = attach_denoiser(model, at, noise=level, example=(torch.randn(2, 4, 8, 8), torch.tensor([900, 100])))
    assert len(net.cut().made(1, 2)) == 1  # the skips inside do not appear
    runner = Denoiser(net, [Point(*at, CachedOutput(), Every(2))])
    noise = torch.randn(2, 4, 8, 8)
    got = sample(runner, schedulers()[0](), noise, steps=4)
    assert runner.report.depth.tolist() == [[3, 2, 3, 2]] * 2
    by_hand = DeepCacheByHand(copy.deepcopy(model), at[1])
    want = sample(by_hand, schedulers()[0](), noise, steps=4)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidInput, match="continues the state"):
        Denoiser(net, [Point(*at, Identity(), Every(2))])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_text_to_image_unet_with_two_guidance_branches() -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    model = conditional_unet()
    parts = {"vae": autoencoder(), "unet": model, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(**parts, **nothing, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(3, 6, 12)
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([900, 100]), "encoder_hidden_states": torch.randn(2, 6, 12)}
    at = deep_part(model)
    view = attach_pipeline(pipe, at=at, example=given)

    def images(run: Any) -> Tensor:
        return seeded(run, prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), **SIZE)

    want = images(pipe)
    assert torch.equal(images(view), want)
    assert len(view.denoiser.net._cuts) == 1  # a scalar timestep and a tuple as answer are the same model
    fast = attach_pipeline(pipe, [Point(*at, CachedOutput(), StateChange(), ALWAYS)], net=view.denoiser.net)
    got = images(fast)
    assert fast.denoiser.report.depth.tolist() == [[3, 2, 2, 3]] * 6
    assert not torch.equal(got, want) and bool(torch.isfinite(got).all())


def test_two_streams_and_flow_matching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=sd3(), vae=autoencoder(), scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(names)
    )
    pipe.set_progress_bar_config(disable=True)
    text, pooled = torch.randn(2, 6, 12), torch.randn(2, 10)
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([900.0, 100.0])}
    example = {**given, "encoder_hidden_states": text, "pooled_projections": pooled}
    view = attach_pipeline(pipe, at=BLOCKS[:3], example=example)

    def images(run: Any) -> Tensor:
        others = {"negative_prompt_embeds": text * 0, "negative_pooled_prompt_embeds": pooled * 0}
        return seeded(run, prompt_embeds=text, pooled_prompt_embeds=pooled, **others, **SIZE)

    assert view.denoiser.net.noise == FlowMatching(1000.0)
    assert torch.equal(images(view), images(pipe))
    made = view.denoiser.net.cut()
    assert len(made.made(1, 2)) == 2 and len(made.made(1, 3)) == 1  # both streams; the last block drops the text
    for point in (
        Point(0, 1, CachedResidual(), StateChange(), ALWAYS),
        Point(0, -1, Identity(), NoiseLevel(), 0.0),
        Point(INPUT, OUTPUT, Extrapolated(1), Every(2)),
    ):
        fast = attach_pipeline(pipe, [point], net=view.denoiser.net)
        assert bool(torch.isfinite(images(fast)).all()) and fast.denoiser.report.cost < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_cross_attention_with_a_second_order_scheduler() -> None:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline(
        transformer=pixart(), vae=autoencoder(), scheduler=DPMSolverMultistepScheduler(), text_encoder=None, tokenizer=None
    )
    pipe.set_progress_bar_config(disable=True)
    text, mask = torch.randn(2, 6, 12), torch.ones(2, 6)
    mask[1, 4:] = 0
    example = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([900, 100]),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    view = attach_pipeline(pipe, at=BLOCKS[:3], example=example)

    def images(run: Any) -> Tensor:
        others = {"negative_prompt": None, "negative_prompt_embeds": text * 0, "negative_prompt_attention_mask": torch.ones(2, 6)}
        return seeded(run, prompt_embeds=text, prompt_attention_mask=mask, **others, **SIZE, use_resolution_binning=False)

    assert torch.equal(images(view), images(pipe))
    fast = attach_pipeline(pipe, [Point(0, -1, CachedResidual(), StateChange(), ALWAYS)], net=view.denoiser.net)
    assert bool(torch.isfinite(images(fast)).all()) and fast.denoiser.report.depth[0].tolist() == [4, 2, 2, 4]


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no denoiser"):
        attach_pipeline(SimpleNamespace(vae=autoencoder()))
    with pytest.raises(InvalidInput, match="no denoiser"):
        attach_pipeline(SimpleNamespace(transformer=Toy()))


def test_noise_levels_of_schedulers() -> None:
    import diffusers

    ddim = diffusers.DDIMScheduler()
    level = noise_scale(ddim)
    assert isinstance(level, VariancePreserving)
    alpha = ddim.alphas_cumprod.double()
    want = (alpha / (1 - alpha)).log()
    torch.testing.assert_close(level.log_snr(torch.tensor([0, 500, 999])), want[[0, 500, 999]])
    torch.testing.assert_close(level.log_snr(torch.tensor([500.25])), want[500:501] * 0.75 + want[501:502] * 0.25)
    assert noise_scale(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)) == FlowMatching(1000.0)
    assert noise_scale(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")) == FlowMatching(
        1000.0
    )
    assert noise_scale(diffusers.EDMEulerScheduler()) == LogSigma(0.25)
    zero = noise_scale(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    assert zero.log_snr(torch.tensor([999])).item() == -20.0  # pure noise, held finite
    with pytest.raises(InvalidInput, match="not known"):
        noise_scale(SimpleNamespace(config={}))
