"""What is done to some rows of a call, in captured graphs.

Every tensor of a call has one address for all rows of it (a `Board`), so that nothing moves when rows leave or come back: a graph gathers
the rows that it is told, by their numbers at an address of its own, and puts what it makes in their places. There is a graph for each part
and number of rows. A part that is run for fewer rows than its graph has repeats the last of them.

Shapes: ``B`` rows of a call, ``R`` of them at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.backbones import Cut
from offramp.backbones.cut import select_rows, whole_like
from offramp.core.errors import InvalidInput
from offramp.diffusion import BoundPoint
from offramp.engines.capture import Graph, Mailbox, Outbox
from offramp.engines.diffusion.rows import MISSING, Answer, alike, codes, compares, continued, filled, measured, watched
from offramp.engines.diffusion.trajectory import Host, Memory, not_finite
from offramp.policies.denoising import Measured, Seen
from offramp.policies.fills import Tensors

if TYPE_CHECKING:
    from offramp.engines.diffusion.graphs import Captured


FEW = 16
"""A part of the batch so small that without it the rest would hardly run faster, as long as that was not measured."""

WAIT_MS = 0.15
"""About what a device stands still, from making an answer to the first kernel that depends on it."""


class Board:
    """The tensors of calls of one form at fixed addresses.

    Attributes:
        cut: the model.
        rows: B.
        values: every tensor by name; those that parts make are there once the first part that makes them was captured.
        sample: the noisy input ``[B, ...]``.
        level: log-SNR ``[B]`` float32.
    """

    def __init__(self, cut: Cut, values: Mapping[str, Tensor], sample: Tensor, rows: int) -> None:
        self.cut, self.rows = cut, rows
        self.values = {n: whole_like(t, cut.batch_dims.get(n, ()), rows) for n, t in values.items()}
        self._own = next((n for n, t in values.items() if t is sample), None)
        self.sample = whole_like(sample, (0,), rows) if self._own is None else self.values[self._own]
        self.level = torch.zeros(rows, device=sample.device)
        self._outbox = Outbox(rows, sample.device)
        self._index: dict[str, Tensor] = {}
        self._chosen: dict[str, bytes] = {}

    def begin(self, values: Mapping[str, Tensor], sample: Tensor, level: Sequence[float]) -> None:
        """Take the inputs of a call."""
        self._outbox.begin()
        for name, value in values.items():
            self.values[name].copy_(value)
        if self._own is None:
            self.sample.copy_(sample)
        if level.count(level[0]) == len(level):
            self.level.fill_(level[0])
        else:
            self.send(self.level, np.asarray(level, dtype=np.float32))

    def index(self, kind: str, rows: Host | None, size: int) -> Tensor:
        """Where parts of one kind find which rows they are run for (int64 ``[size]``); written, unless ``rows`` is ``None``.

        What is run and what is asked after it are mostly the same rows, hence one kind.
        """
        if kind not in self._index:
            self._index[kind] = torch.zeros(self.rows, dtype=torch.int64, device=self.level.device)
        place = self._index[kind][:size]
        if rows is not None and self._chosen.get(kind) != (key := rows.tobytes()):
            self._outbox.send(rows, place)
            self._chosen[kind] = key
        return place

    def send(self, place: Tensor, values: Host) -> None:
        """Numbers of the host to an address of the device, without waiting for it."""
        given = torch.from_numpy(values)
        place.copy_(given.pin_memory() if place.device.type == "cuda" else given, non_blocking=True)

    def select(self, name: str, index: Tensor | None) -> Tensor:
        """Rows of a tensor of the cut."""
        return self.values[name] if index is None else self.cut.select(name, self.values[name], index)

    def place(self, name: str, new: Tensor, index: Tensor | None) -> None:
        """Write rows of a tensor of the cut."""
        dims = self.cut.batch_dims.get(name, ())
        if index is None or not dims:
            self.values[name].copy_(new)
        else:
            self.values[name].index_copy_(dims[0], index, new)

    def provide(self, name: str, like: Tensor) -> None:
        """Room for a tensor of the cut that is made like this for some rows."""
        dims = self.cut.batch_dims.get(name, ())
        if len(dims) > 1:
            raise InvalidInput(f"The tensor {name!r} holds the batch in two dimensions; run this model without graphs.")
        if name not in self.values:
            self.values[name] = whole_like(like, dims, self.rows)


@dataclass
class Part:
    """A graph and what goes in and out of it.

    Attributes:
        graph: ``None`` where there is nothing to run.
        weights: of the remembered steps ``[size, keeps]``.
        score: ``[size]``.
        codes: where the host finds the answers ``[size]``, each 1 more than its code.
        open: whether an answer is on its way.
        milliseconds: of the graph on the device, if that was measured.
        holds: what must live as long as the graph.
    """

    graph: Graph | None = None
    weights: Tensor | None = None
    score: Tensor | None = None
    codes: Mailbox | None = None
    open: bool = False
    milliseconds: float | None = None
    holds: Any = None


@dataclass
class Room:
    """What a point remembers of all rows, at fixed addresses.

    Attributes:
        snapshots: newest first, ``keeps`` of them.
        reference: what the signal watched.
        broken: bool ``[B]`` of every snapshot.
    """

    snapshots: list[dict[str, Tensor]]
    reference: tuple[Tensor, ...] = ()
    broken: tuple[Tensor, ...] = ()

    def adopt(self, memory: Memory) -> None:
        """What a memory holds elsewhere is copied here, oldest first: what was newest may have become older here."""
        for snapshot, home in reversed(list(zip(memory.snapshots, self.snapshots, strict=False))):
            for name, tensor in home.items():
                if snapshot[name] is not tensor:
                    tensor.copy_(snapshot[name])
        if self.snapshots:
            memory.snapshots = self.snapshots[: len(memory.snapshots)]
        if memory.reference and self.reference and memory.reference is not self.reference:
            for place, held in zip(self.reference, memory.reference, strict=True):
                place.copy_(held)
            memory.reference = self.reference
        if self.broken and (len(memory.broken) < len(self.broken) or memory.broken[0] is not self.broken[0]):
            for flags, held in reversed(list(zip(self.broken, memory.broken, strict=False))):
                flags.copy_(held)
            for flags in self.broken[len(memory.broken) :]:
                flags.zero_()
            memory.broken = list(self.broken)


class CapturedRows:
    """Rows of one call (an `offramp.engines.diffusion.rows.Rows`).

    Args:
        run: makes and keeps the graphs.
        board: the inputs of the call are on it.
        points: the plan.
        owner: whose memories will be given.
    """

    def __init__(self, run: Captured, board: Board, points: Sequence[BoundPoint], owner: Any) -> None:
        self._run, self._board, self._points, self._owner = run, board, points, owner
        self._idle = self._waited = False

    def ahead(self, rows: int, staying: int, start: int, stop: int) -> bool:
        whole = self._run.size(rows, self._board.rows)
        less = self._run.size(staying, self._board.rows) if staying else 0
        times = [self._run.milliseconds(self._board, start, stop, size) if size else 0.0 for size in (whole, less)]
        if times[0] is None or times[1] is None:
            return rows - staying <= self._board.rows // FEW
        return times[0] - times[1] < WAIT_MS

    def run(self, rows: Host, start: int, stop: int) -> None:
        if self._waited and self._run.code is not None and stop - start > 1:
            # The device has nothing to do until the next graph is launched, which takes long for many segments.
            self._waited = False
            self.run(rows, start, start + 1)
            start += 1
        self._idle = self._waited = False
        board, size = self._board, self._run.size(len(rows), self._board.rows)
        if size < board.rows:
            board.index("here", rows, size)
        part = self._run.part((board, start, stop, size), lambda: self._capture_run(start, stop, size))
        _replay(part)

    def _capture_run(self, start: int, stop: int, size: int) -> Part:
        board, cut = self._board, self._board.cut
        index = None if size == board.rows else board.index("here", None, size)
        read, made = self._run.reads(cut, start, stop), cut.made(start, stop)
        if loose := [n for n in (*read, *made) if len(cut.batch_dims.get(n, ())) > 1]:
            raise InvalidInput(f"The tensor {loose[0]!r} holds the batch in two dimensions; run this model without graphs.")
        plain, function = self._run.function(cut, start, stop, read)
        for name, new in zip(made, plain(*(board.select(n, index) for n in read)), strict=True):
            board.provide(name, new)

        def call() -> None:
            for name, new in zip(made, function(*(board.select(n, index) for n in read)), strict=True):
                board.place(name, new, index)

        graph = self._run.capture(call)
        return Part(graph, milliseconds=graph.milliseconds())

    def ask(self, point: BoundPoint, memory: Memory, rows: Host, observe: bool) -> Answer:
        board, size = self._board, self._run.size(len(rows), self._board.rows)
        room = self._room(point, memory)
        if size < board.rows:
            board.index("here", rows, size)
        part = self._part("score", point, size, lambda: self._capture_score(point, room, size))
        if part.codes is None or part.score is None:
            return lambda: (np.full(len(rows), MISSING), None)
        box = part.codes
        if part.open and board.level.is_cuda:  # an answer that nobody took, as after an interruption, must not be taken for this one
            torch.cuda.synchronize(board.level.device)
        part.open = self._idle = True
        box.clear()
        _replay(part)
        scores = part.score.clone() if observe else None

        def answer() -> tuple[Host, Tensor | None]:
            found = box.arrived() - 1
            part.open, self._waited = False, self._idle
            if size < board.rows:
                return found[: len(rows)], None if scores is None else scores[: len(rows)]
            return found[rows], None if scores is None else scores[torch.from_numpy(rows).to(scores.device)]

        return answer

    def _capture_score(self, point: BoundPoint, room: Room, size: int) -> Part:
        board, cut, signal = self._board, self._board.cut, measured(point)
        index = None if size == board.rows else board.index("here", None, size)
        part = Part(holds=point)
        names: list[str | None] = [*point.pairs.values()] or [cut.hidden_name(point.start)]
        names.append(None if point.since is None else cut.hidden_name(point.since))
        # Before the first segment the state is the noisy input.
        *state, since = [(board.sample, (0,)) if n is None else (board.values[n], cut.batch_dims.get(n, ())) for n in names]
        looked_at = _LookedAt(tuple(state), None if point.since is None else since, board.sample)
        if signal.compares and not alike(signal.watch(_seen(looked_at, None)), room.reference):
            return part
        threshold = torch.tensor(point.point.threshold, dtype=torch.float32, device=board.level.device)
        reference = room.reference if signal.compares else None
        function = self._run.fuse(_score)
        part.codes = box = Mailbox(size, board.level.device)

        def call() -> None:
            part.score, found = function(signal, point.head, looked_at, reference, room.broken, board.level, threshold, index)
            box.post(found)

        part.graph = self._run.capture(call)
        return part

    def fill(self, point: BoundPoint, memory: Memory, rows: Host, weights: Sequence[Sequence[float]] | None) -> None:
        part, _ = self._exactly("fill", point, memory, rows, self._capture_fill)
        if weights is not None and part.weights is not None:
            given = np.asarray([*weights, *[weights[-1]] * (len(part.weights) - len(rows))], dtype=np.float32)
            self._board.send(part.weights, given)
        _replay(part)

    def _capture_fill(self, point: BoundPoint, room: Room, size: int | None) -> Part:
        board, cut, fill = self._board, self._board.cut, point.point.fill
        index = None if size is None else board.index("fill", None, size)
        names = list(point.pairs.values()) if fill.paired else []
        made = cut.made(point.start, point.stop)
        part = Part(holds=point)
        if fill.keeps > 1:
            part.weights = torch.zeros(size or board.rows, fill.keeps, device=board.level.device)

        def give(values: Tensors, snapshots: Sequence[Tensors], weights: Tensor | None, level: Tensor, index: Tensor | None) -> Tensors:
            if index is not None:
                values = {n: cut.select(n, t, index) for n, t in values.items()}
                snapshots = [{n: t.index_select(0, index) for n, t in s.items()} for s in snapshots]
                level = level.index_select(0, index)
            return filled(cut, point, values, snapshots, weights, level)

        values = {n: board.values[n] for n in names}
        fused = self._run.fuse(give)
        plain: Callable[[], Tensors] = partial(give, values, room.snapshots, part.weights, board.level, index)
        function: Callable[[], Tensors] = partial(fused, values, room.snapshots, part.weights, board.level, index)
        if fill.reads_head:
            state = str(cut.hidden_name(point.start))
            answer = self._run.fuse(_answer)
            given = point.head, (board.values[state], cut.batch_dims.get(state, ())), board.level, index
            plain, function = (lambda: {made[0]: _answer(*given)}), lambda: {made[0]: answer(*given)}
        for name, new in plain().items():
            board.provide(name, new)

        def call() -> None:
            found = function()
            for name in made:
                board.place(name, found[name], index)

        part.graph = self._run.capture(call)
        return part

    def remember(self, point: BoundPoint, memory: Memory, rows: Host) -> None:
        part, room = self._exactly("remember", point, memory, rows, self._capture_remember)
        _replay(part)
        memory.snapshots = room.snapshots[: len(memory.snapshots) + 1]
        memory.reference = room.reference

    def _exactly(
        self, kind: str, point: BoundPoint, memory: Memory, rows: Host, capture: Callable[[BoundPoint, Room, int | None], Part]
    ) -> tuple[Part, Room]:
        """A part that must not touch other rows, ready to run, and where the point's memory is."""
        size = None if len(rows) == self._board.rows else self._run.size(len(rows), self._board.rows)
        room = self._room(point, memory)
        if size is not None:
            self._board.index(kind, rows, size)
        return self._part(kind, point, size, lambda: capture(point, room, size)), room

    def _keep(self, point: BoundPoint, values: Tensors, sample: Tensor) -> tuple[Tensors, tuple[Tensor, ...]]:
        """What a computed step leaves: for the fill, and for the signal."""
        fill = point.point.fill
        kept = fill.remember(continued(point, values), {n: values[n] for n in point.made}) if fill.keeps else {}
        return kept, watched(self._board.cut, point, values, sample) if compares(point) else ()

    def _capture_remember(self, point: BoundPoint, room: Room, size: int | None) -> Part:
        board, cut = self._board, self._board.cut
        index = None if size is None else board.index("remember", None, size)
        names = self._read(point)
        check = bool(room.broken)

        def keep(values: Tensors, sample: Tensor, index: Tensor | None) -> tuple[Tensors, tuple[Tensor, ...], Tensor | None]:
            if index is not None:
                values, sample = {n: cut.select(n, t, index) for n, t in values.items()}, sample.index_select(0, index)
            kept, seen = self._keep(point, values, sample)
            return kept, seen, not_finite(kept) if check and kept else None

        function = self._run.fuse(keep)

        def call() -> None:
            kept, seen, broken = function({n: board.values[n] for n in names}, board.sample, index)
            for name, new in kept.items():
                push([s[name] for s in room.snapshots], new, index)
            if broken is not None:
                push(room.broken, broken, index)
            for place, new in zip(room.reference, seen, strict=True):
                push([place], new, index)

        places = [*(t for s in room.snapshots for t in s.values()), *room.broken, *room.reference]
        saved = [t.clone() for t in places]
        part = Part(self._run.capture(call), holds=point)
        for place, before in zip(places, saved, strict=True):  # capturing has run it
            place.copy_(before)
        return part

    def _read(self, point: BoundPoint) -> list[str]:
        """Names that remembering a point reads."""
        cut, fill = self._board.cut, point.point.fill
        hidden = [cut.hidden_name(b) for b in (point.start, point.since or 0)] if compares(point) else []
        return sorted({*(point.made if fill.keeps else ()), *point.pairs.values(), *filter(None, hidden)})

    def _room(self, point: BoundPoint, memory: Memory) -> Room:
        """Where a point's memory is at home; what the memory holds elsewhere is brought there."""

        def found() -> Room:
            board, keeps = self._board, point.point.fill.keeps
            kept: Tensors = memory.snapshots[0] if memory.snapshots else {}
            seen = memory.reference
            if not kept and not seen:
                kept, seen = self._keep(point, {n: board.values[n] for n in self._read(point)}, board.sample)
            flags = tuple(torch.zeros(board.rows, dtype=torch.bool, device=board.level.device) for _ in range(keeps))
            return Room(
                [{n: whole_like(t, (0,), board.rows) for n, t in kept.items()} for _ in range(keeps)],
                tuple(whole_like(t, (0,), board.rows) for t in seen),
                flags if isinstance(point.point.signal, Measured) else (),
            )

        if not point.point.remembers:
            return Room([])
        room = self._run.room(self._owner, self._board.cut, self._points, point.index, self._board.rows, found)
        room.adopt(memory)
        return room

    def outputs(self) -> dict[str, Tensor]:
        return {n: self._board.values[n].clone() for n in self._board.cut.names(len(self._board.cut.segments))}

    def _part(self, kind: str, point: BoundPoint, size: int | None, capture: Callable[[], Part]) -> Part:
        return self._run.part((self._board, kind, self._owner, id(point), size), capture)


class _LookedAt(NamedTuple):
    """What a signal looks at, of all rows, each with the dimensions that hold the batch; as in `Seen`."""

    state: tuple[tuple[Tensor, tuple[int, ...]], ...]
    since: tuple[Tensor, tuple[int, ...]] | None
    sample: Tensor


def _seen(at: _LookedAt, index: Tensor | None) -> Seen:
    if index is None:
        return Seen(tuple(t for t, _ in at.state), None if at.since is None else at.since[0], at.sample)
    state = tuple(select_rows(t, dims, index) for t, dims in at.state)
    return Seen(state, None if at.since is None else select_rows(*at.since, index), at.sample.index_select(0, index))


# Names and numbers of points are no part of these two, so that what is compiled for one point serves the others.


def _score(
    signal: Measured, head: Any, at: _LookedAt, reference: tuple[Tensor, ...] | None, broken: tuple[Tensor, ...], level: Tensor,
    threshold: Tensor, index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    now = signal.watch(_seen(at, index))
    if index is not None:
        reference = None if reference is None else tuple(t.index_select(0, index) for t in reference)
        broken, level = tuple(t.index_select(0, index) for t in broken), level.index_select(0, index)
    score = signal.score(now, reference, level, head)
    return score, codes(score, broken, threshold).long() + 1


def _answer(head: Any, state: tuple[Tensor, tuple[int, ...]], level: Tensor, index: Tensor | None) -> Tensor:
    hidden = state[0] if index is None else select_rows(*state, index)
    answer: Tensor = head.output(hidden, level if index is None else level.index_select(0, index))
    return answer


def _replay(part: Part) -> None:
    if part.graph is not None:
        part.graph.replay()


def push(held: Sequence[Tensor], new: Tensor, index: Tensor | None) -> None:
    """The last values with a new one before them, in place; those of other rows than ``index`` stay where they are."""
    for older, newer in zip(held[:0:-1], held[-2::-1], strict=True):
        if index is None:
            older.copy_(newer)
        else:
            older.index_copy_(0, index, newer.index_select(0, index))
    if index is None:
        held[0].copy_(new)
    else:
        held[0].index_copy_(0, index, new)
