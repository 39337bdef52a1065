"""The benchmark of the guarantee: its statistics, and a small run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offramp.core.trace import Trace


@pytest.fixture(scope="module")
def guarantee(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("guarantee")


def test_binomial_slack(guarantee: ModuleType) -> None:
    """Against the sum over all counts, written out."""
    tail = sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(4, 21))
    assert guarantee.binomial_tail(20, 0.1, 3) == pytest.approx(tail)
    most = guarantee.allowed(20, 0.1)
    assert guarantee.binomial_tail(20, 0.1, most) <= 0.05 < guarantee.binomial_tail(20, 0.1, most - 1)


def test_halves_break_a_tight_promise_more_often_than_the_population_does(guarantee: ModuleType) -> None:
    """The derivation by simulation: random halves of fixed items, one setting at the least favourable true drop, a normal bound."""
    items, delta, z = 400, 0.1, 1.2815515655
    g = torch.Generator().manual_seed(0)
    losses = torch.randn(items, generator=g, dtype=torch.float64)
    losses = (losses - losses.mean()) / losses.std(correction=0)
    noise = 1 / math.sqrt(items / 2)
    drop = -z * noise / 2  # the limit is 0
    order = torch.rand(10_000, items, generator=g).argsort(1)
    calibration = losses[order[:, : items // 2]].mean(1) + drop
    test = losses[order[:, items // 2 :]].mean(1) + drop
    broken = ((calibration <= -z * noise) & (test > 0)).double().mean()
    assert float(broken) == pytest.approx(guarantee.seen_on_halves(delta), abs=0.015)
    assert 0.17 < guarantee.seen_on_halves(delta) < 0.19 and guarantee.seen_on_halves(0.5) == pytest.approx(0.5)


def test_draws(guarantee: ModuleType) -> None:
    schemes = {name: (calibration, test) for name, calibration, test in guarantee.drawn(11, 3)}
    calibration, test = schemes["split"]
    assert len(calibration) == 5 and sorted([*calibration.tolist(), *test.tolist()]) == list(range(11))
    calibration, test = schemes["population"]
    assert len(calibration) == 5 and test.tolist() == list(range(11))
    again = {name: rows.tolist() for name, rows, _ in guarantee.drawn(11, 3)}
    assert again == {name: rows.tolist() for name, (rows, _) in schemes.items()}


def test_a_small_run(
    guarantee: ModuleType,
    made_up: Callable[..., Trace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made_up(600, 0).save(tmp_path / "traces" / "made-up")
    arguments = ["--traces", str(tmp_path / "traces"), "--results", str(tmp_path / "results"), "--draws", "12", "--max-drop", "0.03"]
    monkeypatch.setattr(sys, "argv", ["guarantee.py", *arguments])
    status = guarantee.main()
    result = json.loads((tmp_path / "results" / "guarantee_traces.json").read_text())
    rows = {(r["scheme"], r["method"]): r for r in result["traces"]["made-up"]["rows"]}
    assert set(rows) == {(s, m) for s in ("population", "split") for m in ("LTT", "naive")}
    for (scheme, _), row in rows.items():
        assert row["violations"] == sum(d > 0.03 for d in row["drops"]) and len(row["drops"]) == 12
        if scheme == "population":
            assert row["violations_of_all_items"] == row["violations"] and row["mean"]["all_items"] == pytest.approx(row["mean"]["drop"])
    # The cautious method gives up less accuracy than the naive one, and both save something.
    assert rows["population", "LTT"]["mean"]["drop"] < rows["population", "naive"]["mean"]["drop"]
    assert rows["population", "naive"]["mean"]["cost"] < 1
    assert status == (0 if rows["population", "LTT"]["violations"] <= result["allowed_violations"] else 1)
    text = (tmp_path / "results" / "guarantee_traces.md").read_text()
    assert "| made-up | 300 of 600 | split | LTT |" in text and "## Reading" in text and "18.2%" in text
    assert text.strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize(("within", "words"), [(True, "kept within slack for every trace"), (False, "broken for made-up (50.0%)")])
def test_words_follow_from_the_numbers(guarantee: ModuleType, within: bool, words: str) -> None:
    row = {"method": "LTT", "share": 0.5, "within_slack": within, "share_of_all_items": 0.25}
    result = {"delta": 0.1, "traces": {"made-up": {"rows": [row | {"scheme": scheme} for scheme in ("population", "split")]}}}
    text = " ".join(guarantee.reading(result))
    assert words in text and "at most 25.0% of the draws" in text
    assert ("beyond slack for made-up (50.0%)" in text) == (not within)


def test_no_traces(guarantee: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["guarantee.py", "--traces", str(tmp_path)])
    with pytest.raises(SystemExit, match="No traces in"):
        guarantee.main()
