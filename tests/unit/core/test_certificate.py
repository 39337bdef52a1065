"""Plans and certificates: checked when made, readable, and the same after a round trip through files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch

from offramp.core.certificate import Certificate, Estimate, Plan
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.policies import PARTS, Confidence, HaltingCDF, all_of, at

INF = float("inf")
PROMISE = Certificate(
    "Accuracy drops by at most 0.01.",
    "LTT, Hoeffding-Bentkus",
    {"max_drop": 0.01},
    {"max_drop": Estimate(0.004, 0.001, 0.009), "mean_cost": Estimate(0.6, 0.58, 0.62, 0.9)},
    guaranteed=True,
    items=2500,
    fingerprint="a" * 64,
    delta=0.1,
)


def plan(**changes) -> Plan:
    given = {
        "rule": Confidence(),
        "exits": ("a", "b", "output"),
        "thresholds": (0.9, INF, -INF),
        "shares": (0.3, 0.0, 0.7),
        "mean_cost": 0.8,
        "certificate": PROMISE,
        "fingerprint": "a" * 64,
        "notes": {"why": "a test"},
    }
    return Plan(**{**given, **changes})


def test_round_trip(tmp_path):
    plan().save(tmp_path)
    assert Plan.load(tmp_path, PARTS) == plan()
    plan(certificate=None, thresholds=(-INF, 1 / 3, -INF)).save(tmp_path)
    assert Plan.load(tmp_path, PARTS) == plan(certificate=None, thresholds=(-INF, 1 / 3, -INF))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_learned_rule_comes_back_with_its_weights(tmp_path):
    rule = all_of(Confidence(), at(HaltingCDF([4, 4], layers=1), 0.5))
    plan(rule=rule).save(tmp_path)
    again = Plan.load(tmp_path, PARTS).rule
    assert isinstance(again, type(rule))
    assert all(torch.equal(v, rule.state_dict()[k]) for k, v in again.state_dict().items()) and again.state_dict()
    data = (tmp_path / "plan.safetensors").read_bytes()
    (tmp_path / "plan.safetensors").write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="truncated or was altered"):
        Plan.load(tmp_path, PARTS)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated(tmp_path, keep):
    plan().save(tmp_path)
    data = (tmp_path / "plan.json").read_bytes()
    (tmp_path / "plan.json").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ArtifactError, match=re.escape("plan.json")):
        Plan.load(tmp_path, PARTS)


def test_an_altered_threshold_is_noticed(tmp_path):
    plan().save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"0.9"', '"0.1"'))
    with pytest.raises(ArtifactError, match="altered"):
        Plan.load(tmp_path, PARTS)


def test_a_rule_that_is_not_known(tmp_path):
    @dataclass(frozen=True)
    class Mine(Confidence):
        pass

    plan(rule=Mine()).save(tmp_path)
    with pytest.raises(ArtifactError, match="'Mine'"):
        Plan.load(tmp_path, PARTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": (0.9, -INF)}, "one threshold and one share per exit"),
        ({"shares": (0.3, 0.7)}, "one threshold and one share per exit"),
        ({"thresholds": (0.9, 0.5, 0.1)}, "last threshold must be -inf"),
        ({"thresholds": (float("nan"), 0.5, -INF)}, "not a number"),
        ({"shares": (0.3, 0.3, 0.3)}, "sum to 1"),
        ({"shares": (-0.3, 0.3, 1.0)}, "sum to 1"),
        ({"shares": (float("nan"), 0.3, 0.7)}, "sum to 1"),
        ({"exits": (), "thresholds": (), "shares": ()}, "at least one exit"),
    ],
)
def test_a_plan_is_checked_when_made(changes, message):
    with pytest.raises(InvalidInput, match=message):
        plan(**changes)


def test_fingerprint():
    plan().check("a" * 64)
    plan(fingerprint="").check("b" * 64)
    plan().check("")
    with pytest.raises(FingerprintMismatch, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb.*record and calibrate again"):
        plan().check("b" * 64)


def test_text():
    text = str(plan())
    assert "mean cost 0.800" in text and "30.0%" in text and "inf" in text and PROMISE.statement in text
    assert "requested      0.01   realised 0.004 [0.001, 0.009]" in text and "2,500 items" in text
    assert "holds with probability >= 0.9" in text
    assert "guarantee  none: an estimate" in str(replace(PROMISE, delta=None, guaranteed=False))
    in_expectation = str(replace(PROMISE, delta=None))  # of conformal risk control, whose bound has no probability of failing
    assert "guarantee  holds in expectation" in in_expectation and "estimate" not in in_expectation
    assert PROMISE.statement not in str(plan(certificate=None))


def test_certificate_round_trip():
    assert Certificate.from_dict(PROMISE.to_dict()) == PROMISE
