"""Where exits go by default: evenly by counted cost over the repeated blocks, outside branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.backbones import repeated_blocks
from offramp.core.errors import NotCuttable
from offramp.exits import Evenly


def build(name: str):
    import importlib

    library = name.split("/")[0]
    pytest.importorskip(library)
    family = next(f for f in importlib.import_module(f"offramp.backbones.{library}").families() if f.name == name)
    return family.build(), *family.inputs(2, None)


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("timm/vit", ["blocks.0", "blocks.1", "blocks.2"]),
        ("timm/swin", ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]),
        ("timm/eca_resnet", ["layer1.0", "layer2.0", "layer3.0"]),
        ("timm/cait", ["blocks.0", "blocks.1", "blocks.2"]),
        ("transformers/bert", [f"bert.encoder.layer.{i}" for i in range(3)]),
        ("transformers/dinov2", [f"dinov2.encoder.layer.{i}" for i in range(3)]),
        ("diffusers/dit", [f"transformer_blocks.{i}" for i in range(3)]),
    ],
)
def test_default_exits(name: str, exits: list[str]) -> None:
    model, args, kwargs = build(name)
    assert Evenly(3).choose(repeated_blocks(model, args, kwargs)) == exits


@pytest.mark.parametrize("name", ["timm/efficientnet", "diffusers/unet2d_scalar_timestep"])
def test_default_exits_are_near_the_quarters_of_the_cost(name: str) -> None:
    model, args, kwargs = build(name)
    blocks = repeated_blocks(model, args, kwargs)
    spent = {b.path: b.spent for b in blocks}
    assert [b.spent for b in blocks] == sorted(b.spent for b in blocks) and blocks[0].spent > 0 and blocks[-1].spent <= 1
    chosen = Evenly(3).choose(blocks)
    assert len(chosen) == 3
    assert all(abs(spent[path] - share) < 0.15 for path, share in zip(chosen, (0.25, 0.5, 0.75), strict=True))


def test_counted_cost_and_crossing_bytes() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)])
    blocks = repeated_blocks(model, (torch.randn(2, 8),))
    assert [(b.path, b.spent, b.crossing, b.hidden) for b in blocks] == [(str(i), (i + 1) / 4, 0, 32) for i in range(4)]


class Residual(nn.Module):
    """A block whose inner list lies in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = Residual(), Residual(), Residual()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block3(self.block2(self.block1(x))))


def test_no_exit_inside_a_residual_branch() -> None:
    in_list = nn.Sequential(Residual(), Residual(), Residual())
    assert [b.path for b in repeated_blocks(in_list, (torch.randn(2, 8),))] == ["0", "1", "2"]
    assert [b.path for b in repeated_blocks(Stages(), (torch.randn(2, 8),))] == ["block1", "block2", "block3"]


def test_plain_layers_are_taken_where_there_is_nothing_else() -> None:
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    found = repeated_blocks(nn.Sequential(*layers), (torch.randn(2, 4, 6, 6),))
    assert [b.path for b in found] == ["0", "2", "4", "6"]


def test_nothing_is_left_behind() -> None:
    model = Stages().train()
    model.block1.eval()
    modes = [m.training for m in model.modules()]
    repeated_blocks(model, (torch.randn(2, 8),))
    with pytest.raises(RuntimeError):
        repeated_blocks(model, (torch.randn(2, 9),))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_error_when_there_are_none() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x)

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.blocks[0](x))

    for model in (Single(), Looped()):
        with pytest.raises(NotCuttable, match="no repeated blocks") as caught:
            repeated_blocks(model, (torch.randn(2, 8),))
        assert caught.value.reason == "missing" and caught.value.suggestions
