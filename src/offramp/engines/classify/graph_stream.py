"""Throughput mode over captured graphs: one queue per stage at a fixed address, answers in a ring.

Shapes: ``b`` rows of a bucket, ``C`` classes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.capture import Graph
from offramp.engines.classify.buffers import Bench
from offramp.engines.classify.graphs import MAX_SIGNATURES, GraphLoop
from offramp.engines.classify.queues import Answers, MakeAnswers
from offramp.engines.classify.stages import Layout, Rows, Stage, join, part


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


class StreamLoop:
    """A throughput run: one queue per stage at a fixed address, filled by position counters on the device.

    Row ids count up; answers lie in a ring of slots. A finished row writes ``id * exits + exit`` into the ring, so that the host
    knows from one asynchronous copy which rows of which lap are done.
    """

    def __init__(self, loop: GraphLoop, bench: Bench, bucket: int, backlog: int) -> None:
        self.loop, self.bench, self.bucket = loop, bench, bucket
        self.limit = bucket * backlog
        bound = zip(loop.stages, loop.thresholds, strict=True)
        self.steps = [loop.recorder.wrap(functools.partial(_stream_step, stage, threshold, loop.exits)) for stage, threshold in bound]
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

    def _next(self, room: int) -> tuple[list[Rows], int]:
        """Pending pieces of at most ``room`` rows, the last of them split if need be, and their rows."""
        picked: list[Rows] = []
        total = 0
        while self.pending and total < room:
            rows, count = self.pending.popleft()
            if count > room - total:
                keep = room - total
                layout = self.loop.stages[0].before
                self.pending.appendleft((part(rows, layout, keep, count), count - keep))
                rows, count = part(rows, layout, 0, keep), keep
            picked.append(rows)
            total += count
        return picked, total

    def collate(self) -> None:
        """Join a bucket of pending pieces into one. Done while the device is busy: with single rows it costs the host the most."""
        if self.pending and self.pending[0][1] < self.bucket <= self.waiting:
            picked, total = self._next(self.bucket)
            self.pending.appendleft((join(picked, self.loop.stages[0].before), total))

    def push(self) -> None:
        """Copy pending rows into the first queue, as many as fit there and in the ring of answers."""
        admitted = self.next_id - self.waiting
        picked, total = self._next(min(2 * self.bucket - self.fill[0], self.bench.slots - (admitted - self.next_out)))
        if not total:
            return
        layout = self.loop.stages[0].before
        for buffer, value, dims in zip(self.bench.inputs[0], join(picked, layout), layout.dims, strict=True):
            if dims:
                buffer.narrow(dims[0], self.fill[0], total).copy_(value, non_blocking=True)
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
        bench, bucket, step = self.bench, self.bucket, self.steps[k]
        last = self.loop.stages[k].last

        def call() -> None:
            ids = bench.index[k][:bucket]
            following = bench.count[0] if last else bench.count[k + 1]
            made = step(bench.view(k, bucket), ids, bench.count[k], following, bench.slots, bench.rows)
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

        return bench.graph(k, call)

    def step(self, drain: bool = False) -> bool:
        """Launch one stage: the deepest with a full bucket; when the backlog is full or at the end, the fullest or the first."""
        if self.in_flight and not drain and self.waiting < self.bucket and not self.bench.mail.ready:
            return False  # the device is busy and the next bucket is not complete: go on taking inputs in
        self.collate()
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


class Assembly:
    """Cuts the rows that a graph stream returns, in order, into the batches that went in."""

    def __init__(self, answer: MakeAnswers) -> None:
        self.answer = answer
        self.sizes: deque[int] = deque()
        self.pieces: list[tuple[Tensor, Tensor]] = []
        self.held = 0

    def expect(self, rows: int) -> None:
        self.sizes.append(rows)

    def collect(self, run: StreamLoop) -> Iterator[Answers]:
        for first, end in run.finished():
            self.pieces.append(run.collect(first, end))
            self.held += end - first
        whole: list[int] = []
        taken = 0
        while self.sizes and taken + self.sizes[0] <= self.held:
            taken += self.sizes[0]
            whole.append(self.sizes.popleft())
        if not whole:
            return
        if not taken:
            yield from (self.answer(None, None) for _ in whole)
            return
        output, exits = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self.pieces, strict=True))
        self.pieces = [(output[taken:], exits[taken:])] if taken < self.held else []
        self.held -= taken
        yield from (self.answer(*parts) for parts in zip(output[:taken].split(whole), exits[:taken].split(whole), strict=True))

    def empty_batches(self) -> Iterator[Answers]:
        """What is left when no row is waiting: batches without rows."""
        yield from (self.answer(None, None) for _ in self.sizes)
        self.sizes.clear()


class Streams:
    """Runs batches through a `StreamLoop` for each signature. A batch of another signature waits until the queues are empty.

    Args:
        loop: the captured stages.
        bucket: rows a stage runs on.
        backlog: rows admitted before the oldest must be finished, in buckets.
        answer: makes answers from outputs and exits.
    """

    def __init__(self, loop: GraphLoop, bucket: int, backlog: int, answer: MakeAnswers) -> None:
        self.loop, self.bucket, self.backlog, self.answer = loop, bucket, backlog, answer
        self.made: dict[Any, StreamLoop] = {}

    def open(self, key: Any, example: Rows, layout: Layout) -> StreamLoop:
        """Empty queues for inputs of one signature."""
        if key not in self.made:
            while len(self.made) >= MAX_SIGNATURES:
                del self.made[next(iter(self.made))]
            bench = self.loop.new_bench(example, layout, 2 * self.bucket, self.bucket * (self.backlog + 2))
            self.made[key] = StreamLoop(self.loop, bench, self.bucket, self.backlog)
            self.made[key].capture()
        self.made[key].reset()
        return self.made[key]

    def run(self, entered: Iterable[tuple[Any, Rows, Layout, int]]) -> Iterator[Answers]:
        """Answers in the order of the batches, given as ``(signature, rows, layout, count)``."""
        stream: StreamLoop | None = None
        current: Any = None
        turn = 0
        waiting = Assembly(self.answer)
        for key, rows, layout, count in entered:
            done: list[Answers] = []
            with torch.inference_mode():  # left before a yield: what the consumer does is not inference
                if stream is not None:
                    stream.check(turn)
                if count and key != current:
                    done += self._drain(stream, waiting)
                    stream, current = self.open(key, rows, layout), key
                    turn = stream.turn
                waiting.expect(count)
                if stream is not None and count:
                    stream.admit(rows, count)
                    while stream.step():
                        done += waiting.collect(stream)
            yield from done
        with torch.inference_mode():
            if stream is not None:
                stream.check(turn)
            done = self._drain(stream, waiting)
        yield from done

    def _drain(self, stream: StreamLoop | None, waiting: Assembly) -> list[Answers]:
        done: list[Answers] = []
        while stream is not None and stream.unfinished:
            if not stream.step(drain=True):
                stream.finish()
            done += waiting.collect(stream)
        return [*done, *waiting.empty_batches()]
