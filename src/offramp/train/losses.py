"""Losses of one answer per item, and how much one answer differs from another's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.core.errors import InvalidInput, OfframpError


class NonFiniteLoss(OfframpError, ArithmeticError):
    """The loss of an exit became NaN or infinite; no step was taken with it.

    Attributes:
        step: optimizer steps that had been taken.
        exits: names of the exits at fault.
    """

    def __init__(self, message: str, *, step: int, exits: tuple[str, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.exits = exits


@runtime_checkable
class ItemLoss(Protocol):
    """``(logits [B, ...], labels [B, ...]) -> [B]``, differentiable. A plain function will do.

    A loss may also have ``check(labels, width)``, called once a batch before the forward, and ``match(student, teacher,
    temperature) -> [B]``, used by distillation.
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy. Labels are class indices ``[B]`` (int) or probabilities ``[B, C]`` (float, e.g. mixup).

    Attributes:
        label_smoothing: in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise InvalidInput(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(),
            labels.float() if labels.is_floating_point() else labels.long(),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def check(self, labels: Tensor, width: int) -> None:
        """Refuse labels that cross-entropy over ``width`` classes cannot use.

        Raises:
            InvalidInput: wrong shape or dtype, or an index outside [0, width).
        """
        if labels.is_floating_point():
            if labels.ndim == 2 and labels.shape[1] == width:
                return
            raise InvalidInput(
                f"Labels are {labels.dtype} of shape {tuple(labels.shape)}; for {width} classes cross-entropy takes indices [B] (int64) or "
                f"probabilities [B, {width}]. Use labels.long() for classes, or fit(..., loss=MeanSquared()) for regression."
            )
        if labels.dtype == torch.bool or labels.is_complex() or labels.ndim != 1:
            raise InvalidInput(f"Labels are {labels.dtype} of shape {tuple(labels.shape)}; use class indices [B]: labels.long().flatten().")
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= width):
            raise InvalidInput(
                f"Labels range over [{int(labels.min())}, {int(labels.max())}] but the exits have {width} classes, "
                f"so [0, {width - 1}] was expected. Renumber the labels from 0, drop unlabelled items, or attach with num_outputs=."
            )

    def match(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 KL(p_teacher^T || p_student^T)`` ``[B]``; T^2 keeps the gradient's size (Hinton et al. 2015, section 2.1)."""
        log_s = F.log_softmax(student.float() / temperature, dim=-1)
        log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
        return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class MeanSquared:
    """Squared error, averaged over an item's outputs. Labels ``[B]``, ``[B, 1]`` or the logits' shape, floating."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        answer = logits.float().reshape(logits.shape[0], -1)
        target = labels.float().reshape(labels.shape[0], -1)
        if answer.shape != target.shape:
            raise InvalidInput(
                f"An exit answers {tuple(logits.shape)} but the labels are {tuple(labels.shape)}; squared error needs one label per output."
            )
        return (answer - target).square().mean(1)

    def check(self, labels: Tensor, width: int) -> None:
        """Refuse integer labels: they are class indices more often than quantities.

        Raises:
            InvalidInput: labels are not floating.
        """
        if not labels.is_floating_point():
            raise InvalidInput(
                f"Squared error takes floating labels, got {labels.dtype}. Use labels.float(), or CrossEntropy() if they are classes."
            )

    def match(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Squared difference ``[B]``; regression has no temperature."""
        return (student.float() - teacher.float()).square().reshape(student.shape[0], -1).mean(1)


def per_item(loss: ItemLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """``loss(logits, labels)``, checked to be one finite-shaped value per row.

    Raises:
        InvalidInput: the loss returned another shape, such as a mean over the batch.
    """
    value = loss(logits, labels)
    if not isinstance(value, Tensor) or value.shape != (logits.shape[0],):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInput(f"loss(logits, labels) must return one value per item, [{logits.shape[0]}]; got {got}. Use reduction='none'.")
    return value


def divergence(loss: ItemLoss, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far an exit's answer is from a teacher's, ``[B]``: the loss's own ``match`` if it has one, else that of cross-entropy."""
    match = getattr(loss, "match", None) or (CrossEntropy().match if student.shape[-1] > 1 and student.ndim > 1 else MeanSquared().match)
    result: Tensor = match(student, teacher, temperature)
    return result
