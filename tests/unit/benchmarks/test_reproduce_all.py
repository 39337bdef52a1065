"""Reproductions seed by seed: what is there is kept, what fails costs nothing else, and systems of a seed share what they can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from offramp.cli.reproduce_images import CONTROLS, DENOISERS

CONFIG = """budgets = [0.5]
below = []
seeds = [0, 1]

[tiny]
data = "digits"
depth = 2
width = 8
heads = 2
steps = 1
tune_steps = 1
"""


@pytest.fixture
def module(script: Callable[[str], ModuleType]) -> Any:
    return script("reproduce_all")


class Fake:
    """Says which seeds were asked for; ``deepcache`` fails in seed 1."""

    how = DENOISERS
    made: list[Fake] = []  # noqa: RUF012
    asked: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, device: str, data: str | None, say: Any) -> None:
        self.made.append(self)

    def repeat(self, name: str, settings: Any, seed: int) -> dict[str, Any]:
        self.asked.append((name, seed))
        if (name, seed) == ("deepcache", 1):
            raise RuntimeError("nothing but a test")
        row = {"budget": 0.5, "cost": 0.5, "fid": 2.0 + seed, "fid_ratio": 1.1, "excess": 0.0, **{f"gain_over_{k}": 0.1 for k in CONTROLS}}
        return {"seed": seed, "full": {"cost": 1.0, "fid": 2.0}, "budgets": [row], "controls": {k: [dict(row)] for k in CONTROLS}}


@pytest.fixture
def run(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("ee-diffusion", "deepcache"):
        (tmp_path / f"{name}.toml").write_text(CONFIG)
    monkeypatch.setattr(module, "KINDS", {"images": Fake})
    Fake.made, Fake.asked = [], []

    def call(*more: str) -> int:
        given = ["x", "images", "ee-diffusion", "deepcache", "--configs", str(tmp_path), "--results", str(tmp_path), *more]
        monkeypatch.setattr("sys.argv", given)
        return int(module.main())

    return call


def seeds(tmp_path: Path, name: str) -> list[int]:
    return [s["seed"] for s in json.loads((tmp_path / f"{name}--tiny--cpu.json").read_text())["seeds"]]


def test_a_failure_costs_its_own_seed_only_and_a_second_call_makes_what_is_missing(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run() == 1
    assert "nothing but a test" in capsys.readouterr().err
    assert (seeds(tmp_path, "ee-diffusion"), seeds(tmp_path, "deepcache")) == ([0, 1], [0])
    assert Fake.asked == [(n, s) for s in (0, 1) for n in ("ee-diffusion", "deepcache")]
    assert len(Fake.made) == 2, "what systems share is of one seed"
    Fake.asked = []
    assert run("--seeds", "2", "1") == 1
    assert Fake.asked == [("ee-diffusion", 2), ("deepcache", 2), ("deepcache", 1)], "the others are there"
    assert seeds(tmp_path, "ee-diffusion") == [0, 1, 2] and seeds(tmp_path, "deepcache") == [0, 2]


def test_other_settings_begin_anew(run: Any, tmp_path: Path) -> None:
    run("--seeds", "0")
    (tmp_path / "ee-diffusion.toml").write_text(CONFIG.replace("budgets = [0.5]", "budgets = [0.4]"))
    run("--seeds", "2")
    assert seeds(tmp_path, "ee-diffusion") == [2] and seeds(tmp_path, "deepcache") == [0, 2]


def test_systems_with_the_same_settings_share_a_bench(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(module.reproduce_images, "read_pictures", lambda *_: None)
    monkeypatch.setattr(module.reproduce_images, "Bench", lambda *given: made.append(given) or len(made))
    monkeypatch.setattr(module.reproduce_images, "measure_on", lambda bench, name, settings: {"bench": bench})
    here = module.Images("cpu", None, print)
    folder = module.HERE / "configs"
    found = [here.repeat(n, DENOISERS.settings.load(folder / f"{n}.toml", "tiny"), 0) for n in ("ee-diffusion", "deepcache", "ras")]
    assert len(made) < 3 and found[0] == found[1] == {"bench": 1}
