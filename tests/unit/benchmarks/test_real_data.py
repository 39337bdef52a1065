"""Tables of the four systems: what is shared, what is complete, and the whole way from traces to tables without a training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offramp import systems
from offramp.core.trace import Trace

CONFIGS = Path(__file__).resolve().parents[3] / "benchmarks" / "configs"
TINY = """
budgets = [0.5, 0.8, 1.0]
seeds = [0, 1]

[system]

[tiny]
data = "digits"
net = "conv"
depth = 3
smaller = [{ depth = 1 }]
epochs = 1
"""


@pytest.fixture(scope="module")
def real_data(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("real_data")


@pytest.mark.parametrize("variant", ["cifar", "cifar-vit", "sst2"])
def test_systems_of_a_variant_share_the_trainings_they_can(real_data: ModuleType, variant: str) -> None:
    study = real_data.study(CONFIGS, variant)
    assert sorted(study.systems) == [name for name in systems.list_systems() if systems.load_card(name).engine == "classify"]
    assert study.shared["msdnet-budget"] == study.shared["eero"] == "eero"
    assert study.shared["branchynet"] == "branchynet" and study.shared["pabee"] == "pabee"
    todo = real_data.jobs(CONFIGS, f"{variant}:7")
    assert len(todo) == 3 + 1 + len(study.any.smaller) and all(job.seed == 7 for job in todo)
    assert len({job.folder(Path("work")) for job in todo}) == len(todo)


def test_an_unknown_variant(real_data: ModuleType) -> None:
    with pytest.raises(SystemExit, match="'large'"):
        real_data.study(CONFIGS, "large")


@pytest.fixture
def work(real_data: ModuleType, made_up: Callable[..., Trace], tmp_path: Path) -> Path:
    """Configurations and trainings of two systems that share a network; of seed 1 one training is missing."""
    (tmp_path / "configs").mkdir()
    for name in ("eero", "msdnet-budget"):
        (tmp_path / "configs" / f"{name}.toml").write_text(TINY)
    work = tmp_path / "work"
    for job in real_data.jobs(tmp_path / "configs", "tiny"):
        folder = job.folder(work)
        folder.mkdir(parents=True)
        if job.change is None:
            rule = systems.build(job.system).rule
            made_up(400, job.seed, rule).save(folder / "calibration")
            made_up(300, 10 + job.seed, rule).save(folder / "test")
            found = {"head_flops": [10, 10], "items": 1000}
        else:
            small = bool(job.change)
            found = {"name": "depth 1" if small else "full model", "flops": 120 if small else 300, "accuracy": 0.7 if small else 0.8}
        if (job.seed, job.change) != (1, ()):
            (folder / "job.json").write_text(json.dumps(found))
    (work / "tiny" / "environment.json").write_text(json.dumps({"device": "cuda", "device_name": "a device"}))
    return tmp_path


def run(real_data: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    given = ["--work", str(work / "work"), "--configs", str(work / "configs"), "--results", str(work / "results")]
    monkeypatch.setattr(sys, "argv", ["real_data.py", *arguments, *given])
    status: int = real_data.main()
    return status


def test_tables(real_data: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(real_data, work, monkeypatch, "table", "--variants", "tiny") == 0
    table = json.loads((work / "results" / "real_tiny.json").read_text())
    assert table["seeds"] == [0]  # of seed 1 the full model is missing
    rows = {(row["system"], row["budget"]): row for row in table["rows"]}
    assert set(rows) == {(s, b) for s in ("eero", "msdnet-budget") for b in (0.5, 0.8, 1.0)}
    test = Trace.load(work / "work" / "tiny" / "seed0" / "exits-eero" / "test")
    assert test.losses is not None
    right = 1 - test.losses.double().mean(0)
    alone = table["fixed_exit"]["eero"]
    assert [p["cost"] for p in alone] == pytest.approx([110 / 300, 210 / 300, 1.0])  # the other exit's head is not run
    assert [p["accuracy"][0] for p in alone] == pytest.approx(right.tolist())
    for (_, budget), row in rows.items():
        assert row["cost"][0] <= min(budget, 320 / 300) + 0.06
    for name in ("eero", "msdnet-budget"):
        result = json.loads((work / "results" / f"{name}--tiny--cuda.json").read_text())
        predicate = systems.load_card(name).predicate
        assert predicate is not None
        values = [r[predicate.metric] for r in result["seeds"][0]["budgets"] if r["budget"] < 1]
        assert result["measured"]["value"] == pytest.approx(max(values) if predicate.over == "worst" else sum(values) / 2)
        assert result["verdict"].split(" (")[0] == ("holds" if predicate.holds(result["measured"]["value"]) else "does not hold")
    text = (work / "results" / "real_data.md").read_text()
    assert "## tiny" in text and "| eero | " in text and str(systems.load_card("eero").predicate) in text


def test_nothing_complete(real_data: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "work" / "tiny" / "seed0" / "static" / "job.json").unlink()
    assert run(real_data, work, monkeypatch, "table", "--variants", "tiny") == 1


def test_pool(real_data: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out items, then test items, of the network a system uses; without logits."""
    assert run(real_data, work, monkeypatch, "pool", "--variants", "tiny:1", "--system", "msdnet-budget") == 0
    pooled = Trace.load(work / "results" / "traces" / "tiny-msdnet-budget-seed1")
    parts = [Trace.load(work / "work" / "tiny" / "seed1" / "exits-eero" / part) for part in ("calibration", "test")]
    assert pooled.items == 700 and pooled.logits is None and len(pooled.recorded) == 1
    rule = systems.build("msdnet-budget").rule
    assert torch.equal(pooled.scores(rule), torch.cat([part.scores(rule) for part in parts]))
    assert torch.equal(pooled.predictions, torch.cat([part.predictions for part in parts]))
    assert pooled.provenance["data"] == "tiny, seed 1: 400 held-out and 300 test items"
    with pytest.raises(SystemExit, match="one of eero, msdnet-budget"):
        run(real_data, work, monkeypatch, "pool", "--variants", "tiny:1", "--system", "pabee")


@pytest.mark.parametrize(
    ("value", "seeds", "text"),
    [
        (None, (), "-"),
        ([0.5, 0.5, 0.5], (0.5,), "50.00"),
        ([0.5, -2.0, 3.0], (0.45, 0.55), "50.00 (45.00, 55.00)"),
        ([0.5, 0.4, 0.6], (0.45, 0.5, 0.55), "50.00 ± 10.00"),
    ],
)
def test_percent(real_data: ModuleType, value: list[float] | None, seeds: tuple[float, ...], text: str) -> None:
    assert real_data.percent(value, seeds) == text
