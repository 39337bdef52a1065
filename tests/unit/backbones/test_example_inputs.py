"""Example inputs for a user's model, from what the model declares."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from offramp.core.errors import InvalidInput


def made(name: str) -> tuple[object, nn.Module]:
    library = name.split("/")[0]
    pytest.importorskip(library)
    module = importlib.import_module(f"offramp.backbones.{library}")
    return module, next(f for f in module.families() if f.name == name).build().eval()


@pytest.mark.parametrize(
    "name", ["transformers/bert", "transformers/vit", "transformers/ast", "diffusers/unet2d_condition", "diffusers/dit"]
)
def test_keyword_inputs_run(name: str) -> None:
    module, model = made(name)
    inputs = module.example_inputs(model, rows=3)
    with torch.no_grad():
        output = model(**inputs)
    assert all(t.shape[0] == 3 for t in inputs.values())
    assert next(iter(output.values())).shape[0] == 3


def test_timm_images_have_the_size_the_model_was_made_with() -> None:
    module, model = made("timm/vit")
    (images,) = module.example_inputs(model, rows=3)
    assert images.shape == (3, 3, 32, 32) and model(images).shape == (3, 10)
    module, model = made("timm/mobilenetv3")
    assert module.example_inputs(model)[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize("library", ["timm", "transformers", "diffusers"])
def test_an_unknown_model_says_to_pass_an_example(library: str) -> None:
    module = importlib.import_module(f"offramp.backbones.{library}")
    with pytest.raises(InvalidInput, match="pass an example"):
        module.example_inputs(nn.Linear(2, 2))
