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
from collections.abc import Callable, Iterator, Sequence
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

    def wait(self) -> list[int]:
        """Spin until all values have arrived."""
        view = self._view
        while view[-1] < 0 or view.min() < 0:
            pass
        values: list[int] = view.tolist()
        return values


def buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes to capture: fine steps (at most an eighth of the size), since a stage runs at the next larger one."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size += max(1, 2 ** (size.bit_length() - 1) // 4) if size >= 4 else size
    return (*sizes, largest)


def _rank(keep: Tensor) -> Tensor:
    """Positions ``[b]`` that put the kept rows first, both groups in order."""
    kept = keep.to(torch.int64)
    ahead = kept.cumsum(0)
    return torch.where(keep, ahead - 1, ahead[-1] + (1 - kept).cumsum(0) - 1)


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
        self.done = torch.full((slots + 1,), -1, dtype=torch.int64, device=device)
        self.index = [torch.arange(rows + 1, device=device) for _ in loop.stages]
        self.count = torch.zeros(len(loop.stages), dtype=torch.int64, device=device)
        self.mail = Mailbox(len(loop.stages), device)
        self.entered = -1  # rows that count[0] says

    def bucket(self, stage: int, left: int) -> int:
        """The captured size that holds ``left`` rows and was fastest when timed; the smallest if none was."""
        fitting = [b for b in buckets(self.rows) if b >= left]
        timed = [b for b in fitting if (stage, b) in self.cost]
        return min(timed, key=lambda b: self.cost[(stage, b)]) if timed else fitting[0]

    def view(self, stage: int, size: int) -> Rows:
        layout = self.loop.stages[stage].before
        return tuple(t.narrow(dims[0], 0, size) if len(dims) == 1 else t for t, dims in zip(self.inputs[stage], layout.dims, strict=True))

    def load(self, stage: int, rows: Rows, start: int, count: int) -> None:
        """Copy rows into a stage's buffer."""
        layout = self.loop.stages[stage].before
        for buffer, value, dims in zip(self.inputs[stage], rows, layout.dims, strict=True):
            (buffer.narrow(dims[0], start, count) if len(dims) == 1 else buffer).copy_(value, non_blocking=True)

    def graph(self, key: Any, make: Callable[[], None]) -> Graph:
        if key not in self.graphs:
            # All stages share one code object, so the compiler's limit on versions of it counts them together.
            limit = torch._dynamo.config.patch(recompile_limit=16 * len(self.loop.stages)) if self.loop.compiled else contextlib.nullcontext()
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
        device: where it runs.
        compiled: run the stages through ``torch.compile`` (dynamic batch).
    """

    def __init__(self, stages: list[Stage], thresholds: list[float], device: torch.device, compiled: bool) -> None:
        self.stages, self.thresholds, self.device = stages, thresholds, device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=True)) if compiled else (lambda f: f)
        self.compiled = compiled
        self.run: list[Callable[..., Any]] = [wrap(s) for s in stages]
        self.decide = wrap(_decide)
        self.benches: dict[Any, Bench] = {}
        self.streams: dict[Any, StreamLoop] = {}

    def bench(self, key: Any, rows: Rows, layout: Layout, size: int, slots: int) -> Bench:
        """Buffers for a signature, made on first use and again for a larger batch."""
        found = self.benches.get(key)
        if found is None or found.rows < size:
            two = torch.arange(2, device=self.device) % max(1, _count(rows, layout))
            found = self.benches[key] = Bench(self, take(rows, layout, two), size, slots)
        return found

    # Latency -------------------------------------------------------------------------------------------------------------

    def latency(self, key: Any, rows: Rows, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
        """Answers ``[B, C]`` and stage numbers ``[B]`` of one batch."""
        bench = self.bench(key, rows, layout, count, count)
        bench.load(0, rows, 0, count)
        if bench.entered != count:
            bench.count[0] = bench.entered = count
        left = count
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
        stage, run = self.stages[k], self.run[k]

        def call() -> None:
            after, logits, score = run(*bench.view(k, bucket))
            index = bench.index[k][:bucket]
            if stage.last:
                alive = torch.arange(bucket, device=self.device) < bench.count[k]
                target = torch.where(alive, index, bench.slots)
                bench.output.index_copy_(0, target, logits)
                bench.done.index_fill_(0, target, k)
                return
            target, position, staying, marks = self.decide(score, index, bench.count[k], self.thresholds[k], bench.slots, k)
            bench.count[k + 1] = staying
            bench.mail.post(bench.count)
            bench.output.index_copy_(0, target, logits)
            bench.done.index_copy_(0, target, marks)
            bench.index[k + 1].index_copy_(0, position, index)
            for buffer, value, dims in zip(bench.inputs[k + 1], after, stage.after.dims, strict=True):
                buffer.index_copy_(dims[0], position, value) if dims else buffer.copy_(value)

        return bench.graph(("latency", k, bucket), call)

    def warm_latency(
        self, key: Any, rows: Rows, layout: Layout, count: int, time_ms: Callable[[Callable[[], object]], float], sizes: Sequence[int]
    ) -> None:
        """Capture and time every stage at the given bucket sizes."""
        bench = self.bench(key, rows, layout, count, count)
        bench.load(0, rows, 0, count)
        for k in range(len(self.stages)):
            for bucket in sizes:
                bench.count.fill_(bucket)
                graph = self._latency_graph(bench, k, bucket)
                bench.cost[(k, bucket)] = time_ms(graph.replay)
        bench.entered = -1

    def measure(self, key: Any, rows: Rows, layout: Layout, count: int, sizes: Sequence[int]) -> LatencyTable:
        """Times of the captured stages. ``segment_ms`` holds a stage less its head; moving survivors is part of the stage."""
        time_ms = functools.partial(median_ms, device=self.device)
        bench = self.bench(key, rows, layout, count, count)
        self.warm_latency(key, rows, layout, count, time_ms, sizes)
        whole = [[bench.cost[(k, min(max(b, 1), count))] for b in sizes] for k in range(len(self.stages))]
        heads = []
        for k, stage in enumerate(self.stages[:-1]):
            net, (hidden, previous) = stage.net[0], stage.head_inputs(bench.inputs[k + 1])
            row = []
            for size in sizes:
                call = functools.partial(net.heads[stage.exit], hidden[:size], tuple(p[:size] for p in previous))
                row.append(time_ms(Graph(call, self.device, self.pool).replay))
            heads.append(row)
        empty = Mailbox(1, self.device)
        one = torch.ones(1, dtype=torch.int64, device=self.device)
        letter = Graph(functools.partial(empty.post, one), self.device, self.pool)

        def round_trip() -> None:
            empty.clear()
            letter.replay()
            empty.wait()

        heads.append([0.0] * len(sizes))
        head_ms = torch.tensor(heads, dtype=torch.float64)
        segment_ms = (torch.tensor(whole, dtype=torch.float64) - head_ms).clamp(min=0)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return LatencyTable(tuple(sizes), segment_ms, head_ms, torch.zeros(len(sizes), dtype=torch.float64), time_ms(round_trip), name)

    # Quota ---------------------------------------------------------------------------------------------------------------

    def quota(self, key: Any, rows: Rows, layout: Layout, count: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Answers and stage numbers of one batch; ``sizes[k]`` rows go on after stage k. One graph, no wait for the host."""
        bench = self.bench(key, rows, layout, count, count)
        bench.load(0, rows, 0, count)

        def call() -> None:
            held, index, size = bench.view(0, count), bench.index[0][:count], count
            for k, (stage, run) in enumerate(zip(self.stages, self.run, strict=True)):
                held, logits, score = run(*held)
                bench.output.index_copy_(0, index, logits)
                bench.done.index_fill_(0, index, k)
                if stage.last or not sizes[k]:
                    return
                if sizes[k] < size:
                    keep = score.topk(sizes[k], largest=False, sorted=False).indices
                    held, index, size = take(held, stage.after, keep), index[keep], sizes[k]

        bench.graph(("quota", count), call).replay()
        return bench.output[:count].clone(), bench.done[:count].clone()

    # Throughput ----------------------------------------------------------------------------------------------------------

    def stream(self, key: Any, example: Rows, layout: Layout, bucket: int, backlog: int) -> StreamLoop:
        """Queues for a stream of inputs of one signature."""
        name = ("stream", key, bucket, backlog)
        if name not in self.streams:
            bench = self.bench(name, example, layout, 2 * bucket, bucket * (backlog + 2))
            self.streams[name] = StreamLoop(self, bench, bucket, backlog)
        self.streams[name].reset()
        return self.streams[name]


def _count(rows: Rows, layout: Layout) -> int:
    return next(int(t.shape[dims[0]]) for t, dims in zip(rows, layout.dims, strict=True) if dims)


def _decide(score: Tensor, index: Tensor, count: Tensor, threshold: float, nowhere: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who leaves. Returns the answer slot of each row (``nowhere`` for those that had left before), new positions with the
    survivors first, the number of survivors, and the stage number for each row."""
    alive = torch.arange(score.shape[0], device=score.device) < count
    stay = alive & (score < threshold)
    return torch.where(alive, index, nowhere), _rank(stay), stay.sum(), torch.full_like(index, k)


class StreamLoop:
    """A throughput run: one queue per stage at a fixed address, filled by position counters on the device.

    Row ids count up; answers lie in a ring of slots. A finished row writes ``id * stages + stage`` into the ring, so that the host
    knows from one asynchronous copy which rows of which lap are done.
    """

    def __init__(self, loop: GraphLoop, bench: Bench, bucket: int, backlog: int) -> None:
        self.loop, self.bench, self.bucket = loop, bench, bucket
        self.limit = bucket * backlog
        host = torch.full((bench.slots + 1,), -1, dtype=torch.int64)
        self.done_host = host.pin_memory() if loop.device.type == "cuda" else host
        self.done_view = self.done_host.numpy()

    def reset(self) -> None:
        """Forget an earlier run, also one that was not read to its end."""
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize(self.loop.device)
        self.fill = [0] * len(self.loop.stages)
        self.next_id = 0  # next row to admit
        self.next_out = 0  # first row not yet returned
        self.pending: list[tuple[Rows, int]] = []  # admitted by the host, not yet copied to the device
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
            rows, count = self.pending.pop(0)
            if count > room - total:
                keep = room - total
                index = torch.arange(count, device=self.loop.device)
                self.pending.insert(0, (take(rows, layout, index[keep:]), count - keep))
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
        stage, run, stages = loop.stages[k], loop.run[k], len(loop.stages)

        def call() -> None:
            after, logits, score = run(*bench.view(k, bucket))
            ids = bench.index[k][:bucket]
            alive = torch.arange(bucket, device=loop.device) < bench.count[k]
            bench.count[k].sub_(bucket).clamp_(min=0)
            stay = torch.zeros_like(alive) if stage.last else alive & (score < loop.thresholds[k])
            target = torch.where(alive & ~stay, ids % bench.slots, bench.slots)
            if not stage.last:
                ahead = stay.to(torch.int64).cumsum(0)
                position = torch.where(stay, bench.count[k + 1] + ahead - 1, bench.rows)
                bench.count[k + 1].add_(ahead[-1])
            bench.output.index_copy_(0, target, logits)
            bench.done.index_copy_(0, target, ids * stages + k)
            self.done_host.copy_(bench.done, non_blocking=True)
            bench.mail.post(bench.count)
            if not stage.last:
                bench.index[k + 1].index_copy_(0, position, ids)
                for buffer, value, dims in zip(bench.inputs[k + 1], after, stage.after.dims, strict=True):
                    buffer.index_copy_(dims[0], position, value) if dims else buffer.copy_(value)

        return bench.graph(("stream", k), call)

    def step(self, drain: bool = False) -> bool:
        """Launch one stage: the deepest with a full bucket; when the backlog is full or at the end, the fullest or the first."""
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
        stages, slots, view = len(self.loop.stages), self.bench.slots, self.done_view
        end = self.next_out
        stop = self.next_id - self.waiting
        while end < stop and view[end % slots] // stages == end:
            end += 1
        if end > self.next_out:
            yield self.next_out, end

    def collect(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Answers and stage numbers of finished rows; frees their slots."""
        slots, stages = self.bench.slots, len(self.loop.stages)
        self.next_out = end
        low, high = first % slots, (end - 1) % slots + 1
        if low < high:
            return self.bench.output[low:high].clone(), self.bench.done[low:high] % stages
        return (
            torch.cat([self.bench.output[low:slots], self.bench.output[:high]]),
            torch.cat([self.bench.done[low:slots], self.bench.done[:high]]) % stages,
        )
