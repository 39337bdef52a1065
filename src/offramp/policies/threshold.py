"""Rules whose score is a function of one exit's answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offramp.core.types import Readout, RuleState
from offramp.policies import scores


@dataclass(frozen=True)
class Confidence:
    """Top-1 softmax probability."""

    stateful: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.top1(readout.logits), state


@dataclass(frozen=True)
class Margin:
    """Difference of the two largest softmax probabilities."""

    stateful: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.margin(readout.logits), state


@dataclass(frozen=True)
class Entropy:
    """Minus the entropy in nats: a threshold of ``-t`` here is the papers' "leave if entropy < t".

    Attributes:
        classes: number of classes, if known; gives the score a known range, which some guarantees use.
    """

    classes: int | None = None
    stateful: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.classes is None else (-math.log(self.classes), 0.0)

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.negative_entropy(readout.logits), state


@dataclass(frozen=True)
class Energy:
    """Minus the free energy of the logits.

    Attributes:
        temperature: > 0.
    """

    temperature: float = 1.0
    stateful: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float] | None] = None

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return scores.negative_energy(readout.logits, self.temperature), state
