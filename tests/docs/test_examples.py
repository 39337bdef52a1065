"""Every example runs as a user would run it, is short, and says what it should."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offramp.core.errors import NoSavingWarning

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.stem != "demo")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    def once(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.chdir(tmp_path)
        grad, state = torch.is_grad_enabled(), torch.get_rng_state()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # offramp's own: an example that changes or saves nothing is no example
                warnings.simplefilter("ignore", NoSavingWarning)  # whether leaving pays is measured, and a busy machine may say no
                for foreign in ("torch", "transformers", "onnx", "accelerate", "copyreg"):
                    warnings.filterwarnings("ignore", module=foreign)
                runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        finally:
            torch.set_grad_enabled(grad)
            torch.set_rng_state(state)
        return capsys.readouterr().out

    return once


def test_examples_are_few_and_short() -> None:
    assert 5 <= len(EXAMPLES) <= 8
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 80, f"{path.name} is no longer short"


def test_digits_budget(run: Callable[..., str]) -> None:
    pytest.importorskip("sklearn")
    rows = re.findall(r"requested ([\d.]+)   realised ([\d.]+)   accuracy ([\d.]+)", run("digits_budget"))
    assert len(rows) == 3
    for requested, realised, accuracy in rows:
        assert float(realised) <= float(requested) + 0.05
        assert float(accuracy) > 0.85


def test_guarantee(run: Callable[..., str]) -> None:
    out = run("guarantee")
    assert "holds with probability >= 0.9" in out
    assert "refused, as it should be" in out
    seen, full, cost = map(float, re.search(r"accuracy ([\d.]+), full model ([\d.]+), mean cost ([\d.]+)", out).groups())
    assert full - seen <= 0.02 + 0.02  # the promise is about the population; 1,000 items scatter
    assert cost < 1


def test_stream(run: Callable[..., str]) -> None:
    out = run("stream")  # holds its own comparison with a run that uses no queue
    leaving = eval(re.search(r"leaving at each exit: (\[.*\])", out).group(1))
    assert sum(leaving) == 2048
    assert min(leaving) > 300


def test_onnx_export(run: Callable[..., str], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = run("onnx_export", str(tmp_path))
    assert "same exits: True" in out
    assert (tmp_path / "adaptive.onnx").stat().st_size > 0


def test_text_bert(run: Callable[..., str]) -> None:
    pytest.importorskip("transformers")
    rows = re.findall(r"length (\d+): accuracy ([\d.]+), exits (\[.*\])", run("text_bert"))
    assert [int(length) for length, _, _ in rows] == [12, 20]
    for _, accuracy, exits in rows:
        assert sum(eval(exits)) == 32
        assert float(accuracy) > 0.5


def test_language_model(run: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = run("language_model")
    kept, passes, plain = re.search(
        r"same text: True, drafts kept: ([\d.]+)\npasses over all blocks: (\d+) in place of (\d+)", out
    ).groups()
    assert float(kept) > 0.5 and int(passes) < 0.6 * int(plain)
    assert "as planned, same text: True" in out and "Plain decoding: " in out
    left, otherwise = map(int, re.search(r"left early: (\d+), of those the model would have written otherwise: (\d+)", out).groups())
    assert otherwise <= 0.2 * left and left > 20
    assert (tmp_path / "draft" / "model.safetensors").stat().st_size > 0 and (tmp_path / "exits" / "lm.json").is_file()
