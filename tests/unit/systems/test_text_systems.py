"""What language-model systems are made of: where their exits go, how they write, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from offramp import systems
from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.exits import PARTS, AfterBlocks
from offramp.policies.decoding import Accept, CatchUp, Copy, Recompute, Scheduled, Verify
from offramp.policies.draft_stop import BelowProbability, BetaThompson, CalibratedThompson, FixedLength

TEXT = [n for n in systems.list_systems() if systems.load_card(n).engine == "generate"]


@dataclass(frozen=True)
class At:
    path: str
    spent: float = 0.5


@pytest.mark.parametrize(
    ("shares", "blocks", "depths"),
    [
        ((2 / 32,), 32, (2,)),
        ((2 / 32,), 8, (1,)),  # half a block is one
        ((3 / 40,), 40, (3,)),
        ((0.01, 0.99), 8, (1, 7)),  # never none, never all
        ((0.5, 0.25), 24, (6, 12)),
        ((0.24, 0.25), 8, (2,)),
        ((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 40, (12, 16, 20, 24, 28, 32, 36)),
    ],
)
def test_exits_after_shares_of_the_blocks(shares: tuple[float, ...], blocks: int, depths: tuple[int, ...]) -> None:
    placed = AfterBlocks(shares)
    assert placed.depths(blocks) == depths
    # What blocks cost does not matter.
    assert placed.choose([At(f"b{k}", 0.9) for k in range(blocks)]) == [f"b{d - 1}" for d in depths]
    assert part_from_dict(part_to_dict(placed), PARTS) == placed


def test_shares_that_are_none() -> None:
    for shares in ((), (0.0,), (1.0,), (-0.5, 0.5)):
        with pytest.raises(InvalidInput, match=r"inside \(0, 1\)"):
            AfterBlocks(shares).choose([At("a"), At("b")])
    with pytest.raises(InvalidInput, match="needs two"):
        AfterBlocks((0.5,)).choose([At("a")])


def test_ways_are_those_of_the_papers() -> None:
    ways = {n: systems.way(systems.build(n), -1.0 if n == "self-supervised-early-exits" else None) for n in TEXT}
    assert ways["kangaroo"] == Verify(6, BelowProbability(0.6))
    assert ways["layerskip"] == Verify(6, FixedLength(), exit_index=7)
    assert ways["eesd"] == Verify(10, BetaThompson(1.0, 1.0))
    assert ways["ee-llm"] == Accept(0.8, fill=Recompute(8))
    fills = {n: type(w.fill) for n, w in ways.items() if isinstance(w, Accept)}
    assert fills == {"calm": Copy, "ee-llm": Recompute, "free": CatchUp, "self-supervised-early-exits": CatchUp}
    assert isinstance(ways["skipdecode"], Scheduled)
    assert isinstance(systems.way(systems.build("eesd", calibrated=True)).stop, CalibratedThompson)


def test_lossless_is_said_of_what_is_verified() -> None:
    for name in TEXT:
        assert systems.load_card(name).lossless == (systems.build(name).draft is not None)


def test_differences_read_well() -> None:
    found = {d.axis: (d.left, d.right) for d in systems.diff("kangaroo", "eesd")}
    assert found == {
        "head": ("Adapter()", "Block()"),
        "placement.shares": ("(0.0625)", "(0.125)"),
        "draft.draft_length": ("6", "10"),
        "draft.stop": ("BelowProbability(eta=0.6)", "BetaThompson(a=1.0, b=1.0)"),
    }
    found = {d.axis: (d.left, d.right) for d in systems.diff("calm", "free")}
    assert found["fill"] == ("Copy()", "CatchUp()") and found["threshold"] == ("Decaying(tau=0.9)", "BetaMixture()")
    assert found["calibrator"] == ("LTT()", "-") and "rule" not in found


def test_layerskip_trains_where_it_has_exits() -> None:
    built = systems.build("layerskip", blocks=8, exit_after=2, rotate=4)
    assert built.recipe.inner.depths == (1, 2, 3, 4, 5, 6, 7) and built.recipe.inner.blocks == 8
    assert built.draft.exit_index == 1
    assert [w > 0 for w in built.recipe.inner.weights(1, 0.0)] == [False, True, False, False, False, True, False, True]


def test_skipdecode_meets_its_share() -> None:
    schedule = systems.build("skipdecode", blocks=24, share=0.5, length=100).fill.schedule
    assert 0.45 < schedule.mean_cost(100) <= 0.5 and schedule.most > schedule.least
    assert systems.build("skipdecode").recipe.schedule == systems.build("skipdecode").fill.schedule
    with pytest.raises(BudgetInfeasible):
        systems.build("skipdecode", blocks=4, share=0.1)


def test_one_tolerance_gives_each_exit_its_threshold() -> None:
    calibrator = systems.build("self-supervised-early-exits", tolerance=0.25).calibrator
    scores = -torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4], [0.5, 0.5]])  # minus entropies
    agreed = torch.tensor([[True, True], [True, True], [True, False], [False, False], [False, True]])
    assert calibrator(scores, agreed) == pytest.approx((-0.4, -0.2))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("layerskip", {"blocks": 8, "exit_after": 8}),
        ("free", {"blocks": 8, "exit_after": 0}),
        ("kangaroo", {"probability": 1.5}),
        ("kangaroo", {"draft_length": 0}),
        ("eesd", {"a": 0.0}),
        ("skipdecode", {"share": 0.0}),
        ("self-supervised-early-exits", {"tolerance": 1.0}),
        ("calm", {"max_disagreement": 0.0}),
        ("ee-llm", {"weights": (-0.1, 0.2)}),
    ],
)
def test_arguments_out_of_range(name: str, kwargs: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        systems.build(name, **kwargs)
