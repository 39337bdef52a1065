"""What a denoiser computed: depth and FLOPs of every row at every step, and why.

Shapes: ``R`` rows times guidance branches, ``T`` steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from offramp.engines.diffusion.trajectory import Host


@dataclass
class StepRecord:
    """One call. Arrays have one entry per row.

    Attributes:
        branch: guidance branch.
        step: of the trajectory.
        log_snr: noise level.
        full: FLOPs per row of the whole model.
        depth: segments that ran.
        flops: executed, heads included.
        fired: number of the first point that fired; -1 = none.
        ran: rows that each segment ran for, by number of the segment; not those that a graph computes along, nor those that were sent away
            while the next part was under way already.
        reasons: how often each (point, reason) decided.
        scores: (point, rows, score) of measured signals, if they are observed.
    """

    branch: int
    step: int
    log_snr: list[float]
    full: int
    ran: Counter[int] = field(default_factory=Counter)
    reasons: Counter[tuple[int, str]] = field(default_factory=Counter)
    scores: list[tuple[int, Host, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = len(self.log_snr)
        self.depth: Host = np.zeros(rows, dtype=np.int64)
        self.flops: Host = np.zeros(rows, dtype=np.int64)
        self.fired: Host = np.full(rows, -1)

    def spend(self, rows: Host | slice, depth: int, flops: int) -> None:
        """Count what some rows ran."""
        self.depth[rows] += depth
        self.flops[rows] += flops

    def run(self, rows: Host | slice, start: int, stop: int, flops: int) -> None:
        """Count segments ``start`` to ``stop - 1`` of some rows."""
        self.spend(rows, stop - start, flops)
        for k in range(start, stop):
            self.ran[k] += len(self.depth[rows])

    def fire(self, rows: Host | slice, point: int) -> None:
        """A point fired for some rows."""
        self.fired[rows] = np.where(self.fired[rows] < 0, point, self.fired[rows])


@dataclass(frozen=True)
class Report:
    """What ran between two resets. Rows of separate guidance calls follow one another, the first branch first.

    Attributes:
        depth: ``[R, T]`` int64 segments that ran; -1 where a row was not called.
        flops: ``[R, T]`` float64 executed FLOPs, heads included; NaN where a row was not called.
        log_snr: ``[R, T]`` float64 noise level; NaN where a row was not called.
        fired: ``[R, T]`` int64 number of the first point that fired; -1 = none.
        segments: of the model.
        full_flops: per row and step of the whole model.
        reasons: how often each (point, reason) decided about a row: ``skipped``, ``score`` (below the threshold), ``first``, ``last``,
            ``cap``, ``missing``, ``not finite``, ``shape``, ``gap``.
        cache_bytes: most that was remembered at once.
        scores: for every point ``[R, T]`` float32 scores, NaN where none was measured; empty unless observed.
        share: steps that were taken, of those that were asked for: a method that takes fewer spends the less.
        ran: rows that each segment ran for, over all steps, as in `StepRecord`.
    """

    depth: Tensor
    flops: Tensor
    log_snr: Tensor
    fired: Tensor
    segments: int
    full_flops: float
    reasons: Mapping[tuple[int, str], int]
    cache_bytes: int
    scores: Mapping[int, Tensor] = field(default_factory=dict)
    share: float = 1.0
    ran: Mapping[int, int] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """Executed FLOPs over those of the whole model at all steps that were asked for; NaN before the first call."""
        return self.share * float(self.flops.nansum() / (self.full_flops * (self.depth >= 0).sum()))

    @property
    def row_cost(self) -> Tensor:
        """``[R]`` executed FLOPs of each row over those of the whole model at the steps that were taken (float64)."""
        return self.flops.nansum(1) / (self.full_flops * (self.depth >= 0).sum(1))

    @classmethod
    def of(cls, records: Sequence[StepRecord], full: int, segments: int, cache_bytes: int, share: float = 1.0) -> Report:
        """Put the records of calls together."""
        widths = {b: max(len(r.log_snr) for r in records if r.branch == b) for b in sorted({r.branch for r in records})}
        steps = sorted({r.step for r in records})
        starts = {b: sum(widths[o] for o in widths if o < b) for b in widths}
        shape = (sum(widths.values()), len(steps))
        depth, fired = torch.full(shape, -1), torch.full(shape, -1)
        flops, log_snr = torch.full(shape, torch.nan, dtype=torch.float64), torch.full(shape, torch.nan, dtype=torch.float64)
        reasons: Counter[tuple[int, str]] = Counter()
        ran: Counter[int] = Counter()
        scores: dict[int, Tensor] = {}
        for record in records:
            ran.update(record.ran)
            column, start = steps.index(record.step), starts[record.branch]
            rows = slice(start, start + len(record.log_snr))
            depth[rows, column] = torch.from_numpy(record.depth)
            flops[rows, column] = torch.from_numpy(record.flops).double() * (full / record.full)
            log_snr[rows, column] = torch.tensor(record.log_snr, dtype=torch.float64)
            fired[rows, column] = torch.from_numpy(record.fired)
            reasons.update(record.reasons)
            for point, which, values in record.scores:
                table = scores.setdefault(point, torch.full(shape, torch.nan))
                table[torch.from_numpy(which) + start, column] = values.float().cpu()
        return cls(depth, flops, log_snr, fired, segments, float(full), dict(reasons), cache_bytes, scores, share, dict(ran))
