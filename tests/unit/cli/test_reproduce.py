"""Reproductions: settings, the numbers that are compared, and a whole small run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from offramp import systems
from offramp.cli import reproduce as reproducing
from offramp.core.errors import InvalidInput

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
smaller = [{ depth = 1 }]
epochs = 1
batch_size = 256
"""


def write(folder: Path, text: str = BASE, name: str = "branchynet") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


class TestSettings:
    """How they are read is in ``test_reproduce_common.py``."""

    def test_what_a_variant_says(self, tmp_path: Path) -> None:
        found = reproducing.Settings.load(write(tmp_path), "tiny")
        assert found.budgets == (0.6, 0.9) and found.smaller == ({"depth": 1},) and dict(found.system) == {"exits": 1}

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("epochs = 1", "epoch = 1", "Did you mean 'epochs'"),
            ("depth = 3\n", "", "'depth' is missing"),
            ('net = "conv"', 'net = "conf"', "Did you mean 'conv'"),
            ("smaller = [{ depth = 1 }]", "smaller = [1]", "must list tables"),
            ("budgets = [0.6, 0.9]", "budgets = []", "must not be empty"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            reproducing.Settings.load(write(tmp_path, BASE.replace(old, new)), "tiny")


class TestRun:
    def test_digits(self, tmp_path: Path, offramp: Callable[..., object]) -> None:
        pytest.importorskip("sklearn")
        write(tmp_path)
        result = offramp("reproduce", "branchynet", "--variant", "tiny", "--configs", tmp_path, "--results", tmp_path, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "verdict" in result.output and "claim" in result.output
        said = [line.partition("] ")[2] for line in result.output.splitlines() if line.startswith("[  ")]
        assert said[:4] == ["branchynet", "seed 0: full model", "seed 0: static model, {'depth': 1}", "seed 0: branchynet"], "no terminal"
        found = json.loads((tmp_path / "branchynet--tiny--cpu.json").read_text())
        seed = found["seeds"][0]
        assert found["predicate"]["budget"] == 0.67 and [r["budget"] for r in seed["budgets"]] == [0.6, 0.67, 0.9]
        assert seed["items"] == {"train": 1006, "calibration": 252, "test": 539}
        assert [s["name"] for s in seed["static"]] == ["full model", "depth 1"] and 0 < seed["static"][1]["cost"] < 1
        for row in seed["budgets"]:
            if not row.get("infeasible"):
                # The random baseline spends exactly what the method spent; the mix of exits cannot be worse than it.
                assert row["cost"] == pytest.approx(sum(s * c for s, c in zip(row["shares"], seed["exit_cost"], strict=True)))
                assert row["fixed"] >= row["random"] - 1e-9
                assert row["calibration_cost"] <= row["budget"] + 1e-9
                assert row["drop"] == pytest.approx(seed["full"]["accuracy"] - row["accuracy"])
        assert found["environment"]["versions"]["torch"] == metadata.version("torch")

    def test_needs_a_path(self, tmp_path: Path, offramp: Callable[..., object]) -> None:
        write(tmp_path, BASE.replace('data = "digits"', 'data = "images"\ntrain = "{data}"'))
        result = offramp("reproduce", "branchynet", "--variant", "tiny", "--configs", tmp_path, "--results", tmp_path)
        assert result.exit_code == 2 and "--data" in result.output
        assert offramp("reproduce", "branchynet", "--configs", tmp_path / "none").exit_code == 2

    def test_texts(self, tmp_path: Path) -> None:
        rows = [f"{i % 2}\t{'good fine film' if i % 2 else 'bad dull film'} {i}" + " so" * (i % 3) for i in range(60)]
        (tmp_path / "a.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
        settings = reproducing.Settings("text", "text", 2, 1, {"width": 8, "heads": 2}, train="{data}/a.tsv", vocabulary=40, length=8)
        pool = reproducing.load_pool(settings, str(tmp_path))
        assert pool.classes == 2 and len(pool.train) == 60 and pool.test is None
        assert pool.train.texts[1] == "good fine film 1 so"
        batches = reproducing.Batches(pool.train, 2)
        assert len(batches) == 30
        inputs, labels = next(iter(batches))  # lengths 5 and 6, the longest of all being 7
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 6) and labels.tolist() == [0, 1]
        assert reproducing.make_net(settings, pool, depth=1)(**inputs).shape == (2, 2)
        assert pool.train.example()["input_ids"].shape == (2, 6)

    def test_images_of_each_net(self, tmp_path: Path) -> None:
        items = reproducing.Items(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
        pool = reproducing.Pool(items, None, 3)
        for net in ("conv", "vit"):
            settings = reproducing.Settings("images", net, 2, 1, {"width": 8})
            assert reproducing.make_net(settings, pool)(items.inputs).shape == (4, 3)
        with pytest.raises(InvalidInput, match="smaller do not fit"):
            reproducing.make_net(settings, pool, breadth=3)

    def test_batches(self) -> None:
        items = reproducing.Items(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
        whole = list(reproducing.Batches(items, 4))
        assert [len(y) for _, y in whole] == [4, 4, 2] and torch.equal(torch.cat([y for _, y in whole]), items.labels)
        training = reproducing.Batches(items, 4, train=True)
        torch.manual_seed(0)
        first = list(training)
        torch.manual_seed(0)
        again = list(training)
        assert len(training) == 2 and [len(y) for _, y in first] == [4, 4]
        assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(x.flatten().long(), y) for x, y in first) and not torch.equal(first[0][1], items.labels[:4])
        assert len(list(reproducing.Batches(items, 64, train=True))) == 1

    def test_sentences_apart(self) -> None:
        """Held-out texts are whole sentences, and no phrase of them is trained on."""
        sentences = [f"the film number {i} is really very good ." for i in range(6)]
        phrases = (
            [f"number {i} is really very good ." for i in range(6)] + [f"film number {i}" for i in range(6)] + ["really very good", "good"]
        )
        held, rest = reproducing.sentences_apart(sentences + phrases, 2, seed=0)
        texts = sentences + phrases
        chosen = [texts[i] for i in held.tolist()]
        assert len(set(chosen)) == 2 and set(chosen) <= set(sentences)
        left = [texts[i] for i in rest.tolist()]
        assert left and not any(" " in t and any(f" {t} " in f" {c} " for c in chosen) for t in left)
        assert "good" in left and len(left) == 6 + 6 + 6 + 2 - 2 * 3 - 1
        with pytest.raises(InvalidInput, match="6 whole sentences"):
            reproducing.sentences_apart(texts, 6, seed=0)

    def test_a_method_that_trains_nothing_needs_the_full_model(self) -> None:
        pool = reproducing.Pool(reproducing.Items(torch.randn(40, 1, 8, 8), torch.arange(40) % 10), None, 10)
        settings = reproducing.Settings("images", "conv", 3, 1, {"width": 2}, batch_size=8)
        system = replace(systems.build("branchynet", exits=1), recipe=None)
        with pytest.raises(InvalidInput, match="needs the full model"):
            reproducing.train_exits(settings, pool, system, 0, "cpu")
        full, model = reproducing.train_static(settings, pool, {}, 0, "cpu")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        recorded = reproducing.train_exits(settings, pool, system, 0, "cpu", full=model)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        # The recorded network is the full model: the same cost and the same accuracy at its last exit.
        assert recorded.test.base_cost == full.flops
        assert float((recorded.test.predictions[:, -1] == recorded.test.labels).double().mean()) == pytest.approx(full.accuracy)

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

    def test_augmentation_shifts_and_mirrors(self) -> None:
        image = torch.arange(1.0, 17).reshape(1, 1, 4, 4)
        torch.manual_seed(0)
        seen = reproducing.shifted(image.expand(64, -1, -1, -1), by=1)
        assert seen.shape == (64, 1, 4, 4)
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
        mirrored = torch.nn.functional.pad(image.flip(-1), (1, 1, 1, 1))[0, 0]
        possible = [p[i : i + 4, j : j + 4] for p in (padded, mirrored) for i in range(3) for j in range(3)]
        found = [next(n for n, p in enumerate(possible) if torch.equal(s[0], p)) for s in seen]
        assert len(set(found)) > 12
        channels = torch.stack([image[0, 0], 100 + image[0, 0]])[None].expand(8, -1, -1, -1)
        moved = reproducing.shifted(channels, by=0)  # mirrored only; the channels move together
        assert torch.equal(moved[:, 1], moved[:, 0] + 100)
