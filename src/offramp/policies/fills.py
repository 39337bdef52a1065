"""Fills: what stands for the part of a denoiser that is skipped.

A skip goes from one boundary of the cut to a later one. Along it some tensors would have been *made*; a fill gives them, from what the
state holds at the start of the skip, from what the last computed steps made, or from an output layer of its own. Fills work per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput

Tensors = Mapping[str, Tensor]
"""Tensors by the name they have in the cut."""


class Fill(ABC):
    """What a skip puts in the place of what was not computed.

    Attributes:
        keeps: how many of the last computed steps it remembers, per row.
        paired: whether it reads, for every tensor that is made, the tensor at the start of the skip that it continues (the hidden state
            before for the hidden state after).
        reads_head: whether it is an output layer's answer and not made of remembered tensors.
    """

    @property
    def keeps(self) -> int:
        return 0

    @property
    def paired(self) -> bool:
        return False

    @property
    def reads_head(self) -> bool:
        return False

    def remember(self, start: Tensors, made: Tensors) -> Tensors:
        """What to keep of a computed step.

        Args:
            start: for every name in ``made`` the tensor that it continues, if ``paired``; else empty.
            made: what the step computed.
        """
        return made

    def coefficients(self, now: float, nodes: Sequence[float]) -> list[float]:
        """Weights of the remembered steps, newest first, ``keeps`` of them; those of steps that are not there are 0.

        Args:
            now: noise level (`offramp.core.noise.noise_share`) of this step.
            nodes: noise levels of the remembered steps of a row, newest first, at least one.
        """
        return [1.0] + [0.0] * (self.keeps - 1)

    @abstractmethod
    def fill(self, start: Tensors, remembered: Sequence[Tensors], weights: Tensor | None) -> dict[str, Tensor]:
        """The tensors that were not computed, by name.

        Args:
            start: as in ``remember``.
            remembered: of the same rows, newest first.
            weights: ``[R, keeps]``, or ``None`` where the newest alone counts.
        """


@dataclass(frozen=True)
class Identity(Fill):
    """The hidden state goes on as it is: an exit to the layers that follow (Moon et al. 2024, ICML: to the final layers)."""

    @property
    def paired(self) -> bool:
        return True

    def fill(self, start: Tensors, remembered: Sequence[Tensors], weights: Tensor | None) -> dict[str, Tensor]:
        return dict(start)


@dataclass(frozen=True)
class HeadOutput(Fill):
    """The answer of an output layer at the start of the skip, which must go to the output (DeeDiff, Tang et al. 2023)."""

    @property
    def reads_head(self) -> bool:
        return True

    def fill(self, start: Tensors, remembered: Sequence[Tensors], weights: Tensor | None) -> dict[str, Tensor]:
        return dict(start)


class Remembered(Fill):
    """A polynomial through what the last computed steps made, at the noise level of this one.

    Attributes:
        order: of the polynomial; 0 repeats the last.
        residual: whether what was added along the way is repeated, and not the result.
    """

    order: int = 0
    residual: bool = False

    @property
    def keeps(self) -> int:
        return self.order + 1

    @property
    def paired(self) -> bool:
        return self.residual

    def remember(self, start: Tensors, made: Tensors) -> Tensors:
        return {n: made[n] - start[n] for n in made} if self.residual else made

    def coefficients(self, now: float, nodes: Sequence[float]) -> list[float]:
        # Lagrange's form of the divided differences. Levels that coincide (samplers that evaluate twice) are one node.
        used: list[int] = []
        for k, node in enumerate(nodes[: self.keeps]):
            if all(abs(node - nodes[u]) > 1e-9 for u in used):
                used.append(k)
        weights = [0.0] * self.keeps
        for k in used:
            weight = 1.0
            for other in used:
                if other != k:
                    weight *= (now - nodes[other]) / (nodes[k] - nodes[other])
            weights[k] = weight
        return weights

    def fill(self, start: Tensors, remembered: Sequence[Tensors], weights: Tensor | None) -> dict[str, Tensor]:
        filled = {}
        for name in remembered[0]:
            value = remembered[0][name]
            if weights is not None:
                kind = torch.promote_types(value.dtype, torch.float32)
                total = torch.zeros_like(value, dtype=kind)
                for k, step in enumerate(remembered):
                    weight = weights[:, k].to(kind).view(-1, *[1] * (value.ndim - 1))
                    total = torch.where(weight == 0, total, total + step[name] * weight)  # what has no weight may be anything, NaN too
                value = total.to(value.dtype)
            filled[name] = start[name] + value if self.residual else value
        return filled


@dataclass(frozen=True)
class CachedOutput(Remembered):
    """What the last computed step made (DeepCache, Ma et al. 2024, section 3: the deep feature of a U-Net)."""


@dataclass(frozen=True)
class CachedResidual(Remembered):
    """This step's state plus what the last computed step added along the way (first-block caching)."""

    residual = True


@dataclass(frozen=True)
class Extrapolated(Remembered):
    """The polynomial of an order through the last computed steps (TaylorSeer, Liu et al. 2025, by divided differences).

    Its coordinate is the noise level ``sigma / (alpha + sigma)`` and not the step number, so that uneven steps are right. A row with fewer
    computed steps behind it takes a lower order.

    Attributes:
        order: from 1; each order remembers one step more.
        residual: extrapolate what is added along the way and not the result.
    """

    order: int = 1
    residual: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise InvalidInput(f"order must be from 1 to 4, got {self.order}; CachedOutput is order 0.")


FILLS: dict[str, type] = {c.__name__: c for c in (Identity, HeadOutput, CachedOutput, CachedResidual, Extrapolated)}
"""Every fill by name: what a saved plan may name."""
