"""Tables and pictures of the documentation follow from results; bars are judged; the same result gives the same bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"


CPU = {
    "model": "tiny",
    "dtype": "float32",
    "exits": ["blocks.2"],
    "planned_shares": [0.3, 0.7],
    "environment": {"device": "cpu", "device_name": "Some CPU", "date": "2026-01-02T03:04:05+00:00", "commit": "abcdef0123"}
    | {"uncommitted_changes": True},
    "rows": [
        {"mode": "full", "bucket": 64, "median_ms": 500.0, "items": 256, "segment_ms": [50.0, 50.0]},
        {"mode": "throughput", "incoming": 1, "bucket": 64, "items": 256, "median_ms": 400.0, "over_full": 0.8, "reach": [1.0, 0.7],
         "ideal_ms": 340.0, "exit_efficiency": 0.85},
        {"mode": "throughput", "incoming": 8, "bucket": 64, "items": 256, "median_ms": 350.0, "over_full": 0.7, "reach": [1.0, 0.7],
         "ideal_ms": 340.0, "exit_efficiency": 0.97},
        {"mode": "full", "batch": 64, "median_ms": 100.0, "waited_ms": 100.0, "over_full": 1.0, "segment_ms": [50.0, 50.0]},
        {"mode": "latency", "batch": 64, "median_ms": 93.4, "waited_ms": 93.4, "over_full": 0.934, "reach": [1.0, 0.7], "ideal_ms": 85.0,
         "exit_efficiency": 0.91},
        {"mode": "never", "batch": 64, "median_ms": 102.0, "waited_ms": 102.0, "over_full": 1.02, "reach": [1.0, 1.0], "ideal_ms": 100.0,
         "exit_efficiency": 0.98},
    ],
}  # fmt: skip

CUDA = {
    "model": "base",
    "dtype": "bfloat16",
    "exits": ["blocks.2"],
    "planned_shares": [0.3, 0.7],
    "environment": {"device": "cuda", "device_name": "Some GPU", "cpu": "Some CPU"},
    "rows": [
        {"mode": "full", "batch": 32, "median_ms": 3.0, "waited_ms": 3.2, "over_full": 1.0, "segment_ms": [1.5, 1.5]},
        {"mode": "latency", "batch": 32, "median_ms": 3.0, "waited_ms": 3.1, "over_full": 1.0, "reach": [1.0, 0.7], "ideal_ms": 2.4,
         "exit_efficiency": 0.8, "ideal_alone_ms": 2.1, "exit_efficiency_alone": 0.7},
        {"mode": "quota", "batch": 32, "median_ms": 3.0, "waited_ms": 3.1, "over_full": 1.0, "reach": [1.0, 0.7], "ideal_ms": 2.7,
         "exit_efficiency": 0.9, "ideal_alone_ms": 2.4, "exit_efficiency_alone": 0.8},
        {"mode": "never", "batch": 32, "median_ms": 3.06, "waited_ms": 3.36, "over_full": 1.02, "reach": [1.0, 1.0], "ideal_ms": 3.0,
         "exit_efficiency": 0.98, "ideal_alone_ms": 2.7, "exit_efficiency_alone": 0.9},
    ],
}  # fmt: skip


@pytest.fixture
def two(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = {"a_cpu.json": copy.deepcopy(CPU), "b_gpu.json": copy.deepcopy(CUDA), "other.json": {"rows": []}, "list.json": []}
    monkeypatch.setattr(render, "results", lambda: found)
    return found


def line(text: str, start: str) -> list[str]:
    """Cells of the one row of a table that starts so."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_rows_of_a_cpu(render: ModuleType, two: dict[str, Any]) -> None:
    del two["b_gpu.json"]
    text = render.efficiency(PAGE)
    assert (
        "**tiny**, float32, exits after blocks.2, on Some CPU; 2026-01-02 03:04, commit abcdef0 with uncommitted changes (`a_cpu.json`)"
        in text
    )
    assert line(text, "mode, batch") == ["mode, batch", "ms", "time / full", "exit efficiency", "bar"]
    assert line(text, "full model, 64") == ["full model, 64", "100", "1.000", "-", "-"]
    assert line(text, "latency, 64") == ["latency, 64", "93.4", "0.934", "0.910", ">= 0.90: met"]
    assert line(text, "never leaving, 64") == ["never leaving, 64", "102", "1.020", "0.980", "<= 1.03: met"]
    assert line(text, "full model at 64") == ["full model at 64", "512.0", "1.000", "-", "-"]
    assert line(text, "1") == ["1", "640.0", "0.800", "0.850", ">= 0.92: **missed**"]
    assert line(text, "8") == ["8", "731.4", "0.700", "0.970", ">= 0.92: met"]


def test_rows_of_a_gpu_show_both_yardsticks_and_the_wait(render: ModuleType, two: dict[str, Any]) -> None:
    text = render.efficiency(PAGE)
    assert text.index("**base**") < text.index("**tiny**"), "GPUs come first"
    text = text[: text.index("**tiny**")]
    head = ["mode, batch", "ms", "time / full", "waited for (/ full)", "exit efficiency (alone)", "bar"]
    assert line(text, "mode, batch") == head
    assert line(text, "full model, 32") == ["full model, 32", "3", "1.000", "3.2 (1.000)", "-", "-"]
    assert line(text, "latency, 32") == ["latency, 32", "3", "1.000", "3.1 (0.969)", "0.800 (0.700)", ">= 0.75: met"]
    assert line(text, "quota, 32")[-1] == ">= 0.92: **missed**"
    # Within 3 % with batches one after another, beyond it when each is waited for.
    assert line(text, "never leaving, 32")[1:4] == ["3.06", "1.020", "3.36 (1.050)"]
    assert line(text, "never leaving, 32")[-1] == "<= 1.03: met; waited for: **missed**"


def test_bars_take_the_worst_and_say_what_is_missing(render: ModuleType, two: dict[str, Any]) -> None:
    text = render.bars(PAGE)
    assert line(text, "tiny") == [
        "tiny",
        "0.910",
        "not measured",
        "0.850, arriving by 1 **missed**",
        "1.020 at batch 64",
        "2026-01-02 03:04, commit abcdef0 with uncommitted changes",
    ]
    assert line(text, "base")[1:] == [
        "not measured", "0.800 (0.700)", "not measured", "0.900 (0.800) **missed**", "not measured", "1.020 at batch 32",
        "1.050 at batch 32 **missed**", "date not recorded, commit not recorded",
    ]  # fmt: skip
    assert "Exit efficiency on Some GPU, bfloat16. In brackets: against each segment repeated alone." in text
    assert "Exit efficiency on Some CPU, float32.\n" in text


def test_without_results_it_says_so(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "results", lambda: {})
    for name in ("pareto", "guarantee", "demo", "efficiency", "bars", "claims"):
        assert "No result is committed yet" in render.RENDERERS[name](PAGE), name


def test_pictures_have_the_same_bytes_each_time(render: ModuleType) -> None:
    """The committed file must be what drawing again gives, or every rendering would be a change."""
    for name, draw in (("pareto", render.pareto_picture), ("guarantee", render.guarantee_picture)):
        first = render.standalone(draw())
        assert first == render.standalone(draw())
        assert first == (render.PICTURES / f"{name}.svg").read_text(), f"{name}.svg is out of date: run python docs/render.py"


def test_a_picture_is_found_from_every_page(render: ModuleType) -> None:
    picture = render.pareto_picture()
    for page in render.PAGES:
        target = render.shown(page, "pareto", picture).rsplit("(", 1)[1].rstrip(")")
        assert (page.parent / target).resolve() == render.PICTURES / "pareto.svg"


def test_claims_are_grouped_and_keep_their_verdicts(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"schema": "offramp.reproduce/1", "system": "some", "claim": "It is better.", "verdict": "does not hold"}
    predicate = {"metric": "drop", "relation": "<=", "value": 0.0, "over": "mean", "budget": 0.5}
    measured = {"value": 0.0123, "low": 0.01, "high": 0.02, "level": 0.95}
    found = {
        "b.json": common | {"variant": "two", "predicate": predicate, "measured": measured},
        "a.json": common | {"variant": "one", "predicate": predicate, "measured": None, "verdict": "not measured"},
    }
    monkeypatch.setattr(render, "results", lambda: found)
    text = render.claims(PAGE)
    assert text.count("**some**: It is better. As a test: drop <= 0 at cost 0.5.") == 1
    assert line(text, "one") == ["one", "-", "not measured"]
    assert line(text, "two") == ["two", "0.0123 [0.0100, 0.0200]", "does not hold"]
