"""Small value types shared by every part.

Shape legend of the whole library: ``N`` items of a data set, ``B`` rows of a batch, ``K`` exits with the model's own
output as the last one, ``C`` classes, ``M`` settings of a rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

RuleState: TypeAlias = Mapping[str, Tensor]
"""Running state of a rule: named tensors whose dimension 0 is the row, so that they are compacted with the batch."""


class Readout(NamedTuple):
    """What an exit says about the rows in front of it.

    Attributes:
        logits: ``[B, C]`` answer of this exit (``[B]`` or ``[B, 1]`` for regression).
        hidden: the tensor the exit read, rows first, or ``None`` at the model's own output.
    """

    logits: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True)
class SegmentSpec:
    """One resumable piece of a model, per item.

    Attributes:
        name: module path after which the segment ends; ``"output"`` for the last one.
        flops: floating-point operations per item (one multiply-add = 2 FLOPs), matrix products, convolutions and attention.
        param_bytes: bytes of parameters and buffers that the segment reads.
        live_bytes: bytes per item of everything that crosses to the next segment (0 after the last).
        hidden_shape: shape of the state an exit reads, without the batch; ``-1`` where it varies; ``None`` after the last.
    """

    name: str
    flops: int
    param_bytes: int
    live_bytes: int
    hidden_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BackboneSpec:
    """What is known about a cut model before it runs.

    Attributes:
        segments: the pieces in execution order.
        dynamic_length: whether some non-batch dimension of the inputs may vary.
    """

    segments: tuple[SegmentSpec, ...]
    dynamic_length: bool = False

    @property
    def flops(self) -> int:
        """FLOPs per item of the whole model, heads not included."""
        return sum(s.flops for s in self.segments)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.segments)
