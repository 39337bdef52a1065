"""Watching served traffic without labels: do items still leave where they left at calibration, with the scores they had there?

Served items come in windows of fixed size. Each window is compared with calibration by a two-sample chi-square test whose level
shrinks from window to window so that all of them together raise a false alarm with probability at most ``alpha`` (in the large-sample
approximation of the test), and by the population stability index (PSI), which measures size and not certainty. An alarm needs both:
enough evidence, and a shift large enough to matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from offramp.budget.replay import F64, columns, leave_columns
from offramp.core.certificate import Plan
from offramp.core.errors import FingerprintMismatch, InvalidInput
from offramp.core.trace import Trace


def psi(reference: F64, served: F64) -> float:
    """Population stability index of two histograms of counts, half a count added to each cell. 0 = equal."""
    p, q = (reference + 0.5) / (reference + 0.5).sum(), (served + 0.5) / (served + 0.5).sum()
    return float(((q - p) * np.log(q / p)).sum())


def chi_square(reference: F64, served: F64, least: float = 5.0) -> float:
    """p-value of "both histograms come from one distribution" (Pearson's two-sample test). Cells that expect too little are merged."""
    total = reference + served
    share = served.sum() / total.sum()
    rare = total * min(share, 1 - share) < least
    if rare.any():
        reference = np.append(reference[~rare], reference[rare].sum())
        served = np.append(served[~rare], served[rare].sum())
        total = reference + served
    keep = total > 0
    if keep.sum() < 2:
        return 1.0
    expected = total[keep] * share
    statistic = float(((served[keep] - expected) ** 2 / (expected * (1 - share))).sum())
    freedom = int(keep.sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)))


@dataclass(frozen=True)
class DriftReference:
    """Histograms of the calibration items.

    Attributes:
        exits: ``[K]`` counts leaving at each exit.
        edges: inner edges of score bins at the first exit.
        scores: counts per score bin.
    """

    exits: F64
    edges: F64
    scores: F64

    @classmethod
    def of(cls, trace: Trace, plan: Plan, *, bins: int = 10) -> DriftReference:
        """From the trace that the plan was calibrated on.

        Raises:
            FingerprintMismatch: trace and plan belong to different models.
        """
        if trace.fingerprint != plan.fingerprint:
            raise FingerprintMismatch(f"The trace is of model {trace.fingerprint!r}, the plan of {plan.fingerprint!r}.")
        cols = columns(trace.scores(plan.rule), trace.exits)
        exits = np.bincount(leave_columns(cols, np.asarray(plan.thresholds)), minlength=len(trace.exits)).astype(np.float64)
        if not len(cols):
            return cls(exits, np.empty(0), np.asarray([float(trace.items)]))
        edges = np.unique(np.quantile(cols[0].astype(np.float64), np.linspace(0, 1, bins + 1)[1:-1]))
        scores = np.bincount(np.searchsorted(edges, cols[0], side="right"), minlength=edges.size + 1).astype(np.float64)
        return cls(exits, edges, scores)


@dataclass(frozen=True)
class DriftReport:
    """One window, or the state between windows.

    Attributes:
        window: windows completed.
        exit_psi: shift of the exit histogram.
        score_psi: shift of the first exit's scores; 0 if scores were not given.
        p_value: smaller of the two tests' p-values, doubled.
        level: what it was compared with.
        drifted: whether this window raised an alarm.
    """

    window: int
    exit_psi: float
    score_psi: float
    p_value: float
    level: float
    drifted: bool


@dataclass
class DriftMonitor:
    """Feed it what the engine returns; it reports each completed window.

    Attributes:
        reference: calibration histograms.
        window: items per comparison, >= 50.
        alpha: bound on the probability of any false alarm, however long it runs.
        threshold: PSI that matters; 0.1 is commonly read as a moderate shift, 0.25 as a large one.
    """

    reference: DriftReference
    window: int = 1000
    alpha: float = 0.01
    threshold: float = 0.1
    windows: int = 0
    _exits: list[int] = field(default_factory=list, repr=False)
    _scores: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.window < 50 or not 0 < self.alpha < 1 or not self.threshold >= 0:
            raise InvalidInput(
                f"DriftMonitor needs window >= 50, alpha in (0, 1), threshold >= 0, got {self.window}, {self.alpha}, {self.threshold}."
            )

    def update(self, exits: Tensor, first_scores: Tensor | None = None) -> list[DriftReport]:
        """Add served items.

        Args:
            exits: exit index of each item, any length.
            first_scores: scores of the same items at the first exit; give them always or never.

        Returns:
            A report for each window that these items completed.
        """
        new = exits.detach().reshape(-1).cpu().to(torch.int64)
        if new.numel() and not (int(new.min()) >= 0 and int(new.max()) < self.reference.exits.size):
            raise InvalidInput(f"Exit indices must lie in 0..{self.reference.exits.size - 1}, got {int(new.min())}..{int(new.max())}.")
        if first_scores is not None and first_scores.numel() != new.numel():
            raise InvalidInput(f"One first-exit score per item is needed, got {first_scores.numel()} for {new.numel()} items.")
        if new.numel() and (self._exits or self.windows) and (first_scores is not None) != self._scored:
            raise InvalidInput("first_scores must be given with every update or with none.")
        if new.numel():
            self._scored = first_scores is not None
        self._exits.extend(new.tolist())
        if first_scores is not None:
            self._scores.extend(first_scores.detach().reshape(-1).to("cpu", torch.float32).tolist())
        out = []
        while len(self._exits) >= self.window:
            out.append(self._close())
        return out

    _scored: bool = field(default=False, repr=False)

    def _close(self) -> DriftReport:
        w = self.window
        exits = np.bincount(np.asarray(self._exits[:w]), minlength=self.reference.exits.size).astype(np.float64)
        del self._exits[:w]
        self.windows += 1
        # Shares of alpha that sum to it over all windows: 1 / (w (w + 1)).
        level = self.alpha / (self.windows * (self.windows + 1))
        p, exit_psi, score_psi = chi_square(self.reference.exits, exits), psi(self.reference.exits, exits), 0.0
        drifted = p <= level and exit_psi >= self.threshold
        if self._scored:
            bins = np.searchsorted(self.reference.edges, np.asarray(self._scores[:w], np.float32), side="right")
            del self._scores[:w]
            scores = np.bincount(bins, minlength=self.reference.scores.size).astype(np.float64)
            q, score_psi = chi_square(self.reference.scores, scores), psi(self.reference.scores, scores)
            drifted = (2 * p <= level and exit_psi >= self.threshold) or (2 * q <= level and score_psi >= self.threshold)
            p = min(1.0, 2 * min(p, q))
        return DriftReport(self.windows, exit_psi, score_psi, p, level, drifted)
