"""The tensors of one call, whole, and what is done to some of its rows.

A name of the cut is one tensor of all rows, written for the rows that are there when it is made. So rows need not be moved when some of
them leave or come back: a part gathers the rows it is run for and puts what it makes in their places.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.diffusion import BoundPoint
from offramp.engines.diffusion.trajectory import Host, Memory, on_device
from offramp.policies.denoising import Measured, Seen
from offramp.policies.fills import Tensors

SKIP, COMPUTE, NOT_FINITE, MISSING = 1, 0, -1, -2
"""What a score says of a row: it reaches the threshold, it does not, it is no number or what is remembered is none, there is nothing to
compare with."""


Answer = Callable[[], tuple[Host, Tensor | None]]
"""Waits for what a measured signal says: ``[R]`` one of ``SKIP``, ``COMPUTE``, ``NOT_FINITE``, ``MISSING`` for each row, and the scores
``[R]`` if they are observed and there are any."""


class Rows(Protocol):
    """What is done to some rows of one call (int64, ascending). Made by `offramp.engines.diffusion.run.Runner.rows`."""

    def ahead(self, rows: int, staying: int, start: int, stop: int) -> bool:
        """Whether it pays to run segments for all of some rows before an answer says which of them stay, about so many."""
        ...

    def run(self, rows: Host, start: int, stop: int) -> None:
        """Run segments ``start`` to ``stop - 1``. No decision falls between."""
        ...

    def ask(self, point: BoundPoint, memory: Memory, rows: Host, observe: bool) -> Answer:
        """Ask a measured signal; the answer is the one read of the host."""
        ...

    def fill(self, point: BoundPoint, memory: Memory, rows: Host, weights: Sequence[Sequence[float]] | None) -> None:
        """What stands for what rows skip at a point, ``weights`` ``[R, keeps]`` of the steps that it remembers."""
        ...

    def remember(self, point: BoundPoint, memory: Memory, rows: Host) -> None:
        """Keep what rows computed from a point's start to its end."""
        ...

    def outputs(self) -> dict[str, Tensor]:
        """What the model returns for all rows, by name; the caller's to keep."""
        ...


def compares(point: BoundPoint) -> bool:
    """Whether a point's signal compares with the last computed step."""
    return isinstance(point.point.signal, Measured) and point.point.signal.compares


def measured(point: BoundPoint) -> Measured:
    """The signal of a point that is asked."""
    if not isinstance(point.point.signal, Measured):
        raise RuntimeError(
            "A point whose signal is known beforehand was asked for a score; this is a defect in the walk over the boundaries."
        )
    return point.point.signal


def watched(cut: Cut, point: BoundPoint, values: Tensors, sample: Tensor) -> tuple[Tensor, ...]:
    """What a measured signal looks at, of rows that have passed all that it names."""
    signal = point.point.signal
    if not isinstance(signal, Measured):
        return ()
    state = tuple(values[n] for n in point.pairs.values()) if point.pairs else (hidden(cut, point.start, values, sample),)
    since = None if point.since is None else hidden(cut, point.since, values, sample)
    return signal.watch(Seen(state, since, sample))


def hidden(cut: Cut, boundary: int, values: Tensors, sample: Tensor) -> Tensor:
    """The hidden state at a boundary; before the first segment the noisy input."""
    name = cut.hidden_name(boundary)
    return sample if name is None else values[name]


def continued(point: BoundPoint, values: Tensors) -> dict[str, Tensor]:
    """For every name that the fill gives, what it continues, if the fill reads that."""
    return {n: values[b] for n, b in point.pairs.items()} if point.point.fill.paired else {}


Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes one function of a few operations in memory."""


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def filled(
    cut: Cut,
    point: BoundPoint,
    values: Tensors,
    remembered: Sequence[Tensors],
    weights: Tensor | None,
    level: Tensor | None,
    fuse: Fuse = as_it_is,
) -> Tensors:
    """What stands for the skipped part, by name."""
    if point.point.fill.reads_head:
        state = values[str(cut.hidden_name(point.start))]
        return point.point.fill.fill({point.made[0]: point.head.output(state, level)}, (), None)  # type: ignore[union-attr,operator]
    made: Tensors = fuse(point.point.fill.fill)(continued(point, values), remembered, weights)
    return made


def codes(score: Tensor, broken: Sequence[Tensor], threshold: float | Tensor) -> Tensor:
    """int8 ``[R]`` of scores (float32)."""
    sound = score.isfinite()
    for flags in broken:
        sound = sound & ~flags
    return torch.where(sound, (score >= threshold).to(torch.int8), NOT_FINITE)


class EagerRows:
    """Everything as it was exported.

    Args:
        cut: the model.
        values: at the first boundary, by name; the caller's, never written to.
        sample: the noisy input ``[B, ...]``.
        level: log-SNR of every row.
    """

    def __init__(self, cut: Cut, values: Mapping[str, Tensor], sample: Tensor, level: Sequence[float]) -> None:
        self.cut, self.sample, self.rows = cut, sample, len(level)
        self.values = dict(values)
        self._given = level
        self._level: Tensor | None = None
        self._indices: dict[bytes, Tensor] = {}

    def ahead(self, rows: int, staying: int, start: int, stop: int) -> bool:
        return False  # an answer is there when it was asked for

    def run(self, rows: Host, start: int, stop: int) -> None:
        state = CutState({n: self._some(n, rows) for n in self.cut.names(start)}, len(rows), start)
        done = self.cut.run(state, start, stop)
        for name in self.cut.made(start, stop):
            self._place(name, done.values[name], rows)

    def ask(self, point: BoundPoint, memory: Memory, rows: Host, observe: bool) -> Answer:
        signal = measured(point)
        reference = tuple(self._take(t, rows) for t in memory.reference) if signal.compares else None
        now = watched(self.cut, point, _Chosen(self, rows), self._take(self.sample, rows))
        if reference is not None and not (reference and alike(now, reference)):
            return lambda: (np.full(len(rows), MISSING), None)
        score = signal.score(now, reference, self._levels(rows), point.head)
        found = codes(score, [self._take(t, rows) for t in memory.broken], point.point.threshold)
        return lambda: (np.asarray(found.tolist()), score.detach() if observe else None)

    def fill(self, point: BoundPoint, memory: Memory, rows: Host, weights: Sequence[Sequence[float]] | None) -> None:
        remembered = [{n: self._take(t, rows) for n, t in s.items()} for s in memory.snapshots]
        held = len(remembered)
        given = None if weights is None else on_device([w[:held] for w in weights], torch.float32, self.sample.device)
        made = filled(self.cut, point, _Chosen(self, rows), remembered, given, self._levels(rows))
        last = point.stop == len(self.cut.segments)  # the caller may write into what it is given
        for name in self.cut.made(point.start, point.stop):
            self._place(name, made[name].clone() if last else made[name], rows)

    def remember(self, point: BoundPoint, memory: Memory, rows: Host) -> None:
        fill, values = point.point.fill, _Chosen(self, rows)
        kept = dict(fill.remember(continued(point, values), {n: values[n] for n in point.made})) if fill.keeps else {}
        seen = watched(self.cut, point, values, self._take(self.sample, rows)) if compares(point) else ()
        whole = len(rows) == self.rows
        if whole and point.stop == len(self.cut.segments):
            kept = {n: t.clone() for n, t in kept.items()}
        memory.put(None if whole else self._index(rows), kept, seen, check=isinstance(point.point.signal, Measured))

    def outputs(self) -> dict[str, Tensor]:
        return {n: self.values[n] for n in self.cut.names(len(self.cut.segments))}

    def _index(self, rows: Host) -> Tensor:
        key = rows.tobytes()
        if key not in self._indices:
            self._indices[key] = on_device(rows.tolist(), torch.int64, self.sample.device)
        return self._indices[key]

    def _levels(self, rows: Host) -> Tensor:
        if self._level is None:
            self._level = on_device(self._given, torch.float32, self.sample.device)
        return self._take(self._level, rows)

    def _take(self, tensor: Tensor, rows: Host) -> Tensor:
        """Rows of a tensor that has all of them in its first dimension."""
        return tensor if len(rows) == self.rows else tensor.index_select(0, self._index(rows))

    def _some(self, name: str, rows: Host) -> Tensor:
        tensor = self.values[name]
        return tensor if len(rows) == self.rows else self.cut.select(name, tensor, self._index(rows))

    def _place(self, name: str, new: Tensor, rows: Host) -> None:
        whole = len(rows) == self.rows
        self.values[name] = new if whole else self.cut.place(name, self.values.get(name), new, self._index(rows), self.rows)


class _Chosen(Mapping[str, Tensor]):
    """Rows of every tensor, taken when they are asked for."""

    def __init__(self, of: EagerRows, rows: Host) -> None:
        self._of, self._rows = of, rows

    def __getitem__(self, name: str) -> Tensor:
        return self._of._some(name, self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of.values)

    def __len__(self) -> int:
        return len(self._of.values)


def alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether tensors of two lists can be compared."""
    return len(one) == len(other) and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(one, other, strict=True))
