"""Reproductions: settings, the numbers that are compared, and a whole small run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offramp.cli import reproduce as reproducing
from offramp.core.errors import InvalidInput
from offramp.core.system import Predicate

BASE = """
budgets = [0.6, 0.9]
seeds = [0]

[system]
exits = 1

[tiny]
data = "digits"
net = "conv"
net_args = { width = 2 }
depth = 3
static_depths = [1]
epochs = 1
batch_size = 256
"""


def write(folder: Path, text: str = BASE, name: str = "branchynet") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


class TestSettings:
    def test_shared_and_own_keys(self, tmp_path: Path) -> None:
        path = write(
            tmp_path, BASE + '[other]\ndata = "digits"\nnet = "conv"\ndepth = 2\nepochs = 5\nseeds = [3, 4]\nsystem = { exits = 2 }\n'
        )
        assert reproducing.variants(path) == ["tiny", "other"]
        tiny, other = (reproducing.load_settings(path, v) for v in ("tiny", "other"))
        assert tiny.budgets == other.budgets == (0.6, 0.9)
        assert (tiny.seeds, other.seeds) == ((0,), (3, 4)) and (dict(tiny.system), dict(other.system)) == ({"exits": 1}, {"exits": 2})

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("epochs = 1", "epoch = 1", "Did you mean 'epochs'"),
            ("depth = 3\n", "", "'depth' is missing"),
            ('net = "conv"', 'net = "conf"', "Did you mean 'conv'"),
            ("static_depths = [1]", "static_depths = [3]", "between 1 and 2"),
            ("budgets = [0.6, 0.9]", "budgets = []", "must not be empty"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            reproducing.load_settings(write(tmp_path, BASE.replace(old, new)), "tiny")

    def test_unknown_variant(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="no variant 'large'; it has: tiny"):
            reproducing.load_settings(write(tmp_path), "large")


class TestNumbers:
    ROWS = (
        {"budget": 0.3, "infeasible": True},
        {"budget": 0.5, "drop": 0.02},
        {"budget": 0.7, "drop": -0.01},
        {"budget": 0.9, "drop": 0.0},
    )

    @pytest.mark.parametrize(
        ("predicate", "value"),
        [
            (Predicate("drop", "<=", 0.0), (0.02 - 0.01) / 3),
            (Predicate("drop", "<=", 0.0, over="worst"), 0.02),
            (Predicate("drop", "<=", 0.0, over="best"), -0.01),
            (Predicate("drop", ">=", 0.0, over="worst"), -0.01),
            (Predicate("drop", ">=", 0.0, over="best"), 0.02),
            (Predicate("drop", "<=", 0.0, budget=0.7), -0.01),
            (Predicate("drop", "<=", 0.0, budget=0.3), None),
            (Predicate("accuracy", ">=", 0.0), None),
        ],
    )
    def test_measured(self, predicate: Predicate, value: float | None) -> None:
        assert reproducing.measured(predicate, self.ROWS) == (value if value is None else pytest.approx(value))

    def test_interval_and_verdict(self) -> None:
        estimate = reproducing.across_seeds([0.01, 0.02, 0.03])
        assert estimate.value == pytest.approx(0.02) and estimate.high - 0.02 == pytest.approx(4.303 * 0.01 / 3**0.5)
        above = Predicate("gain_over_fixed", ">=", 0.0)
        assert reproducing.verdict(above, estimate).startswith("holds (not clear")
        assert reproducing.verdict(above, reproducing.across_seeds([0.02, 0.021, 0.022])) == "holds"
        assert reproducing.verdict(above, reproducing.across_seeds([-0.02, -0.021, -0.022])) == "does not hold"
        assert reproducing.verdict(above, reproducing.across_seeds([0.02])) == "holds (not clear: one seed)"
        assert reproducing.verdict(above, None).startswith("not measured")


class TestRun:
    def test_digits(self, tmp_path: Path, offramp: Callable[..., object]) -> None:
        pytest.importorskip("sklearn")
        write(tmp_path)
        result = offramp("reproduce", "branchynet", "--variant", "tiny", "--configs", tmp_path, "--results", tmp_path, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "verdict" in result.output and "claim" in result.output
        found = json.loads((tmp_path / "branchynet--tiny--cpu.json").read_text())
        seed = found["seeds"][0]
        assert found["predicate"]["budget"] == 0.67 and [r["budget"] for r in seed["budgets"]] == [0.6, 0.67, 0.9]
        assert seed["items"] == {"train": 1006, "calibration": 252, "test": 539}
        assert [s["name"] for s in seed["static"]] == ["full model", "1 blocks"] and 0 < seed["static"][1]["cost"] < 1
        for row in seed["budgets"]:
            if not row.get("infeasible"):
                # The random baseline spends exactly what the method spent; the mix of exits cannot be worse than it.
                assert row["cost"] == pytest.approx(sum(s * c for s, c in zip(row["shares"], seed["exit_cost"], strict=True)))
                assert row["fixed"] >= row["random"] - 1e-9
                assert row["calibration_cost"] <= row["budget"] + 1e-9
                assert row["drop"] == pytest.approx(seed["full"]["accuracy"] - row["accuracy"])
        assert found["environment"]["versions"]["torch"] == torch.__version__

    def test_needs_a_path(self, tmp_path: Path, offramp: Callable[..., object]) -> None:
        write(tmp_path, BASE.replace('data = "digits"', 'data = "images"\ntrain = "{data}"'))
        result = offramp("reproduce", "branchynet", "--variant", "tiny", "--configs", tmp_path, "--results", tmp_path)
        assert result.exit_code == 2 and "--data" in result.output
        assert offramp("reproduce", "branchynet", "--configs", tmp_path / "none").exit_code == 2

    def test_texts(self, tmp_path: Path) -> None:
        rows = [f"{i % 2}\t{'good fine film' if i % 2 else 'bad dull film'} {i}" for i in range(60)]
        (tmp_path / "a.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
        settings = reproducing.Settings("text", "text", 2, 1, {"width": 8, "heads": 2}, train="{data}/a.tsv", vocabulary=40, length=8)
        pool = reproducing.load_pool(settings, str(tmp_path))
        assert pool.classes == 2 and len(pool.train) == 60 and pool.test is None
        inputs, labels = pool.train.collate([pool.train[0], pool.train[1]])
        assert inputs["input_ids"].shape == (2, 5) and labels.tolist() == [0, 1]
        logits = reproducing.make_net(settings, pool, 1)(**inputs)
        assert logits.shape == (2, 2)

    def test_learning_rate_rises_and_falls(self) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        schedule = reproducing.warmup_cosine(optimizer, 10)
        rates = []
        for _ in range(10):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert (
            rates[:2] == [0.5, 1.0]
            and rates[2:] == sorted(rates[2:], reverse=True)
            and schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)
        )

    def test_augmentation_shifts_and_mirrors_only_in_training(self) -> None:
        images = [torch.arange(16.0).reshape(1, 4, 4)]
        items = reproducing.Items(images, torch.zeros(1, dtype=torch.long))
        assert torch.equal(items[0][0], images[0])
        torch.manual_seed(0)
        training = items.take(torch.tensor([0]), augment=True)
        seen = [training[0][0] for _ in range(8)]
        assert all(s.shape == (1, 4, 4) for s in seen) and any(not torch.equal(s, images[0]) for s in seen)
        assert all(set(s.unique().tolist()) <= set(range(16)) for s in seen)
