"""Orders and refreshes: known answers, row by row."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.policies.refresh import Blocks, DriftTest, Elastic, EveryN, Full, PerBlock, Progress, Sliding, Unmask

KNOWN: dict[str, type] = {c.__name__: c for c in (Full, EveryN, PerBlock, Elastic, Sliding, Blocks, Unmask)}


def marks(*rows: str) -> Tensor:
    return torch.tensor([[c == "#" for c in row] for row in rows])


START = torch.tensor([2, 3])
MASKED = marks("...#.##.##", "....#...##")


class TestOrders:
    def test_sliding(self) -> None:
        scope = Sliding(3).scope(MASKED, START)
        assert torch.equal(scope.candidates, marks("...#.##...", "....#...##"))
        assert scope.low.tolist() == [3, 4] and scope.high.tolist() == [7, 10]

    def test_blocks_are_counted_from_the_prompts_end(self) -> None:
        scope = Blocks(4).scope(MASKED, START)
        assert scope.low.tolist() == [2, 3] and scope.high.tolist() == [6, 7]
        assert torch.equal(scope.candidates, marks("...#.#....", "....#....."))
        later = Blocks(4).scope(marks("......##..", ".........#"), START)
        assert later.low.tolist() == [6, 7] and torch.equal(later.candidates, marks("......##..", ".........#"))

    def test_rows_alone_say_the_same(self) -> None:
        for order in (Sliding(2), Blocks(3)):
            both = order.scope(MASKED, START)
            for row in range(2):
                alone = order.scope(MASKED[row : row + 1], START[row : row + 1])
                assert torch.equal(alone.candidates[0], both.candidates[row]) and alone.low == both.low[row]


def progress(age: list[int], refreshed_low: list[int], order: Sliding | Blocks = Blocks(4)) -> Progress:  # noqa: B008 - frozen
    recent = marks("....#.....", "..........")
    valid = marks("##########", "#########.")
    return Progress(order.scope(MASKED, START), recent, torch.tensor(age), torch.tensor(refreshed_low), valid)


class TestRefreshes:
    def test_full(self) -> None:
        assert Full().due(progress([0, 5], [2, 3])).all() and Full().test is None

    def test_every_n(self) -> None:
        now = progress([0, 2], [2, 3])
        assert EveryN(3).due(now).tolist() == [False, True] and EveryN(1).due(now).all()
        assert torch.equal(EveryN(3).queried(now), marks("...###....", "....#....."))

    def test_per_block(self) -> None:
        now = progress([9, 9], [2, -1])
        assert PerBlock().due(now).tolist() == [False, True]
        assert torch.equal(PerBlock().queried(now), marks("..####....", "...####..."))
        assert torch.equal(PerBlock(suffix=True).queried(now), marks("..########", "...######."))

    def test_elastic_waits_for_drift(self) -> None:
        now = progress([9, 9], [0, 0], Sliding(2))
        assert not Elastic(0.9).due(now).any() and Elastic(0.9).test == DriftTest(0.9)
        assert torch.equal(Elastic().queried(now), marks("...###....", "....#...#."))


@pytest.mark.parametrize(
    "way", [Unmask(), Unmask(Elastic(0.8, rolling=True), Sliding(8), 0.7), Unmask(PerBlock(True), Blocks(16)), Unmask(EveryN(4))]
)
def test_ways_are_data(way: Unmask) -> None:
    assert part_from_dict(json.loads(json.dumps(part_to_dict(way))), KNOWN) == way


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sliding(0), "size must be at least 1, got 0"),
        (lambda: Blocks(0), "size must be at least 1"),
        (lambda: EveryN(0), "steps must be at least 1"),
        (lambda: Elastic(math.nan), "nan"),
        (lambda: Unmask(PerBlock(), Sliding()), "order=Blocks"),
        (lambda: Unmask(Full), "refresh must be"),
        (lambda: Unmask(order=7), "order must be"),
        (lambda: Unmask(confidence=0.0), "above 0"),
    ],
)
def test_refused(make, said) -> None:
    with pytest.raises(InvalidInput, match=said):
        make()
