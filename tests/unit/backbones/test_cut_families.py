"""Every family: the cut model equals the uncut one bit for bit, at three batch sizes and several sequence lengths."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._pytree import tree_flatten

from offramp.backbones import cut, repeated_blocks
from offramp.exits import Evenly

FAMILIES = [
    *(
        f"timm/{n}"
        for n in [
            "vit",
            "beit",
            "eva",
            "cait",
            "hiera",
            "swin",
            "convnext",
            "resnet",
            "resnetv2",
            "densenet",
            "mambaout",
            "inception_next",
            "mobilenetv4",
            "starnet",
            "sknet",
            "fastvit",
            "resmlp",
        ]
    ),
    *(
        f"transformers/{n}"
        for n in [
            "bert",
            "roberta",
            "distilbert",
            "electra",
            "mpnet",
            "t5_encoder",
            "clip_text",
            "fnet",
            "vit",
            "dinov2",
            "clip_vision",
            "swin",
            "convnext",
            "resnet",
            "yolos",
            "ast",
            "wav2vec2",
            "whisper_encoder",
            "videomae",
        ]
    ),
    *(f"diffusers/{n}" for n in ["unet2d_scalar_timestep", "unet2d_condition", "dit", "pixart", "transformer2d"]),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_equals_uncut(name: str) -> None:
    library = name.split("/")[0]
    pytest.importorskip(library)
    module = importlib.import_module(f"offramp.backbones.{library}")
    family = next(f for f in module.families() if f.name == name)
    model = family.build().eval()
    args, kwargs = family.inputs(2, None)
    made = cut(model, Evenly(3).choose(repeated_blocks(model, args, kwargs)), args, kwargs)
    assert len(made.segments) >= 2
    for rows in (1, 3, 7):
        for length in (None, *family.lengths):
            inputs = family.inputs(rows, length)
            with torch.no_grad():
                want, want_spec = tree_flatten(model(*inputs.args, **inputs.kwargs))
                got, got_spec = tree_flatten(made(*inputs.args, **inputs.kwargs))
            assert got_spec == want_spec
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if library == "transformers" and family.lengths:
        assert made.spec.dynamic_length
