from __future__ import annotations

from typing import Any

import pytest

from offramp.core.errors import InvalidInput
from offramp.systems import build


@pytest.mark.parametrize(
    ("name", "setting", "wrong", "says"),
    [
        ("deepcache", "interval", 0, "deepcache: interval must be at least 1 .*got 0"),
        ("first-block-cache", "change", -1.0, "first-block-cache: change .* at least 0 .*got -1.0"),
        ("first-block-cache", "change", float("nan"), "first-block-cache: change .*got nan"),
        ("latte-flow", "groups", 1, "latte-flow: groups must be at least 2 .*got 1"),
        ("random-skip", "rate", 1.5, r"random-skip: rate .*\[0, 1\]; got 1.5"),
        ("random-skip", "rate", float("nan"), "random-skip: rate .*got nan"),
        ("deediff", "theta", -0.1, r"deediff: theta .*\[0, 1\] .*got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_name_that_was_given(name: str, setting: str, wrong: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        build(name, **{setting: wrong})


@pytest.mark.parametrize(
    ("name", "setting", "edge"),
    [("deepcache", "interval", 1), ("first-block-cache", "change", 0.0), ("latte-flow", "groups", 2), ("random-skip", "rate", 0.0),
     ("random-skip", "rate", 1.0), ("deediff", "theta", 0.0), ("deediff", "theta", 1.0)],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(name: str, setting: str, edge: Any) -> None:
    assert build(name, **{setting: edge}).card.name == name
