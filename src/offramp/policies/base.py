"""What rules have in common. A rule overrides only what differs from a stateless rule that reads logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.pooling import pool
from offramp.core.types import Readout, RuleState

T = TypeVar("T")


class RuleBase(ABC):
    """A stateless rule that reads logits only and whose score has no known range, until overridden."""

    @property
    def stateful(self) -> bool:
        return False

    @property
    def needs_hidden(self) -> bool:
        return False

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {}

    @abstractmethod
    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]: ...


class Remembers(RuleBase):
    """A rule whose score at an exit depends on earlier exits."""

    @property
    def stateful(self) -> bool:
        return True


class ReadsState(RuleBase):
    """A rule whose score depends on the state at an exit, not on the answer alone."""

    @property
    def needs_hidden(self) -> bool:
        return True


def read_hidden(readout: Readout, token: int | None, rule: object, width: int | None = None) -> Tensor:
    """The state at this exit as one vector per row, ``[B, width]``.

    Raises:
        InvalidInput: there is no state, or it has another width than the rule was made for.
    """
    if readout.hidden is None:
        raise InvalidInput(
            f"{type(rule).__name__} reads the state at an exit, and this readout has none. Pass Readout(logits, hidden); to calibrate, "
            "record the trace with record(..., rules=[rule])."
        )
    vector = pool(readout.hidden, token)
    if width is not None and vector.shape[-1] != width:
        raise InvalidInput(
            f"{type(rule).__name__} was made for a state of width {width} at this exit and was given {vector.shape[-1]}. Make it with "
            f"{type(rule).__name__}.for_shapes([e.hidden_shape for e in net.exits])."
        )
    return vector


def at_exit(values: Sequence[T], exit_index: int, rule: object) -> T:
    """The value of one exit.

    Raises:
        InvalidInput: there are fewer.
    """
    if not 0 <= exit_index < len(values):
        raise InvalidInput(
            f"{type(rule).__name__} was made for {len(values)} early exits; exit {exit_index} was scored. Give one value per early exit."
        )
    return values[exit_index]


def constant(value: float, readout: Readout) -> Tensor:
    """The same score for every row, ``[B]``."""
    return torch.full((readout.logits.shape[0],), value, dtype=torch.float32, device=readout.logits.device)
