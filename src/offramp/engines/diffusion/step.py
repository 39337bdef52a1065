"""One step of a denoiser under a plan: rows skip, land, join and are remembered, boundary by boundary.

What is known of rows is on the host; what is done to them is `offramp.engines.diffusion.rows.Rows`.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.backbones import Cut
from offramp.core.noise import noise_share
from offramp.diffusion import BoundPoint
from offramp.engines.diffusion.report import StepRecord
from offramp.engines.diffusion.rows import COMPUTE, MISSING, NOT_FINITE, SKIP, Rows, compares
from offramp.engines.diffusion.straight import must_compute
from offramp.engines.diffusion.trajectory import Branch, Host, Memory
from offramp.policies.denoising import Measured, Moment, Scheduled

_NAMES = {SKIP: "skipped", COMPUTE: "score", NOT_FINITE: "not finite", MISSING: "missing"}


@dataclass
class Walk:
    """One call on its way through the segments.

    Attributes:
        cut: the model.
        points: the plan on it.
        branch: what is remembered.
        moment: what is known of the rows.
        final: bool ``[B]``, whether each row is at its last step.
        why: why the branch has nothing to remember, if it has not.
        rows: what is done to them.
        record: what happened, filled on the way.
        observe: scores are noted in the record.
    """

    cut: Cut
    points: Sequence[BoundPoint]
    branch: Branch
    moment: Moment
    final: Host
    why: str
    rows: Rows
    record: StepRecord
    observe: bool = False

    def __post_init__(self) -> None:
        self.count = len(self.moment.log_snr)
        share = {x: noise_share(x) for x in set(self.moment.log_snr)}
        self.noise = np.array([share[x] for x in self.moment.log_snr])
        self.landing: dict[int, list[tuple[BoundPoint, Host]]] = {}
        self.open: dict[int, Host] = {}
        """Bool ``[B]`` by point: rows that went past it without skipping and have computed everything since."""
        self.passed: dict[int, Host] = {}
        """Bool ``[B]`` by boundary: rows that were there."""
        self.since = {p.since for p in self.points if p.since}
        self.later: list[Callable[[], None]] = []
        self.ran = False

    def all(self) -> None:
        """From the first boundary to the last, stopping where a point or its signal has something to see."""
        last = len(self.cut.segments)
        stops = sorted({0, last, *self.since, *(b for p in self.points for b in (p.start, p.stop))})
        here = np.arange(self.count)
        stored: dict[int, Host] = {}
        for boundary, following in zip(stops, [*stops[1:], last], strict=True):
            here = self._landed(boundary, here)
            if not here.size:
                continue
            for point in self.points:
                if point.stop == boundary and point.index in self.open:
                    stored[point.index] = self._remember(point, here)
            if boundary == last:
                break
            if boundary in self.since:
                self.passed[boundary] = self._flags(here)
            asks = [p for p in self.points if p.start == boundary and p.point.threshold != math.inf]
            self.ran = False
            for point in asks:
                if here.size:
                    here = self._decide(point, here, following if len(asks) == 1 else None)
            if here.size and not self.ran:
                self.rows.run(here, boundary, following)
            for note in self.later:
                note()
            self.later.clear()
            if not here.size:
                continue
            for point in asks:
                if point.point.follows:
                    self.open[point.index] = self._flags(self._seen(point, here) if compares(point) else here)
            self.record.run(here, boundary, following, sum(s.flops for s in self.cut.spec.segments[boundary:following]))
        for point in (p for p in self.points if p.point.follows):
            away = np.ones(self.count, dtype=bool)
            if point.index in stored:
                away[stored[point.index]] = False
            self.branch.memories[point.index].skipped(away)

    def _flags(self, rows: Host) -> Host:
        flags = np.zeros(self.count, dtype=bool)
        flags[rows] = True
        return flags

    def _landed(self, boundary: int, here: Host) -> Host:
        """Rows at a boundary, with those that land there; they are filled now: the rows that compute are on their way before."""
        landed = self.landing.pop(boundary, [])
        for point, rows in landed:
            memory = self.branch.memories[point.index]
            weights = self._coefficients(point, memory, rows) if point.point.fill.keeps > 1 else None
            self.rows.fill(point, memory, rows, weights)
        return np.sort(np.concatenate([here, *(rows for _, rows in landed)])) if landed else here

    def _seen(self, point: BoundPoint, rows: Host) -> Host:
        """Of some rows, those that were where the point's signal looks."""
        if not point.since:
            return rows
        before = self.passed.get(point.since)
        return rows[before[rows]] if before is not None else rows[:0]

    def _decide(self, point: BoundPoint, here: Host, following: int | None) -> Host:
        """Send away the rows whose score reaches the threshold; returns the others.

        Args:
            point: which.
            here: rows that are there.
            following: where those that stay go on to, if nothing else is asked here.
        """
        memory = self.branch.memories[point.index]
        asked, reasons = must_compute(point, self.branch, memory, here, self.final, self.why)
        for reason, count in reasons.items():
            self.record.reasons[point.index, reason] += count
        if not asked.size:
            return here
        signal = point.point.signal
        if isinstance(signal, Scheduled):
            found = self._known(point, signal, asked)
        else:
            found = self._measured(point, signal, memory, asked, here, following)
        gone = asked[found == SKIP]
        memory.gone = len(gone)
        self.later.append(lambda: self._note(point, found, gone))  # what follows is launched first
        if not gone.size:
            return here
        self.landing.setdefault(point.stop, []).append((point, gone))
        return here[~self._flags(gone)[here]]

    def _note(self, point: BoundPoint, found: Host, gone: Host) -> None:
        """What a decision was."""
        if gone.size:
            self.record.spend(gone, 0, point.fill_flops)
            self.record.fire(gone, point.index)
            for other in self.points:  # what is under way across this place is not computed any more
                if other.index in self.open and other.start <= point.start < other.stop:
                    self.open[other.index][gone] = False
        for code, count in enumerate(np.bincount(found - MISSING), MISSING):
            if count:
                self.record.reasons[point.index, _NAMES[code]] += int(count)

    def _known(self, point: BoundPoint, signal: Scheduled, asked: Host) -> Host:
        scores = np.asarray(signal.known(self.moment, point.index))[asked]
        return np.where(np.isfinite(scores), np.where(scores >= point.point.threshold, SKIP, COMPUTE), NOT_FINITE)

    def _measured(self, point: BoundPoint, signal: Measured, memory: Memory, asked: Host, here: Host, following: int | None) -> Host:
        seen = self._seen(point, asked)
        found = np.full(len(asked), MISSING)
        if not seen.size or (signal.compares and not memory.reference):
            return found
        wait = self.rows.ask(point, memory, seen, self.observe)
        if following is not None and memory.gone is not None:
            staying = max(0, len(here) - memory.gone)  # as many as at the last step
            if self.rows.ahead(len(here), staying, point.start, following):
                # All go on before the answer is there, and it is not waited for with nothing to do. What is computed of rows that are sent
                # away after all is written over when they land.
                self.rows.run(here, point.start, following)
                self.ran = True
        answer, scores = wait()
        found[np.isin(asked, seen) if len(seen) < len(asked) else slice(None)] = answer
        if (answer != MISSING).any():
            self.record.spend(seen, 0, point.head_flops)
        if scores is not None:
            self.record.scores.append((point.index, seen, scores))
        return found

    def _coefficients(self, point: BoundPoint, memory: Memory, rows: Host) -> list[list[float]]:
        """Weights of the remembered steps for each row; rows that remember the same steps have the same."""
        found: dict[bytes, list[float]] = {}
        each = []
        for r in rows:
            key = self.noise[r].tobytes() + memory.noise[:, r].tobytes()
            if key not in found:
                found[key] = point.point.fill.coefficients(float(self.noise[r]), memory.levels(r))
            each.append(found[key])
        return each

    def _remember(self, point: BoundPoint, here: Host) -> Host:
        """Keep what rows computed all the way from a point's start to its end; returns which."""
        rows = here[self.open.pop(point.index)[here]]
        if rows.size:
            memory = self.branch.memories[point.index]
            if point.point.remembers:
                self.rows.remember(point, memory, rows)
            memory.note(rows, self.noise[rows])
        return rows
