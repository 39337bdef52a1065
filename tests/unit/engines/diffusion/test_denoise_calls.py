"""Calls of one form after the first take a short way: they must not differ from it."""

from __future__ import annotations

import copy

import pytest
import torch
from denoise_models import toy
from torch import Tensor

from denoisers import attached, batch
from offramp.engines.diffusion.denoise import Denoiser
from offramp.policies.denoising import Every, Point
from offramp.policies.fills import CachedOutput


def test_one_tensor_for_two_inputs_is_not_taken_for_a_rule() -> None:
    net = toy()
    x, same, other = torch.randn(2, 6, 4), torch.tensor([3, 5]), torch.tensor([1, 2])
    short = Denoiser(net)
    for y in (same, other, same):
        assert torch.equal(short(x, same, y), Denoiser(net)(x, same, y))


@pytest.mark.parametrize("kind", ["uvit", "dit", "unet"])
def test_later_calls_return_what_the_model_returns(kind: str) -> None:
    """Bit for bit, in its own class and as a tuple, without a plan and where it computes; copies begin anew."""
    net = attached(kind)
    for plan in ([], [Point(net.at[0], -1, CachedOutput(), Every(1))]):
        made = Denoiser(net, plan)
        for denoiser in (made, copy.deepcopy(made)):
            for seed in (1, 2, 3):
                inputs = batch(2, net.sample_name, seed)
                want = net.model(**inputs)
                got = denoiser(**inputs)
                assert type(got) is type(want)
                assert torch.equal(_tensor(got), _tensor(want))
                if kind != "uvit":
                    flat = denoiser(**inputs, return_dict=False)
                    assert type(flat) is tuple and len(flat) == 1 and torch.equal(flat[0], _tensor(want))


def test_another_form_is_looked_through_again() -> None:
    net = attached("dit")
    made = Denoiser(net)
    made(**batch(2, net.sample_name))
    inputs = batch(2, net.sample_name)
    with pytest.raises(RuntimeError, match="channels"):  # the model's own words
        made(**{**inputs, net.sample_name: inputs[net.sample_name][:, :2]})
    assert made(**batch(3, net.sample_name)).sample.shape[0] == 3


def _tensor(output: object) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found
