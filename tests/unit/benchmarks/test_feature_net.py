"""The feature networks: they learn, come back as they were saved, and give statistics that carry their fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.core.errors import ArtifactError, InvalidInput
from offramp.measure.image_quality import FeatureStatistics, fid

SMALL = {"width": 8, "dimensions": 12, "classes": 3, "blocks": 1}


@pytest.fixture(scope="module")
def net(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("feature_net")


def coloured(items: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one of three channels brighter: a class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (items,), generator=g)
    images = 0.3 * torch.randn(items, 3, 16, 16, generator=g)
    images[torch.arange(items), labels] += 0.5
    return images.clamp(-1, 1), labels


def test_a_short_run_is_whole(net: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = coloured(240, 0)
    held, truth = coloured(120, 1)

    def pixels(images: Tensor) -> np.ndarray:
        return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    np.savez(tmp_path / "data.npz", x_train=pixels(x), y_train=y.numpy(), x_test=pixels(held), y_test=truth.numpy())
    arguments = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "25", "--batch", "60"]
    assert net.main([*arguments, "--width", "8", "--dimensions", "12", "--blocks", "1"]) == 0
    found = json.loads((tmp_path / "out" / "floors.json").read_text())
    assert found["about"]["test_accuracy"] > 0.8 and "test accuracy" in capsys.readouterr().out
    images, labels = net.load_images(tmp_path / "data.npz", "test")
    assert images.shape == (120, 3, 16, 16) and float(images.min()) >= -1 and torch.equal(labels, truth)
    for name in ("trained", "random"):
        features = net.load_features(tmp_path / "out", name)
        made = features(images)
        assert made.shape == (120, 12) and made.dtype == torch.float32
        test, train = (FeatureStatistics.load(tmp_path / "out", f"{name}-{part}") for part in ("test", "train"))
        assert test.network == features.network and (test.count, train.count) == (120, 240)
        assert fid(FeatureStatistics.of(made, features.network), test) < 1e-6 * float(test.covariance.trace())
        assert found[name]["train_against_test"]["fid"] == pytest.approx(fid(train, test))
        assert found[name]["train_against_train"]["count"] == 120
    accuracy = float((net.load_features(tmp_path / "out").classify(images) == labels).double().mean())
    assert accuracy == found["about"]["test_accuracy"]


def test_a_saved_network_comes_back(net: ModuleType, tmp_path: Path) -> None:
    x, _ = coloured(8, 0)
    made = net.random_net(x, 3, **SMALL)
    net.save_net(made, tmp_path, "n", {})
    features = net.load_features(tmp_path, "n")
    assert torch.equal(features(x), made.features(x)) and not any(p.requires_grad for p in features.net.parameters())
    (tmp_path / "n.json").write_text((tmp_path / "n.json").read_text().replace('"width": 8', '"width": 4'))
    with pytest.raises(ArtifactError, match="altered"):
        net.load_features(tmp_path, "n")


def test_random_networks_keep_images_apart_and_are_repeatable(net: ModuleType) -> None:
    x, labels = coloured(300, 0)
    before = torch.random.get_rng_state()
    one, other = net.frozen(net.random_net(x, 0, **SMALL)), net.frozen(net.random_net(x, 0, **SMALL))
    assert torch.equal(one(x), other(x)) and torch.equal(before, torch.random.get_rng_state())
    assert net.frozen(net.random_net(x, 1, **SMALL)).network != one.network
    by_class = [FeatureStatistics.of(one(x[labels == c])) for c in range(3)]
    again = FeatureStatistics.of(one(coloured(300, 5)[0][coloured(300, 5)[1] == 0]))
    assert fid(by_class[0], by_class[1]) > 5 * fid(by_class[0], again)


def test_variation_moves_mirrors_and_blanks(net: ModuleType) -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8).expand(400, 3, 8, 8) + 1
    plain = net.varied(image, torch.Generator().manual_seed(0), shift=0, hole=0)
    straight = (plain == image).flatten(1).all(1)
    mirrored = (plain == image.flip(3)).flatten(1).all(1)
    assert bool((straight ^ mirrored).all()) and 140 < int(straight.sum()) < 260
    holed = net.varied(image, torch.Generator().manual_seed(0), shift=0, hole=4)
    blanks = (holed == 0).sum((1, 2, 3))
    assert int(blanks.max()) == 3 * 16 and int(blanks.min()) >= 3 * 4
    moved = net.varied(image, torch.Generator().manual_seed(0), shift=2, hole=0)
    assert 0.02 < float((moved == image).flatten(1).all(1).double().mean() * 2) < 0.2  # one place in 25, half of them straight
    assert torch.equal(moved.unique(), image.unique())


def test_bad_input_is_told(net: ModuleType) -> None:
    x, y = coloured(20, 0)
    features = net.frozen(net.random_net(x, 0, **SMALL))
    with pytest.raises(InvalidInput, match=r"\[-1, 1\]"):
        features(x * 200)
    with pytest.raises(InvalidInput, match="floats"):
        features((x * 100).byte())
    with pytest.raises(InvalidInput, match=r"batch within 1\.\.20"):
        net.train(net.FeatureNet(**SMALL), x, y, 1, 21, 0)
