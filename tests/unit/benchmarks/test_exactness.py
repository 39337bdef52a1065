"""The benchmark of exactness: its statistics, its drafts, and that it notices what is not exact."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from offramp import systems
from offramp.engines.text.generate import generate
from offramp.language import attach_lm
from offramp.policies.decoding import Plain

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exactness(script: Callable[[str], ModuleType]) -> ModuleType:
    script("lm_common")
    return script("exactness")


def run(exactness: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> dict[str, Any]:
    """A small call of the command, and what it wrote."""
    small = ["--prompts", "3", "--new", "8", "--batch", "3", "--draws", "300", "--repeats", "1", "--longest", "6", "--minutes", "5"]
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--out", str(out), *small, *more])
    exactness.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


# ---- statistics ----------------------------------------------------------------------------------------------------------


def test_chi_square_of_three_cells_is_an_exponential(exactness: ModuleType) -> None:
    counts, chances = torch.tensor([30, 50, 40]), torch.tensor([0.25, 0.5, 0.25])
    found = exactness.chi_square(counts, chances)
    value = 0.0 + 100 / 60 + 100 / 30
    assert found["statistic"] == pytest.approx(value) and found["p"] == pytest.approx(math.exp(-value / 2)) and found["cells"] == 3


def test_rare_cells_are_one_and_what_cannot_happen_must_not(exactness: ModuleType) -> None:
    chances = torch.tensor([0.5, 0.44, 0.03, 0.03, 0.0])
    assert exactness.chi_square(torch.tensor([50, 44, 3, 3, 0]), chances)["cells"] == 3
    found = exactness.chi_square(torch.tensor([50, 44, 3, 2, 1]), chances)
    assert found["p"] == 0 and found["impossible"] == 1


def test_uniform_numbers_look_uniform_and_others_do_not(exactness: ModuleType) -> None:
    assert exactness.uniformity([(k + 0.5) / 40 for k in range(40)]) > 0.999
    assert exactness.uniformity([(k + 0.5) / 80 for k in range(40)]) < 1e-6
    scaled = (math.sqrt(25) + 0.12 + 0.11 / 5) * 0.2  # 25 numbers, shifted so that the distance is a fifth
    expected = 2 * (math.exp(-2 * scaled**2) - math.exp(-8 * scaled**2) + math.exp(-18 * scaled**2))
    assert exactness.uniformity([min(1.0, (k + 1) / 25 + 0.16) for k in range(25)]) == pytest.approx(expected, abs=2e-3)


def test_the_law_is_that_of_the_model(exactness: ModuleType) -> None:
    model = exactness.llama(3, 2, 16)
    chances = exactness.law(model, [1, 0], {})
    assert float(chances.sum()) == pytest.approx(1) and bool((chances > 0).all())
    text, logs = [1, 0], 0.0
    for token in (2, 0, 1, 1):
        with torch.no_grad():
            logs += float(model(torch.tensor([text])).logits[0, -1].double().log_softmax(-1)[token])
        text.append(token)
    assert float(chances[2 * 27 + 0 * 9 + 1 * 3 + 1]) == pytest.approx(math.exp(logs))
    cut = exactness.law(model, [1, 0], {"temperature": 0.7, "top_p": 0.5})
    assert float(cut.sum()) == pytest.approx(1) and bool((cut == 0).any())


# ---- drafts --------------------------------------------------------------------------------------------------------------


def test_every_lossless_system_drafts(exactness: ModuleType) -> None:
    cards = [systems.load_card(name) for name in systems.list_systems()]
    lossless = {c.name for c in cards if c.engine == "generate" and c.lossless}
    assert lossless >= {"layerskip", "kangaroo", "eesd", "sorted-llama"}
    assert set(exactness.drafting_systems()) == lossless | {"self-supervised-early-exits"}
    for name in exactness.drafting_systems():
        assert exactness.drafting(exactness.composed(name, 4, 8)).draft_length > 1


@pytest.mark.parametrize("name", ["kangaroo", "layerskip"])
def test_good_drafts_are_kept_and_bad_ones_never(exactness: ModuleType, name: str) -> None:
    model = exactness.damped(exactness.llama(64, 4, 16), 0.01)
    system = exactness.composed(name, 4, 16)
    kept = {}
    for drafts in ("good", "bad"):
        lm = exactness.attached(model, system, drafts)
        found = generate(lm, [[5, 9], [3]], exactness.drafting(system), max_new_tokens=24)
        assert found.tokens == generate(lm, [[5, 9], [3]], Plain(), max_new_tokens=24).tokens
        kept[drafts] = found.acceptance
    assert kept["good"] > 0.6 and kept["bad"] == 0


def test_neighbours_differ_in_length(exactness: ModuleType) -> None:
    lengths = [len(p) for p in exactness.ragged([[1] * 10] * 20, 10)]
    assert min(lengths) == 1 and max(lengths) == 10 and all(a != b for a, b in itertools.pairwise(lengths))


def test_a_threshold_lies_in_a_gap(exactness: ModuleType) -> None:
    assert exactness.between(torch.tensor([0.9, 0.1, 0.4, 0.6, 0.41, 0.2])) == pytest.approx(0.505)


# ---- the command ---------------------------------------------------------------------------------------------------------


def test_a_call_that_is_kept_goes_on(exactness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(exactness, "drafting_systems", lambda: ["kangaroo"])
    first = run(exactness, monkeypatch, out, "--parts", "sampling,greedy", "--engines", "reference", "--batch", "2+1")
    assert first["failures"] == [] and first["prompts_from"] == "random tokens" and first["left_out"] == []
    assert [(r["system"], r["drafts"]) for r in first["rows"]] == [
        ("plain", "good"), ("plain", "random"), ("kangaroo", "good"), ("kangaroo", "bad"), ("kangaroo", "random"),
    ]  # fmt: skip
    assert all(r["against_plain"]["equal"] == r["against_transformers"]["equal"] == 3 for r in first["rows"])
    assert first["sampling"]["tests"] == 4 and all(c["p"] < 1e-6 for c in first["control"])
    second = run(exactness, monkeypatch, out, "--parts", "greedy", "--keep", "--batch", "2+1")
    assert len(second["rows"]) == 10 and second["sampling"] == first["sampling"]
    assert not any("reference" in name for name in second["seconds"])


def test_caches_and_mates_of_every_system(exactness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(exactness, monkeypatch, tmp_path / "result.json", "--parts", "cache,mates", "--damped", "0.3")
    assert {"free", "ee-llm", "kangaroo"} <= {r["system"] for r in found["cache"]}
    assert not {"calm", "skipdecode"} & {r["system"] for r in found["cache"]}, "their keys and values are not the full model's"
    assert {"calm", "skipdecode"} <= {r["system"] for r in found["mates"]} and all(r["equal"] == r["rows"] for r in found["mates"])


def test_a_wrong_token_is_noticed(exactness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exactness, "drafting_systems", lambda: ["kangaroo"])
    write = exactness.Exactness.write

    def tampered(self: Any, writer: Any, sizes: Any) -> Any:
        texts, tried, kept = write(self, writer, sizes)
        if sum(tried):
            texts[1][4] = (texts[1][4] + 1) % 512
        return texts, tried, kept

    monkeypatch.setattr(exactness.Exactness, "write", tampered)
    out = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="Not exact: greedy 3 reference good: kangaroo, against plain"):
        run(exactness, monkeypatch, out, "--parts", "greedy", "--engines", "reference")
    row = json.loads(out.read_text())["rows"][2]
    assert row["against_transformers"]["equal"] == 2 and row["against_plain"]["divergences"][0]["place"] == 4
    assert row["against_plain"]["not_near_ties"] == 1


def test_a_cell_that_does_not_fit_is_named(exactness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exactness, "drafting_systems", lambda: ["kangaroo"])
    found = run(exactness, monkeypatch, tmp_path / "r.json", "--parts", "greedy", "--engines", "reference", "--guess", "1e6")
    assert found["rows"] == [] and found["left_out"] == [f"greedy 3 reference {d}: {s}" for s, d in (
        ("plain", "good"), ("plain", "random"), ("kangaroo", "good"), ("kangaroo", "bad"), ("kangaroo", "random"))]  # fmt: skip


def test_plain_decoding_drafts_nothing(exactness: ModuleType) -> None:
    lm = attach_lm(exactness.llama(64, 3, 16), [1])
    assert generate(lm, [[5]], Plain(), max_new_tokens=3).drafted == []
