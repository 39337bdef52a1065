"""Picking the threshold by its point estimate: what is usually done, and what breaks its promise about half of the time."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.budget.bounds import Sample
from offramp.budget.replay import Bools
from offramp.budget.risk_control import DesignedPath, Procedure, SharedThreshold


@dataclass(frozen=True)
class PointEstimate(Procedure):
    """Accept every setting whose measured mean loss is within the limit. No guarantee; kept to be shown beside the others."""

    family: SharedThreshold | DesignedPath | None = None
    guaranteed = False
    name = "point estimate"

    def certify(self, sample: Sample, alpha: float, delta: float) -> Bools:
        out: Bools = sample.natural(sample.mean) <= alpha
        return out
