"""What `offramp.fit` trained goes with the method: into calibration, onto disk and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from denoise_models import Toy

import offramp
from offramp import systems
from offramp.budget import MeanCost
from offramp.cli.image_nets import EulerFlow
from offramp.core.errors import BudgetInfeasible, FingerprintMismatch, OfframpWarning
from offramp.core.noise import FlowMatching
from offramp.engines.diffusion.model import DiffusionModel
from offramp.train import NoisePrediction, Noising, linear_betas, noisy_loader


def attached(name: str, toy: Toy, **arguments: Any) -> DiffusionModel:
    example = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500.0, 300.0]), "y": torch.tensor([1, 2])}
    return offramp.attach(toy, system=systems.build(name, **arguments), scheduler=EulerFlow(), noise=FlowMatching(), example=example)


def toy() -> Toy:
    torch.manual_seed(5)
    return Toy().eval()


def fitted(fast: DiffusionModel) -> None:
    noising = Noising(NoisePrediction(linear_betas()), "x", timestep="t", label="y")
    loader = noisy_loader(torch.randn(8, 6, 4), noising, 4, classes=torch.arange(8))
    offramp.fit(fast, loader, epochs=1, max_steps=2, progress=False)


def given() -> dict[str, Any]:
    return {"noise": torch.randn(8, 6, 4), "inputs": {"y": torch.arange(8)}, "steps": 8}


def test_depths_that_fit_did_not_train_are_not_planned_also_after_loading(tmp_path: Path) -> None:
    model = toy()
    fast = attached("shallow", model, share=0.5)
    with pytest.warns(OfframpWarning, match="shallow runs a model that was trained for it"):
        offramp.calibrate(fast, MeanCost(0.8), **given())
    fitted(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = offramp.calibrate(fast, MeanCost(0.95), **given())
    assert plan.points == fast.points
    with pytest.raises(BudgetInfeasible, match="trained by shallow for 2 of 4 blocks"):
        offramp.calibrate(fast, MeanCost(0.3), **given())
    with pytest.warns(OfframpWarning, match=r"weights of Toy were trained in place and are not in .*save them too"):
        fast.save(tmp_path)
    again = offramp.load(model, tmp_path, scheduler=EulerFlow(), noise=FlowMatching(), example=fast.net.example)
    assert again.trained == fast.trained and offramp.calibrate(again, MeanCost(0.95), **given()).points == fast.points
    with pytest.raises(FingerprintMismatch):
        offramp.load(toy(), tmp_path, scheduler=EulerFlow(), noise=FlowMatching(), example=fast.net.example)


def test_exits_beside_a_model_leave_it_alone_and_are_saved_without_a_warning(tmp_path: Path) -> None:
    fast = attached("deediff", toy())
    fitted(fast)
    kept = fast.trained
    assert kept is not None and not kept.in_place and kept.points is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.save(tmp_path)
