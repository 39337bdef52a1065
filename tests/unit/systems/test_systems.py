"""Listing, building, showing and comparing systems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offramp import systems
from offramp.core.errors import InvalidInput
from offramp.core.types import Readout
from offramp.policies import Patience


def test_listing_imports_no_system() -> None:
    code = (
        "import sys; from offramp import systems; names = systems.list_systems(); "
        "loaded = [m for m in sys.modules if m.startswith('offramp.systems.')]; print(names, loaded)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'branchynet'" in out and out.strip().endswith("[]")


@pytest.mark.parametrize("name", ["msdnet-budget", "msdnet_budget", " MSDNet-Budget "])
def test_names_are_forgiving(name: str) -> None:
    assert systems.load_card(name).name == "msdnet-budget"


@pytest.mark.parametrize(("name", "message"), [("pabe", "Nearest: pabee"), ("../x", "There is no system"), ("", "There is no system")])
def test_unknown_system(name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        systems.load_card(name)


def test_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'patience'"):
        systems.build("pabee", patiense=3)


def test_bad_arguments_are_refused() -> None:
    for name, kwargs in [("pabee", {"patience": 0}), ("eero", {"beta": -1.0}), ("branchynet", {"mean_cost": 0.0})]:
        with pytest.raises(InvalidInput):
            systems.build(name, **kwargs)


def test_diff_is_computed_and_field_by_field() -> None:
    found = {d.axis: (d.left, d.right) for d in systems.diff("branchynet", "msdnet-budget")}
    assert found["rule"] == ("Entropy()", "Confidence()")
    assert found["placement.count"] == ("2", "4")
    assert found["calibrator"] == ("QuantileCost()", "GeometricShares()")
    assert "recipe" not in found and "target" not in found
    assert systems.diff("pabee", "pabee") == []


def test_show_has_the_card_the_parts_and_the_notes() -> None:
    text = systems.show("pabee")
    for piece in (
        "BERT Loses Patience",
        "Pooler(shared=True)",
        "Joint(weights=IndexWeighted())",
        "patience = 6",
        "Deviations from the released code",
    ):
        assert piece in text


def test_no_claim_is_met_by_running_the_full_model() -> None:
    """What a predicate counts lies below the full cost, for every system."""
    for name in systems.list_systems():
        predicate = systems.load_card(name).predicate
        assert predicate is not None and not predicate.counts(1.0) and not predicate.counts(1.1)
        assert any(predicate.counts(budget) for budget in (0.5, 0.64, 0.67, 0.75))


def test_cards_say_what_they_were_checked_against() -> None:
    for name in systems.list_systems():
        assert "Checked against" in systems.show(name)


def test_a_reference_has_its_parity_recorded() -> None:
    recorded = json.loads((Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "parity.json").read_text())
    for name in systems.list_systems():
        assert systems.load_card(name).status != "reference" or name in recorded


def test_cite_once_each() -> None:
    text = systems.cite("eero", "pabee", "eero")
    assert text.count("@") == 2
    with pytest.raises(InvalidInput, match="at least one"):
        systems.cite()


def test_pabee_leaves_at_zero_with_the_papers_patience() -> None:
    """Threshold 0 of the composed rule is patience 2: three equal answers in a row, counting the one they agree with."""
    rule = systems.build("pabee", patience=2).rule
    answers = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1]])
    state = rule.begin(3, torch.device("cpu"))
    leaves = []
    for k in range(4):
        score, state = rule.score(k, Readout(torch.nn.functional.one_hot(answers[:, k], 2).float()), state)
        leaves.append(score >= 0)
    assert torch.stack(leaves, 1).tolist() == [[False, False, True, True], [False, False, False, True], [False] * 4]
    assert type(rule.rule) is Patience


def test_branchynet_weights() -> None:
    recipe = systems.build("branchynet", weights=(1.0, 0.5, 0.3)).recipe
    assert recipe.weights(3, 0.0) == (1.0, 0.5, 0.3)
    assert systems.build("branchynet").recipe.weights(3, 0.0) == (1.0, 1.0, 1.0)
