"""The classify engine on CUDA: stages compiled, then captured as graphs per bucket, with one cheap read per decision.

What makes a small batch pay:

* One graph launch per stage holds everything: segments, head, score, decision, writing answers, and moving survivors to the front
  of the next stage's buffer. Inputs of the next stage lie at fixed addresses, so no copy follows.
* The number of survivors is written to pinned host memory *before* the survivors are moved. The host spins on that memory, not on
  a synchronisation, and launches the next bucket while the move is still running.
* Rows of a bucket beyond the survivors are leavers that compute along and write nowhere.

The loops are the same on the CPU, where a "graph" is a plain call: that is how they are tested.

Shapes: ``N`` rows of the largest batch, ``b`` rows of a bucket, ``C`` classes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.trace import LatencyTable
from offramp.engines.profile import median_ms
from offramp.engines.stages import Layout, Rows, Stage, take


class Graph:
    """A captured call: ``replay()`` runs it again on the same memory."""

    def __init__(self, function: Callable[[], object], device: torch.device, pool: Any) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            function()  # as below: what is captured has run before, so its effects must not matter
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile and warm up outside the capture
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        if self._graph is None:
            self._function()
        else:
            self._graph.replay()


class Mailbox:
    """Integers that the device writes and the host waits for, without a synchronisation.

    The host marks the box empty, launches work that ends in `post`, and spins in `wait` on pinned memory.
    """

    EMPTY = -1

    def __init__(self, size: int, device: torch.device) -> None:
        host = torch.full((size,), self.EMPTY, dtype=torch.int64)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self._view = self._host.numpy()

    def clear(self) -> None:
        self._view.fill(self.EMPTY)

    def post(self, values: Tensor) -> None:
        """Copy device values ``[size]``, none negative, to the host; part of a graph."""
        self._host.copy_(values, non_blocking=True)

    @property
    def ready(self) -> bool:
        """Whether all values have arrived."""
        return bool(self._view[-1] >= 0 and self._view.min() >= 0)

    def wait(self) -> list[int]:
        """Spin until all values have arrived."""
        while not self.ready:
            pass
        values: list[int] = self._view.tolist()
        return values


def buckets(rows: int, reach: float) -> tuple[int, ...]:
    """Sizes to capture a stage at, ascending, the last being ``rows``.

    Each size is compiled for itself, so only those are made that a batch of ``rows`` rows is likely to need when each row reaches
    the stage with probability ``reach``: the mean of the binomial, and one to three standard deviations around it.
    """
    step = 8 if rows >= 64 else 2 if rows >= 16 else 1
    mean, deviation = rows * reach, math.sqrt(rows * reach * (1 - reach))
    wanted = {math.ceil((mean + z * deviation) / step) * step for z in (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)}
    return (*sorted(w for w in wanted if 0 < w < rows), rows)


class Bench:
    """Memory and graphs of one input signature: buffers for ``rows`` rows before every stage, answers, graphs by (stage, bucket)."""

    def __init__(self, loop: GraphLoop, example: Rows, rows: int, slots: int) -> None:
        self.loop, self.rows, self.slots = loop, rows, slots
        device = loop.device
        self.graphs: dict[Any, Graph] = {}
        self.cost: dict[Any, float] = {}
        self.inputs: list[Rows] = []
        with torch.inference_mode():
            values = example
            for stage in loop.stages:
                self.inputs.append(tuple(_room(t, dims, rows + 1) for t, dims in zip(values, stage.before.dims, strict=True)))
                values, logits, _ = stage(*values)
        self.output = logits.new_zeros(slots + 1, *logits.shape[1:])  # the last row takes what nobody asked for
        self.done = torch.full((slots + 1,), loop.exits - 1, dtype=torch.int64, device=device)
        self.index = [torch.arange(rows + 1, device=device) for _ in loop.stages]
        self.count = torch.zeros(len(loop.stages), dtype=torch.int64, device=device)
        self.mail = Mailbox(len(loop.stages), device)
        self.entered = -1  # rows that count[0] says
        self.alone: dict[int, Tensor] = {}  # where the graph of an only stage leaves its answers, by size
        self.begun = 0  # rows whose initial rule state is in place
        self.quota: dict[int, tuple[Tensor, Tensor]] = {}  # where the graph of a batch size leaves its answers
        self.sizes: list[tuple[int, ...]] = [buckets(rows, reach) for reach in loop.reach]

    def bucket(self, stage: int, left: int) -> int:
        """The captured size that holds ``left`` rows and was fastest when timed.

        A size is added, at the price of compiling it on the way, where the smallest captured one is more than twice too large.
        """
        fitting = [b for b in self.sizes[stage] if b >= left]
        if fitting[0] > 2 * left:
            new = 1 << (left - 1).bit_length()
            self.sizes[stage] = (new, *self.sizes[stage]) if new < self.sizes[stage][0] else tuple(sorted({new, *self.sizes[stage]}))
            return new
        timed = [b for b in fitting if (stage, b) in self.cost]
        return min(timed, key=lambda b: self.cost[(stage, b)]) if timed else fitting[0]

    def view(self, stage: int, size: int) -> Rows:
        layout = self.loop.stages[stage].before
        return tuple(t.narrow(dims[0], 0, size) if len(dims) == 1 else t for t, dims in zip(self.inputs[stage], layout.dims, strict=True))

    def load(self, rows: Rows, count: int) -> None:
        """Copy rows into the first buffers. The rule's initial state is the same for every batch and is copied once."""
        layout = self.loop.stages[0].before
        inputs = len(layout.live) if self.begun >= count else len(rows)
        for buffer, value, dims in zip(self.inputs[0][:inputs], rows, layout.dims, strict=False):
            (buffer.narrow(dims[0], 0, count) if dims else buffer).copy_(value, non_blocking=True)
        self.begun = max(self.begun, count)

    def store(self, stage: int, position: Tensor, rows: Rows) -> None:
        """Scatter rows to their positions in a stage's buffer; part of a graph."""
        for buffer, value, dims in zip(self.inputs[stage], rows, self.loop.stages[stage].before.dims, strict=True):
            buffer.index_copy_(dims[0], position, value) if dims else buffer.copy_(value)

    def graph(self, key: Any, make: Callable[[], None]) -> Graph:
        if key not in self.graphs:
            # All stages and sizes share one code object, and the compiler limits the versions of it.
            limits: dict[str, Any] = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096}
            limit = torch._dynamo.config.patch(limits) if self.loop.compiled else contextlib.nullcontext()
            with limit:
                self.graphs[key] = Graph(make, self.loop.device, self.loop.pool)
        return self.graphs[key]


def _room(tensor: Tensor, dims: tuple[int, ...], rows: int) -> Tensor:
    if not dims:
        return tensor.clone()
    if len(dims) > 1:
        raise InvalidInput("A tensor that holds the batch in two dimensions crosses the cut; run this model with graphs=False.")
    shape = list(tensor.shape)
    shape[dims[0]] = rows
    return tensor.new_zeros(shape)


class GraphLoop:
    """The loops of the three modes over captured graphs. Made by `offramp.engines.classify.compile`.

    Args:
        stages: what runs between decisions.
        thresholds: one per stage; the last is not used.
        reach: expected share of rows that enters each stage; the first is 1.
        device: where it runs.
        compiled: run the stages through ``torch.compile``, for each size by itself: code for any size is a seventh slower.
    """

    def __init__(self, stages: list[Stage], thresholds: list[float], reach: list[float], device: torch.device, compiled: bool) -> None:
        self.stages, self.thresholds, self.reach, self.device = stages, thresholds, reach, device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.compiled = compiled
        self.exits = stages[-1].exit + 1
        bound = list(zip(stages, thresholds, strict=True))
        self.steps = [self.wrap(functools.partial(_latency_step, stage, threshold)) for stage, threshold in bound]
        self.stream_steps = [self.wrap(functools.partial(_stream_step, stage, threshold, self.exits)) for stage, threshold in bound]
        self.pipeline = self.wrap(functools.partial(_quota_pipeline, stages))
        self.benches: dict[Any, Bench] = {}
        self.streams: dict[Any, StreamLoop] = {}

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if self.compiled else function

    def bench(self, key: Any, rows: Rows, layout: Layout, size: int, slots: int) -> Bench:
        """Buffers for a signature, made on first use and again for a larger batch."""
        found = self.benches.get(key)
        if found is None or found.rows < size:
            two = torch.arange(2, device=self.device) % max(1, _count(rows, layout))
            found = self.benches[key] = Bench(self, take(rows, layout, two), size, slots)
        return found

    # Latency -------------------------------------------------------------------------------------------------------------

    def latency(self, key: Any, rows: Rows, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
        """Answers ``[B, C]`` and exits ``[B]`` of one batch."""
        bench = self.bench(key, rows, layout, count, count)
        bench.load(rows, count)
        if bench.entered != count:
            bench.count[0] = bench.entered = count
        left = count
        if len(self.stages) == 1:
            bucket = bench.bucket(0, count)
            self._latency_graph(bench, 0, bucket).replay()
            return bench.alone[bucket][:count].clone(), bench.done[:count].clone()
        for k, stage in enumerate(self.stages):
            graph = self._latency_graph(bench, k, bench.bucket(k, left))
            if stage.last:
                graph.replay()
                break
            bench.mail.clear()
            graph.replay()
            left = bench.mail.wait()[k + 1]
            if not left:
                break
        return bench.output[:count].clone(), bench.done[:count].clone()

    def _latency_graph(self, bench: Bench, k: int, bucket: int) -> Graph:
        stage, step = self.stages[k], self.steps[k]

        def call() -> None:
            index = bench.index[k][:bucket]
            after, logits, target, position, staying, marks = step(bench.view(k, bucket), index, bench.count[k], bench.slots)
            if not stage.last:
                bench.count[k + 1] = staying
                bench.mail.post(bench.count)
            bench.output.index_copy_(0, target, logits)
            bench.done.index_copy_(0, target, marks)
            if not stage.last:
                bench.index[k + 1].index_copy_(0, position, index)
                bench.store(k + 1, position, after)

        def alone() -> None:  # a single stage: every row leaves here, in its own place
            bench.alone[bucket] = step(bench.view(0, bucket), bench.index[0][:bucket], bench.count[0], bench.slots)[1]

        return bench.graph(("latency", k, bucket), call if len(self.stages) > 1 else alone)

    def warm(self, bench: Bench) -> None:
        """Capture and time every stage at every size that latency mode is likely to need."""
        for k in range(len(self.stages)):
            for bucket in bench.sizes[k] if k else (bench.rows,):
                bench.count.fill_(bucket)
                bench.cost[(k, bucket)] = median_ms(self._latency_graph(bench, k, bucket).replay, self.device)
        bench.entered = -1

    def measure(self, key: Any, rows: Rows, layout: Layout, count: int, warm: bool) -> LatencyTable:
        """Times of the captured stages at ``count`` rows. ``segment_ms`` is a stage less its head, moving survivors included.

        With ``warm``, every size that latency mode is likely to need is captured and timed too.
        """
        bench = self.bench(key, rows, layout, count, count)
        bench.load(rows, count)
        if warm:
            self.warm(bench)
        sizes = (count,)
        whole, heads = [], []
        for k, stage in enumerate(self.stages):
            times = []
            for size in sizes:
                if (k, size) not in bench.cost:
                    bench.count.fill_(size)
                    bench.cost[(k, size)] = median_ms(self._latency_graph(bench, k, size).replay, self.device)
                times.append(bench.cost[(k, size)])
            whole.append(times)
            heads.append([0.0 if stage.last else self._head_ms(bench, k, size) for size in sizes])
        bench.entered = -1
        box = Mailbox(1, self.device)
        letter = Graph(functools.partial(box.post, torch.ones(1, dtype=torch.int64, device=self.device)), self.device, self.pool)

        def round_trip() -> None:
            box.clear()
            letter.replay()
            box.wait()

        head_ms = torch.tensor(heads, dtype=torch.float64)
        segment_ms = (torch.tensor(whole, dtype=torch.float64) - head_ms).clamp(min=0)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return LatencyTable(
            sizes, segment_ms, head_ms, torch.zeros(len(sizes), dtype=torch.float64), median_ms(round_trip, self.device), name
        )

    def _head_ms(self, bench: Bench, k: int, size: int) -> float:
        stage = self.stages[k]
        hidden, previous = stage.head_inputs(bench.inputs[k + 1])
        head = self.wrap(stage.net[0].heads[stage.exit])
        call = functools.partial(head, hidden[:size], tuple(p[:size] for p in previous))
        return median_ms(Graph(call, self.device, self.pool).replay, self.device)

    # Quota ---------------------------------------------------------------------------------------------------------------

    def quota(self, key: Any, rows: Rows, layout: Layout, count: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Answers and exits of one batch; ``sizes[k]`` rows go on after stage k. One graph, no wait for the host."""
        bench = self.bench(key, rows, layout, count, count)
        bench.load(rows, count)

        def call() -> None:
            bench.quota[count] = self.pipeline(bench.view(0, count), tuple(sizes))

        bench.graph(("quota", count), call).replay()
        output, done = bench.quota[count]
        return output.clone(), done.clone()

    # Throughput ----------------------------------------------------------------------------------------------------------

    def stream(self, key: Any, example: Rows, layout: Layout, bucket: int, backlog: int) -> StreamLoop:
        """Queues for a stream of inputs of one signature."""
        name = ("stream", key, bucket, backlog)
        if name not in self.streams:
            bench = self.bench(name, example, layout, 2 * bucket, bucket * (backlog + 2))
            self.streams[name] = StreamLoop(self, bench, bucket, backlog)
            self.streams[name].capture()
        self.streams[name].reset()
        return self.streams[name]


def _count(rows: Rows, layout: Layout) -> int:
    return next(int(t.shape[dims[0]]) for t, dims in zip(rows, layout.dims, strict=True) if dims)


def _latency_step(stage: Stage, threshold: float, rows: Rows, index: Tensor, count: Tensor, nowhere: int) -> tuple[Any, ...]:
    """One stage of latency mode on a bucket of which the first ``count`` rows are waiting and the others have left.

    Returns the rows for the next stage, the logits, where each row's answer goes (``nowhere`` for those that had left), new
    positions with the survivors first, the number of survivors, and the exit for each row.
    """
    after, logits, score = stage(*rows)
    alive = torch.arange(index.shape[0], device=index.device) < count
    target = torch.where(alive, index, nowhere)
    marks = torch.full_like(index, stage.exit)
    if score is None:
        return after, logits, target, index, count, marks
    stay = alive & ~(score >= threshold)  # a score that is not a number stays, as in replay
    kept = stay.to(torch.int64)
    ahead = kept.cumsum(0)
    position = torch.where(stay, ahead - 1, ahead[-1] + (1 - kept).cumsum(0) - 1)
    return after, logits, target, position, ahead[-1], marks


def _stream_step(
    stage: Stage, threshold: float, exits: int, rows: Rows, ids: Tensor, count: Tensor, following: Tensor, slots: int, dump: int
) -> tuple[Any, ...]:
    """One stage of throughput mode on a bucket of its queue.

    ``count`` rows wait here and ``following`` in the next queue. Returns the rows, the logits, the answer slot of each row that
    leaves (``slots`` for the others), the position of each survivor in the next queue (``dump`` for the others), both counts, and
    what to write into the ring: ``id * exits + exit``.
    """
    after, logits, score = stage(*rows)
    alive = torch.arange(ids.shape[0], device=ids.device) < count
    stay = torch.zeros_like(alive) if score is None else alive & ~(score >= threshold)
    ahead = stay.to(torch.int64).cumsum(0)
    target = torch.where(alive & ~stay, ids % slots, slots)
    position = torch.where(stay, following + ahead - 1, dump)
    return after, logits, target, position, (count - ids.shape[0]).clamp(min=0), following + ahead[-1], ids * exits + stage.exit


def _quota_pipeline(stages: list[Stage], rows: Rows, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All stages of quota mode: after stage k the ``sizes[k]`` lowest scores go on. Returns answers and exits.

    Leavers' answers are put in place once, at the end: what is not on the way to the next stage does not delay it.
    """
    answers: list[Tensor] = []
    places: list[Tensor] = []
    marks: list[Tensor] = []
    index: Tensor | None = None
    for k, stage in enumerate(stages):
        rows, logits, score = stage(*rows)
        index = torch.arange(logits.shape[0], device=logits.device) if index is None else index
        staying = 0 if score is None else sizes[k]
        if score is None or staying == 0:
            left = index
        elif staying == index.shape[0]:
            continue
        else:
            order = ascending(score)
            gone, keep = order[staying:], order[:staying]
            left, logits = index[gone], logits[gone]
            rows, index = take(rows, stage.after, keep), index[keep]
        answers.append(logits)
        places.append(left)
        marks.append(torch.full_like(left, stage.exit))
        if staying == 0:
            break
    place = torch.cat(places)
    output = torch.cat(answers)
    return torch.zeros_like(output).index_copy(0, place, output), torch.zeros_like(place).index_copy(0, place, torch.cat(marks))


def ascending(score: Tensor) -> Tensor:
    """Indices that sort scores ``[b]``, ties by position. Counting beats a sort, which costs as much as a block at small b."""
    if score.shape[0] > 1024:
        return score.sort(stable=True).indices
    place = torch.arange(score.shape[0], device=score.device)
    before = (score[None, :] < score[:, None]) | ((score[None, :] == score[:, None]) & (place[None, :] < place[:, None]))
    return torch.empty_like(place).scatter(0, before.sum(1), place)


class StreamLoop:
    """A throughput run: one queue per stage at a fixed address, filled by position counters on the device.

    Row ids count up; answers lie in a ring of slots. A finished row writes ``id * exits + exit`` into the ring, so that the host
    knows from one asynchronous copy which rows of which lap are done.
    """

    def __init__(self, loop: GraphLoop, bench: Bench, bucket: int, backlog: int) -> None:
        self.loop, self.bench, self.bucket = loop, bench, bucket
        self.limit = bucket * backlog
        host = torch.full((bench.slots + 1,), -1, dtype=torch.int64)
        self.done_host = host.pin_memory() if loop.device.type == "cuda" else host
        self.done_view = self.done_host.numpy()
        self.turn = 0  # counts the streams that have used these queues

    def capture(self) -> None:
        """Capture every stage. Capturing runs it, which moves the queues' counters, so this comes before `reset`."""
        for k in range(len(self.loop.stages)):
            self._graph(k)

    def check(self, turn: int) -> None:
        """Refuse to go on with a stream whose queues another one has taken over.

        Raises:
            InvalidInput: `reset` was called since ``turn`` was read.
        """
        if turn != self.turn:
            raise InvalidInput(
                "Another stream was started on this engine before this one ended; with graphs it runs one stream at a time. "
                "Read a stream to its end first, or compile an engine for each."
            )

    def reset(self) -> None:
        """Forget an earlier run, also one that was not read to its end."""
        self.turn += 1
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize(self.loop.device)
        self.fill = [0] * len(self.loop.stages)
        self.next_id = 0  # next row to admit
        self.next_out = 0  # first row not yet returned
        self.pending: deque[tuple[Rows, int]] = deque()  # admitted by the host, not yet copied to the device
        self.waiting = 0
        self.in_flight = False
        self.bench.count.zero_()
        self.bench.done.fill_(-1)
        self.done_view.fill(-1)

    @property
    def unfinished(self) -> int:
        return self.next_id - self.next_out

    def admit(self, rows: Rows, count: int) -> None:
        """Take rows in. They reach the device when a bucket is full, or at the next `push`."""
        self.pending.append((rows, count))
        self.waiting += count
        self.next_id += count

    def push(self) -> None:
        """Copy pending rows into the first queue, as many as fit there and in the ring of answers."""
        admitted = self.next_id - self.waiting
        room = min(2 * self.bucket - self.fill[0], self.bench.slots - (admitted - self.next_out))
        layout = self.loop.stages[0].before
        picked: list[Rows] = []
        total = 0
        while self.pending and total < room:
            rows, count = self.pending.popleft()
            if count > room - total:
                keep = room - total
                index = torch.arange(count, device=self.loop.device)
                self.pending.appendleft((take(rows, layout, index[keep:]), count - keep))
                rows, count = take(rows, layout, index[:keep]), keep
            picked.append(rows)
            total += count
        if not total:
            return
        for buffer, values, dims in zip(self.bench.inputs[0], zip(*picked, strict=True), layout.dims, strict=True):
            if dims:
                room_for = buffer.narrow(dims[0], self.fill[0], total)
                room_for.copy_(torch.cat(values, dim=dims[0]) if len(values) > 1 else values[0], non_blocking=True)
        self.bench.index[0][self.fill[0] : self.fill[0] + total] = torch.arange(admitted, admitted + total, device=self.loop.device)
        self.fill[0] += total
        self.waiting -= total
        self.bench.count[0] = self.fill[0]

    def launch(self, stage: int) -> None:
        """Run a stage on up to a bucket of its queue."""
        self.bench.mail.clear()
        self._graph(stage).replay()
        left = self.fill[stage] - self.bucket
        self.fill[stage] = max(left, 0)
        if left > 0:  # what is behind the bucket moves to the front
            for buffer, dims in zip(self.bench.inputs[stage], self.loop.stages[stage].before.dims, strict=True):
                if dims:
                    buffer.narrow(dims[0], 0, left).copy_(buffer.narrow(dims[0], self.bucket, left))
            self.bench.index[stage][:left].copy_(self.bench.index[stage][self.bucket : self.bucket + left])
        self.in_flight = True

    def settle(self) -> None:
        """Wait for the launched stage's counts."""
        if self.in_flight:
            self.fill = self.bench.mail.wait()
            self.in_flight = False

    def _graph(self, k: int) -> Graph:
        bench, loop, bucket = self.bench, self.loop, self.bucket
        last = loop.stages[k].last

        def call() -> None:
            ids = bench.index[k][:bucket]
            following = bench.count[0] if last else bench.count[k + 1]
            made = loop.stream_steps[k](bench.view(k, bucket), ids, bench.count[k], following, bench.slots, bench.rows)
            after, logits, target, position, here, there, marks = made
            bench.count[k] = here
            if not last:
                bench.count[k + 1] = there
            bench.output.index_copy_(0, target, logits)
            bench.done.index_copy_(0, target, marks)
            self.done_host.copy_(bench.done, non_blocking=True)
            bench.mail.post(bench.count)
            if not last:
                bench.index[k + 1].index_copy_(0, position, ids)
                bench.store(k + 1, position, after)

        return bench.graph(("stream", k), call)

    def step(self, drain: bool = False) -> bool:
        """Launch one stage: the deepest with a full bucket; when the backlog is full or at the end, the fullest or the first."""
        if self.in_flight and not drain and self.waiting < self.bucket and not self.bench.mail.ready:
            return False  # the device is busy and the next bucket is not complete: go on taking inputs in
        self.settle()
        if self.fill[0] < self.bucket and self.waiting and (drain or self.fill[0] + self.waiting >= self.bucket):
            self.push()
        full = [k for k in range(len(self.fill)) if self.fill[k] >= self.bucket]
        if full:
            self.launch(full[-1])
            return True
        if drain and any(self.fill):
            self.launch(next(k for k, f in enumerate(self.fill) if f))
            return True
        if self.unfinished - self.waiting > self.limit and any(self.fill):
            self.launch(max(range(len(self.fill)), key=lambda k: self.fill[k]))
            return True
        return False

    def finish(self) -> None:
        """Wait until everything launched is done and seen by the host."""
        self.settle()
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize(self.loop.device)

    def finished(self) -> Iterator[tuple[int, int]]:
        """``(first, end)`` of the rows that are done and not yet returned, if there are any: one span."""
        exits, slots, view = self.loop.exits, self.bench.slots, self.done_view
        end = self.next_out
        stop = self.next_id - self.waiting
        while end < stop and view[end % slots] // exits == end:
            end += 1
        if end > self.next_out:
            yield self.next_out, end

    def collect(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Answers and exits of finished rows; frees their slots."""
        slots, exits = self.bench.slots, self.loop.exits
        self.next_out = end
        low, high = first % slots, (end - 1) % slots + 1
        if low < high:
            return self.bench.output[low:high].clone(), self.bench.done[low:high] % exits
        return (
            torch.cat([self.bench.output[low:slots], self.bench.output[:high]]),
            torch.cat([self.bench.done[low:slots], self.bench.done[:high]]) % exits,
        )
