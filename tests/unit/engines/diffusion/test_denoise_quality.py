"""Plans for a limit on FID: what they promise against figures computed anew, and targets, features and images that do not fit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from denoise_models import Toy, autoencoder, dit
from torch import Tensor, nn

import offramp
from offramp import systems
from offramp.budget import Quality
from offramp.cli.image_nets import EulerFlow
from offramp.core.errors import InvalidInput, NoEffectWarning, OfframpWarning
from offramp.core.noise import FlowMatching
from offramp.engines.diffusion.calibrate import calibrate_denoiser
from offramp.engines.diffusion.model import DiffusionModel, attach_diffusion
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.plan import DenoisingPlan
from offramp.exits.denoising import DenoisingExit
from offramp.measure.image_quality import FeatureStatistics, fid
from offramp.train.denoising import add_heads

STEPS, COUNT, WIDTH = 6, 24, 3


def features(images: Tensor) -> Tensor:
    """``[B, 3]`` of Toy's samples ``[B, 6, 4]``."""
    return torch.stack([images.flatten(1).mean(1), images.flatten(1).std(1), images[:, 0, 0]], 1)


def attached(name: str, **arguments: Any) -> DiffusionModel:
    torch.manual_seed(5)
    model = Toy().eval()
    torch.manual_seed(6)
    example = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500.0, 300.0]), "y": torch.tensor([1, 2])}
    system = systems.build(name, **arguments)
    made = attach_diffusion(model, system=system, scheduler=EulerFlow(), noise=FlowMatching(), example=example)
    if isinstance(system.head, DenoisingExit):
        add_heads(made.net, system.head, made.layout.blocks[:-1])
        with torch.no_grad():
            for parameter in made.net.heads.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def real() -> Tensor:
    """Features of what the full model makes of other noise, so that what departs from it is further away."""
    torch.manual_seed(5)
    toy, generator = Toy().eval(), torch.Generator().manual_seed(7)
    noise, labels = torch.randn(200, 6, 4, generator=generator), torch.randint(0, 10, (200,), generator=generator)
    return features(sample(toy, EulerFlow(), noise, steps=STEPS, inputs={"y": labels}))


REAL = real()


def given(count: int = 2 * COUNT) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(count, 6, 4, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return {"noise": noise, "inputs": {"y": labels}, "steps": STEPS, "batch_size": 10, "progress": False}


def made_by(fast: DiffusionModel, rows: slice, plan: DenoisingPlan | None = None) -> tuple[Tensor, float]:
    """Images of some rows of `given` and their mean cost, by the sampler alone and in one batch."""
    denoiser = fast.run(()) if plan is None else fast.run(plan.points)
    steps = STEPS if plan is None else plan.steps(STEPS)
    got = sample(denoiser, EulerFlow(), given()["noise"][rows], steps=steps, inputs={"y": given()["inputs"]["y"][rows]})
    return got, denoiser.report.cost * steps / STEPS


def increase(fast: DiffusionModel, plan: DenoisingPlan, rows: slice, reference: Tensor = REAL) -> float:
    to = FeatureStatistics.of(reference)
    return fid(FeatureStatistics.of(features(made_by(fast, rows, plan)[0])), to) - fid(
        FeatureStatistics.of(features(made_by(fast, rows)[0])), to
    )


def near(images: Tensor, known: Tensor) -> Tensor:
    """``[B, 1]``, whether an image is one of some, up to what batches of another size do to it."""
    return (images.flatten(1)[:, None] - known.flatten(1)).abs().amax(2).amin(1, keepdim=True) < 1e-3


CHOSEN, HELD = slice(0, COUNT), slice(COUNT, 2 * COUNT)
METHODS = ["first-block-cache", "random-skip", "deepcache", "static-schedule", "shallow", "few-steps"]

# ---- what is promised ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
@pytest.mark.parametrize("name", METHODS)
def test_the_increase_is_within_the_limit_and_the_plan_the_cheapest_that_was_run(name: str) -> None:
    fast = attached(name)
    loosest = calibrate_denoiser(fast, Quality(1e9, features, REAL, COUNT), **given(), runs=2)
    assert len(loosest.tried) == 2 and loosest.cost.value < 1, "the loosest setting is within such a limit, and nothing else is run"
    most = loosest.certificate.realised["fid_increase"].value
    limit = 0.4 * most
    plan = calibrate_denoiser(fast, Quality(limit, features, REAL, COUNT), **given(), runs=7)
    realised = plan.certificate.realised
    found = increase(fast, plan, CHOSEN)
    assert found == pytest.approx(realised["fid_increase"].value, abs=1e-5) and found <= limit + 1e-5
    assert realised["fid_increase"].low <= found <= realised["fid_increase"].high
    assert increase(fast, plan, HELD) == pytest.approx(realised["fid_increase_held_out"].value, abs=1e-5)
    assert made_by(fast, HELD, plan)[1] == pytest.approx(plan.cost.value) and plan.cost == realised["mean_cost"]
    full = plan.tried[0]
    assert full.cost == 1 and full.setting == "the full model"
    assert full.fid == pytest.approx(fid(FeatureStatistics.of(features(made_by(fast, CHOSEN)[0])), FeatureStatistics.of(REAL)), abs=1e-5)
    within = [t for t in plan.tried if t.fid - full.fid <= limit]
    assert made_by(fast, CHOSEN, plan)[1] == pytest.approx(min(t.cost for t in within)) and len(within) < len(plan.tried)
    assert len({t.setting for t in plan.tried}) == len(plan.tried) <= 8, "no setting is run twice"


def test_the_certificate_is_an_estimate_and_says_what_it_rests_on(tmp_path: Path) -> None:
    fast = attached("deepcache", interval=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = calibrate_denoiser(fast, Quality(0.3, features, FeatureStatistics.of(REAL), COUNT), **given())
    promised = plan.certificate
    assert not promised.guaranteed and promised.delta is None and promised.items == COUNT and promised.requested == {"fid_increase": 0.3}
    chosen = next(t for t in plan.tried if t.setting in promised.method)
    for words in ("estimate", f"{plan.tried[0].fid:.5g}", f"{chosen.fid:.5g}", f"from {COUNT} images each", "chance"):
        assert words in promised.statement
    assert "1/N" in promised.assumptions and "held-out" in promised.assumptions and str(plan.tried[0].fid)[:5] in str(plan)
    plan.save(tmp_path)
    assert DenoisingPlan.load(tmp_path) == plan
    whole, *settings = plan.results()
    assert (whole.name, whole.flops, whole.mean_fid) == ("full model", 1.0, plan.tried[0].fid)
    assert [(s.name, s.setting, s.flops, s.fid) for s in settings] == [("deepcache", t.setting, t.cost, (t.fid,)) for t in plan.tried[1:]]
    page = offramp.report(tmp_path / "images.html", plan=plan, features="three numbers").read_text()
    assert "deepcache" in page and "three numbers" in page
    with pytest.raises(InvalidInput, match="no FID is known"):
        offramp.report(tmp_path / "images.html", plan=replace(plan, tried=()))


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
def test_learned_exits_that_cost_more_than_they_save_are_not_chosen() -> None:
    fast = attached("deediff")  # its heads are not trained: what leaves is far off, and hardly anything leaves where the limit is met
    loosest = calibrate_denoiser(fast, Quality(1e9, features, REAL, COUNT), **given(), runs=2)
    assert increase(fast, loosest, CHOSEN) == pytest.approx(loosest.certificate.realised["fid_increase"].value, abs=1e-5)
    assert loosest.cost.value == pytest.approx(made_by(fast, HELD, loosest)[1]) and loosest.cost.value < 0.5
    plan = calibrate_denoiser(fast, Quality(0.1, features, REAL, COUNT), **given(), runs=8)
    assert plan.tried[0].cost > 1 and plan.cost.value == 1 and plan.points == ()


def test_nothing_skipped_is_an_increase_of_exactly_zero() -> None:
    fast = attached("first-block-cache", change=0.0)
    to = FeatureStatistics.of(REAL)
    never = sample(fast.run(), EulerFlow(), given()["noise"], steps=STEPS, inputs=given()["inputs"])
    full = sample(fast.run(()), EulerFlow(), given()["noise"], steps=STEPS, inputs=given()["inputs"])
    assert fid(FeatureStatistics.of(features(never)), to) - fid(FeatureStatistics.of(features(full)), to) == 0.0


@pytest.mark.parametrize("name", ["first-block-cache", "static-schedule", "few-steps"])
def test_a_limit_that_nothing_cheaper_meets_gives_the_full_model_and_warns(name: str) -> None:
    fast = attached(name)
    own = features(made_by(fast, CHOSEN)[0])  # no other images are as near to these
    with pytest.warns(NoEffectWarning, match=r"skips nothing. The nearest was .* a FID higher by .*\. Raise max_fid_increase"):
        plan = calibrate_denoiser(fast, Quality(0.0, features, own, COUNT), **given(), runs=5)
    assert plan.points == () and plan.share == 1 and plan.cost.value == 1 and len(plan.tried) > 2
    assert plan.certificate.realised["fid_increase"].value == 0 and "fid_increase_held_out" not in plan.certificate.realised
    assert torch.equal(made_by(fast, CHOSEN, plan)[0], made_by(fast, CHOSEN)[0])


def test_it_is_said_when_so_few_images_cannot_show_the_difference() -> None:
    fast = attached("deepcache", interval=2)
    with pytest.warns(OfframpWarning, match="24 images a FID increase of 1e-07 cannot be told from chance"):
        calibrate_denoiser(fast, Quality(1e-7, features, REAL, COUNT), **given(), runs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_denoiser(fast, Quality(1e6, features, REAL, COUNT), **given(), runs=3)


def test_settings_whose_images_break_are_never_chosen(tmp_path: Path) -> None:
    fast = attached("deepcache", interval=2)
    whole = torch.cat([made_by(fast, CHOSEN)[0], made_by(fast, HELD)[0]])

    def strict(images: Tensor) -> Tensor:
        return torch.where(near(images, whole), features(images), torch.nan)

    with pytest.warns(NoEffectWarning, match="skips nothing. Raise"):
        plan = calibrate_denoiser(fast, Quality(1e6, strict, REAL, COUNT), **given(), runs=3)
    assert plan.points == () and plan.tried[-1].fid == float("inf")
    assert [r.name for r in plan.results()] == ["full model"], "what is not finite is no result"
    plan.save(tmp_path)
    assert DenoisingPlan.load(tmp_path) == plan, "JSON has no infinity"
    with pytest.raises(InvalidInput, match="full model's images are NaN or infinite in 24 of 24"):
        calibrate_denoiser(fast, Quality(1.0, lambda x: features(x) * torch.nan, REAL, COUNT), **given())


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
def test_a_setting_that_breaks_images_only_where_they_are_held_out_is_passed_over() -> None:
    fast = attached("few-steps")
    first = calibrate_denoiser(fast, Quality(1.0, features, REAL, COUNT), **given())
    broken = made_by(fast, HELD, first)[0]
    target = Quality(1.0, lambda images: torch.where(near(images, broken), torch.nan, features(images)), REAL, COUNT)
    plan = calibrate_denoiser(fast, target, **given())
    within = [t.cost for t in plan.tried if t.fid - plan.tried[0].fid <= 1.0]
    assert len(within) > 2 and (plan.cost.value, first.cost.value) == pytest.approx((within[-2], within[-1]))
    assert plan.certificate.realised["fid_increase"].value == pytest.approx(increase(fast, plan, CHOSEN), abs=1e-5)


class Net(nn.Module):
    """Features that differ in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(24, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.drop(images.flatten(1)))


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
def test_a_feature_network_runs_in_evaluation_mode_without_gradients_and_keeps_its_own() -> None:
    torch.manual_seed(0)
    net, fast = Net().train(), attached("few-steps")
    first, second = (calibrate_denoiser(fast, Quality(0.5, net, REAL, COUNT), **given(), runs=3) for _ in range(2))
    assert first == second and net.training and net.drop.training


# ---- a pipeline ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::offramp.core.errors.OfframpWarning")
def test_calls_of_a_pipeline_are_gone_through_until_there_are_images_enough() -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(dit(), autoencoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    fast = offramp.attach(pipe, system=systems.build("deepcache", interval=2))
    seen: list[Tensor] = []

    def colours(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean((2, 3))

    calls = [{"class_labels": [1, 2, 3, 4], "num_inference_steps": 3}, {"class_labels": [5], "num_inference_steps": 3}]
    target = Quality(1e6, colours, torch.rand(30, 3, generator=torch.Generator().manual_seed(0)), samples=11)
    plan = offramp.calibrate(fast, target=target, calls=calls, runs=2, progress=False)
    assert [len(i) for i in seen] == 4 * [4, 1, 4, 1, 1], "the full model and the loosest setting, both again on held-out noise"
    assert all(i.shape[1:] == (3, 8, 8) and float(i.min()) >= 0 and float(i.max()) <= 1 for i in seen)
    chosen, held = torch.cat(seen[:5]), torch.cat(seen[15:])
    every = torch.cat([chosen, held]).flatten(1)
    assert float(torch.cdist(every, every).fill_diagonal_(1).min()) > 1e-3, "no noise is used twice"
    assert plan.certificate.items == 11 and isinstance(offramp.compile(fast, plan), DiTPipeline)


# ---- bad input -------------------------------------------------------------------------------------------------------------


def test_targets_that_do_not_fit_are_named() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"max_fid_increase": -0.5}, "a finite number >= 0; got -0.5"),
        ({"max_fid_increase": float("nan")}, "a finite number >= 0"),
        ({"features": "inception"}, "a function from images .* got str"),
        ({"samples": 3}, "more than 3 images on each side, .* got samples=3 and 200 real images. Give more"),
        ({"samples": 9}, "10 at least"),
        ({"reference": REAL[:3]}, "got samples=24 and 3 real images"),
        ({"reference": REAL[None]}, r"features \[M, D\] of real images.* got torch.float32 \(1, 200, 3\)"),
        ({"reference": REAL.long()}, "torch.int64"),
        ({"reference": REAL / 0}, "with NaN or infinity"),
        ({"reference": [1.0]}, "got list"),
        ({"level": 1.0}, "level must lie inside"),
    ]
    for change, words in bad:
        arguments: dict[str, Any] = {"max_fid_increase": 0.1, "features": features, "reference": REAL, "samples": COUNT}
        with pytest.raises(InvalidInput, match=words):
            Quality(**{**arguments, **change})


def test_features_and_noise_that_do_not_fit_are_named() -> None:
    fast = attached("few-steps")
    target = Quality(0.1, features, REAL, COUNT)
    bad: list[tuple[Quality, dict[str, Any], str]] = [
        (Quality(0.1, lambda x: x, REAL, COUNT), given(), r"gave torch.float32 \(10, 6, 4\) for images \(10, 6, 4\); .*\[10, 3\]"),
        (Quality(0.1, lambda x: features(x)[:, :2], REAL, COUNT), given(), r"expected floating-point features \[10, 3\]"),
        (Quality(0.1, lambda x: features(x)[:1], REAL, COUNT), given(), r"gave torch.float32 \(1, 3\)"),
        (Quality(0.1, lambda x: None, REAL, COUNT), given(), "gave NoneType"),  # type: ignore[arg-type, return-value]
        (target, given(2 * COUNT - 1), "needs 48 rows of noise and inputs, 24 to choose by and 24 held out; got 47"),
        (target, {**given(), "inputs": {"y": torch.tensor([1, 2])}}, r"inputs\['y'\] is \(2,\) for 48 samples"),
        (target, {**given(), "runs": 1}, "runs must be at least 2"),
    ]
    for wanted, options, words in bad:
        with pytest.raises(InvalidInput, match=words):
            calibrate_denoiser(fast, wanted, **options)
