"""A denoiser's segments compiled, and on CUDA captured as graphs by number of rows.

A step that is known beforehand and the same for every row is one graph, memories included: one for every depth of a schedule. Otherwise
segments between two decisions are one function, so that a compiler sees them whole, captured for the rows of a call and for some sizes
below (`offramp.engines.diffusion.row_graphs`). What lies between two places of a plan is compiled once and is part of many graphs.

On the CPU a "graph" is a plain call: that is how this is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.backbones.cut import whole_like
from offramp.backbones.early_part import early_part
from offramp.backbones.shared_code import SharedCode
from offramp.core.errors import InvalidInput
from offramp.core.noise import noise_share
from offramp.diffusion import BoundPoint
from offramp.engines.capture import Beside, Graph, Recorder, Tuning
from offramp.engines.diffusion.row_graphs import Board, CapturedRows, Part, Room, push
from offramp.engines.diffusion.rows import Fuse, as_it_is
from offramp.engines.diffusion.straight import Work, weigh
from offramp.engines.diffusion.trajectory import Memory
from offramp.policies.fills import Tensors


class _Step:
    """A whole step that is the same for every row, memories at fixed addresses included."""

    def __init__(self, run: Captured, work: Work, state: CutState, memories: Sequence[Memory], owner: Any) -> None:
        fills = {i: work.points[i].point.fill for i in (*work.path.fired, *work.path.stored)}
        self.work = work
        self.inputs = {n: t.clone(memory_format=torch.contiguous_format) for n, t in state.values.items()}
        self.level = torch.zeros(work.rows, device=run.device)
        self.weights = {i: torch.zeros(work.rows, fills[i].keeps, device=run.device) for i in work.path.fired if fills[i].keeps > 1}
        self.rooms: dict[int, Room] = {}

        def room(i: int, like: Tensors) -> None:
            def made() -> Room:
                return Room([{n: whole_like(t, (0,), work.rows) for n, t in like.items()} for _ in range(fills[i].keeps)])

            self.rooms[i] = run.room(owner, work.cut, work.points, i, work.rows, made)

        for i in (i for i in work.path.fired if fills[i].keeps):
            room(i, memories[i].snapshots[0])
        self.outputs: dict[str, Tensor] = {}
        for i, new in self._work(Cut.run)[1].items():  # once, to see the shapes of what is kept
            room(i, new)
        saved = {i: [{n: t.clone() for n, t in s.items()} for s in held.snapshots] for i, held in self.rooms.items()}

        def call() -> None:
            self.outputs, kept = self._work(run.through, run.fuse)
            for i, new in kept.items():
                for name, tensor in new.items():
                    push([s[name] for s in self.rooms[i].snapshots], tensor, None)

        self._graph = run.capture(call)
        for i, held in saved.items():  # capturing has run it
            for snapshot, before in zip(self.rooms[i].snapshots, held, strict=True):
                for name, tensor in snapshot.items():
                    tensor.copy_(before[name])
        self.replay = self._graph.replay

    def _work(
        self, run: Callable[[Cut, CutState, int, int], CutState], fuse: Fuse = as_it_is
    ) -> tuple[dict[str, Tensor], dict[int, Tensors]]:
        remembered = {i: self.rooms[i].snapshots for i in self.work.path.fired if i in self.rooms}
        return self.work(self.inputs, remembered, self.weights, self.level, run, fuse)


class _Piece(NamedTuple):
    """A segment by shared code, what does not wait for the state by itself."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rest: Callable[..., Any]
    first: Callable[..., Any] | None = None
    reads: tuple[str, ...] = ()


@dataclass
class Captured:
    """Runs segments as captured graphs (an `offramp.engines.diffusion.run.Runner`).

    One that is shared by several denoisers of one model shares its graphs; then they must not run at the same time.

    Args:
        device: where the denoiser is.
        compiled: run through ``torch.compile``, for each number of rows by itself. With ``Tuning(shared_blocks=True)`` segment by segment,
            once for all that are alike: a fraction of the compile time, for what the compiler would have joined across their borders. What
            of a segment does not wait for the one before, such as its conditioning, then runs beside it.
        sizes: numbers of rows to capture besides that of the whole call, ascending; by default powers of two up to an eighth of the whole,
            at least 4, and multiples of that beyond; up to a sixteenth where code is shared, so that one more size compiles little.
        most: graphs of parts, and of steps, that are kept; of more, the oldest are given up: of parts those that were not used for longest.
        code: compiled code of segments that is shared with others, such as those of other models of the same shape.
    """

    device: torch.device
    compiled: bool | Tuning = True
    sizes: Sequence[int] | None = None
    most: int = 1024
    code: SharedCode | None = None
    _parts: dict[Any, Part] = field(default_factory=dict, repr=False)
    _boards: dict[Any, Board] = field(default_factory=dict, repr=False)
    _functions: dict[Any, Any] = field(default_factory=dict, repr=False)
    _pieces: dict[Any, _Piece] = field(default_factory=dict, repr=False)
    _steps: dict[Any, _Step] = field(default_factory=dict, repr=False)
    _rooms: dict[Any, tuple[Room, Any]] = field(default_factory=dict, repr=False)
    _weights: dict[Any, Any] = field(default_factory=dict, repr=False)
    _read: dict[Any, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        if self.sizes is not None and (not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1):
            raise InvalidInput(f"sizes must be ascending numbers of rows from 1, got {self.sizes}.")
        self.recorder = Recorder(self.device, self.compiled)
        self._beside = Beside(self.device)
        if self.code is None and self.recorder.compiled and self.recorder.tuning.shared_blocks:
            self.code = SharedCode(dynamic=False, options=self.recorder.tuning.options() or None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return Captured(self.device, self.compiled, self.sizes, self.most, self.code)  # graphs are of one model's memory

    def forget(self) -> None:
        self._parts.clear()
        self._steps.clear()

    def size(self, rows: int, whole: int) -> int:
        """The number of rows that runs for ``rows`` of a call of ``whole``."""
        if rows >= whole:
            return rows
        if self.sizes is not None:
            return min(next((s for s in self.sizes if s >= rows), whole), whole)
        part = max(4, -(-whole // (8 if self.code is None else 16)))
        return min(1 << (rows - 1).bit_length() if rows <= part else -(-rows // part) * part, whole)

    def rows(
        self, cut: Cut, points: Sequence[BoundPoint], values: Mapping[str, Tensor], sample: Tensor, level: Sequence[float], owner: Any
    ) -> CapturedRows:
        self._drop_moved(cut)
        # Sizes other than the batch may vary (text): each has a board of its own.
        key = (cut, *((n, t.dtype, tuple(t.shape)) for n, t in values.items()))
        if key not in self._boards:
            while len(self._boards) >= self.most:
                oldest = self._boards.pop(next(iter(self._boards)))
                self._parts = {k: part for k, part in self._parts.items() if k[0] is not oldest}
            self._boards[key] = Board(cut, values, sample, len(level))
        board = self._boards[key]
        board.begin(values, sample, level)
        return CapturedRows(self, board, points, owner)

    def part(self, key: Any, capture: Callable[[], Part]) -> Part:
        """A graph of a board, made on first use."""
        found = self._parts.pop(key, None)
        if found is None:
            while len(self._parts) >= self.most:
                del self._parts[next(iter(self._parts))]
            found = capture()
        self._parts[key] = found  # the last one used comes last
        return found

    def milliseconds(self, board: Board, start: int, stop: int, size: int) -> float | None:
        """What segments take for a number of rows, as one graph or as two; ``None`` if no such graphs were made."""
        spans = [(start, stop)] if (board, start, stop, size) in self._parts else [(start, start + 1), (start + 1, stop)]
        found = [self._parts[board, *span, size].milliseconds for span in spans if (board, *span, size) in self._parts]
        return None if len(found) < len(spans) or None in found else sum(found)  # type: ignore[arg-type]

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A few operations in memory as one: compiled for any number of rows, as there is little to gain from knowing it."""
        return self.recorder.wrap(function, dynamic=True)

    def through(self, cut: Cut, state: CutState, start: int, stop: int) -> CutState:
        """Segments ``start`` to ``stop - 1`` compiled, not captured: shared by all that captures them."""
        read = self.reads(cut, start, stop)
        made = self.function(cut, start, stop, read)[1](*(state.values[n] for n in read))
        return cut.skip(state, stop, dict(zip(cut.made(start, stop), made, strict=True)))

    def reads(self, cut: Cut, start: int, stop: int) -> tuple[str, ...]:
        """Live tensors that segments ``start`` to ``stop - 1`` read, of those live at ``start``."""
        if (cut, start, stop) not in self._read:
            wanted = {n for segment in cut.segments[start:stop] for n in segment.inputs}
            self._read[cut, start, stop] = tuple(n for n in cut.names(start) if n in wanted)
        return self._read[cut, start, stop]

    def function(self, cut: Cut, start: int, stop: int, read: tuple[str, ...]) -> tuple[Any, Any]:
        """As exported, and compiled."""
        key = (cut, start, stop)
        if key not in self._functions:
            plain = _function(cut, start, stop, read, [s.module for s in cut.segments[start:stop]])
            compiled = self.recorder.wrap(plain) if self.code is None else self._shared(self.code, cut, start, stop, read)
            self._functions[key] = plain, compiled
        found: tuple[Any, Any] = self._functions[key]
        return found

    def _shared(self, code: SharedCode, cut: Cut, start: int, stop: int, read: tuple[str, ...]) -> Any:
        made = cut.made(start, stop)
        pieces = [self._piece(code, cut, k) for k in range(start, stop)]

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(read, given, strict=True))
            # Of the first there is nothing to run beside, and others may read what is made on the way.
            firsts = {
                k: partial(piece.first, *(values[n] for n in piece.reads))
                for k, piece in enumerate(pieces)
                if k and piece.first is not None and all(n in values for n in piece.reads)
            }
            ready = dict(zip(firsts, self._beside.start([*firsts.values()]), strict=True)) if firsts else {}
            held = []  # until all has run: memory that is let go may be given out again on the other stream
            for k, piece in enumerate(pieces):
                more: tuple[Tensor, ...] = ()
                if piece.first is not None:
                    more = ready[k]() if k in ready else piece.first(*(values[n] for n in piece.reads))
                    held.append(more)
                values |= zip(piece.outputs, piece.rest(*(values[n] for n in piece.inputs), *more), strict=True)
            return tuple(values[n] for n in made)

        return run

    def _piece(self, code: SharedCode, cut: Cut, k: int) -> _Piece:
        if (cut, k) not in self._pieces:
            segment = cut.segments[k]
            before = cut.names(k - 1) if k else ()
            split = early_part(segment.module, [n in before for n in segment.inputs])
            if split is None:
                self._pieces[cut, k] = _Piece(segment.inputs, segment.outputs, code.bind(segment.module))
            else:
                reads = tuple(segment.inputs[i] for i in split.reads)
                self._pieces[cut, k] = _Piece(segment.inputs, segment.outputs, code.bind(split.rest), code.bind(split.first), reads)
        return self._pieces[cut, k]

    def step(self, work: Work, state: CutState, memories: Sequence[Memory], log_snr: float, owner: Any) -> dict[str, Tensor]:
        self._drop_moved(work.cut)
        path, points = work.path, work.points
        sizes = tuple((t.dtype, tuple(t.shape)) for t in state.values.values())
        key = (owner, work.cut, id(points), path.parts, path.stored, sizes)
        step = self._steps.get(key)
        if step is None:
            while len(self._steps) >= self.most:
                del self._steps[next(iter(self._steps))]
            step = self._steps[key] = _Step(self, work, state, memories, owner)
        for name, value in state.values.items():
            step.inputs[name].copy_(value)
        for i in {*path.fired, *path.stored} & step.rooms.keys():
            step.rooms[i].adopt(memories[i])
        for i, weights in step.weights.items():
            for k, weight in enumerate(weigh(points[i], memories[i], log_snr)):
                weights[:, k].fill_(weight)
        step.level.fill_(log_snr)
        step.replay()
        now = noise_share(log_snr)
        for i in path.stored:
            memories[i].note(slice(None), now)
            if i in step.rooms:
                memories[i].snapshots = step.rooms[i].snapshots[: len(memories[i].snapshots) + 1]
        return {n: t.clone() for n, t in step.outputs.items()}

    def room(self, owner: Any, cut: Cut, points: Sequence[BoundPoint], index: int, rows: int, make: Callable[[], Room]) -> Room:
        """Memory at fixed addresses for a point: the same for all steps of one owner at one number of rows."""
        key = (owner, cut, id(points), index, rows)
        if key not in self._rooms:
            self._rooms[key] = make(), points  # the points are kept too, so that no others take their place in the key
        return self._rooms[key][0]

    def _drop_moved(self, cut: Cut) -> None:
        """Give up the graphs of a model whose weights have moved, such as to another device and back: they read the old ones."""
        if cut not in self._weights:
            first = next((p for segment in cut.segments for p in segment.module.parameters()), None)
            self._weights[cut] = first, first.data_ptr() if first is not None else 0
        first, place = self._weights[cut]
        if first is not None and first.data_ptr() != place:
            self._weights[cut] = first, first.data_ptr()
            self._parts = {key: part for key, part in self._parts.items() if key[0].cut is not cut}
            self._steps = {key: step for key, step in self._steps.items() if step.work.cut is not cut}

    def capture(self, call: Callable[[], None]) -> Graph:
        """A call as a graph."""
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # the casts that it would keep end with the caller's autocast, and the graph does not
        try:
            return self.recorder.graph(call)
        finally:
            torch.set_autocast_cache_enabled(before)


def _function(cut: Cut, start: int, stop: int, read: tuple[str, ...], modules: Sequence[Callable[..., Any]]) -> Any:
    made = cut.made(start, stop)
    parts = list(zip(cut.segments[start:stop], modules, strict=True))

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(read, given, strict=True))
        for segment, module in parts:
            values |= zip(segment.outputs, module(*(values[n] for n in segment.inputs)), strict=True)
        return tuple(values[n] for n in made)

    return run
