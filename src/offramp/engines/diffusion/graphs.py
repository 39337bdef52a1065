"""A denoiser's segments compiled, and on CUDA captured as graphs by number of rows.

Segments between two decisions are one function, so that a compiler sees them whole. Each is captured for the rows of a call and for some
sizes below: fewer rows run in the next larger size, and what the rows beyond them hold is computed along and read by nobody. A step that
is known beforehand and the same for every row is one graph, memories included: one for every depth of a schedule. What lies between two
places of a plan is compiled once and is part of many graphs.

On the CPU a "graph" is a plain call: that is how this is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.backbones.shared_code import SharedCode
from offramp.core.errors import InvalidInput
from offramp.core.noise import noise_share
from offramp.engines.capture import Graph, Recorder, Tuning
from offramp.engines.diffusion.straight import Work, weigh
from offramp.engines.diffusion.trajectory import Memory
from offramp.policies.fills import Tensors


@dataclass
class _Span:
    """Segments ``start`` to ``stop - 1`` at one number of rows.

    Attributes:
        inputs: at fixed addresses, by name.
        made: where the graph leaves what it makes, in the order of ``Cut.made``. Not in the graphs' own memory, which they share: what one
            part leaves must outlast the next.
    """

    inputs: dict[str, Tensor]
    made: tuple[Tensor, ...]
    graph: Graph | None = None


class _Step:
    """A whole step that is the same for every row, memories at fixed addresses included."""

    def __init__(self, run: Captured, work: Work, state: CutState, memories: Sequence[Memory], owner: Any) -> None:
        fills = {i: work.points[i].point.fill for i in (*work.path.fired, *work.path.stored)}
        self.work = work
        self.inputs = {n: t.clone(memory_format=torch.contiguous_format) for n, t in state.values.items()}
        self.level = torch.zeros(work.rows, device=run.device)
        self.weights = {i: torch.zeros(work.rows, fills[i].keeps, device=run.device) for i in work.path.fired if fills[i].keeps > 1}
        self.memory = {i: run.room(owner, work, i, memories[i].snapshots[0]) for i in work.path.fired if fills[i].keeps}
        self.outputs: dict[str, Tensor] = {}
        kept = self._work(Cut.run)[1]  # once, to see the shapes of what is kept
        self.memory |= {i: run.room(owner, work, i, new) for i, new in kept.items()}
        saved = {i: [{n: t.clone() for n, t in s.items()} for s in held] for i, held in self.memory.items()}

        def call() -> None:
            self.outputs, kept = self._work(run.through)
            for i, new in kept.items():
                held = self.memory[i]
                for older, newer in zip(held[:0:-1], held[-2::-1], strict=True):
                    for name, tensor in older.items():
                        tensor.copy_(newer[name])
                for name, tensor in held[0].items():
                    tensor.copy_(new[name])

        self._graph = run.capture(call)
        for i, held in saved.items():  # capturing has run it
            for snapshot, before in zip(self.memory[i], held, strict=True):
                for name, tensor in snapshot.items():
                    tensor.copy_(before[name])
        self.replay = self._graph.replay

    def _work(self, run: Callable[[Cut, CutState, int, int], CutState]) -> tuple[dict[str, Tensor], dict[int, Tensors]]:
        remembered = {i: self.memory[i] for i in self.work.path.fired if i in self.memory}
        return self.work(self.inputs, remembered, self.weights, self.level, run)


@dataclass
class Captured:
    """Runs segments as captured graphs (an `offramp.engines.diffusion.run.Runner`).

    One that is shared by several denoisers of one model shares its graphs; then they must not run at the same time.

    Args:
        device: where the denoiser is.
        compiled: run through ``torch.compile``, for each number of rows by itself. With ``Tuning(shared_blocks=True)`` segment by segment,
            once for all that are alike: a fraction of the compile time, for what the compiler would have joined across their borders.
        sizes: numbers of rows to capture besides that of the whole call, ascending; by default powers of two up to an eighth of the whole,
            at least 4, and multiples of that beyond.
        most: graphs that are kept; of more, the oldest are given up.
        code: compiled code of segments that is shared with others, such as those of other models of the same shape.
    """

    device: torch.device
    compiled: bool | Tuning = True
    sizes: Sequence[int] | None = None
    most: int = 256
    code: SharedCode | None = None
    _spans: dict[Any, _Span] = field(default_factory=dict, repr=False)
    _functions: dict[Any, Any] = field(default_factory=dict, repr=False)
    _pieces: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _rows: dict[Any, int] = field(default_factory=dict, repr=False)
    _steps: dict[Any, _Step] = field(default_factory=dict, repr=False)
    _rooms: dict[Any, Any] = field(default_factory=dict, repr=False)
    _weights: dict[Any, Any] = field(default_factory=dict, repr=False)
    _read: dict[Any, tuple[str, ...]] = field(default_factory=dict, repr=False)

    reuses = True

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        if self.sizes is not None and (not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1):
            raise InvalidInput(f"sizes must be ascending numbers of rows from 1, got {self.sizes}.")
        self.recorder = Recorder(self.device, self.compiled)
        if self.code is None and self.recorder.compiled and self.recorder.tuning.shared_blocks:
            self.code = SharedCode(dynamic=False, options=self.recorder.tuning.options() or None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return Captured(self.device, self.compiled, self.sizes, self.most, self.code)  # graphs are of one model's memory

    def forget(self) -> None:
        self._spans.clear()
        self._steps.clear()

    def size(self, cut: Cut, rows: int) -> int:
        """The number of rows that runs for ``rows``."""
        whole = self._rows.get(cut, rows)
        if rows >= whole:
            return rows
        if self.sizes is not None:
            return min(next((s for s in self.sizes if s >= rows), whole), whole)
        part = max(4, -(-whole // 8))
        return min(1 << (rows - 1).bit_length() if rows <= part else -(-rows // part) * part, whole)

    def __call__(self, cut: Cut, state: CutState, stop: int) -> CutState:
        if state.at == stop:
            return state
        if state.at == 0:
            self._drop_moved(cut)
            self._rows[cut] = state.rows
        read, made = self._reads(cut, state.at, stop), cut.made(state.at, stop)
        for name in (*read, *made):
            if len(cut.batch_dims.get(name, ())) > 1:
                raise InvalidInput(f"The tensor {name!r} holds the batch in two dimensions; run this model without graphs.")
        size = self.size(cut, state.rows)
        given = {n: state.values[n] for n in read}
        # Sizes other than the batch may vary (text): each has graphs of its own.
        key = (cut, state.at, stop, size, tuple((t.dtype, *_others(t, cut.batch_dims.get(n, ()))) for n, t in given.items()))
        span = self._spans.get(key)
        if span is None:
            span = self._capture(key, cut, state, stop, size, given)
        else:
            for name, value in given.items():
                _window(span.inputs[name], cut.batch_dims.get(name, ()), state.rows).copy_(value)
            if span.graph is not None:
                span.graph.replay()
        fresh = {n: _window(t, cut.batch_dims.get(n, ()), state.rows) for n, t in zip(made, span.made, strict=True)}
        return cut.skip(state, stop, fresh)

    def through(self, cut: Cut, state: CutState, start: int, stop: int) -> CutState:
        """Segments ``start`` to ``stop - 1`` compiled, not captured: shared by all that captures them."""
        read = self._reads(cut, start, stop)
        made = self._function(cut, start, stop, read)[1](*(state.values[n] for n in read))
        return cut.skip(state, stop, dict(zip(cut.made(start, stop), made, strict=True)))

    def _reads(self, cut: Cut, start: int, stop: int) -> tuple[str, ...]:
        """Live tensors that segments ``start`` to ``stop - 1`` read, of those live at ``start``."""
        if (cut, start, stop) not in self._read:
            wanted = {n for segment in cut.segments[start:stop] for n in segment.inputs}
            self._read[cut, start, stop] = tuple(n for n in cut.names(start) if n in wanted)
        return self._read[cut, start, stop]

    def _function(self, cut: Cut, start: int, stop: int, read: tuple[str, ...]) -> tuple[Any, Any]:
        """As exported, and compiled."""
        key = (cut, start, stop)
        if key not in self._functions:
            plain = _function(cut, start, stop, read, [s.module for s in cut.segments[start:stop]])
            compiled = self.recorder.wrap(plain) if self.code is None else self._shared(self.code, cut, start, stop, read)
            self._functions[key] = plain, compiled
        found: tuple[Any, Any] = self._functions[key]
        return found

    def _shared(self, code: SharedCode, cut: Cut, start: int, stop: int, read: tuple[str, ...]) -> Any:
        for k in range(start, stop):
            if (cut, k) not in self._pieces:
                self._pieces[cut, k] = code.bind(cut.segments[k].module)
        return _function(cut, start, stop, read, [self._pieces[cut, k] for k in range(start, stop)])

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
        for i in {*path.fired, *path.stored}:
            _bring(memories[i], step.memory.get(i, []))
        for i, weights in step.weights.items():
            for k, weight in enumerate(weigh(points[i], memories[i], log_snr)):
                weights[:, k].fill_(weight)
        step.level.fill_(log_snr)
        step.replay()
        now = [noise_share(log_snr)] * work.rows
        for i in path.stored:
            memories[i].store(range(work.rows), None, {}, (), now)
            if i in step.memory:
                held = min(len(memories[i].snapshots) + 1, points[i].point.fill.keeps)
                memories[i].snapshots = step.memory[i][:held]
        return {n: t.clone() for n, t in step.outputs.items()}

    def room(self, owner: Any, work: Work, index: int, like: Tensors) -> list[dict[str, Tensor]]:
        """Memory at fixed addresses for a point: the same for all steps of one owner at one number of rows."""
        key = (owner, work.cut, id(work.points), index, work.rows)
        if key not in self._rooms:
            keeps = work.points[index].point.fill.keeps
            # The points are kept too, so that no others take their place in the key.
            self._rooms[key] = ([{n: torch.zeros_like(t) for n, t in like.items()} for _ in range(keeps)], work.points)
        return self._rooms[key][0]

    def _drop_moved(self, cut: Cut) -> None:
        """Give up the graphs of a model whose weights have moved, such as to another device and back: they read the old ones."""
        if cut not in self._weights:
            first = next((p for segment in cut.segments for p in segment.module.parameters()), None)
            self._weights[cut] = first, first.data_ptr() if first is not None else 0
        first, place = self._weights[cut]
        if first is not None and first.data_ptr() != place:
            self._weights[cut] = first, first.data_ptr()
            self._spans = {key: span for key, span in self._spans.items() if key[0] is not cut}
            self._steps = {key: step for key, step in self._steps.items() if step.work.cut is not cut}

    def capture(self, call: Callable[[], None]) -> Graph:
        """A call as a graph."""
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # the casts that it would keep end with the caller's autocast, and the graph does not
        try:
            return self.recorder.graph(call)
        finally:
            torch.set_autocast_cache_enabled(before)

    def _capture(self, key: Any, cut: Cut, state: CutState, stop: int, size: int, given: dict[str, Tensor]) -> _Span:
        while len(self._spans) >= self.most:
            del self._spans[next(iter(self._spans))]
        inputs = {}
        for name, value in given.items():
            dims = cut.batch_dims.get(name, ())
            inputs[name] = _room(value, dims, size)
            _window(inputs[name], dims, state.rows).copy_(value)
        plain, function = self._function(cut, state.at, stop, tuple(given))
        span = _Span(inputs, tuple(torch.empty_like(t) for t in plain(*inputs.values())))

        def call() -> None:
            for place, new in zip(span.made, function(*span.inputs.values()), strict=True):
                place.copy_(new)

        span.graph = self.capture(call)
        span.graph.replay()  # what was captured has not run
        self._spans[key] = span
        return span


def _bring(memory: Memory, room: list[dict[str, Tensor]]) -> None:
    """What a memory holds elsewhere is copied to its fixed addresses, oldest first: what was newest may have become older there."""
    for snapshot, place in reversed(list(zip(memory.snapshots, room, strict=False))):
        for name, tensor in place.items():
            if snapshot[name] is not tensor:
                tensor.copy_(snapshot[name])
    if room:
        memory.snapshots = room[: len(memory.snapshots)]


def _function(cut: Cut, start: int, stop: int, read: tuple[str, ...], modules: Sequence[Callable[..., Any]]) -> Any:
    made = cut.made(start, stop)
    parts = list(zip(cut.segments[start:stop], modules, strict=True))

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(read, given, strict=True))
        for segment, module in parts:
            values |= zip(segment.outputs, module(*(values[n] for n in segment.inputs)), strict=True)
        return tuple(values[n] for n in made)

    return run


def _others(tensor: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s for d, s in enumerate(tensor.shape) if d not in dims)


def _window(tensor: Tensor, dims: tuple[int, ...], rows: int) -> Tensor:
    return tensor.narrow(dims[0], 0, rows) if dims else tensor


def _room(tensor: Tensor, dims: tuple[int, ...], rows: int) -> Tensor:
    """Zeros for other rows with the same order of strides: segments may view it as they viewed the whole batch's."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    if tensor.is_contiguous() or 0 in tensor.stride():
        order = list(range(tensor.ndim))
    room = tensor.new_zeros([rows if d in dims else tensor.shape[d] for d in order])
    return room.permute(sorted(range(tensor.ndim), key=order.__getitem__))
