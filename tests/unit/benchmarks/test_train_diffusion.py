"""Denoisers trained in a trial: every stage, what is kept of it, and that it is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from offramp.engines.diffusion.denoise import Denoiser
from offramp.policies.denoising import OUTPUT, Point, Uncertainty
from offramp.policies.fills import HeadOutput

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def training(script: Callable[[str], ModuleType]) -> ModuleType:
    for needed in ("feature_net", "lm_common", "train_lm"):
        script(needed)
    return script("train_diffusion")


@pytest.fixture(scope="module")
def folder(training: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diffusion")
    training.main(["flow", "variants", "check", "--tiny", "--steps", "4", "--out", str(out), "--device", "cpu"])
    return out


def sheet(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())["stages"]
    return found


@pytest.mark.slow
def test_every_stage_is_trained_and_the_compared_ones_take_the_same_steps(training: ModuleType, folder: Path) -> None:
    found = sheet(folder)
    assert set(found) == {"flow", *training.VARIANTS}
    assert found["ee"]["steps"] == found["full"]["steps"] == found["uniform"]["steps"] == 4
    assert found["shallow"]["parameters"] < 0.6 * found["flow"]["parameters"]
    for name in ("flow", "ee", "full", "uniform", "deediff"):
        table = torch.tensor(found[name]["losses"]["loss"])
        assert table.shape == (10, 4) and bool(table.isfinite().all())
        assert found[name]["losses"]["flops"] == sorted(found[name]["losses"]["flops"])
    assert all((folder / f"{n}.png").is_file() for n in found if n != "deediff")


@pytest.mark.slow
def test_models_are_read_again_with_their_exits_and_plans(training: ModuleType, folder: Path) -> None:
    models = training.load_models(folder, ["flow", "deediff", "latte"])
    start, exits, groups = models["flow"], models["deediff"], models["latte"]
    same = start.model.state_dict()
    assert all(torch.equal(v, same[n]) for n, v in exits.model.state_dict().items()), "exits are trained on the frozen start"
    assert any(not torch.equal(v, same[n]) for n, v in groups.model.state_dict().items())
    assert start.plan() == exits.plan() == () and len(groups.plan()) == 2
    net = exits.attach()
    points = [Point(p, OUTPUT, HeadOutput(), Uncertainty(), -0.5) for p in net.at[1:-1]]
    inputs = training.example(exits.model)
    answer = Denoiser(net, points)(**inputs | {"timestep": torch.tensor([900.0, 100.0])})
    assert answer[0].shape == (2, 3, 8, 8)
    with pytest.raises(training.InvalidInput, match="no model 'unet'"):
        training.load_models(folder, ["unet"])


@pytest.mark.slow
def test_what_is_there_is_not_trained_again(training: ModuleType, folder: Path) -> None:
    before = (folder / "flow" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    training.main(["flow", "variants", "--tiny", "--steps", "4", "--out", str(folder), "--device", "cpu"])
    assert (folder / "flow" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert set(sheet(folder)) == {"flow", *training.VARIANTS}


def test_the_grid_has_a_class_in_every_column(training: ModuleType) -> None:
    images = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 3, 4, 5)
    made = training.grid(images)
    assert made.shape == (8, 50, 3) and made.dtype == "uint8"
    for k in range(20):
        tile = made[4 * (k // 10) : 4 * (k // 10) + 4, 5 * (k % 10) : 5 * (k % 10) + 5]
        assert bool((tile == round(255 * k / 19)).all())
