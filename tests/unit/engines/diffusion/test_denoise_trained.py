"""Calibration after training: what was trained is kept, other depths are refused by name, and exits that are not trained are noticed."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from denoise_models import Toy

from offramp import systems
from offramp.budget import DriftLimit, MeanCost, Quality
from offramp.cli.image_nets import EulerFlow
from offramp.core.errors import BudgetInfeasible, InvalidInput, OfframpWarning
from offramp.core.noise import FlowMatching
from offramp.engines.diffusion.calibrate import calibrate_denoiser
from offramp.engines.diffusion.model import DiffusionModel, attach_diffusion
from offramp.engines.diffusion.trained import Trained, note_trained, warn_untrained
from offramp.train.denoising import add_heads

STEPS = 8


def attached(name: str, **arguments: Any) -> DiffusionModel:
    torch.manual_seed(5)
    example = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500.0, 300.0]), "y": torch.tensor([1, 2])}
    system = systems.build(name, **arguments)
    return attach_diffusion(Toy().eval(), system=system, scheduler=EulerFlow(), noise=FlowMatching(), example=example)


def given(count: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(count, 6, 4, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return {"noise": noise, "inputs": {"y": labels}, "steps": STEPS}


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("shallow", {"share": 0.5}, "2 of 4 blocks"),
        ("ee-diffusion", {"depths": (4, 3, 2, 1), "of": 4}, "1, 2, 3 of 4 blocks by noise level, or all"),
    ],
)
def test_a_model_trained_under_a_plan_keeps_it_or_is_refused(name: str, arguments: dict[str, Any], words: str) -> None:
    fast = attached(name, **arguments)
    note_trained(fast, fast.points, in_place=True)
    plan = calibrate_denoiser(fast, MeanCost(0.95), **given())
    assert plan.points == fast.points and plan.cost.value < 0.95 and f"{words}, as it was trained" in plan.certificate.method
    with pytest.raises(BudgetInfeasible, match=f"trained by {name} for {words}, which costs .* other depths were not trained") as caught:
        calibrate_denoiser(fast, MeanCost(0.3), **given())
    assert caught.value.best == pytest.approx(plan.cost.value)
    for target in (DriftLimit(0.3), Quality(0.1, lambda x: x.mean(2), torch.randn(50, 6), 16)):
        with pytest.raises(InvalidInput, match=r"trained for its depths, .* no model to stay near to\. Calibrate it for MeanCost"):
            calibrate_denoiser(fast, target, **given())


def test_where_nothing_or_every_exit_was_trained_all_depths_may_be_chosen() -> None:
    shallow, schedule = attached("shallow", share=0.5), attached("static-schedule")
    deep = calibrate_denoiser(shallow, MeanCost(0.8), **given()).points
    assert shallow.trained is None and deep[0].at == "blocks.2"
    before = calibrate_denoiser(schedule, MeanCost(0.7), **given(), bins=3)
    note_trained(schedule, None, in_place=True)
    assert calibrate_denoiser(schedule, MeanCost(0.7), **given(), bins=3) == before


def test_what_was_trained_is_kept_as_data_and_weights_once_trained_in_place_stay_so() -> None:
    fast = attached("shallow", share=0.5)
    note_trained(fast, fast.points, in_place=True)
    note_trained(fast, None, in_place=False)
    assert fast.trained == Trained(None, True)
    note_trained(fast, fast.points, in_place=False)
    kept = fast.trained
    assert kept is not None and Trained.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


def test_a_method_that_needs_training_says_so_by_name_until_it_has_some() -> None:
    fast = attached("shallow", share=0.5)
    with pytest.warns(OfframpWarning, match=r"shallow runs a model that was trained for it, .* Call offramp\.fit"):
        warn_untrained(fast)
    note_trained(fast, fast.points, in_place=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untrained(fast)
        warn_untrained(attached("deepcache"))


def test_exits_that_all_say_the_same_are_not_trained_and_that_is_said() -> None:
    fast = attached("deediff")
    add_heads(fast.net, fast.system.head, fast.layout.blocks[:-1])
    with pytest.warns(OfframpWarning, match=r"All exits of deediff say the same uncertainty, 0\.5.*Call offramp\.fit"):
        calibrate_denoiser(fast, MeanCost(0.6), **given(), runs=3)
