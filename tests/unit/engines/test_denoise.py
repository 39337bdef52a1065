from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from denoise_models import attached, dit, example, schedulers
from torch import Tensor

from offramp.diffusion import DenoisingNet
from offramp.engines.denoise import Denoiser
from offramp.engines.pipeline import sample
from offramp.policies.denoising import Every, NoiseLevel, Point
from offramp.policies.fills import CachedOutput, Identity

pytest.importorskip("diffusers")

NAMES = ("hidden_states", "timestep")


@pytest.fixture(scope="module")
def net() -> DenoisingNet:
    return attached()


def noise(rows: int, seed: int = 3) -> Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_without_points_every_sampler_gives_the_plain_models_sample_bit_for_bit(net: DenoisingNet) -> None:
    labels = {"class_labels": torch.tensor([1, 2, 3])}
    for scheduler in schedulers():
        plain = sample(net.model, scheduler(), noise(3), steps=4, inputs=labels, names=NAMES)
        assert torch.equal(sample(Denoiser(net), scheduler(), noise(3), steps=4, inputs=labels), plain)


def test_leaving_to_the_final_layers_equals_the_model_without_its_last_blocks(net: DenoisingNet) -> None:
    shallow: Any = copy.deepcopy(net.model)
    shallow.transformer_blocks = shallow.transformer_blocks[:2]
    runner = Denoiser(net, [Point(1, -1, Identity(), NoiseLevel(), float("-inf"))])
    inputs = example(3)
    assert torch.equal(runner(**inputs).sample, shallow(**inputs).sample)
    assert runner.report.depth.tolist() == [[3]] * 3  # two blocks and the final layers


def test_every_second_step_is_computed_and_the_others_take_the_deep_output(net: DenoisingNet) -> None:
    runner = Denoiser(net, [Point(0, -1, CachedOutput(), Every(2))])
    sample(runner, schedulers()[0](), noise(2), steps=5, inputs={"class_labels": torch.tensor([1, 2])})
    assert runner.report.depth.tolist() == [[5, 2, 5, 2, 5]] * 2
    assert runner.report.cost < 1


def test_the_model_is_left_as_it_was() -> None:
    model = dit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    Denoiser(attached(model), [Point(0, -1, Identity(), Every(2))])(**example())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert flags == [m.training for m in model.modules()] and not any(m._forward_hooks for m in model.modules())
