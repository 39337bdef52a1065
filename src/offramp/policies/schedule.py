"""Rules that do not look at the item: the controls that every adaptive method must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.types import Readout, RuleState
from offramp.policies.base import RuleBase, at_exit, constant


@dataclass(frozen=True)
class Schedule(RuleBase):
    """The same score for every item at an exit.

    Attributes:
        values: one finite score per early exit.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(v) for v in self.values):
            raise InvalidInput(f"values must be one finite number per early exit, got {self.values}.")

    @property
    def bounds(self) -> tuple[float, float]:
        return (min(self.values), max(self.values))

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return constant(at_exit(self.values, exit_index, self), readout), state


@dataclass(frozen=True)
class FixedExit(RuleBase):
    """1 from exit ``exit_index`` on, 0 before: with any threshold in (0, 1] everything leaves there.

    Attributes:
        exit_index: 0-based.
    """

    exit_index: int

    def __post_init__(self) -> None:
        if self.exit_index < 0:
            raise InvalidInput(f"exit_index counts from 0, got {self.exit_index}.")

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return constant(float(exit_index >= self.exit_index), readout), state
