"""How a masked language model fills in its masks, as data: which may be filled in next, and what is computed again before.

A masked-diffusion model looks both ways, so keys and values of a position change whenever a mask anywhere is filled in. Keeping those of
earlier steps is not exact; these rules say where and when it is done all the same. An *order* says which masks may be filled in next. A
*refresh* says which rows compute every position at a step, and which positions the others compute; what is not computed is looked at as it
last was. Engines carry them out, row by row: no decision depends on batch mates.

Shapes: ``B`` rows, ``T`` positions of a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput

# ---- which masks may be filled in next -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """Where each row is at work.

    Attributes:
        candidates: bool ``[B, T]``, masks that may be filled in at this step.
        low: int64 ``[B]``, where the stretch that is worked on begins.
        high: int64 ``[B]``, where it ends, exclusive.
    """

    candidates: Tensor
    low: Tensor
    high: Tensor


@runtime_checkable
class Order(Protocol):
    """Which masks may be filled in next."""

    @property
    def size(self) -> int:
        """Most of them in a row."""
        ...

    def scope(self, masked: Tensor, start: Tensor) -> Scope:
        """Where each row is at work.

        Args:
            masked: bool ``[B, T]``, what is still to be filled in; at least one in each row.
            start: int64 ``[B]``, the first position behind the prompt.
        """
        ...


@dataclass(frozen=True)
class Sliding:
    """The ``size`` left-most masks: a window that moves on with every mask that is filled in (Elastic-Cache's beta).

    Attributes:
        size: at least 1. Elastic-Cache: 16 or 32.
    """

    size: int = 16

    def __post_init__(self) -> None:
        _at_least_one("size", self.size)

    def scope(self, masked: Tensor, start: Tensor) -> Scope:
        candidates = masked & (masked.cumsum(1) <= self.size)
        place = torch.arange(masked.shape[1], device=masked.device)
        return Scope(candidates, candidates.int().argmax(1), (candidates * (place + 1)).amax(1))


@dataclass(frozen=True)
class Blocks:
    """The masks of the left-most block that has any: semi-autoregressive (LLaDA, Nie et al. 2025; Fast-dLLM, Wu et al. 2025).

    Attributes:
        size: positions of a block, counted from the end of the prompt, at least 1. Fast-dLLM: 32.
    """

    size: int = 32

    def __post_init__(self) -> None:
        _at_least_one("size", self.size)

    def scope(self, masked: Tensor, start: Tensor) -> Scope:
        first = masked.int().argmax(1)
        low = start + (first - start) // self.size * self.size
        high = low + self.size
        place = torch.arange(masked.shape[1], device=masked.device)
        return Scope(masked & (place < high[:, None]), low, high)


# ---- what is computed again ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """What a refresh knows at the beginning of a step.

    Attributes:
        scope: where each row is at work.
        recent: bool ``[B, T]``, positions filled in at the last step: their keys and values are still those of a mask.
        age: int64 ``[B]``, steps since a row last computed every position in every block; 0 right behind such a step.
        refreshed_low: int64 ``[B]``, ``scope.low`` at that step.
        valid: bool ``[B, T]``, positions that are part of each text.
    """

    scope: Scope
    recent: Tensor
    age: Tensor
    refreshed_low: Tensor
    valid: Tensor


@dataclass(frozen=True)
class DriftTest:
    """When a row computes the other blocks for every position: when what a watched token attends to has changed.

    Attributes:
        least: cosine of attention rows below which it has.
        rolling: compare with the step before; else with when the block was last computed for every position.
        fresh: compute the watched tokens at every step, so that their queries are new; else those are kept.
    """

    least: float
    rolling: bool = False
    fresh: bool = False


@runtime_checkable
class Refresh(Protocol):
    """What is computed again at a step. The first step of a text computes everything whatever it says."""

    @property
    def test(self) -> DriftTest | None:
        """Of drift, in every block but the last; `None` = none."""
        ...

    def due(self, progress: Progress) -> Tensor:
        """Rows (bool ``[B]``) that compute every position in every block."""
        ...

    def queried(self, progress: Progress) -> Tensor:
        """Positions (bool ``[B, T]``) that the other rows compute; candidates are computed anyway."""
        ...


@dataclass(frozen=True)
class Full:
    """Everything at every step: no cache. What all others are held to."""

    @property
    def test(self) -> DriftTest | None:
        return None

    def due(self, progress: Progress) -> Tensor:
        return torch.ones_like(progress.age, dtype=torch.bool)

    def queried(self, progress: Progress) -> Tensor:
        return progress.valid


@dataclass(frozen=True)
class EveryN:
    """Everything at every ``steps``-th step; between, the candidates and what was just filled in: the control of a learned or tested rule.

    Attributes:
        steps: at least 1; 1 is `Full`.
    """

    steps: int = 8

    def __post_init__(self) -> None:
        _at_least_one("steps", self.steps)

    @property
    def test(self) -> DriftTest | None:
        return None

    def due(self, progress: Progress) -> Tensor:
        return progress.age + 1 >= self.steps

    def queried(self, progress: Progress) -> Tensor:
        return progress.scope.candidates | progress.recent


@dataclass(frozen=True)
class PerBlock:
    """Everything when a block begins; within it, the block (Fast-dLLM, Wu et al. 2025, section 3.2). Needs `Blocks`.

    Attributes:
        suffix: compute what comes behind the block at every step too: the paper's prefix cache. Without, its dual cache.
    """

    suffix: bool = False

    @property
    def test(self) -> DriftTest | None:
        return None

    def due(self, progress: Progress) -> Tensor:
        return progress.scope.low != progress.refreshed_low

    def queried(self, progress: Progress) -> Tensor:
        scope = progress.scope
        place = torch.arange(progress.valid.shape[1], device=progress.valid.device)
        inside = (place >= scope.low[:, None]) & progress.valid
        return inside if self.suffix else inside & (place < scope.high[:, None])


@dataclass(frozen=True)
class Elastic:
    """When attention drifts, from the block where it drifts on (Elastic-Cache, Nguyen-Tri et al. 2026).

    Between refreshes the candidates and what was just filled in are computed. In every block but the last one written token is watched: the
    one that candidates attended to most when the row was last refreshed there. A block drifts when the cosine of what its token attends to
    now and then is below ``drift``; every position is then computed from there on.

    Attributes:
        drift: gamma. Above 1 everything is computed at every step; at -1 or below, nothing is computed again after the first step. The
            paper uses 0.9 for text.
        rolling: compare with the step before instead of the last refresh, so that slow drift is not noticed. Notes on the paper can be read
            either way.
        fresh: compute the watched tokens too, up to one for each block but the last: their queries are then new, where else those of the
            last refresh ask the new keys.
    """

    drift: float = 0.9
    rolling: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.drift):
            raise InvalidInput("drift must be a number, a cosine; got nan.")

    @property
    def test(self) -> DriftTest | None:
        return DriftTest(self.drift, self.rolling, self.fresh)

    def due(self, progress: Progress) -> Tensor:
        return torch.zeros_like(progress.age, dtype=torch.bool)

    def queried(self, progress: Progress) -> Tensor:
        return progress.scope.candidates | progress.recent


# ---- together ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unmask:
    """A way of filling in masks.

    Attributes:
        refresh: what is computed again.
        order: which masks may be filled in next.
        confidence: epsilon: of the candidates, those whose most likely token has at least this probability are filled in, and in any case
            the surest one. Above 1, one at a step. Fast-dLLM and Elastic-Cache: 0.9.
    """

    refresh: Refresh = field(default_factory=Full)
    order: Order = field(default_factory=Sliding)
    confidence: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.refresh, type) or not isinstance(self.refresh, Refresh):
            raise InvalidInput(f"refresh must be Full(), EveryN(...), PerBlock(...) or Elastic(...), got {self.refresh!r}.")
        if isinstance(self.order, type) or not isinstance(self.order, Order):
            raise InvalidInput(f"order must be Sliding(...) or Blocks(...), got {self.order!r}.")
        if isinstance(self.refresh, PerBlock) and not isinstance(self.order, Blocks):
            raise InvalidInput(f"PerBlock refreshes when a block begins and needs order=Blocks(...), got {self.order!r}.")
        if not self.confidence > 0:
            raise InvalidInput(f"confidence must be above 0, got {self.confidence}.")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InvalidInput(f"{name} must be at least 1, got {value}.")


__all__ = ["Blocks", "DriftTest", "Elastic", "EveryN", "Full", "Order", "PerBlock", "Progress", "Refresh", "Scope", "Sliding", "Unmask"]
