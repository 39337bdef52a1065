"""Calibrating diffusion methods: exact choices, what was realised on held-out samples, and plans that are refused elsewhere."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from denoise_models import Toy
from torch import Tensor

import offramp
from offramp import systems
from offramp.budget import DriftLimit, MeanCost, Quality, Risk, best_cache_plan
from offramp.cli.image_nets import EulerFlow, SmallDiT
from offramp.core.bundle import load_bundle, save_bundle
from offramp.core.errors import ArtifactError, BudgetInfeasible, FingerprintMismatch, InvalidInput, OfframpWarning
from offramp.core.noise import FlowMatching, LogSigma
from offramp.engines.diffusion.calibrate import DenoisingPlan, calibrate_denoiser
from offramp.engines.diffusion.losses import reuse_losses
from offramp.engines.diffusion.model import DiffusionModel, attach_diffusion, layout_of, training_levels
from offramp.engines.diffusion.pipeline import sample
from offramp.exits.denoising import DenoisingExit
from offramp.measure.image_quality import relative_l2
from offramp.train.denoising import add_heads

STEPS = 8


def model() -> Toy:
    torch.manual_seed(5)
    return Toy().eval()


def attached(name: str, toy: Toy | None = None, **arguments: Any) -> DiffusionModel:
    torch.manual_seed(6)
    example = {"x": torch.randn(2, 6, 4), "t": torch.tensor([500.0, 300.0]), "y": torch.tensor([1, 2])}
    system = systems.build(name, **arguments)
    made = attach_diffusion(toy or model(), system=system, scheduler=EulerFlow(), noise=FlowMatching(), example=example)
    if isinstance(system.head, DenoisingExit):
        add_heads(made.net, system.head, made.layout.blocks[:-1])
        with torch.no_grad():
            for parameter in made.net.heads.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def given(count: int = 16, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    noise, labels = torch.randn(count, 6, 4, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return {"noise": noise, "inputs": {"y": labels}, "steps": STEPS}


def images(fast: DiffusionModel, samples: dict[str, Any], plan: Any = None, points: Any = None) -> tuple[Tensor, Any]:
    denoiser = fast.run(plan.points if plan is not None else points)
    steps = STEPS if plan is None else plan.steps(STEPS)
    return sample(denoiser, EulerFlow(), samples["noise"], steps=steps, inputs=samples["inputs"]), denoiser.report


# ---- for a cost ------------------------------------------------------------------------------------------------------------


def test_a_schedule_meets_its_cost_and_is_the_best_of_all_by_the_table() -> None:
    fast = attached("static-schedule")
    plan = calibrate_denoiser(fast, MeanCost(0.7), **given(), bins=3)
    report = images(fast, given(4, seed=9), plan)[1]
    assert report.cost == pytest.approx(plan.cost.value) and report.cost <= 0.7
    assert len(report.depth.unique(dim=0)) == 1, "the same for every image"
    assert plan.certificate.requested == {"mean_cost": 0.7} and not plan.certificate.guaranteed
    cheaper = calibrate_denoiser(fast, MeanCost(0.5), **given(), bins=3)
    assert cheaper.cost.value <= 0.5 < plan.cost.value


def test_a_schedule_by_loss_on_data_is_another_than_by_drift() -> None:
    fast = attached("static-schedule")
    generator = torch.Generator().manual_seed(3)
    times = torch.linspace(1, 999, 64)
    x, y = torch.randn(64, 6, 4, generator=generator), torch.randint(0, 10, (64,), generator=generator)
    exits = fast.run(attached("shallow", share=0.25).points)
    labels = exits(x, times, y)  # data that the first block alone predicts best
    wanted = calibrate_denoiser(fast, MeanCost(0.95), **given(), bins=2, data=[{"x": x, "t": times, "y": y, "labels": labels}])
    assert images(fast, given(2), wanted)[1].depth.unique().tolist() == [2]
    assert "by loss on data" in wanted.certificate.method


def test_monotone_schedules_never_get_shallower_towards_the_image() -> None:
    fast = attached("static-schedule")
    for cost in (0.8, 0.65, 0.5):
        plan = calibrate_denoiser(fast, MeanCost(cost), **given(), bins=8, monotone=True)
        depth = images(fast, given(1), plan)[1].depth[0]
        assert (depth.diff() >= 0).all()


def test_cached_steps_are_the_best_by_the_losses_of_reuse() -> None:
    fast = attached("deepcache", interval=2)
    plan = calibrate_denoiser(fast, MeanCost(0.7), **given())
    chosen, found = images(fast, given(8, seed=4), plan)
    assert found.cost <= 0.7 and found.depth[0, 0] == found.depth[0, -1] == found.segments
    some = given()
    table = reuse_losses(
        fast.net, fast.points[0], EulerFlow(), some["noise"][:8], steps=STEPS, max_gap=STEPS - 1, inputs={"y": some["inputs"]["y"][:8]}
    )
    wanted = best_cache_plan(table.loss, table.flops_full, table.flops_reuse, 0.7 * table.flops_full)
    assert [d == found.segments for d in found.depth[0]] == [s in wanted.computed for s in range(STEPS)]
    assert not torch.equal(chosen, images(fast, given(8, seed=4), points=())[0])


@pytest.mark.parametrize(("name", "cost"), [("first-block-cache", 0.7), ("random-skip", 0.7), ("deediff", 0.8)])
def test_thresholds_are_found_by_running_and_checked_on_other_samples(name: str, cost: float) -> None:
    fast = attached(name)
    plan = calibrate_denoiser(fast, MeanCost(cost), **given(32), runs=16)
    assert plan.cost.value == pytest.approx(cost, abs=0.1)
    assert plan.certificate.items == 16, "half of them were held out"
    held = {"noise": given(32)["noise"][16:], "inputs": {"y": given(32)["inputs"]["y"][16:]}}
    assert images(fast, held, plan)[1].cost == pytest.approx(plan.cost.value)


def test_controls_meet_their_cost() -> None:
    few = calibrate_denoiser(attached("few-steps"), MeanCost(0.6), **given())
    assert few.points == () and few.steps(STEPS) == 4 and few.cost.value == pytest.approx(0.5)
    shallow = attached("shallow")
    plan = calibrate_denoiser(shallow, MeanCost(0.8), **given())
    assert set(images(shallow, given(2), plan)[1].depth.flatten().tolist()) == {4} and plan.cost.value <= 0.8


def test_both_guidance_branches_count_and_cost_is_of_samples() -> None:
    fast = attached("deepcache", interval=2)
    branch = {"unconditional": {"y": torch.zeros(16, dtype=torch.int64)}, "guidance": 2.0}
    plan = calibrate_denoiser(fast, MeanCost(0.7), **given(), **branch)
    assert plan.made_with["guidance"] == 2.0 and plan.certificate.items == 8 and plan.cost.value <= 0.7


def test_what_cannot_be_met_is_infeasible_and_says_what_can() -> None:
    for name, best in (("deepcache", 0.3), ("static-schedule", 0.1), ("shallow", 0.1), ("few-steps", 0.1)):
        with pytest.raises(BudgetInfeasible) as caught:
            calibrate_denoiser(attached(name), MeanCost(0.05), **given())
        assert caught.value.requested == 0.05 and caught.value.best > best


# ---- for a limit on drift --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first-block-cache", "static-schedule"])
def test_a_limit_on_drift_is_certified_on_held_out_samples(name: str) -> None:
    fast, other = attached(name), given(64, seed=8)
    limit = DriftLimit(0.5, above=0.8, delta=0.2)
    plan = calibrate_denoiser(fast, limit, **given(96))
    assert plan.certificate.guaranteed and plan.certificate.delta == 0.2 and plan.certificate.items == 48 and plan.cost.value < 1
    drift = relative_l2(images(fast, other, plan)[0], images(fast, other, points=())[0])
    assert float((drift > 0.8).float().mean()) <= 0.5
    with pytest.raises(BudgetInfeasible, match="no setting is certified"):
        calibrate_denoiser(fast, DriftLimit(1e-6), **given(12))


# ---- tokens and groups -----------------------------------------------------------------------------------------------------


def small(name: str, blocks: int = 4, **arguments: Any) -> DiffusionModel:
    """A method on a transformer over 16 tokens of an image."""
    torch.manual_seed(0)
    net = SmallDiT(2, 3, 8, depth=blocks, width=16, heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    example = {"sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([500.0, 100.0]), "class_labels": torch.tensor([0, 1])}
    system = systems.build(name, **arguments)
    return attach_diffusion(net.eval(), system=system, scheduler=EulerFlow(), noise=FlowMatching(), example=example)


def pictures(count: int = 12, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "noise": torch.randn(count, 2, 8, 8, generator=generator),
        "inputs": {"class_labels": torch.randint(0, 3, (count,), generator=generator)},
        "steps": STEPS,
    }


def spent(fast: DiffusionModel, plan: DenoisingPlan | None = None, regions: Any = None) -> float:
    denoiser = fast.run(regions=regions) if plan is None else fast.run(plan.points, regions=plan.regions)
    sample(denoiser, EulerFlow(), pictures(2)["noise"], steps=STEPS, inputs=pictures(2)["inputs"])
    return denoiser.report.cost


def test_a_share_of_the_tokens_is_the_largest_within_the_cost_and_is_what_runs(tmp_path: Path) -> None:
    fast = small("ras", ratio=0.9, first=2, resets=(5,), multiple=1)
    plan = calibrate_denoiser(fast, MeanCost(0.7), **pictures())
    regions = plan.regions
    assert regions is not None and plan.points == () and plan.certificate.items == 6
    assert plan.cost.value == pytest.approx(spent(fast, plan)) and plan.cost.value <= 0.7
    assert spent(fast, regions=dataclasses.replace(regions, ratio=regions.ratio + 1 / 16)) > 0.7, "one token more costs too much"
    assert regions == dataclasses.replace(fast.system.reduction, ratio=regions.ratio)
    plan.save(tmp_path)
    assert DenoisingPlan.load(tmp_path) == plan and f"{regions.ratio:.4g} of the tokens" in str(plan)
    some = pictures(3, seed=4)
    got = fast.sample(some["noise"], steps=STEPS, plan=plan, inputs=some["inputs"])
    compiled = offramp.compile(fast, plan)
    assert torch.equal(got, sample(compiled, EulerFlow(), some["noise"], steps=STEPS, inputs=some["inputs"]))
    assert compiled.report.cost == pytest.approx(plan.cost.value)
    assert not torch.equal(got, fast.sample(some["noise"], steps=STEPS, inputs=some["inputs"])), "the published settings are others"
    with pytest.raises(BudgetInfeasible, match="fewest of 16 tokens") as caught:
        calibrate_denoiser(fast, MeanCost(0.3), **pictures())
    assert caught.value.best > 0.3
    with pytest.raises(InvalidInput, match="a plan of tokens is for a method that computes some"):
        attached("deepcache").run(plan.points, regions=regions)


def test_tokens_are_calibrated_for_drift_and_for_quality_too() -> None:
    fast = small("ras", first=1, resets=(), multiple=1)
    plan = calibrate_denoiser(fast, DriftLimit(0.3, above=0.9, delta=0.2), **pictures(64))
    assert plan.certificate.guaranteed and plan.regions is not None and plan.cost.value < 1
    full = fast.run(regions=dataclasses.replace(plan.regions, ratio=1.0))
    real = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OfframpWarning)
        found = calibrate_denoiser(fast, Quality(0.02, lambda x: x.mean((2, 3)), real, 16), **pictures(32), runs=4, progress=False)
        exact = calibrate_denoiser(fast, Quality(0.0, lambda x: x.mean((2, 3)), _own(full), 16), **pictures(32), runs=3, progress=False)
    assert found.regions is not None and found.cost.value < 1 and found.certificate.realised["fid_increase"].value <= 0.02
    assert exact.regions is not None and exact.regions.ratio == 1 and exact.cost.value == spent(fast, exact) == 1


def _own(denoiser: Any) -> Tensor:
    """Features of the images that `pictures(32)` are chosen by, as a denoiser makes them."""
    some = pictures(32)
    return sample(
        denoiser, EulerFlow(), some["noise"][:16], steps=STEPS, inputs={"class_labels": some["inputs"]["class_labels"][:16]}
    ).mean((2, 3))


def test_groups_of_layers_keep_those_they_were_trained_with() -> None:
    fast = small("latte-flow", groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = calibrate_denoiser(fast, MeanCost(0.7), **pictures())
    assert plan.points == fast.points and plan.cost.value == pytest.approx(spent(fast)) and plan.cost.value <= 0.7
    finer = small("latte-flow", groups=4)
    cheapest = spent(finer)
    with pytest.raises(BudgetInfeasible, match=r"groups=2 runs one group of 2 blocks .* groups=4 costs .* build it with that") as caught:
        calibrate_denoiser(fast, MeanCost((cheapest + plan.cost.value) / 2), **pictures())
    assert caught.value.best == pytest.approx(plan.cost.value)
    with pytest.raises(BudgetInfeasible, match=f"Even groups=4, of one block each, costs {cheapest:.4g}: raise the cost"):
        calibrate_denoiser(fast, MeanCost(0.9 * cheapest), **pictures())
    with pytest.warns(OfframpWarning, match=f"groups=2 would cost {plan.cost.value:.4g}, still within 0.7"):
        assert calibrate_denoiser(finer, MeanCost(0.7), **pictures()).cost.value == pytest.approx(cheapest)
    for target in (DriftLimit(0.3), Quality(0.1, lambda x: x.mean((2, 3)), torch.randn(50, 2), 16)):
        with pytest.raises(InvalidInput, match=r"no model to stay near to\. Calibrate it for MeanCost"):
            calibrate_denoiser(fast, target, **pictures())


# ---- plans -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> tuple[DiffusionModel, DenoisingPlan]:
    fast = attached("first-block-cache", change=0.3)
    return fast, calibrate_denoiser(fast, MeanCost(0.8), **given())


def test_a_plan_comes_back_from_disk_and_runs_the_same(planned: Any, tmp_path: Path) -> None:
    fast, plan = planned
    plan.save(tmp_path)
    again = DenoisingPlan.load(tmp_path)
    assert again == plan
    assert torch.equal(images(fast, given(3), again)[0], images(fast, given(3), plan)[0])
    assert "requested" in str(again) and plan.system in str(again)


def test_a_plan_from_before_tokens_were_kept_in_it_is_read(planned: Any, tmp_path: Path) -> None:
    planned[1].save(tmp_path)
    content, _ = load_bundle(tmp_path, "denoising_plan", "denoising_plan")
    save_bundle(tmp_path, "denoising_plan", "denoising_plan", {k: v for k, v in content.items() if k not in ("regions", "tried")})
    assert DenoisingPlan.load(tmp_path) == planned[1]


def test_a_plan_is_refused_for_another_model_and_warns_for_another_sampler(planned: Any) -> None:
    fast, plan = planned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.check(fast)
    other = model()
    with torch.no_grad():
        other.outlet.bias.add_(1)
    with pytest.raises(FingerprintMismatch, match="Calibrate again"):
        plan.check(attached("first-block-cache", other))
    with pytest.raises(FingerprintMismatch, match="float64"):
        plan.check(attached("first-block-cache", model().double()))

    class Heun(EulerFlow):
        pass

    elsewhere = DiffusionModel(fast.system, fast.net, fast.layout, None, Heun())
    with pytest.warns(OfframpWarning, match="EulerFlow and runs with Heun"):
        plan.check(elsewhere)


def test_an_altered_plan_is_refused(planned: Any, tmp_path: Path) -> None:
    planned[1].save(tmp_path)
    file = tmp_path / "denoising_plan.json"
    data = json.loads(file.read_text())
    data["content"]["points"][0]["args"]["threshold"] = 0.0
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="altered"):
        DenoisingPlan.load(tmp_path)


# ---- bad input -------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    fast = attached("first-block-cache")
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (Risk(max_drop=0.1), given(), "MeanCost"),
        (MeanCost(0.5), {"steps": 4}, "also takes y"),
        (MeanCost(0.5), {"calls": [{}]}, "of a pipeline"),
        (MeanCost(0.5), {**given(), "held_out": 1.0}, "held_out"),
        (MeanCost(0.5), given(1), "cannot be divided"),
        (MeanCost(0.5), {**given(), "inputs": {"y": torch.tensor([1, 2, 3])}}, r"inputs\['y'\] is \(3,\) for 16 samples"),
    ]
    for target, options, words in bad:
        with pytest.raises(InvalidInput, match=words):
            calibrate_denoiser(fast, target, **options)
    lone = DiffusionModel(fast.system, fast.net, fast.layout)
    with pytest.raises(InvalidInput, match="needs a scheduler"):
        calibrate_denoiser(lone, MeanCost(0.5), **given())


def test_levels_of_training_and_places() -> None:
    levels = training_levels(FlowMatching())
    assert len(levels) == 1000 and levels[0] > 0 > levels[-1] and sorted(levels, reverse=True) == list(levels)
    with pytest.raises(InvalidInput, match="LogSigma does not say"):
        training_levels(LogSigma())
    layout = layout_of(model(), {"x": torch.randn(2, 6, 4), "t": torch.ones(2), "y": torch.tensor([1, 2])}, FlowMatching())
    assert layout.blocks == tuple(f"blocks.{k}" for k in range(4)) and layout.inlet is None and layout.deep == ()
    assert layout.edges(2)[0] == pytest.approx(0.0, abs=0.01), "half of the time of a flow is where noise and image weigh the same"
    with pytest.raises(InvalidInput, match="neither repeated blocks nor"):
        layout_of(torch.nn.Linear(4, 4), {"input": torch.randn(2, 4)}, FlowMatching())
