"""Ways of decoding as data: what is refused is tested with the engine (`tests/unit/engines/test_accept.py`)."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from offramp.budget.agreement import BetaMixture
from offramp.budget.depth_schedule import LinearDepth
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.policies import PARTS, WAYS, Entropy, Patience, at
from offramp.policies.decoding import Accept, Adapting, CatchUp, Copy, Decaying, DepthSchedule, Plain, Recompute, Scheduled, Verify
from offramp.policies.draft_stop import BelowProbability, FixedLength

KNOWN: dict[str, type] = {**PARTS, **WAYS, **{c.__name__: c for c in (BelowProbability, FixedLength, LinearDepth)}}


@pytest.mark.parametrize(
    "way",
    [
        Plain(),
        Verify(3, BelowProbability(0.4), sample_drafts=False, exit_index=2),
        Accept(),
        Accept((0.5, math.inf), Patience(), Recompute(5), exits=(1, 3)),
        Accept(Decaying(0.9, 2.0), Entropy(), Copy()),
        Accept(-1.5, Entropy(50), CatchUp(2)),
        Scheduled(LinearDepth(12, 9, 4)),
    ],
    ids=str,
)
def test_is_saved_and_comes_back(way: Any) -> None:
    assert part_from_dict(json.loads(json.dumps(part_to_dict(way))), KNOWN) == way


def test_a_rule_made_of_rules_comes_back() -> None:
    way = Accept(0.0, at(Patience(), 2.0))
    back = part_from_dict(json.loads(json.dumps(part_to_dict(way))), KNOWN)
    assert part_to_dict(back) == part_to_dict(way)


def test_decaying_is_strict_first() -> None:
    """CALM's equation 5 at its two ends, and in between it only falls."""
    places, length = torch.arange(41), torch.full((41,), 40)
    found = Decaying(0.8, 4.0).at(places, length)
    assert found[0] == pytest.approx(0.8) and found[40] == pytest.approx(0.72 + 0.08 * math.exp(-4))
    assert (found.diff() < 0).all()
    assert Decaying(0.8, 0.0).at(places, length).tolist() == pytest.approx([0.8] * 41)


def test_what_fits_the_protocols() -> None:
    assert isinstance(BetaMixture(), Adapting) and isinstance(LinearDepth(4, 4, 2), DepthSchedule)
    assert not isinstance(Decaying(0.5), Adapting) and not isinstance(0.5, Adapting)
