"""Blocks that are alike share compiled code: as much of it for many blocks as for few, and the same text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from language_models import build, prompts
from offramp.engines.capture import Recorder, Tuning
from offramp.engines.text.generate import generate
from offramp.engines.text.round_parts import _at_a_time
from offramp.engines.text.rounds import Rounds
from offramp.exits.cached import Adapter, Block
from offramp.language import attach_lm
from offramp.policies.decoding import Accept, CatchUp, Plain, Verify, Way

pytest.importorskip("transformers")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of every graph that the compiler was given, which are then run as they are."""
    found: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(len(module.graph.nodes))
        return module.forward

    monkeypatch.setattr(Recorder, "wrap", lambda self, function: torch.compile(function, dynamic=False, backend=backend))
    torch._dynamo.reset()
    return found


def nodes(graphs: list[int], blocks: int, tuning: Tuning, way: Way, head: Any = None) -> int:
    """Of all graphs for texts by a model of so many blocks, the exit after two of them; the texts are the reference's."""
    graphs.clear()
    torch._dynamo.reset()
    lm = attach_lm(build("llama", num_hidden_layers=blocks), [2], head)
    run = Rounds(lm, 2, slots=60, compiled=tuning, way=way)  # type: ignore[arg-type]
    given = prompts((5, 9))
    assert run.generate(given, 9).tokens == generate(lm, given, way, max_new_tokens=9).tokens
    return sum(graphs)


@pytest.mark.parametrize(
    ("way", "head", "joined"),
    [
        (Plain(), None, False),
        (Verify(2), Adapter(), True),
        (Verify(1), Block(), False),
        (Accept(0.05, fill=CatchUp(2)), None, False),
    ],
    ids=["plain", "adapter", "block", "accept"],
)
def test_more_blocks_are_no_more_code(graphs: list[int], way: Way, head: Any, joined: bool) -> None:
    tuning = Tuning(shared_blocks=True, joined_projections=joined)
    few, many = (4, 8) if isinstance(way, Plain) else (4, 6)  # two or four at a time, and nothing left over
    assert nodes(graphs, many, tuning, way, head) == nodes(graphs, few, tuning, way, head) > 0


def test_without_sharing_there_is_more(graphs: list[int]) -> None:
    assert nodes(graphs, 8, Tuning(), Plain()) > 1.5 * nodes(graphs, 8, Tuning(shared_blocks=True), Plain())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_families(graphs: list[int], family: str) -> None:
    lm = attach_lm(build(family), [2])
    run = Rounds(lm, 1, slots=60, draft_length=3, compiled=Tuning(shared_blocks=True))
    given = prompts((7,))
    assert run.generate(given, 20).tokens == generate(lm, given, Verify(3), max_new_tokens=20).tokens
    assert graphs


def test_how_many_share_divides_both_parts() -> None:
    assert [_at_a_time(*of) for of in ((4, 24), (3, 24), (4, 22), (3, 22), (24, 24), (1, 2))] == [4, 3, 2, 1, 4, 1]
