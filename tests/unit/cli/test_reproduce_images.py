"""Reproductions on images: what is trained and measured, and what is said about it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

from offramp import systems
from offramp.cli import reproduce_images
from offramp.cli.image_nets import EulerFlow, Features, SmallDiT
from offramp.cli.reproduce_common import measured
from offramp.cli.reproduce_images import CONTROLS, DENOISERS, ImageSettings, candidates, table_rows
from offramp.core.errors import InvalidInput
from offramp.core.system import Predicate

CONFIG = Path(__file__).resolve().parents[3] / "benchmarks" / "configs" / "deepcache.toml"
QUICK = ImageSettings(
    "digits", depth=3, width=16, heads=2, steps=4, tune_steps=2, sampler_steps=6, samples=32, calibration=4, feature_steps=5,
    budgets=(0.75, 0.5), below=(), seeds=(0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    told: list[str] = []
    found = DENOISERS.run("deediff", QUICK, variant="quick", say=told.append)
    assert any("training exits" in t for t in told) and sum("training" in t for t in told) == 6, "each training once"
    return found


@pytest.mark.slow
def test_a_result_holds_the_method_and_every_control(result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)
    seed = result["seeds"][0]
    assert result["schema"] == "offramp.reproduce/1" and result["system"] == "deediff" and set(seed["controls"]) == set(CONTROLS)
    assert seed["full"]["cost"] == pytest.approx(1.0, abs=1e-6) and seed["full"]["fid"] > 0
    for rows in seed["controls"].values():
        for row in rows:
            assert "infeasible" in row or (0 < row["cost"] < 1 and row["fid_ratio"] == pytest.approx(row["fid"] / seed["full"]["fid"]))
    assert result["verdict"].startswith(("holds", "does not hold", "not measured"))
    header, shown = table_rows(result)
    assert len(shown) == 1 + 2 + 4 * 2 and all(len(row) == len(header) for row in shown)


def test_a_gain_is_taken_at_equal_cost_and_not_where_there_is_none() -> None:
    control = [{"budget": 0.5, "cost": 0.5, "fid": 6.0}, {"budget": 0.9, "infeasible": "no"}]
    gain = reproduce_images._gain
    assert gain({"cost": 0.75, "fid": 3.0}, control, 2.0) == pytest.approx((4.0 - 3.0) / 2)
    assert gain({"cost": 0.4, "fid": 3.0}, control, 2.0) is None
    assert gain({"cost": 0.4, "fid": 3.0}, control[1:], 2.0) is None


def test_the_predicate_sees_the_costs_that_count() -> None:
    rows = [{"budget": 0.75, "fid_ratio": 1.0}, {"budget": 0.5, "fid_ratio": 3.0}, {"budget": 0.4, "infeasible": "no"}]
    assert measured(Predicate("fid_ratio", "<=", 1.1, budget=0.75), rows) == 1.0
    assert measured(Predicate("fid_ratio", "<=", 1.1), rows) == 2.0
    assert measured(Predicate("fid_ratio", "<=", 1.1, over="worst"), rows) == 3.0
    assert measured(Predicate("gain_over_steps", ">=", 0.0), rows) is None


def test_settings_that_are_trained_for_a_cost_get_cheaper() -> None:
    lists = [s.skips.depths for s in candidates(systems.build("ee-diffusion"), 6)]
    assert lists[0][0] == 28 and lists[1] == tuple(d - 1 for d in lists[0]) and min(lists[-1]) == 1
    assert [s.skips.groups for s in candidates(systems.build("latte-flow"), 6)] == [2, 3, 6]
    assert [round(6 * s.skips.share) for s in candidates(systems.build("shallow"), 6)] == [5, 4, 3, 2, 1]


def test_a_setting_that_does_not_fit_the_model_is_not_in_the_way_of_those_that_do() -> None:
    """The published number of groups does not divide every model's blocks."""
    deeper = dataclasses.replace(QUICK, depth=6, samples=8)
    bench = reproduce_images.Bench(deeper, reproduce_images.read_pictures(deeper, None, "cpu"), 0, "cpu", lambda text: None)
    for cost, groups in ((0.75, 2), (0.5, 3)):
        found = bench.row("latte-flow", {}, cost)
        assert found["how"] == f"LayerGroups(groups={groups})" and found["cost"] < cost
    assert "infeasible" in bench.row("latte-flow", {}, 0.05)


def test_settings_are_checked() -> None:
    assert ImageSettings.load(CONFIG, "tiny").budgets == (0.75, 0.6, 0.5)
    with pytest.raises(InvalidInput, match="must not be empty"):
        dataclasses.replace(QUICK, seeds=())
    with pytest.raises(InvalidInput, match="--data"):
        reproduce_images.read_pictures(dataclasses.replace(QUICK, data="{data}"), None, "cpu")


def test_the_parts_do_what_they_say() -> None:
    torch.manual_seed(0)
    with pytest.raises(InvalidInput, match="multiple of the heads"):
        SmallDiT(1, 3, 8, width=18)
    sampler, clean, noise = EulerFlow(), torch.ones(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    sampler.set_timesteps(4)
    state = noise
    for time in sampler.timesteps:
        state = sampler.step(noise - clean, time, state)[0]
    torch.testing.assert_close(state, clean)  # a straight path is followed exactly
    images = torch.cat([torch.randn(64, 1, 8, 8) + 2, torch.randn(64, 1, 8, 8) - 2])
    net = Features(1, 2, 8, width=4, dimensions=8)
    assert net.fit(images, torch.arange(128) // 64, 60, 32, 0) > 0.95 and net(images).shape == (128, 8)
