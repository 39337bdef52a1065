"""What holds for every diffusion system: rows of `cases`, over a diffusion transformer and a U-Net that reads text."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import offramp
from offramp import systems
from offramp.core.errors import FingerprintMismatch, InvalidInput, UnsupportedModel
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import PARTS, DiffusionModel, changed, saved
from offramp.engines.diffusion.pipeline import sample
from offramp.policies.skips import DepthSchedule

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, Case

DENOISING = [c for c in CASES if systems.load_card(c.system).engine == "denoise"]
SKIPPING = [c for c in DENOISING if systems.build(c.system).skips is not None]
TRAINING_FREE = [n for n in systems.list_systems() if (c := systems.load_card(n)).engine == "denoise" and not c.trained]
STEPS = 5

rows = pytest.mark.parametrize("case", DENOISING, ids=lambda c: c.system)
skipping = pytest.mark.parametrize("case", SKIPPING, ids=lambda c: c.system)


def sampler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def built(case: Case) -> Any:
    """The system; a schedule that has to be chosen is given."""
    system = systems.build(case.system, **case.kwargs)
    return dataclasses.replace(system, skips=DepthSchedule((4, 3, 2), 4)) if case.system == "static-schedule" else system


@pytest.fixture(scope="module")
def attached() -> Any:
    made: dict[str, DiffusionModel] = {}

    def attach(case: Case) -> DiffusionModel:
        if case.system not in made:
            torch.manual_seed(1)
            made[case.system] = offramp.attach(case.model(), system=built(case), scheduler=sampler())
            with torch.no_grad():
                for head in made[case.system].net.heads.values():
                    for parameter in head.parameters():  # type: ignore[union-attr]
                        parameter.add_(0.3 * torch.randn_like(parameter))
        return made[case.system]

    return attach


def images(fast: DiffusionModel, given: Any, **options: Any) -> Tensor:
    return fast.sample(given["noise"], steps=STEPS, inputs=given["inputs"], **options)


def plain(model: nn.Module, given: Any) -> Tensor:
    return sample(model, sampler(), given["noise"], steps=STEPS, inputs=given["inputs"], names=("hidden_states", "timestep"))


@skipping
def test_points_save_and_read_back(case: Case, attached: Any) -> None:
    fast = attached(case)
    assert part_from_dict(part_to_dict(fast.points), PARTS) == fast.points
    assert part_from_dict(part_to_dict(fast.skips), PARTS) == fast.skips


@rows
def test_changes_images_and_saves_work(case: Case, attached: Any) -> None:
    fast, given = attached(case), case.inputs(3, 0)
    denoiser = fast.run()
    got = sample(denoiser, sampler(), given["noise"], steps=STEPS, inputs=given["inputs"])
    assert denoiser.report.cost < 1 or fast.skips.steps(STEPS) < STEPS
    assert not torch.equal(images(fast, given), plain(fast.net.model, given))
    assert got.isfinite().all()


@skipping
def test_a_plan_that_never_fires_is_the_model_bit_for_bit(case: Case, attached: Any) -> None:
    fast, given = attached(case), case.inputs(3, 0)
    never = [dataclasses.replace(p, threshold=float("inf")) for p in fast.points]
    got = sample(Denoiser(fast.net, never), sampler(), given["noise"], steps=STEPS, inputs=given["inputs"])
    assert torch.equal(got, plain(fast.net.model, given))


def test_a_schedule_of_all_blocks_is_the_model_bit_for_bit(attached: Any) -> None:
    case = next(c for c in DENOISING if c.system == "ee-diffusion")
    fast, given = attached(case), case.inputs(3, 0)
    full = DepthSchedule((28,) * 10, 28).points(fast.layout)
    assert torch.equal(images(fast, given, plan=_Points(full)), plain(fast.net.model, given))


@dataclasses.dataclass(frozen=True)
class _Points:
    points: Any

    def steps(self, steps: int) -> int:
        return steps


@rows
def test_a_batch_of_eight_equals_eight_of_one(case: Case, attached: Any) -> None:
    fast, given = attached(case), case.inputs(8, 3)
    together = images(fast, given)
    alone = [
        images(fast, {"noise": given["noise"][k : k + 1], "inputs": {n: v[k : k + 1] for n, v in given["inputs"].items()}})
        for k in range(8)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@rows
def test_guidance_branches_share_nothing(case: Case, attached: Any) -> None:
    """With guidance 1 the unconditional branch has no say, so whatever it computes must not show."""
    fast, given = attached(case), case.inputs(3, 4)
    with_branch = images(fast, given, unconditional={"class_labels": torch.full((3,), 10)}, guidance=1.0)
    torch.testing.assert_close(with_branch, images(fast, given), rtol=1e-4, atol=1e-5)


@rows
def test_the_users_model_stays_what_it_was(case: Case, attached: Any) -> None:
    fast, given = attached(case), case.inputs(2, 5)
    model, fresh = fast.detach(), case.model()
    images(fast, given)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(plain(model, given), plain(fresh, given))


@skipping
def test_what_is_saved_is_the_method_with_its_settings(case: Case, attached: Any, tmp_path: Path) -> None:
    fast = attached(case)
    fast.save(tmp_path)
    name, fields, tensors = saved(tmp_path)
    assert changed(systems.build(name), fields) == fast.system
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in fast.net.heads.state_dict().items()}


@pytest.mark.parametrize("name", ["deediff", "first-block-cache", "static-schedule"])
def test_saved_and_loaded_it_gives_the_same_images(name: str, attached: Any, tmp_path: Path) -> None:
    case = next(c for c in DENOISING if c.system == name)
    fast, given = attached(case), case.inputs(2, 6)
    fast.save(tmp_path)
    again = offramp.load(case.model(), tmp_path, scheduler=sampler())
    assert type(again) is DiffusionModel and again.system == fast.system
    assert torch.equal(images(again, given), images(fast, given))
    other = case.model()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(FingerprintMismatch, match="trained on"):
        offramp.load(other, tmp_path, scheduler=sampler())


# ---- text to image -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_pipe() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8,
        latent_channels=4,
    ).eval()  # fmt: skip
    none: Any = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), **none, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictured(pipe: Any, steps: int = 5, rows: int = 2) -> Tensor:
    text = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1))[:rows]
    return torch.as_tensor(
        pipe(
            prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), num_inference_steps=steps, height=8, width=8,
            guidance_scale=4.0, output_type="np", generator=[torch.Generator().manual_seed(k) for k in range(rows)],
        ).images
    )  # fmt: skip


TEXT_SETTINGS: dict[str, dict[str, Any]] = {"first-block-cache": {"change": 1.0}, "deepcache": {"interval": 2}}


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_every_training_free_system_on_a_text_to_image_pipeline(name: str, text_pipe: Any) -> None:
    system = systems.build(name, **TEXT_SETTINGS.get(name, {}))
    if name == "ras":
        with pytest.raises((UnsupportedModel, InvalidInput), match="UNet2DConditionModel"):
            offramp.attach(text_pipe, system=system)
        return
    before = copy.deepcopy(text_pipe.unet.state_dict())
    full = pictured(text_pipe)
    fast = offramp.attach(text_pipe, system=system)
    got = pictured(fast)
    assert got.shape == full.shape and got.isfinite().all()
    assert fast.report.cost < 1 or len(fast.report.flops[0]) < 5
    never = [dataclasses.replace(p, threshold=float("inf")) for p in fast.points]
    assert torch.equal(pictured(fast.view(never, steps=lambda steps: steps)), full)
    torch.testing.assert_close(got[:1], pictured(fast, rows=1), rtol=1e-5, atol=1e-5)
    assert type(text_pipe.unet).__name__ == "UNet2DConditionModel" and torch.equal(pictured(text_pipe), full)
    assert all(torch.equal(v, before[k]) for k, v in text_pipe.unet.state_dict().items())


@pytest.mark.parametrize("name", ["ee-diffusion", "deediff", "latte-flow", "shallow", "static-schedule"])
def test_a_system_that_attaches_nowhere_says_why(name: str, text_pipe: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"{name} cannot be attached to this UNet2DConditionModel.*is a U-Net"):
        offramp.attach(text_pipe, system=systems.build(name))
