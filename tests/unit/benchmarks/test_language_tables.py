"""Tables of the language-model benchmarks: what is shown, which bars are met, and what a page says without results."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "results.md"
MACHINE = {"device": "cuda:0", "device_name": "a GPU", "date": "2026-01-02T03:04:05", "commit": "0123456789"}


def _equal(texts: int, equal: int, far: int = 0) -> dict[str, Any]:
    return {"texts": texts, "equal": equal, "not_near_ties": far, "divergences": []}


DECODING: dict[str, Any] = {
    "benchmark": "decoding", "dtype": "bfloat16", "exit": 4, "agreement": 0.9, "environment": MACHINE, "left_out": ["capture: 32 rows"],
    "shape": {"blocks": 22, "width": 2048, "heads": 32, "kv_heads": 4, "vocabulary": 32000},
    "rows": [
        {"way": "ours, plain", "rows": 1, "tokens_per_s": 750.0, "of_bandwidth_limit": 0.5, "synchronisations": {"per_round": 1.0}},
        {"way": "ours, 5 drafts", "rows": 1, "tokens_per_s": 1650.0, "of_bandwidth_limit": 1.1, "synchronisations": {"per_round": 1.0},
         "acceptance": 0.9, "tokens_per_round": 4.5, "against_plain": _equal(8, 7)},
        {"way": "transformers, greedy", "rows": 1, "tokens_per_s": 80.0},
        {"way": "transformers, assistant_early_exit", "rows": 1, "tokens_per_s": 60.0},
        {"way": "ours, plain", "rows": 8, "tokens_per_s": 5000.0},
        {"way": "ours, length by round", "rows": 8, "tokens_per_s": 4900.0, "over_plain": 0.98, "against_plain": _equal(8, 8)},
        {"way": "ours, 5 drafts, long prompt", "rows": 1, "tokens_per_s": 900.0, "peak_bytes": 110, "prompt_tokens": 8192},
        {"way": "ours, plain, long prompt", "rows": 1, "tokens_per_s": 600.0, "peak_bytes": 100, "prompt_tokens": 8192},
    ],
}  # fmt: skip


def test_without_results_a_page_says_how_to_make_them(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "results", dict)
    for name in ("decoding", "decoding_trained", "lm_systems"):
        assert render.RENDERERS[name](PAGE).startswith("*No result is committed yet; `make")


def test_decoding_is_held_to_its_bars(render: ModuleType) -> None:
    found = {
        what.partition(" >=")[0].partition(" <=")[0].partition(" =")[0]: (value, met)
        for what, value, met in render.decoding_bars(DECODING["rows"])
    }
    assert found == {
        "plain, tokens/s": ("750.000", "met"),
        "plain over transformers' greedy": ("9.375", "**missed**"),
        "drafts over the bandwidth limit of plain decoding": ("1.100", "met"),
        "drafts over transformers' assistant_early_exit": ("27.500", "met"),
        "waits of the host in a round": ("1.000", "met"),
        "more rows, length by round, over plain, lowest": ("0.980", "met"),
        "memory of drafts over plain, long prompt": ("1.100", "**missed**"),
    }


def test_bars_that_were_not_measured_are_not_judged(render: ModuleType) -> None:
    assert [bar[0].split()[0] for bar in render.decoding_bars(DECODING["rows"][:1])] == ["plain,"]


def test_the_table_of_decoding(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "results", lambda: {"a.json": DECODING})
    text = render.decoding(PAGE)
    assert "| ours, 5 drafts | 1 | 1,650 | 1.10 | 2.20 | 0.90 | 4.50 | 1.00 | 1 of 8 differ, 0 of them not at a near tie |" in text
    assert "| ours, length by round | 8 | 4,900 | - | 0.98 | - | - | - | equal |" in text
    assert "Left out for want of time: capture: 32 rows." in text and "on a GPU" in text


def test_the_table_of_a_trained_model(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"rows": 1, "prompts": 80, "plain_tokens_per_s": 1000.0, "tokens_per_s": 1600.0, "acceptance": 0.7, "tokens_per_round": 2.8}
    ahead = {**row, "way": "verified", "speedup": 1.6, "predicted": 1.9, "predicted_over_measured": 1.19}
    result = {
        "benchmark": "decoding_trained", "dtype": "bfloat16", "environment": MACHINE, "shape": {"blocks": 24},
        "model": {"model": {"parameters": 75e6}}, "chosen": {"exit": 3, "head": "shared-3", "draft_length": 5},
        "divergences": _equal(160, 158, 1),
        "rows": [{**ahead, "group": "all"}, {**row, "group": "all", "way": "by_round", "speedup": 1.7},
                 {"way": "float32", "group": "all", "rows": 1, **_equal(200, 200)}],
    }  # fmt: skip
    monkeypatch.setattr(render, "results", lambda: {"b.json": result})
    text = render.decoding_trained(PAGE)
    assert "24 blocks, 75 M parameters" in text and "drafts of 5 from the exit after block 3 (shared-3)" in text
    assert "| all | 80 | 1,000 | 1,600 | 0.70 | 2.80 | 1.60 | 1.70 | 1.90 | 1.19 |" in text
    assert "2 of 160 differ, 1 of them not at a near tie" in text and "In float32: equal (200 prompts)" in text
    assert ">= 1.5: met" in text and "within 15%: **missed**" in text


def test_the_table_of_systems(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = {
        "way": "drafts", "system": "kangaroo", "exit": 2, "draft_length": 6, "acceptance": 0.6, "tokens_per_round": 2.0, "speedup": 1.2,
        "tokens_per_s": 1200.0, "plain_tokens_per_s": 1000.0, "against_plain": _equal(24, 24),
    }  # fmt: skip
    leaves = {
        "way": "leaves", "system": "free", "fill": "CatchUp", "left": 0.5, "blocks_share": 0.7, "cost": 0.75, "agreement": 0.93,
        "perplexity": 9.0, "perplexity_plain": 8.0, "perplexity_first": 9.5, "perplexity_first_plain": 8.5,
        "reference_s": 1.5, "reference_plain_s": 1.2,
    }  # fmt: skip
    captured = {
        "way": "captured leaves", "system": "ours: catch-up", "limit": 0.05, "threshold": 0.8, "left": 0.4, "audited": 200, "disagreed": 8,
        "tokens_per_s": 1500.0, "plain_tokens_per_s": 1000.0, "speedup": 1.5,
    }  # fmt: skip
    peer = {"way": "transformers, prompt_lookup", "system": "-", "tokens_per_s": 70.0}
    result = {
        "benchmark": "lm_systems",
        "dtype": "bfloat16",
        "environment": MACHINE,
        "seconds_of_training": 25.0,
        "even_prompts": 12,
        "even_new_tokens": 64,
        "rows": [drafts, leaves, captured, peer],
    }
    monkeypatch.setattr(render, "results", lambda: {"c.json": result})
    text = render.lm_systems(PAGE)
    assert "| kangaroo | 2 | 6 | 0.60 | 2.00 | 1,200 | 1,000 | 1.20 | equal |" in text
    assert "| transformers, prompt_lookup | - | - | - | - | 70 | - | - | - |" in text
    assert "| 0.05 | 0.80 | 0.40 | 0.040 | 0.016 | 1,500 | 1,000 | 1.50 |" in text
    assert "| free | CatchUp | 0.50 | 0.70 | 0.75 | 0.930 | 9.00 (8.00) | 9.50 (8.50) | 512 (640) |" in text
