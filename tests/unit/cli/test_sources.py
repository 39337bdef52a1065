"""Models of every kind, on images and texts, through the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.cli import models
from offramp.cli.parts import parse_part
from offramp.core.errors import InvalidInput, MissingExtra
from offramp.core.trace import Trace
from offramp.network import load_plan
from offramp.policies import PARTS

Call = Callable[..., object]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty pictures of two classes, dark and bright."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("bright", "dark")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 128, (20, 24, 3)) + (1 - number) * 127
            image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Sixty reviews and a tokenizer that knows their words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "a", "good", "bad", "film", "really"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    rows = [f"{'pos' if i % 2 else 'neg'}\ta {'really ' * (i % 4)}{'good' if i % 2 else 'bad'} film" for i in range(60)]
    (tmp_path / "reviews.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
    return tmp_path


def test_images_with_timm(photos: Path, tmp_path: Path, offramp: Call) -> None:
    pytest.importorskip("timm")
    out = tmp_path / "run"
    result = offramp(
        "fit", "--model", "timm:test_vit", "--data", photos, "--image-size", 160, "--part", "0:0.6", "--exits", 2, "--epochs", 1,
        "--batch-size", 12, "--recipe", "Frozen", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = (out / "config.toml").read_text()
    assert 'classes = ["bright", "dark"]' in config and "num_classes = 2" in config
    # The base was drawn at random, so its weights must travel with the exits.
    assert json.loads((out / "adapter" / "adapter.json").read_text())["content"]["base_included"] is True
    result = offramp("record", "--config", out / "config.toml", "--part", "0.6:1", "--rule", "StateSimilarity", "--device", "cpu")
    assert result.exit_code == 0, result.output
    trace = Trace.load(out / "trace")
    assert trace.items == 16 and len(trace.recorded) == 1
    assert '"StateSimilarity"' in next(iter(trace.recorded))
    assert offramp("calibrate", "--out", out, "--mean-cost", 0.8).exit_code == 0
    assert type(load_plan(out / "plan").rule).__name__ == "Confidence"
    (photos / "dark" / "3.png").write_bytes(b"spoilt")
    result = offramp("record", "--config", out / "config.toml", "--device", "cpu")
    assert result.exit_code == 2 and "dark/3.png is not a readable image" in result.output


def test_texts_with_a_bert(reviews: Path, tmp_path: Path, offramp: Call) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    out = tmp_path / "run"
    source = ("--model", f"hf:{tmp_path / 'bert'}", "--data", reviews / "reviews.tsv", "--out", out, "--device", "cpu")
    result = offramp("fit", *source, "--tokenizer", reviews / "tokenizer.json", "--system", "pabee", "--epochs", 2, "--learning-rate", 0.01)
    assert result.exit_code == 0, result.output
    assert [e["name"] for e in json.loads((out / "adapter" / "adapter.json").read_text())["content"]["exits"]] == [
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
    ]
    result = offramp("record", "--config", out / "config.toml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert offramp("calibrate", "--out", out, "--system", "pabee", "--mean-cost", 0.9).exit_code == 0
    result = offramp("evaluate", "--config", out / "config.toml", "--keep-all-exits", "--mode", "throughput", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "evaluation.json").read_text())["exits_as_replayed"] == 1.0


def test_texts_need_a_tokenizer(reviews: Path, tmp_path: Path, toy: Path, offramp: Call) -> None:
    result = offramp("fit", "--model", f"python:{toy / 'net.py'}:make", "--data", reviews / "reviews.tsv", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "--tokenizer" in result.output


def test_timm_names_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(InvalidInput, match=r"Nearest: .*resnet18"):
        models.load_model("timm:resnet81")


def test_timm_preparation() -> None:
    pytest.importorskip("timm")
    loaded = models.load_model("timm:resnet10t", num_classes=3)
    assert loaded.images is not None and loaded.images.size == (176, 176) and loaded.images.mean == (0.485, 0.456, 0.406)
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3) and not loaded.model.training


def test_hf_folder_without_a_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InvalidInput, match="transformers cannot load"):
        models.load_model(f"hf:{tmp_path}")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"offramp\[timm\]"):
        models.load_model("timm:resnet18")


class TestParts:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("margin", "Margin()"),
            ("Energy(temperature=2)", "Energy(temperature=2)"),
            ("Energy(0.5)", "Energy(temperature=0.5)"),
            ("Entropy(classes=10)", "Entropy(classes=10)"),
        ],
    )
    def test_read(self, text: str, shown: str) -> None:
        assert repr(parse_part(text, PARTS, "rule")) == shown

    def test_nested(self) -> None:
        rule = parse_part("AnyOf((At(Confidence, 0.9), At(Patience(), threshold=3)))", PARTS, "rule")
        assert [(type(r.rule).__name__, r.threshold) for r in rule.config["rules"]] == [("Confidence", 0.9), ("Patience", 3.0)]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "3",
            "'Margin'",
            "Margin().__class__",
            "__import__('os')",
            "Margin; Margin",
            "Energy(**{})",
            "[Margin]",
            "Energy(temperature=open('x'))",
            "lambda: 0",
        ],
    )
    def test_nothing_is_evaluated(self, text: str) -> None:
        with pytest.raises(InvalidInput):
            parse_part(text, PARTS, "rule")

    def test_wrong_arguments_show_the_right_ones(self) -> None:
        with pytest.raises(InvalidInput, match=r"AnyOf\(rules\) was written 'AnyOf\(Margin, Patience\)'"):
            parse_part("AnyOf(Margin, Patience)", PARTS, "rule")

    def test_bad_values_are_the_parts_own_errors(self) -> None:
        with pytest.raises(InvalidInput, match="temperature"):
            parse_part("Tempered(Margin(), (0,))", PARTS, "rule")
