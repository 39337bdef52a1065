"""Rules whose score is a function of one exit's answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.types import Readout, RuleState
from offramp.policies import scores
from offramp.policies.base import RuleBase


@dataclass(frozen=True)
class Confidence(RuleBase):
    """Top-1 softmax probability."""

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.top1(readout.logits), state


@dataclass(frozen=True)
class Margin(RuleBase):
    """Difference of the two largest softmax probabilities."""

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.margin(readout.logits), state


@dataclass(frozen=True)
class Entropy(RuleBase):
    """Minus the entropy in nats: a threshold of ``-t`` here is the papers' "leave if entropy < t".

    Attributes:
        classes: number of classes, if known; gives the score a known range, which some guarantees use.
    """

    classes: int | None = None

    def __post_init__(self) -> None:
        if self.classes is not None and self.classes < 2:
            raise InvalidInput(f"classes must be at least 2, got {self.classes}.")

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.classes is None else (-math.log(self.classes), 0.0)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.negative_entropy(readout.logits), state


@dataclass(frozen=True)
class Energy(RuleBase):
    """Minus the free energy of the logits.

    Attributes:
        temperature: > 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidInput(f"temperature must be positive and finite, got {self.temperature}.")

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.negative_energy(readout.logits, self.temperature), state
