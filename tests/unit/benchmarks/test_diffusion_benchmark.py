"""The diffusion benchmark: what is chosen, what is compared, what is captured, and what a page shows."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.engines.diffusion.run import Eager
from offramp.measure.image_report import ImageResult
from offramp.policies.denoising import Every, Point, StateChange
from offramp.policies.fills import CachedResidual
from offramp.reduce.regions import AtLevels, Regions

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "results.md"


@pytest.fixture(scope="module")
def ways(script: Callable[[str], ModuleType]) -> ModuleType:
    for needed in ("feature_net", "lm_common", "train_lm", "train_diffusion"):
        script(needed)
    return script("diffusion_ways")


@pytest.fixture(scope="module")
def plans(script: Callable[[str], ModuleType], ways: ModuleType) -> ModuleType:
    return script("diffusion_plans")


@pytest.fixture(scope="module")
def bench(script: Callable[[str], ModuleType], plans: ModuleType) -> ModuleType:
    script("diffusion_text")
    script("diffusion_sheet")
    return script("diffusion")


@pytest.fixture(scope="module")
def model(ways: ModuleType, script: Callable[[str], ModuleType]) -> Any:
    """A small flow transformer that was not trained, and other weights of it."""
    training = script("train_diffusion")
    found = {}
    for seed, name in enumerate(("flow", "ee")):
        settings = type("Settings", (), {"seed": seed, "heads": 2, "width": 16})()
        made = training.transformer(settings, 8, 10, 4)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in made.parameters():
                if p.ndim > 1:
                    p.copy_(0.1 * torch.randn(p.shape, generator=g))
        found[name] = training.Trained(name, made.eval(), "flow", {}, Path())
    return ways.Model(found, 1.5, 6)


# ---- ways ----------------------------------------------------------------------------------------------------------------


def test_a_way_is_read_again_from_a_result(ways: ModuleType) -> None:
    point = Point("a", "b", CachedResidual(), StateChange(), -0.1)
    regions = Regions(0.4, first=2, resets=AtLevels((-1.0, 2.0)))
    for way in (
        ways.Way("x", "y", "flow", 9, (point,), "dpm++", ours=True, about={"drift": 0.5}),
        ways.Way("r", "", "flow", 9, regions=regions),
    ):
        assert ways.Way.from_dict(json.loads(json.dumps(way.to_dict()))) == way
    assert ways.Way("x", "", "flow", 9, (point,)).by_sample and not ways.Way("x", "", "flow", 9).by_sample
    assert not ways.Way("r", "", "flow", 9, regions=regions).plain


def test_samplers_are_compared_at_equal_evaluations(ways: ModuleType) -> None:
    assert [ways.steps_for(s, 0.5, 50) for s in ways.SAMPLERS] == [25, 25, 13]
    assert [ways.evaluations(s, ways.steps_for(s, 0.5, 50)) for s in ways.SAMPLERS] == [25, 25, 25]
    assert ways.steps_for("own", 0.01, 50) == 1


@pytest.mark.parametrize("kind", ["flow", "noise"])
@pytest.mark.parametrize("name", ["own", "dpm++", "heun"])
def test_a_sampler_ends_at_the_image_that_a_perfect_model_predicts(ways: ModuleType, kind: str, name: str) -> None:
    image, noise = torch.full((2, 3, 4, 4), 0.5), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    used = ways.scheduler(kind, name)
    used.set_timesteps(6)
    current = noise * used.init_noise_sigma if hasattr(used, "init_noise_sigma") else noise
    calls = 0
    for t in used.timesteps:
        seen = used.scale_model_input(current, t) if hasattr(used, "scale_model_input") else current
        if kind == "flow":
            share = float(t) / 1000
            answer = (seen - image) / max(share, 1e-3)
        else:
            alphas = ways.scheduler("noise").alphas_cumprod
            level = alphas[min(int(t), 999)]
            answer = (seen - level.sqrt() * image) / (1 - level).sqrt()
        current = used.step(answer, t, current)[0]
        calls += 1
    assert calls == ways.evaluations(name, 6)
    torch.testing.assert_close(current, image, atol=0.05, rtol=0)


# ---- running -------------------------------------------------------------------------------------------------------------


def test_noise_of_a_row_does_not_depend_on_how_many_there_are(model: Any) -> None:
    few, many = model.noise(3, 5), model.noise(250, 5)
    assert torch.equal(few[0], many[0][:3]) and torch.equal(few[1], many[1][:3])
    assert not torch.equal(model.noise(3, 6)[0], few[0])


def test_block_by_block_is_what_eager_segments_make_and_rows_are_counted(ways: ModuleType, model: Any) -> None:
    blocks = model.layout.blocks
    way = ways.Way("cache", "", "flow", 6, (Point(blocks[0], blocks[2], CachedResidual(), Every(2)),))
    noise, labels = model.noise(3, 1)
    plain = model.draw(model.denoiser(way), way, noise, labels)
    runner = ways.ByBlock(torch.device("cpu"), False, [2, 4, 6])
    denoiser = model.denoiser(way, runner)
    made = model.draw(denoiser, way, noise, labels)
    torch.testing.assert_close(made.images, plain.images, rtol=0, atol=1e-6)
    # Six rows with both branches, six steps, every second of which skips the blocks 2 and 3.
    ran = [denoiser.report.ran[k] for k in range(6)]
    assert ran == [36, 36, 18, 18, 36, 36]
    flops = [s.flops for s in model.net.cut().spec.segments]
    counted = sum(f * r for f, r in zip(flops, ran, strict=True)) / (36 * sum(flops))
    assert made.cost == pytest.approx(counted) and model.share(made, model) == pytest.approx(counted)


@pytest.mark.parametrize("captured", [False, True])
def test_rules_by_sample_count_the_rows_that_ran(ways: ModuleType, model: Any, captured: bool) -> None:
    """In captured parts too, where rows may go on before it is known that they leave."""
    blocks = model.layout.blocks
    points = (Point(blocks[0], blocks[2], CachedResidual(), StateChange(), -0.2),)
    way = ways.Way("rule", "", "flow", 6, points)
    noise, labels = model.noise(3, 1)
    denoiser = model.denoiser(way, ways.ByBlock(torch.device("cpu"), False) if captured else Eager())
    made = model.draw(denoiser, way, noise, labels)
    flops = [s.flops for s in model.net.cut().spec.segments]
    assert made.cost == pytest.approx(
        sum(f * r for f, r in zip(flops, (denoiser.report.ran[k] for k in range(6)), strict=True)) / (36 * sum(flops))
    )


def test_weights_change_in_place_and_the_whole_model_follows(ways: ModuleType, model: Any) -> None:
    way = ways.Way("full model", "", "flow", 6)
    noise, labels = model.noise(2, 1)
    noted: list[dict[str, Any]] = []
    first = model.sample(ways.Called(model.denoiser(way), model.net, noted), way, noise, labels)
    whole = ways.Whole(model.net, noted[0])
    torch.testing.assert_close(model.sample(ways.Called(whole, model.net), way, noise, labels), first, rtol=0, atol=1e-6)
    model.wear("ee")
    try:
        other = model.sample(ways.Called(whole, model.net), way, noise, labels)
        assert not torch.allclose(other, first, atol=1e-3)
        torch.testing.assert_close(other, model.sample(ways.Called(model.denoiser(way), model.net), way, noise, labels), rtol=0, atol=1e-6)
    finally:
        model.wear("flow")
    with pytest.raises(InvalidInput, match="not of 'latte'"):
        model.wear("latte")


def test_ideal_time_is_each_segments_share_of_its_time(ways: ModuleType) -> None:
    assert ways.ideal_ms([40, 20, 0], 4, [1.0, 2.0, 8.0]) == pytest.approx(10 * 1 + 5 * 2)
    with pytest.raises(InvalidInput, match="rows and a time"):
        ways.ideal_ms([1, 2], 4, [1.0])


def test_segments_are_timed_one_by_one(ways: ModuleType, model: Any) -> None:
    way = ways.Way("full model", "", "flow", 1)
    noted: list[dict[str, Any]] = []
    model.sample(ways.Called(model.denoiser(way), model.net, noted), way, *model.noise(2, 1))
    segments = ways.Segments(model.net, ways.ByBlock(torch.device("cpu"), False), noted[0])
    segments()
    segments()
    assert [len(s) for s in segments.samples] == [2] * len(model.net.cut().segments)
    assert all(ms > 0 for ms in segments.median_ms())


# ---- choosing ------------------------------------------------------------------------------------------------------------


def test_even_steps_compute_first_and_last_and_keep_the_cost(plans: ModuleType) -> None:
    for cost in (0.9, 0.6, 0.3):
        reused = plans.even_steps(50, cost, 0.2)
        assert len(reused) == 50 and not reused[0] and not reused[-1]
        spent = sum(0.2 if r else 1.0 for r in reused) / 50
        assert cost - 0.8 / 50 < spent <= cost + 1e-9
    with pytest.raises(BudgetInfeasible, match="Two of 50 steps"):
        plans.even_steps(50, 0.22, 0.2)


def test_an_interval_in_a_bin_computes_its_first_step(plans: ModuleType) -> None:
    table = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0], [0.0, 8.0], [0.0, 16.0]])
    cost, loss = plans.interval_losses(table, [0, 0, 1, 1, 1], 2, 2, 0.25)
    assert cost.tolist() == [1.25, 2.25] and loss.tolist() == [2.0, 8.0]
    assert plans.interval_losses(table, [0, 0, 1, 1, 1], 2, 3, 0.25)[1].tolist() == [2.0, math.inf], "an age that was not measured"
    assert plans.reused_steps([0, 0, 1, 1, 1], [2, None]) == [False, True, False, False, False]
    assert plans.reused_steps([0, 0, 1, 1, 1], [None, 2]) == [False, False, False, True, False]


def test_the_composition_of_least_drift_is_the_chosen_one(ways: ModuleType, plans: ModuleType) -> None:
    tried = [
        ways.Way(name, "", "flow", 9, about={"cost": cost, "drift": drift, "spent": spent})
        for name, cost, drift, spent in (
            ("a", 0.5, 0.3, 0.5), ("a", 0.5, 0.2, 0.51), ("b", 0.5, 0.1, 0.4), ("b", 0.5, 0.01, 0.52), ("a", 0.75, 0.05, 0.7),
            ("b", 0.75, 0.06, 0.7),
        )
    ]  # fmt: skip
    found = plans.best_of(tried)
    assert [(w.name, w.about["cost"], w.about["drift"], w.about.get("chosen", False)) for w in found] == [
        ("a", 0.5, 0.2, False), ("b", 0.5, 0.1, True), ("a", 0.75, 0.05, True), ("b", 0.75, 0.06, False),
    ], "what executed more than was asked does not count"  # fmt: skip
    assert [(w.name, w.about["cost"]) for w in plans.best_of(tried, (0.75,))] == [("a", 0.5), ("b", 0.5), ("a", 0.75)]


def test_costs_are_shares(plans: ModuleType) -> None:
    assert plans.check_costs([0.5, 0.75, 0.5]) == (0.75, 0.5)
    with pytest.raises(InvalidInput, match="inside"):
        plans.check_costs([1.2])


def test_plans_keep_to_their_costs(plans: ModuleType, model: Any) -> None:
    calibration = plans.Calibration.of(model, 4, 2, 1)
    images = (torch.zeros(40, 3, 8, 8), torch.zeros(40, dtype=torch.int64))
    said: list[str] = []
    chooser = plans.Plans({"flow": model}, images, calibration, (0.6,), fine=2, say=said.append)
    controls = {w.title: w for w in chooser.controls()}
    assert {w.name for w in controls.values()} == {"few-steps", "dpm++", "heun", "deepcache", "random-skip", "static-schedule", "shallow"}
    made, cost = chooser.images(controls["static-schedule, cost 0.6"])
    assert cost <= 0.6 and made.shape == (4, 3, 8, 8)
    one = {w.about["branch"]: chooser.drift(w)[0] for b in range(chooser.branches()) if (w := chooser._evenly(b, 0.9)) is not None}
    cached = controls["deepcache, evenly, cost 0.9"]
    assert one[cached.about["branch"]] == min(one.values()), "DeepCache's branch is chosen for it"
    assert all(chooser.images(w)[1] <= w.about["cost"] + 1e-9 for w in controls.values() if w.name in ("deepcache", "few-steps", "heun")
               and "cost" in w.about)  # fmt: skip
    found = chooser.compositions()
    assert {"ours: cache", "ours: steps and cache", "ours: depths or reuse"} <= {w.name for w in found}
    assert all(w.about["spent"] <= 0.6 + 1e-9 and w.ours for w in found) and sum(w.about.get("chosen", False) for w in found) == 1
    assert chooser.drift(chooser.full)[0] < 1.0


# ---- comparing -----------------------------------------------------------------------------------------------------------


def results() -> dict[str, ImageResult]:
    full = ImageResult("full model", "", (2.0, 2.1, 2.2), 1.0, {64: 100.0})
    ours = ImageResult("ours: cache", "cost 0.5", (2.1, 2.2, 2.3), 0.5, {64: 52.0})
    far = ImageResult("ours: cache", "cost 0.75", (2.0, 2.1, 2.2), 0.75, {64: 78.0})
    few = [
        ImageResult("few-steps", f"{n}", (f, f + 0.1, f + 0.2), n / 50, {64: 2.0 * n}, True) for n, f in ((15, 4.0), (25, 2.6), (35, 2.2))
    ]
    dear = ImageResult("static-schedule", "cost 0.9", (2.0, 2.0, 2.0), 0.9, {64: 90.0}, True)
    return {r.title: r for r in (full, ours, far, *few, dear)}


def test_the_winner_at_half_the_time_is_compared_at_its_own_time(bench: ModuleType) -> None:
    found = bench.winner(results(), ["ours: cache, cost 0.5", "ours: cache, cost 0.75"], 64, ("few-steps", "static-schedule"))
    assert found["way"] == "ours: cache, cost 0.5" and found["time_over_full"] == pytest.approx(0.52)
    assert found["controls"]["few-steps"]["fid"] == pytest.approx(2.7 - 0.4 * 2 / 20)  # on the line between 50 and 70 ms
    assert found["controls"]["few-steps"]["next_dearer"] == "few-steps, 35" and not found["lower_than_next_dearer"], "2.2 against 2.2"
    dearest = {"next_dearer": "static-schedule, cost 0.9", "next_dearer_fid": 2.0}
    assert found["controls"]["static-schedule"] == {"fid": None, "verdict": "no control is as cheap", **dearest}
    assert found["lower_than_all"] and found["beyond_the_spread"] and found["best_control"] == "few-steps"
    assert bench.winner(results(), [], 64, ("few-steps",)) is None
    assert bench.winner(results(), ["ours: cache, cost 0.5"], 1, ("few-steps",)) is None


def test_a_control_that_wins_is_said_to(bench: ModuleType) -> None:
    found = results()
    found["few-steps, 25"] = ImageResult("few-steps", "25", (1.0, 1.1, 1.2), 0.5, {64: 50.0}, True)
    assert not bench.winner(found, ["ours: cache, cost 0.5"], 64, ("few-steps",))["lower_than_all"]
    rows = {(v["way"], v["control"]): v for v in bench.verdicts(found, None)}
    assert rows["ours: cache, cost 0.5", "few-steps"]["verdict"] == "worse"
    assert set(rows) == {(w, c) for w in ("ours: cache, cost 0.5", "ours: cache, cost 0.75") for c in ("few-steps", "static-schedule")}


def test_the_next_dearer_setting_is_what_a_control_may_spend(bench: ModuleType) -> None:
    assert bench.next_dearer(results(), "few-steps", 64, 52.0) == "few-steps, 35"
    assert bench.next_dearer(results(), "few-steps", 64, 500.0) == "few-steps, 35", "nothing dearer"
    assert bench.next_dearer(results(), "few-steps", 8, 52.0) is None


def rows() -> list[dict[str, Any]]:
    quality = {
        "group": "quality", "system": "flow", "kid": 0.1, "precision": 0.5, "recall": 0.4, "psnr_db": 20.0, "relative_l2": 0.1,
        "accuracy": 0.9, "explained": None, "cache_bytes": 8.0, "control": False, "fid_random": 3.0,
    }  # fmt: skip
    timed = {"group": "time", "system": "flow", "rows": 64}
    return [
        {**quality, "way": "full model", "rows": 0, "fid": 1.0, "flops": 1.0},
        {**quality, "way": "full model", "rows": 1, "fid": 1.2, "flops": 1.0},
        {**quality, "way": "a, b", "rows": 0, "fid": 2.0, "flops": 0.5}, {**quality, "way": "a, b", "rows": 1, "fid": 2.2, "flops": 0.5},
        {**quality, "way": "a, c", "rows": 0, "fid": 2.0, "flops": 0.5, "explained": 0.5},
        {**timed, "way": "a, b", "over_full": 0.6, "full_ms": 10.0, "exit_efficiency": 0.95},
        {**timed, "way": "a, c", "over_full": 0.7, "full_ms": 12.0, "exit_efficiency": 0.7},
        {**quality, "way": "a, b", "rows": 0, "system": "unet", "fid": 9.0, "flops": 0.5},
    ]  # fmt: skip


def test_results_have_the_seeds_that_all_have_and_times_of_their_own_rounds(bench: ModuleType, ways: ModuleType) -> None:
    known = {w.title: w for w in (ways.Way("full model", "", "flow", 9), ways.Way("a", "b", "flow", 9), ways.Way("a", "c", "flow", 9))}
    found = bench.combined("flow", rows(), known)
    assert found["a, b"].fid == (2.0,) and found["full model"].fid == (1.0,), "the second seed is not there for all"
    assert found["full model"].time_ms == {64: 11.0} and found["a, b"].time_ms == {64: pytest.approx(6.6)}
    assert found["a, c"].explained == 0.5 and found["a, b"].explained is None and found["a, b"].exit_efficiency == {64: 0.95}
    assert bench.combined("flow", [], known) == {}


def test_what_matters_is_sampled_first(bench: ModuleType, ways: ModuleType) -> None:
    names = ["few-steps", "few-steps", "ras", "ras", "deediff", "ours: cache", "full model"]
    costs = [0.75, 0.5, 0.75, 0.5, 0.5, 0.5, 1.0]
    made = [
        ways.Way(n, str(k), "flow", 9, about={"chosen": n.startswith("ours"), "cost": c})
        for k, (n, c) in enumerate(zip(names, costs, strict=True))
    ]
    found = [(w.name, w.about["cost"]) for w in bench.in_turn(made)]
    assert found == [
        ("full model", 1.0), ("few-steps", 0.5), ("few-steps", 0.75), ("ours: cache", 0.5), ("ras", 0.5), ("deediff", 0.5), ("ras", 0.75),
    ], "near half of the cost first"  # fmt: skip
    assert [bench.share_of(s) for s in ("1/1", "2/3")] == [(1, 1), (2, 3)]
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(SystemExit, match="1/2 or 2/2"):
            bench.share_of(wrong)
    assert bench.slug("ours: cache, cost 0.5") == "ours-cache-cost-0-5"


# ---- the page ------------------------------------------------------------------------------------------------------------


def test_the_table_of_diffusion(render: ModuleType, ways: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "results", dict)
    assert render.diffusion(PAGE).startswith("*No result is committed yet; `make") and render.imaging(PAGE).startswith("*No result")
    rule = ways.Way("a", "c", "flow", 9, (Point("x", "y", CachedResidual(), StateChange(), -0.1),)).to_dict()
    full, unseen = (ways.Way(n, "", "flow", 9).to_dict() for n in ("full model", "unseen"))
    chosen = ways.Way("a", "b", "flow", 9, about={"chosen": True}).to_dict()
    half = {
        "way": "a, b", "batch": 64, "time_over_full": 0.5, "fid": 2.0, "lower_than_all": False, "beyond_the_spread": False,
        "controls": {
            "few-steps": {"fid": 1.5, "verdict": "worse", "next_dearer": "few-steps, 30", "next_dearer_fid": 1.4},
            "deepcache": {"fid": None, "verdict": "no control is as cheap", "next_dearer": None, "next_dearer_fid": None},
        },
    }  # fmt: skip
    text = {"group": "text", "system": "text-unet", "rows": 1, "way": "ras", "unsupported": "it has no tokens"}
    result = {
        "benchmark": "diffusion", "dtype": "bfloat16", "steps": 50, "guidance": 1.5, "samples": 10000, "rows": [*rows(), text],
        "features": {"floor_mean": 0.5, "floor_count": 10000}, "plans": {"flow": [full, rule, chosen, unseen]},
        "missing": {"flow": ["Measured of quality, seed 1: all but 1 of 3 (a, c)."], "unet": ["Nothing is planned."]},
        "calls": [
            {"parts": "plans", "beside": 0, "environment": {"device_name": "a CPU", "commit": "fedcba9876"}},
            {"parts": "time", "beside": 2, "environment": {"device_name": "a GPU", "commit": "0123456789"}},
        ],
        "planned_in": {"flow": 0},
        "verdicts": {
            "flow": {
                "seeds": 1,
                "half_time": [half],
                "over_cost": [{"way": "a, b", "asked": 0.5, "executed": 0.5}, {"way": "a, c", "asked": 0.5, "executed": 0.6}],
                "by_flops": [
                    {"way": "a, b", "control": "few-steps", "cost": 0.5, "difference": [0.25, 0.1, 0.4], "verdict": "worse"},
                    {"way": "a, b", "control": "deepcache", "cost": 0.5, "difference": None, "verdict": "no control is as cheap"},
                    {"way": "a, c", "control": "few-steps", "cost": 0.4, "difference": [-0.5] * 3, "verdict": "one seed: not clear"},
                ],
            }
        },
        "environment": {"device": "cuda:0", "device_name": "a GPU", "date": "2026-01-02T03:04:05", "commit": "0123456789"},
        "left_out": ["of the last call alone"],
        "errors": {"quality flow: z": "RuntimeError: no"},
    }  # fmt: skip
    monkeypatch.setattr(render, "results", lambda: {"d.json": result})
    page = render.diffusion(PAGE)
    for r in result["rows"]:
        r |= {"call": 1}
    page = render.diffusion(PAGE)
    assert "| full model | full | 1.000 | - | - | 1.000 | - | 1 | 3 |" in page, "of the one seed that all have"
    assert "| a, b | chosen | 0.500 | - | - | 0.600 | 0.950 | 2 | 3 | 0.1 | 20.0 | - | 8 |" in page
    assert "| unseen |" not in page and "of the last call alone" not in page
    assert "By 2 calls, up to 3 processes side by side on one host. Of these plans on a CPU, commit fedcba9." in page
    assert "seed 1: all but 1 of 3 (a, c)." in page and "**unet**" in page and "Nothing is planned." in page
    assert "| a, b | 0.500 | +0.25 | - |" in page and "| a, c | 0.400 | -0.5 ~ | - |" in page
    assert "| 1.200 (a, c) | **missed** by 1 of 2 settings |" in page
    assert "| a, c | system | 0.500 | - | - | 0.700 | 0.700 | 2 | 3 | 0.1 | 20.0 | 0.50 | 8 |" in page
    assert "lowest >= 0.90 | 0.950 (a, b) | met |" in page and "lowest >= 0.80 | 0.700 (a, c) | **missed** |" in page
    assert "2; few-steps 1.5 (worse), deepcache not as cheap | **missed**, not clear of the spread over seeds; not below the" in page
    assert "; not below the next dearer setting of few-steps |" in page
    assert "| text-unet | ras | 1 | - | - | it has no tokens |" in page and "Failed: quality flow: z" in page
    short = render.imaging(PAGE)
    assert "| a, b | 0.50 | 2 | 1.5 | not as cheap | not as cheap | not as cheap | not as cheap | a GPU |" in short
    assert "Of one seed" in short
    half["not_measured"] = ["deepcache, every 2"]
    assert "not judged: 1 settings of these controls are not measured |" in render.diffusion(PAGE)
    result["rows"] = [r for r in result["rows"] if r["group"] != "quality"]
    assert "| a, b | chosen | - | - | - | 0.600 | 0.950 | not measured |" in render.diffusion(PAGE), "what was timed alone is shown"


# ---- results of several calls --------------------------------------------------------------------------------------------


@pytest.fixture
def sheet(bench: ModuleType, script: Callable[[str], ModuleType]) -> ModuleType:
    import sys

    return sys.modules["diffusion_sheet"]


def settings() -> dict[str, Any]:
    return {"benchmark": "diffusion", "dtype": "float32", "steps": 8, "samples": 24, "guidance": 1.5, "costs": [0.6], "half": [],
            "calibration": 4, "rows": [], "models": {"flow": "m"}, "seeds": 1, "batches": [2]}  # fmt: skip


def call(device: str = "a GPU", **more: Any) -> dict[str, Any]:
    return {"environment": {"device": "cuda", "device_name": device}, "parts": "quality", "families": "flow", "beside": 0, **more}


def other(ways: ModuleType) -> dict[str, Any]:
    """What a call wrote that planned two settings and sampled with one."""
    planned = [ways.Way("full model", "", "flow", 8), ways.Way("few-steps", "4 evaluations", "flow", 4, control=True)]
    row = {"group": "quality", "system": "flow", "way": planned[0].title, "rows": 0, "key": planned[0].key, "fid": 1.0, "call": 0}
    return settings() | {
        "plans": {"flow": [w.to_dict() for w in planned]}, "compositions": {"flow": "all were tried"}, "planned_in": {"flow": 0},
        "calls": [call("another GPU")], "rows": [row], "errors": {"quality flow: few-steps, 4 evaluations, seed 0": "RuntimeError: no"},
        "features": {"networks": {"trained": "n"}},
    }  # fmt: skip


def test_results_of_other_calls_are_taken_in_once(sheet: ModuleType, ways: ModuleType) -> None:
    content, theirs = settings(), other(ways)
    assert sheet.take(content, theirs, "x.json") == {"plans": 1, "rows": 1, "already there": 0}
    assert content["plans"] == theirs["plans"] and content["features"] == theirs["features"] and content["planned_in"] == {"flow": 0}
    mine = copy.deepcopy(content["rows"])
    assert sheet.take(content, theirs, "x.json") == {"plans": 0, "rows": 0, "already there": 1}
    assert content["rows"] == mine and len(content["calls"]) == 1

    more = copy.deepcopy(theirs)
    more["calls"] = [call("a third GPU")]
    more["rows"][0] |= {"rows": 1, "call": 0}
    more |= {"seeds": 2, "batches": [64]}
    sheet.take(content, more, "y.json")
    assert content["seeds"] == 2 and content["batches"] == [2, 64]
    assert [(r["rows"], content["calls"][r["call"]]["environment"]["device_name"]) for r in content["rows"]] == [
        (0, "another GPU"), (1, "a third GPU"),
    ]  # fmt: skip
    sheet.settled(content)
    assert content["errors"], "the failed setting is still missing"
    content["rows"].append({"group": "quality", "system": "flow", "way": "few-steps, 4 evaluations", "rows": 0})
    sheet.settled(content)
    assert not content["errors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 50}, "steps is 50 there and 8 here"),
        ({"costs": [0.5]}, "costs is"),
        ({"models": {"flow": "trained again"}}, "other models"),
        ({"features": {"networks": {"trained": "of another seed"}}}, "other feature networks"),
    ],
)
def test_results_of_another_measurement_are_refused(sheet: ModuleType, ways: ModuleType, change: dict[str, Any], message: str) -> None:
    content = settings() | {"features": {"networks": {"trained": "n"}}}
    before = copy.deepcopy(content)
    with pytest.raises(SystemExit, match=message):
        sheet.take(content, other(ways) | change, "x.json")
    assert content == before


def test_plans_of_two_choices_are_refused_and_finished_ones_replace_unfinished(sheet: ModuleType, ways: ModuleType) -> None:
    content, theirs = settings(), other(ways)
    sheet.take(content, theirs, "x.json")
    changed = copy.deepcopy(theirs)
    changed["plans"]["flow"][1]["steps"] = 5
    with pytest.raises(SystemExit, match=r"other plans for flow: let one call choose them"):
        sheet.take(content, changed, "y.json")
    del content["compositions"]["flow"]
    content["rows"].append({"group": "time", "system": "flow", "way": "few-steps, 4 evaluations", "rows": 2, "call": 0,
                            "key": ways.Way.from_dict(theirs["plans"]["flow"][1]).key})  # fmt: skip
    assert sheet.take(content, changed, "y.json")["plans"] == 1
    assert sheet.without_stale(content) == 1, "the row of four steps is of a plan that is gone"
    assert [r["way"] for r in content["rows"]] == ["full model"]


def test_what_is_missing_is_said(sheet: ModuleType, ways: ModuleType) -> None:
    content = other(ways) | {"models": {"flow": "m", "unet": "m"}}
    assert sheet.missing(content) == {
        "flow": ["Measured of quality, seed 0: all but 1 of 2 (few-steps, 4 evaluations).", "Measured of time, batch 2: nothing."],
        "unet": ["Nothing is planned."],
    }


def test_a_result_says_which_call_measured(sheet: ModuleType, ways: ModuleType, bench: ModuleType, tmp_path: Path) -> None:
    path, theirs = tmp_path / "a.json", other(ways)
    budget = bench.Budget(1.0)
    made = sheet.Result(path, settings(), budget, call("here", beside=3))
    sheet.take(made.content, theirs, "x.json")
    made.write()
    found = json.loads(path.read_text())
    assert found["environment"]["device_name"] == "another GPU" and len(found["calls"]) == 1, "this call measured nothing"
    for seed in (0, 1):
        made.row(group="quality", system="flow", way="few-steps, 4 evaluations", rows=seed, key="k")
    found = json.loads(path.read_text())
    assert found["environment"]["device_name"] == "here" and [r["call"] for r in found["rows"]] == [0, 1, 1]
    assert found["calls"][1]["beside"] == 3

    again = sheet.Result(path, settings(), budget, call("later"))
    assert len(again.content["rows"]) == 3 and again.content["plans"] == theirs["plans"]
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="samples is 24 there and 99 here"):
        sheet.Result(path, settings() | {"samples": 99}, budget, call())
    with pytest.raises(SystemExit, match="other models"):
        sheet.Result(path, settings() | {"models": {"flow": "other"}}, budget, call())
    assert path.read_bytes() == before, "a result of hours is not written over"
    empty = tmp_path / "b.json"
    for samples in (24, 99):  # a call that was refused what it was to take left nothing behind that matters
        assert sheet.Result(empty, settings() | {"samples": samples}, budget, call()).content["samples"] == samples


def test_files_of_other_settings_are_not_read(sheet: ModuleType, ways: ModuleType, bench: ModuleType, tmp_path: Path) -> None:
    way, content = ways.Way("ours: cache", "cost 0.5", "flow", 8), settings()
    one = sheet.Files([tmp_path / "one"], content)
    name = one.name("flow", way, "features", 0, bench.slug)
    one.save(name, torch.ones(2))
    both = sheet.Files([tmp_path / "two", tmp_path / "one"], content)
    assert torch.equal(both.load(name), torch.ones(2)) and [p.name for p in (tmp_path / "one").iterdir()] == [name]
    names = {
        name,
        one.name("flow", way, "features", 1, bench.slug),
        one.name("flow", ways.Way("ours: cache", "cost 0.5", "flow", 7), "features", 0, bench.slug),
        one.name("flow", ways.Way("ours, cache", "cost 0.5", "ee", 8), "features", 0, bench.slug),
        sheet.Files([tmp_path / "one"], content | {"samples": 48}).name("flow", way, "features", 0, bench.slug),
        sheet.Files([tmp_path / "one"], content | {"models": {"flow": "other"}}).name("flow", way, "features", 0, bench.slug),
    }
    assert len(names) == 6
    assert both.load(one.name("unet", way, "features", 0, bench.slug)) is None


def test_a_call_measures_its_share_of_the_first_settings(bench: ModuleType, ways: ModuleType) -> None:
    made = [ways.Way("few-steps", str(k), "flow", 9) for k in range(5)]

    def shares(share: str, most: int | None) -> list[str]:
        one = bench.Benchmark.__new__(bench.Benchmark)
        one.share, one.args = bench.share_of(share), type("Given", (), {"most": most})()
        one.ways = lambda name: made
        return [w.setting for w in one.mine("flow")]

    assert shares("1/1", None) == list("01234") and shares("1/1", 2) == list("01")
    assert shares("1/2", None) == list("024") and shares("2/2", None) == list("13") and shares("2/2", 3) == ["1"]


def test_models_are_told_apart_by_their_training(sheet: ModuleType, tmp_path: Path) -> None:
    def digests(**stages: Any) -> dict[str, str]:
        (tmp_path / "training.json").write_text(json.dumps({"stages": stages}))
        return dict(sheet.models_in(tmp_path))

    first = digests(flow={"loss": 1.0, "losses": {}}, noise={"loss": 2.0}, ee={"loss": 3.0})
    assert digests(flow={"loss": 1.0, "losses": {}, "check": {"fid": 1}}, noise={"loss": 2.0}, ee={"loss": 3.0}) == first
    changed = digests(flow={"loss": 1.0, "losses": {}}, noise={"loss": 2.0}, ee={"loss": 3.5})
    assert changed["flow"] != first["flow"] and changed["noise"] == first["noise"], "variants belong to what they began with"
