"""How accepting rows pass over a model piece by piece, and how keys and values behind an exit come to be.

The exits used cut the blocks into ``E + 1`` segments. A fill runs one segment for the newest token of every row that is alive, and for
whatever else its method takes along, and knows which tokens of a row still wait for the blocks behind.

Shapes: ``B`` rows, ``E`` exits used, ``Q`` tokens of a row in one pass, ``W`` width of the states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.engines.text.rows import Rows
from offramp.policies.decoding import CatchUp, Fill, Recompute


class Pass(NamedTuple):
    """States ``[B, Q, W]`` after a segment, of ``counts[b]`` tokens of each row from position ``first[b]`` on (both int64 ``[B]``)."""

    states: Tensor
    first: Tensor
    counts: Tensor


class Filling(ABC):
    """A fill at work on the rows of a batch.

    Args:
        rows: whose prompts have run.
        cap: most tokens of a row that may wait.
    """

    def __init__(self, rows: Rows, cap: int) -> None:
        self.rows, self.cap = rows, cap
        self.cuts = [0, *(rows.lm.exits[e] for e in rows.exits), len(rows.model)]
        self.last = len(self.cuts) - 2

    @abstractmethod
    def run(self, segment: int, going: Tensor) -> Pass:
        """Run a segment, the one before it having run for these tokens.

        Args:
            segment: from 0.
            going: rows whose newest token has not left (bool ``[B]``).
        """

    @property
    @abstractmethod
    def waiting(self) -> Tensor:
        """Tokens of each row that ran through the first segment and not through the last, int64 ``[B]``."""

    def full(self) -> bool:
        """Whether a row has as many waiting as it may, so that a pass has to go all the way."""
        return bool((self.waiting >= self.cap).any())

    def leave(self, segment: int, leaving: Tensor, state: Tensor) -> None:
        """Newest tokens of some rows (bool ``[B]``) leave after a segment, with states ``[B, 1, W]``."""
        return

    def settle(self) -> None:
        """The newest token of every row is decided."""
        return

    def finish(self) -> Pass | None:
        """Every row has ended: run what still waits through all blocks. ``None`` if nothing waits."""
        return None

    def _run(self, segment: int, first: Tensor, counts: Tensor, width: int, states: Tensor | None) -> Tensor:
        return self.rows.run(first, counts, width, self.cuts[segment], self.cuts[segment + 1], states)


class _CatchingUp(Filling):
    """Tokens wait before each segment with the states that the one before it left; a pass takes all that wait there.

    They are a contiguous run of positions, up to the newest that ran before: ``done[s, b]`` positions of a row have been through segment
    ``s``, and fewer through each segment behind it. Before each segment, states stand in a ring by position.
    """

    def __init__(self, rows: Rows, cap: int) -> None:
        super().__init__(rows, cap)
        self.done = rows.start.repeat(self.last + 1, 1)
        self.rings: dict[int, Tensor] = {}

    @property
    def waiting(self) -> Tensor:
        return self.done[0] - self.done[-1]

    def run(self, segment: int, going: Tensor) -> Pass:
        first = self.done[segment].clone()
        until = self.done[segment - 1] if segment else torch.where(self.rows.alive, self.rows.length, first)
        counts = until - first
        width = int(counts.max()) if segment else 1
        hidden = self._run(segment, first, counts, width, self._take(segment, first, width) if segment else None)
        self.done[segment] = until
        if segment < self.last:
            self._put(segment + 1, first, counts, hidden)
        return Pass(hidden, first, counts)

    def finish(self) -> Pass | None:
        found = None
        for segment in range(1, self.last + 1):
            if bool((self.done[segment - 1] > self.done[segment]).any()):
                found = self.run(segment, self.rows.alive)
                if segment < self.last:
                    self.rows.observe(found.states, self.rows.exits[segment])
        return found

    def _take(self, segment: int, first: Tensor, width: int) -> Tensor:
        place = (first[:, None] + torch.arange(width, device=first.device)) % self.cap
        ring = self.rings[segment]
        return ring.gather(1, place[..., None].expand(-1, -1, ring.shape[2]))

    def _put(self, segment: int, first: Tensor, counts: Tensor, hidden: Tensor) -> None:
        if segment not in self.rings:  # one place more takes what nobody reads
            self.rings[segment] = hidden.new_zeros(len(hidden), self.cap + 1, hidden.shape[2])
        offset = torch.arange(hidden.shape[1], device=first.device)
        place = torch.where(offset < counts[:, None], (first[:, None] + offset) % self.cap, self.cap)
        self.rings[segment].scatter_(1, place[..., None].expand_as(hidden), hidden)


class _Recomputing(Filling):
    """Every pass runs the waiting tokens anew, from their embeddings on, together with the newest."""

    def __init__(self, rows: Rows, cap: int) -> None:
        super().__init__(rows, cap)
        self.seen, self.done = rows.start.clone(), rows.start.clone()
        self.states: Tensor | None = None
        self.counts = torch.zeros_like(self.done)

    @property
    def waiting(self) -> Tensor:
        return self.seen - self.done

    def run(self, segment: int, going: Tensor) -> Pass:
        if segment == 0:
            self.seen = torch.where(self.rows.alive, self.rows.length, self.seen)
            self.counts = torch.where(self.rows.alive, self.waiting, 0)  # a row that has ended has no later pass
            self.states = None
        return self._go(segment)

    def _go(self, segment: int) -> Pass:
        first, counts = self.done.clone(), self.counts
        self.states = self._run(segment, first, counts, int(counts.max()) if self.states is None else self.states.shape[1], self.states)
        if segment == self.last:
            self.done += counts
        return Pass(self.states, first, counts)

    def finish(self) -> Pass | None:
        found = None
        if bool(self.waiting.any()):
            self.counts, self.states = self.waiting, None
            for segment in range(self.last + 1):
                found = self._go(segment)
                if segment < self.last:
                    self.rows.observe(found.states, self.rows.exits[segment])
        return found


class _Copying(Filling):
    """Rows that left write, behind their exit, keys and values made from their state there. Nothing waits."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, 1)
        self.states: Tensor | None = None
        self.left = torch.full_like(rows.length, self.last)  # segment after which the newest token left
        self.frozen: Tensor | None = None

    @property
    def waiting(self) -> Tensor:
        return torch.zeros_like(self.rows.length)

    def run(self, segment: int, going: Tensor) -> Pass:
        first, counts = self.rows.length - 1, going.long()
        self.states = self._run(segment, first, counts, 1, self.states if segment else None)
        return Pass(self.states, first, counts)

    def leave(self, segment: int, leaving: Tensor, state: Tensor) -> None:
        self.left = torch.where(leaving, segment, self.left)
        self.frozen = state if self.frozen is None else torch.where(leaving[:, None, None], state, self.frozen)

    def settle(self) -> None:
        rows = self.rows
        for segment in range(1, self.last + 1):
            copied = rows.alive & (self.left < segment)
            if self.frozen is not None and bool(copied.any()):
                rows.project(rows.length - 1, copied.long(), self.cuts[segment], self.cuts[segment + 1], self.frozen)
                if segment < self.last:  # the state counts as that after the segment
                    rows.observe(self.frozen, rows.exits[segment])
        self.left, self.frozen = torch.full_like(self.left, self.last), None


def filling(rows: Rows, fill: Fill) -> Filling:
    """The fill that some data describe, for rows whose prompts have run."""
    if isinstance(fill, CatchUp):
        return _CatchingUp(rows, fill.cap)
    if isinstance(fill, Recompute):
        return _Recomputing(rows, fill.cap)
    return _Copying(rows)
