"""From the confidence of a draft to the chance that the full model keeps it, learned from what was kept.

Shapes: ``B`` rows, ``K`` drafts, ``N`` bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.types import RuleState


@dataclass(frozen=True)
class AcceptanceBins:
    """A Beta distribution over the acceptance in each of ``N`` equally wide bins of confidence.

    What is given here is the prior; a row adds what it sees, so that calibration goes on while text is written, and a row's beliefs
    never depend on the rows beside it.

    Attributes:
        accepted: first parameter of each bin, > 0: as many drafts kept, in effect.
        rejected: second parameter of each bin, > 0.
    """

    accepted: tuple[float, ...]
    rejected: tuple[float, ...]

    def __post_init__(self) -> None:
        values = (*self.accepted, *self.rejected)
        if not self.accepted or len(self.accepted) != len(self.rejected) or not all(math.isfinite(v) and v > 0 for v in values):
            raise InvalidInput(
                f"accepted and rejected must be positive finite numbers, one of each per bin; got {self.accepted} and {self.rejected}."
            )

    @classmethod
    def trusting(cls, bins: int = 10, weight: float = 2.0) -> AcceptanceBins:
        """A prior that takes confidence at its word: the mean of a bin is its middle.

        Args:
            bins: how many, at least 1.
            weight: drafts that the prior counts for in each bin, > 0.
        """
        if bins < 1 or not weight > 0:
            raise InvalidInput(f"bins must be at least 1 and weight > 0, got {bins} and {weight}.")
        middle = [(i + 0.5) / bins for i in range(bins)]
        return cls(tuple(weight * m for m in middle), tuple(weight * (1 - m) for m in middle))

    def fitted(self, confidence: Tensor, accepted: Tensor, most: float = 50.0) -> AcceptanceBins:
        """This prior after drafts that were tried before.

        Args:
            confidence: ``[N]`` in [0, 1].
            accepted: bool ``[N]``, or the chance of each to be accepted.
            most: weight that a bin may get, > 0; its mean stays. Less lets a row move away faster from what was calibrated.

        Raises:
            InvalidInput: shapes differ, or confidence is not in [0, 1].
        """
        if confidence.ndim != 1 or confidence.shape != accepted.shape:
            raise InvalidInput(f"confidence and accepted must be [N] alike, got {tuple(confidence.shape)} and {tuple(accepted.shape)}.")
        if confidence.numel() and not bool(((confidence >= 0) & (confidence <= 1)).all()):
            raise InvalidInput("confidence must lie in [0, 1]; give probabilities.")
        if not most > 0:
            raise InvalidInput(f"most must be > 0, got {most}.")
        state = self.begin(1, confidence.device, torch.float64)
        looked = torch.ones(1, confidence.numel(), dtype=torch.float64, device=confidence.device)
        state = self.update(state, confidence[None].double(), looked, accepted[None].double())
        a, b = state["accepted"][0], state["rejected"][0]
        shrink = (most / (a + b)).clamp(max=1)
        return AcceptanceBins(tuple((a * shrink).tolist()), tuple((b * shrink).tolist()))

    def begin(self, rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> RuleState:
        """Beliefs ``accepted`` and ``rejected`` ``[B, N]``."""
        return {
            "accepted": torch.tensor(self.accepted, dtype=dtype, device=device).repeat(rows, 1),
            "rejected": torch.tensor(self.rejected, dtype=dtype, device=device).repeat(rows, 1),
        }

    def bin(self, confidence: Tensor) -> Tensor:
        """Bin (int64, same shape) of each confidence."""
        n = len(self.accepted)
        return (confidence * n).long().clamp(0, n - 1)

    def estimate(self, state: RuleState, confidence: Tensor) -> Tensor:
        """Expected acceptance ``[B]`` of drafts with confidence ``[B]``: the mean of the bin's Beta distribution."""
        mean = state["accepted"] / (state["accepted"] + state["rejected"])
        return mean.gather(1, self.bin(confidence)[:, None]).squeeze(1)

    def update(self, state: RuleState, confidence: Tensor, looked: Tensor, accepted: Tensor) -> RuleState:
        """Beliefs after drafts ``[B, K]``.

        Args:
            state: beliefs before.
            confidence: of each draft.
            looked: 1 where the full model has judged the draft, else 0.
            accepted: 1 where it was kept.
        """
        a, b = state["accepted"], state["rejected"]
        index, looked = self.bin(confidence), looked.to(a.dtype)
        kept = looked * accepted.to(a.dtype)
        return {**state, "accepted": a.scatter_add(1, index, kept), "rejected": b.scatter_add(1, index, looked - kept)}
