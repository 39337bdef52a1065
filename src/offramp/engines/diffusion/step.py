"""One step of a denoiser under a plan: rows skip, land, join and are remembered, boundary by boundary.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.core.noise import noise_share
from offramp.diffusion import BoundPoint
from offramp.engines.diffusion.report import StepRecord
from offramp.engines.diffusion.run import Runner
from offramp.engines.diffusion.straight import must_compute
from offramp.engines.diffusion.trajectory import Branch, Memory, on_device
from offramp.policies.denoising import Measured, Moment, Scheduled, Seen


@dataclass
class _Group:
    """Rows that stand at one boundary, in the order of the state."""

    rows: list[int]
    state: CutState


@dataclass
class _Open:
    """Rows that went past a point without skipping, until they reach its end."""

    rows: list[int]
    start: dict[str, Tensor]
    watched: tuple[Tensor, ...]
    dirty: set[int] = field(default_factory=set)


@dataclass
class Walk:
    """One call on its way through the segments.

    Attributes:
        cut: the model.
        points: the plan on it.
        branch: what is remembered.
        moment: what is known of the rows.
        sample: the noisy input ``[B, ...]``.
        final: whether each row is at its last step.
        run: runs a segment.
        record: what happened, filled on the way.
        observe: scores are noted in the record.
    """

    cut: Cut
    points: Sequence[BoundPoint]
    branch: Branch
    moment: Moment
    sample: Tensor
    final: list[bool]
    why: str
    run: Runner
    record: StepRecord
    observe: bool = False

    def __post_init__(self) -> None:
        self.rows = len(self.moment.log_snr)
        self.everyone = list(range(self.rows))
        share = {x: noise_share(x) for x in set(self.moment.log_snr)}
        self.noise = [share[x] for x in self.moment.log_snr]
        self.level: Tensor | None = None
        self.landing: dict[int, list[Callable[[], _Group]]] = {}
        self.open: dict[int, _Open] = {}
        self.passed: dict[int, _Group] = {}
        self.indices: dict[tuple[int, ...], Tensor] = {}
        self.since = {p.since for p in self.points if p.since is not None}

    def all(self, state: CutState) -> CutState:
        """From the first boundary to the last, stopping where a point or its signal has something to see."""
        last = len(self.cut.segments)
        stops = sorted({0, last, *self.since, *(b for p in self.points for b in (p.start, p.stop))})
        group: _Group | None = _Group(self.everyone, state)
        for boundary, following in zip(stops, [*stops[1:], last], strict=True):
            group = self._joined([*([group] if group else []), *(land() for land in self.landing.pop(boundary, []))])
            if group is None:
                continue
            for point in self.points:
                if point.stop == boundary:
                    self._remember(point, group)
            if boundary == last:
                break
            if boundary in self.since:
                self.passed[boundary] = group
            for point in self.points:
                if point.start == boundary and group is not None:
                    group = self._decide(point, group)
            if group is None:
                continue
            for point in self.points:
                if point.start == boundary and point.point.remembers:
                    self._open(point, group)
            state = self.run(self.cut, group.state, following)
            self.record.spend(group.rows, following - boundary, sum(s.flops for s in self.cut.spec.segments[boundary:following]))
            group = _Group(group.rows, state)
        if group is None:
            raise RuntimeError("No row reached the output; this is a defect in the walk over the boundaries.")
        for index, memory in enumerate(self.branch.memories):
            stored = self.record.stored.get(index, set())
            memory.skipped([r for r in self.everyone if r not in stored])
        state = self._rows_of(group, self.everyone)
        if self.run.reuses and state is group.state:
            state = replace(state, values={n: t.clone() for n, t in state.values.items()})
        return state

    def _index(self, rows: Sequence[int]) -> Tensor:
        key = tuple(rows)
        if key not in self.indices:
            self.indices[key] = on_device(key, torch.int64, self.sample.device)
        return self.indices[key]

    def _levels(self, rows: list[int]) -> Tensor:
        if self.level is None:
            self.level = on_device(self.moment.log_snr, torch.float32, self.sample.device)
        return self._some(self.level, rows)

    def _joined(self, groups: Sequence[_Group]) -> _Group | None:
        if not groups:
            return None
        return _Group([r for g in groups for r in g.rows], self.cut.join([g.state for g in groups]))

    def _rows_of(self, group: _Group, rows: list[int]) -> CutState:
        """The state of the given rows of a group, in that order."""
        if rows == group.rows:
            return group.state
        place = {r: k for k, r in enumerate(group.rows)}
        return self.cut.take(group.state, self._index([place[r] for r in rows]))

    def _state(self, point: BoundPoint, state: CutState, rows: list[int]) -> tuple[Tensor, ...]:
        """What the skipped part would continue: for every tensor that it makes the one before, else the hidden state."""
        if point.pairs:
            return tuple(state.values[n] for n in point.pairs.values())
        return (state.hidden if state.hidden is not None else self._some(self.sample, rows),)

    def _some(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Rows of a tensor that has all of them."""
        return tensor if rows == self.everyone else tensor.index_select(0, self._index(rows))

    def _watched(self, point: BoundPoint, group: _Group) -> tuple[Tensor, ...]:
        signal = point.point.signal
        if not isinstance(signal, Measured):
            return ()
        since = None
        if point.since is not None:
            before = self.passed.get(point.since)
            if before is None or not set(group.rows) <= set(before.rows):
                return ()
            since = self._rows_of(before, group.rows).hidden if point.since else self._some(self.sample, group.rows)
        return signal.watch(Seen(self._state(point, group.state, group.rows), since, self._some(self.sample, group.rows)))

    def _start(self, point: BoundPoint, state: CutState) -> dict[str, Tensor]:
        return {n: state.values[b] for n, b in point.pairs.items()} if point.point.fill.paired else {}

    def _decide(self, point: BoundPoint, group: _Group) -> _Group | None:
        """Send away the rows whose score reaches the threshold; returns the others."""
        if point.point.threshold == math.inf:
            return group
        memory = self.branch.memories[point.index]
        reasons = self._reasons(point, memory, group.rows)
        asked = [row for row, reason in zip(group.rows, reasons, strict=True) if not reason]
        self.record.reasons.update((point.index, reason) for reason in reasons if reason)
        if not asked:
            return group
        signal = point.point.signal
        if isinstance(signal, Scheduled):
            scores = signal.known(self.moment, point.index)
            codes = [(1 if scores[r] >= point.point.threshold else 0) if math.isfinite(scores[r]) else -1 for r in asked]
        else:
            codes = self._measured(point, signal, memory, _Group(asked, self._rows_of(group, asked)))
        names = {1: "skipped", 0: "score", -1: "not finite", -2: "missing"}
        self.record.reasons.update((point.index, names[code]) for code in codes)
        gone = [r for r, code in zip(asked, codes, strict=True) if code == 1]
        if not gone:
            return group
        # Filled where they land: the rows that compute are on their way before.
        self.landing.setdefault(point.stop, []).append(lambda: self._filled(point, memory, _Group(gone, self._rows_of(group, gone))))
        self._skip(point, gone)
        away = set(gone)
        left = [r for r in group.rows if r not in away]
        return _Group(left, self._rows_of(group, left)) if left else None

    def _reasons(self, point: BoundPoint, memory: Memory, rows: list[int]) -> list[str]:
        """Why each row must compute, or ``""``; rows that stand alike have the same reason."""
        found: dict[tuple[bool, int, bool, int], str] = {}
        reasons = []
        for r in rows:
            stands = (not memory.noise[r], self.branch.step[r], self.final[r], memory.age[r])
            if stands not in found:
                found[stands] = must_compute(point, self.branch, memory, r, self.final[r], self.why)
            reasons.append(found[stands])
        return reasons

    def _measured(self, point: BoundPoint, signal: Measured, memory: Memory, asked: _Group) -> list[int]:
        """1 = skip, 0 = the score is too low, -1 = it is not finite or what is remembered is not, -2 = nothing to compare with."""
        now = self._watched(point, asked)
        if not now or (signal.compares and not memory.reference):
            return [-2] * len(asked.rows)
        reference = tuple(self._some(t, asked.rows) for t in memory.reference) if signal.compares else None
        if reference is not None and any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(now, reference, strict=True)):
            return [-2] * len(asked.rows)
        score = signal.score(now, reference, self._levels(asked.rows), point.head)
        self.record.spend(asked.rows, 0, point.head_flops)
        if self.observe:
            self.record.scores.append((point.index, tuple(asked.rows), score.detach()))
        sound = score.isfinite()
        for broken in memory.broken:
            sound = sound & ~self._some(broken, asked.rows)
        codes: list[int] = torch.where(sound, (score >= point.point.threshold).to(torch.int8), -1).tolist()  # the one host read
        return codes

    def _skip(self, point: BoundPoint, rows: list[int]) -> None:
        """Note that rows skip."""
        self.record.spend(rows, 0, point.fill_flops)
        for r in rows:
            self.record.fired[r].append(point.index)
        for other in self.points:  # what is under way across this place is not computed any more
            if other.index in self.open and other.start <= point.start < other.stop:
                self.open[other.index].dirty.update(rows)

    def _filled(self, point: BoundPoint, memory: Memory, gone: _Group) -> _Group:
        """Rows at the end of the point with its fill."""
        fill, rows, state = point.point.fill, gone.rows, gone.state
        if fill.reads_head:
            level = self._levels(rows)
            made = fill.fill({point.made[0]: point.head.output(state.hidden, level)}, (), None)  # type: ignore[union-attr,operator]
        else:
            remembered = [{n: self._some(t, rows) for n, t in s.items()} for s in memory.snapshots]
            weights = None
            if fill.keeps > 1:
                weights = on_device(self._coefficients(point, memory, rows, len(remembered)), torch.float32, self.sample.device)
            made = fill.fill(self._start(point, state), remembered, weights)
        if point.stop == len(self.cut.segments):  # the caller may write into what it is given
            made = {n: t.clone() for n, t in made.items()}
        return _Group(rows, self.cut.skip(state, point.stop, made))

    def _coefficients(self, point: BoundPoint, memory: Memory, rows: list[int], held: int) -> list[list[float]]:
        """Weights of the remembered steps for each row; rows that remember the same steps have the same."""
        found: dict[tuple[float, ...], list[float]] = {}
        each = []
        for r in rows:
            key = (self.noise[r], *memory.noise[r])
            if key not in found:
                found[key] = point.point.fill.coefficients(self.noise[r], memory.noise[r])[:held]
            each.append(found[key])
        return each

    def _open(self, point: BoundPoint, group: _Group) -> None:
        if point.point.threshold == math.inf:
            return
        compares = isinstance(point.point.signal, Measured) and point.point.signal.compares
        watched = self._watched(point, group) if compares else ()
        if compares and not watched:
            return  # the place that the signal compares with was jumped over: this step cannot be a reference
        self.open[point.index] = _Open(group.rows, self._start(point, group.state), watched)

    def _remember(self, point: BoundPoint, group: _Group) -> None:
        """Keep what rows computed all the way from a point's start to its end."""
        opened = self.open.pop(point.index, None)
        if opened is None:
            return
        present = set(group.rows)
        rows = [r for r in opened.rows if r not in opened.dirty and r in present]
        if not rows:
            return
        fill = point.point.fill
        kept: dict[str, Tensor] = {}
        place = {r: k for k, r in enumerate(opened.rows)}
        same = rows == opened.rows
        index = None if same else self._index([place[r] for r in rows])

        def of(tensor: Tensor) -> Tensor:
            return tensor if index is None else tensor.index_select(0, index)

        if fill.keeps:
            state = self._rows_of(group, rows)
            made = {n: state.values[n] for n in point.made}
            kept = dict(fill.remember({n: of(t) for n, t in opened.start.items()}, made))
        watched = tuple(of(t) for t in opened.watched)
        where = None if rows == self.everyone else self._index(rows)
        if where is None and (self.run.reuses or point.stop == len(self.cut.segments)):  # the caller may write into what it is given
            kept = {n: t.clone() for n, t in kept.items()}
            watched = tuple(t.clone() for t in watched)
        measured = isinstance(point.point.signal, Measured)
        self.branch.memories[point.index].store(rows, where, kept, watched, self.noise, check=measured)
        self.record.stored[point.index] = set(rows)
