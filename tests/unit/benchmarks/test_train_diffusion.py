"""Denoisers trained in a trial: every stage, what is kept of it, and that it is read again."""

from __future__ import annotations

import json
import shutil
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
    common = ["--tiny", "--out", str(out), "--device", "cpu"]
    training.main(["flow", "--steps", "4", *common])
    wanted = str(10**6)  # steps that no time is enough for
    training.main(["variants", "noise", *common, "--steps", wanted, "--least-steps", wanted, "--minutes", "5"])
    (out / "left_out.json").write_bytes((out / "training.json").read_bytes())
    training.main(["flow", "variants", "check", "--steps", "4", *common])
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
def test_a_stage_without_time_is_named_and_not_saved_and_another_call_does_it(training: ModuleType, folder: Path) -> None:
    early = json.loads((folder / "left_out.json").read_text())
    assert set(early["stages"]) == {"flow"} and set(early["left_out"]) == {"noise", *training.VARIANTS}
    assert all(early["left_out"][n].startswith("it needs ee") for n in ("full", "uniform"))
    for name in ("ee", "deediff", "latte", "shallow", "noise"):
        assert "too few steps" in early["left_out"][name], "it ends at once, though there would be minutes"
    later = json.loads((folder / "training.json").read_text())
    assert "left_out" not in later or set(later["left_out"]) == {"noise"}
    assert all(later["stages"][n]["first_step_seconds"] > 0 and later["stages"][n]["steps_per_second"] > 0 for n in training.VARIANTS)
    assert not (folder / "noise").exists()


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


@pytest.mark.slow
def test_one_variant_of_those_that_are_missing(training: ModuleType, folder: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(folder, tmp_path / "made", ignore=shutil.ignore_patterns("work")))
    known = json.loads((made / "training.json").read_text())
    for name in ("latte", "shallow"):
        del known["stages"][name]
    (made / "training.json").write_text(json.dumps(known))
    training.main(["shallow", "--tiny", "--steps", "4", "--out", str(made), "--device", "cpu"])
    assert set(sheet(made)) == {"flow", *training.VARIANTS} - {"latte"}


class Clock:
    """Time that passes by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(training, "time", found)
    return found


def timed(training: ModuleType, clock: Clock, seconds: Callable[[], float], least: int, paces: list[float], steps: int) -> tuple[Any, int]:
    """Steps that take so long, the last pace for all that follow, until the time or the steps are over."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    told: list[float] = []
    made = training.Timed(seconds, least, lambda step, share, spent: told.append(share))
    scheduler, done = made(optimizer, steps), 0
    try:
        for k in range(steps):
            clock.now += paces[min(k, len(paces) - 1)]
            optimizer.step()
            done += 1
            scheduler.step()
    except training.OutOfTimeError:
        pass
    assert told == sorted(told) and told[-1] <= 1
    return made, done


def test_time_begins_after_the_first_step(training: ModuleType, clock: Clock) -> None:
    made, done = timed(training, clock, lambda: 10.0, 5, [60.0, 1.0], 1000)
    assert done == 11 and made.first == 60.0 and made.pace == pytest.approx(1.0)


def test_the_share_is_of_what_the_first_step_left(training: ModuleType, clock: Clock) -> None:
    made, done = timed(training, clock, lambda: 0.5 * (100.0 - clock.now), 5, [60.0, 1.0], 1000)
    assert done == 21 and clock.now == 80.0
    made, done = timed(training, clock, lambda: 0.5 * (100.0 - clock.now), 5, [60.0, 1.0], 1000)
    assert done == 1 and made.pace == 0, "nothing was left"


def test_a_training_that_cannot_be_long_enough_ends_at_once(training: ModuleType, clock: Clock) -> None:
    assert timed(training, clock, lambda: 10.0, 100, [60.0, 1.0], 1000)[1] == training.Timed.PROBE
    assert timed(training, clock, lambda: 10.0, 100, [60.0, 5.0, 0.01], 1000)[1] >= 100, "a slow second step alone says little"
    assert timed(training, clock, lambda: 10.0, 100, [60.0, 1.0], 8)[1] == 8, "no more steps are wanted than there are"


def test_the_grid_has_a_class_in_every_column(training: ModuleType) -> None:
    images = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 3, 4, 5)
    made = training.grid(images)
    assert made.shape == (8, 50, 3) and made.dtype == "uint8"
    for k in range(20):
        tile = made[4 * (k // 10) : 4 * (k // 10) + 4, 5 * (k % 10) : 5 * (k % 10) + 5]
        assert bool((tile == round(255 * k / 19)).all())
