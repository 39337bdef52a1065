"""Traces and latency tables: shapes are checked, rows stay together, and what is saved comes back."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from offramp.core.errors import ArtifactError, InvalidInput, NotReplayable
from offramp.core.parts import part_key
from offramp.core.trace import LatencyTable, RiskTable, Trace
from offramp.core.types import Readout
from offramp.policies import Confidence, Patience, StateSimilarity

N, K, C = 11, 3, 4


def table(**changes) -> LatencyTable:
    given = {
        "batch_sizes": (1, 4),
        "segment_ms": torch.rand(K, 2, dtype=torch.float64),
        "head_ms": torch.rand(K, 2, dtype=torch.float64),
        "gather_ms": torch.rand(2, dtype=torch.float64),
        "sync_ms": 0.125,
        "device": "a machine",
    }
    return LatencyTable(**{**given, **changes})


def trace(**changes) -> Trace:
    logits = torch.randn(N, K, C)
    given = {
        "exits": ("a", "b", "output"),
        "predictions": logits.argmax(-1),
        "cost": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "base_cost": 2.9,
        "losses": torch.rand(N, K),
        "labels": torch.arange(N),
        "logits": logits,
        "recorded": {part_key(StateSimilarity()): torch.rand(N, K)},
        "latency": table(),
        "fingerprint": "f" * 64,
        "provenance": {"data": "made up", "n": 3},
    }
    return Trace(**{**given, **changes})


def same(a: Trace, b: Trace) -> None:
    for name in ("predictions", "cost", "losses", "labels", "logits"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (torch.equal(x, y) and x.dtype == y.dtype), name
    assert dict(a.provenance) == dict(b.provenance) and set(a.recorded) == set(b.recorded)
    assert all(torch.equal(a.recorded[k], b.recorded[k]) for k in a.recorded)
    for name in ("exits", "base_cost", "fingerprint", "why_not_replayable"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.latency is None) == (b.latency is None)
    if a.latency is not None and b.latency is not None:
        assert a.latency.to_dict() == b.latency.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"losses": None, "labels": None},
        {"logits": None, "latency": None, "recorded": {}},
        {"predictions": torch.randn(N, K), "why_not_replayable": "caches are copied"},
    ],
)
def test_save_and_load(tmp_path, changes):
    given = trace(**changes)
    given.save(tmp_path)
    same(Trace.load(tmp_path), given)


@pytest.mark.parametrize("part", ["trace.json", "trace.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
def test_truncated(tmp_path, part, keep):
    trace().save(tmp_path)
    data = (tmp_path / part).read_bytes()
    (tmp_path / part).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ArtifactError, match=re.escape(part)):
        Trace.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictions": torch.zeros(N, K + 1)}, "predictions must be"),
        ({"predictions": torch.zeros(N)}, "predictions must be"),
        ({"cost": torch.zeros(K - 1)}, "cost must be"),
        ({"losses": torch.zeros(N, 1)}, "losses must be"),
        ({"logits": torch.zeros(N - 1, K, C)}, "logits must be"),
        ({"labels": torch.zeros(N - 1)}, "labels must be"),
        ({"recorded": {"x": torch.zeros(N, K - 1)}}, "scores .* must be"),
    ],
)
def test_shapes_are_checked(changes, message):
    with pytest.raises(InvalidInput, match=message):
        trace(**changes)


def test_shown_in_one_line():
    shown = repr(trace())
    assert len(shown.splitlines()) == 1 and "items" in shown and all(name in shown for name in trace().exits) and "logits" in shown
    assert "logits" not in repr(trace(logits=None))


def test_scores_are_computed_from_logits_in_chunks():
    found = trace()
    for rule in (Confidence(), Patience()):
        assert torch.equal(found.scores(rule, chunk=4), found.scores(rule))
    by_hand, state = [], Patience().begin(N, torch.device("cpu"))
    for k in range(K - 1):
        score, state = Patience().score(k, Readout(found.logits[:, k]), state)
        by_hand.append(score)
    assert torch.equal(found.scores(Patience())[:, :-1], torch.stack(by_hand, 1)) and not found.scores(Patience())[:, -1].any()


def test_recorded_scores_are_used_and_missing_ones_named():
    found = trace()
    assert torch.equal(found.scores(StateSimilarity()), found.recorded[part_key(StateSimilarity())])
    with pytest.raises(NotReplayable, match=r"StateSimilarity reads hidden states.*record\(\.\.\., rules=\[rule\]\)"):
        found.scores(StateSimilarity(token=None))
    with pytest.raises(NotReplayable, match="logits, which were not kept"):
        replace(found, logits=None).scores(Confidence())
    with pytest.raises(NotReplayable, match="caches are copied"):
        replace(found, why_not_replayable="caches are copied").scores(Confidence())


def test_subset_and_split_keep_rows_together():
    found = trace()
    some = found.subset(torch.tensor([7, 2]))
    assert some.items == 2 and some.labels.tolist() == [7, 2] and torch.equal(some.logits, found.logits[[7, 2]])
    assert torch.equal(some.recorded[part_key(StateSimilarity())], found.recorded[part_key(StateSimilarity())][[7, 2]])
    assert found.subset(torch.arange(N) % 2 == 0).items == 6
    left, right = found.split(0.4, seed=3)
    assert (left.items, right.items) == (4, 7)
    assert sorted([*left.labels.tolist(), *right.labels.tolist()]) == list(range(N))
    assert torch.equal(found.split(0.4, seed=3)[0].labels, left.labels) and not torch.equal(found.split(0.4, seed=4)[0].labels, left.labels)
    for fraction in (0.0, 1.0, -1.0, 0.01, 2.0):
        with pytest.raises(InvalidInput, match="fraction"):
            found.split(fraction)
    bare = trace(losses=None, labels=None, logits=None).subset(torch.tensor([1]))
    assert bare.losses is None and bare.labels is None and bare.logits is None


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_sizes": ()},
        {"batch_sizes": (4, 1)},
        {"batch_sizes": (1, 1)},
        {"batch_sizes": (0, 4)},
        {"segment_ms": torch.zeros(K, 3)},
        {"segment_ms": torch.zeros(2)},
        {"head_ms": torch.zeros(K, 1)},
        {"head_ms": torch.zeros(K + 1, 2)},
        {"gather_ms": torch.zeros(3)},
        {"gather_ms": torch.zeros(K, 2)},
    ],
)
def test_latency_table_is_checked(changes):
    with pytest.raises(InvalidInput):
        table(**changes)


def test_latency_table_round_trip():
    given = table()
    again = LatencyTable.from_dict(given.to_dict())
    assert again.to_dict() == given.to_dict() and again.batch_sizes == (1, 4)
    assert torch.equal(again.segment_ms, given.segment_ms) and again.segment_ms.dtype == torch.float64


def test_risk_table_is_plain():
    found = RiskTable(torch.zeros(2, K), torch.zeros(N, 2), torch.zeros(N, 2))
    assert found.loss_range == (0.0, 1.0)
