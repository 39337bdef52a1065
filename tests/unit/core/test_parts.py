"""Parts as data: what comes back equals what went in, and a file can name only what is known."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from offramp.core.errors import ArtifactError, InvalidInput
from offramp.core.parts import part_from_dict, part_key, part_to_dict


@dataclass(frozen=True)
class Leaf:
    size: int = 3
    shares: tuple[float, ...] = (0.5, 0.25)


@dataclass(frozen=True)
class Tree:
    left: Leaf
    right: Leaf | None = None
    names: tuple[str, ...] = ()


class Learned(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = {"width": width}
        self.linear = nn.Linear(width, 1)


KNOWN = {"Leaf": Leaf, "Tree": Tree, "Learned": Learned}


@pytest.mark.parametrize("part", [Leaf(), Leaf(1, ()), Tree(Leaf()), Tree(Leaf(2), Leaf(4), ("a", "b")), None, 3, "x", (Leaf(), Leaf(7))])
def test_round_trip_through_json(part):
    again = part_from_dict(json.loads(json.dumps(part_to_dict(part))), KNOWN)
    assert again == part and type(again) is type(part)


def test_modules_go_by_their_config():
    made = part_from_dict(part_to_dict(Learned(4)), KNOWN)
    assert isinstance(made, Learned) and made.linear.in_features == 4
    with pytest.raises(InvalidInput, match="config"):
        part_to_dict(nn.Linear(2, 2))


def test_what_is_no_part_is_refused():
    for value in (object(), torch.zeros(2), Leaf, {"x": object()}, lambda: None):
        with pytest.raises(InvalidInput, match="neither plain data nor a part"):
            part_to_dict(value)


@pytest.mark.parametrize("kind", ["os.system", "Unknown", "", "__import__"])
def test_a_file_cannot_name_what_is_not_known(kind):
    with pytest.raises(ArtifactError, match="known types: Leaf, Learned, Tree"):
        part_from_dict({"type": kind, "args": {}}, KNOWN)


@pytest.mark.parametrize("args", [{"sise": 3}, {"size": 1, "shares": [], "more": 2}])
def test_arguments_that_do_not_fit(args):
    with pytest.raises(ArtifactError, match="do not fit this version"):
        part_from_dict({"type": "Leaf", "args": args}, KNOWN)


def test_key_tells_parts_apart():
    assert part_key(Leaf()) == part_key(Leaf(3))
    assert len({part_key(p) for p in (Leaf(), Leaf(4), Tree(Leaf()), Tree(Leaf(4)))}) == 4
    torch.manual_seed(0)
    one, two = Learned(2), Learned(2)
    assert part_key(one) == part_key(one) != part_key(two)
    two.load_state_dict(one.state_dict())
    assert part_key(one) == part_key(two), "equal weights, equal key"
