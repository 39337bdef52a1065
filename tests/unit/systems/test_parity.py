"""Systems against what the authors' code did on the same made-up scores, as recorded in benchmarks/results/parity.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from offramp import systems
from offramp.budget.mean_cost import geometric_thresholds
from offramp.core.types import Readout
from offramp.policies import Patience
from offramp.train.losses import CrossEntropy
from offramp.train.recipe import Seen

RECORD = json.loads((Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "parity.json").read_text())


def distinct_scores(items: int, exits: int, seed: int) -> NDArray[np.float32]:
    """Scores in (0.5, 1) without ties; items that are easy at one exit tend to be easy at the others."""
    g = np.random.default_rng(seed)
    skill = g.random(items)
    out = []
    for _ in range(exits):
        noisy = skill + 0.5 * g.random(items)
        rank = np.empty(items, np.int64)
        rank[np.argsort(noisy)] = np.arange(items)
        out.append(0.5 + (rank + 1) / (2 * (items + 1)))
    return np.stack(out, 1).astype(np.float32)


def settling_logits(items: int, layers: int, classes: int, seed: int) -> NDArray[np.float32]:
    """Logits that begin at random and settle with depth."""
    g = np.random.default_rng(seed)
    goal = g.random((items, 1, classes))
    depth = (np.arange(layers) / (layers - 1))[None, :, None]
    return (depth * goal + (1 - depth) * g.random((items, layers, classes))).astype(np.float32)


@pytest.mark.parametrize("case", RECORD["msdnet-budget"]["cases"], ids=lambda c: f"q={c['q']:g}")
def test_msdnet_thresholds(case: dict[str, Any]) -> None:
    """As many leave at each exit, for every ratio that the release sweeps; scores are distinct, so they are the same items."""
    about = RECORD["msdnet-budget"]
    scores = distinct_scores(about["items"], about["exits"], seed=0)
    thresholds = geometric_thresholds(torch.from_numpy(scores), case["q"]).numpy().astype(np.float32)
    leaves = (scores >= thresholds).argmax(1)
    assert np.bincount(leaves, minlength=about["exits"]).tolist() == case["leaving"]


@pytest.mark.parametrize("kind", ["classes", "values"])
@pytest.mark.parametrize("patience", range(1, 9))
def test_pabee_exits(kind: str, patience: int) -> None:
    """Every item leaves at the same layer."""
    about = RECORD["pabee"]
    classes, seed = (about["classes"], 0) if kind == "classes" else (1, 1)
    logits = torch.from_numpy(settling_logits(about["items"], about["layers"], classes, seed))
    rule = systems.build("pabee", patience=patience, regression_tolerance=None if kind == "classes" else about["tolerance"]).rule
    assert type(rule.rule) is Patience
    state = rule.begin(about["items"], torch.device("cpu"))
    leaves = torch.full((about["items"],), about["layers"])
    for k in range(about["layers"] - 1):
        score, state = rule.score(k, Readout(logits[:, k]), state)
        leaves = torch.where((score >= 0) & (leaves == about["layers"]), k + 1, leaves)
    assert "".join(f"{layer:x}" for layer in leaves.tolist()) == about["exits"][kind][str(patience)]


def test_pabee_loss() -> None:
    about = RECORD["pabee"]
    logits = torch.from_numpy(settling_logits(about["items"], about["layers"], about["classes"], 0))
    seen = Seen(tuple(logits.unbind(1)), torch.arange(about["items"]) % about["classes"], CrossEntropy())
    assert float(systems.build("pabee").recipe.objective(seen).total) == pytest.approx(about["loss"], rel=1e-6)
