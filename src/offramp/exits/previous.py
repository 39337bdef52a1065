"""Heads that read the earlier exits' answers: Zero Time Waste (Wolczyk et al. 2021).

Engines carry the answers, compacted with the batch. Gradients stop at them, so a deep exit does not bend a shallow one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.protocols import Head, HeadSpec


@dataclass(frozen=True)
class Cascade:
    """The inner head's features and the previous exit's normalised logits, side by side, before the last projection.

    Zero Time Waste, section 3.1. A linear map of two vectors side by side is the sum of a linear map of each, so the second is
    added to the inner head's logits; that equals concatenation for every inner head that ends in a linear layer, as ours do.
    The first exit sees zeros in place of logits.

    Attributes:
        inner: the head that reads the state.
    """

    inner: HeadSpec

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> CascadeHead:
        return CascadeHead(self.inner.build(hidden_shape, num_outputs), num_outputs)


class CascadeHead(Head):
    """Module of `Cascade`."""

    needs_previous = True

    def __init__(self, inner: Head, num_outputs: int) -> None:
        super().__init__()
        self.inner = inner
        # The layer norm of a single number is a constant, so a regression passes as it is.
        self.norm = nn.LayerNorm(num_outputs) if num_outputs > 1 else nn.Identity()
        self.linear = nn.Linear(num_outputs, num_outputs, bias=False)

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        own: Tensor = self.inner(hidden, previous)
        # Zeros, and not a skipped term, keep every parameter in use at the first exit, as distributed training wants.
        before = previous[-1].detach() if previous else torch.zeros_like(own).detach()
        logits: Tensor = own + self.linear(self.norm(before.reshape(own.shape).to(self.linear.weight.dtype)))
        return logits


@dataclass(frozen=True)
class GeometricEnsemble:
    """Weighted geometric mean of this exit's and all earlier exits' probabilities: ``mean_j exp(w_j) log p_j + b``.

    Zero Time Waste, section 3.2, equation 3; the softmax of the result is the ensemble. The weights ``w`` (from 0) and the bias
    ``b`` ``[C]`` (from 0) are trained. ``p_j`` is the answer that exit j gave: where that is itself an ensemble the products
    nest; with an ordinary head at the earlier exits the formula is the paper's.

    Attributes:
        inner: the head that reads the state.
        most: earlier exits there is room for.
    """

    inner: HeadSpec
    most: int = 64

    def build(self, hidden_shape: tuple[int, ...], num_outputs: int) -> GeometricEnsembleHead:
        if num_outputs < 2:
            raise InvalidInput("GeometricEnsemble multiplies class probabilities, and this answer has one value. Use Cascade(inner).")
        if self.most < 1:
            raise InvalidInput(f"most must be at least 1, got {self.most}.")
        return GeometricEnsembleHead(self.inner.build(hidden_shape, num_outputs), num_outputs, self.most)


class GeometricEnsembleHead(Head):
    """Module of `GeometricEnsemble`.

    ``weights`` holds this exit's weight first and then one per earlier exit, first exit first.
    """

    needs_previous = True

    def __init__(self, inner: Head, num_outputs: int, most: int) -> None:
        super().__init__()
        self.inner = inner
        self.weights = nn.Parameter(torch.zeros(1 + most))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, hidden: Tensor, previous: tuple[Tensor, ...] = ()) -> Tensor:
        if len(previous) >= self.weights.shape[0]:
            raise InvalidInput(
                f"{len(previous)} earlier exits, but room for {self.weights.shape[0] - 1}. "
                f"Use GeometricEnsemble(inner, most={len(previous)})."
            )
        own: Tensor = self.inner(hidden, previous)
        answers_BJC = torch.stack([own, *(p.detach().to(own.dtype) for p in previous)], dim=1)
        weight_J1 = self.weights[: 1 + len(previous)].exp()[:, None]
        return (torch.log_softmax(answers_BJC, dim=-1) * weight_J1).mean(dim=1) + self.bias


__all__ = ["Cascade", "CascadeHead", "GeometricEnsemble", "GeometricEnsembleHead"]
