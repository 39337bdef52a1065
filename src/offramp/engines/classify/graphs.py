"""The classify engine on CUDA: stages compiled, then captured as graphs per bucket, with one cheap read per decision.

What makes a small batch pay:

* One graph launch per stage holds everything: segments, head, score, decision, writing answers, and moving survivors to the front
  of the next stage's buffer. Inputs of the next stage lie at fixed addresses, so no copy follows.
* The number of survivors is written to pinned host memory *before* the survivors are moved. The host spins on that memory, not on
  a synchronisation, and launches the next bucket while the move is still running.
* Rows of a bucket beyond the survivors are leavers that compute along and write nowhere.

This file holds latency and quota mode; throughput mode is `offramp.engines.classify.graph_stream`.

Shapes: ``B`` rows of a batch, ``b`` rows of a bucket, ``C`` classes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from offramp.core.trace import LatencyTable
from offramp.engines.capture import Graph, Mailbox, Recorder
from offramp.engines.classify.buffers import Bench
from offramp.engines.classify.profile import median_ms
from offramp.engines.classify.stages import Layout, Rows, Stage, take

MAX_SIGNATURES = 32
"""Input signatures (sizes other than the batch) whose memory and graphs are kept; of more, the oldest are given up."""


class GraphLoop:
    """Latency and quota mode over captured graphs. Made by `offramp.engines.classify.engine.compile`.

    Args:
        stages: what runs between decisions.
        thresholds: one per stage; the last is not used.
        reach: expected share of rows that enters each stage; the first is 1.
        device: where it runs.
        compiled: run the stages through ``torch.compile``, for each size by itself: code for any size is a seventh slower.
    """

    def __init__(self, stages: list[Stage], thresholds: list[float], reach: list[float], device: torch.device, compiled: bool) -> None:
        self.stages, self.thresholds, self.reach, self.device = stages, thresholds, reach, device
        self.recorder = Recorder(device, compiled)
        self.exits = stages[-1].exit + 1
        wrap = self.recorder.wrap
        self.steps = [wrap(functools.partial(_latency_step, stage, threshold)) for stage, threshold in zip(stages, thresholds, strict=True)]
        self.whole = wrap(functools.partial(_whole, stages[0]))
        self.pipeline = wrap(functools.partial(quota_pipeline, stages))
        self.benches: dict[Any, Bench] = {}

    def bench(self, key: Any, rows: Rows, layout: Layout, size: int, slots: int) -> Bench:
        """Buffers for a signature, made on first use and again for a larger batch."""
        found = self.benches.get(key)
        if found is None or found.rows < size:
            self.benches.pop(key, None)
            while len(self.benches) >= MAX_SIGNATURES:
                del self.benches[next(iter(self.benches))]
            found = self.benches[key] = self.new_bench(rows, layout, size, slots)
        return found

    def new_bench(self, rows: Rows, layout: Layout, size: int, slots: int) -> Bench:
        """Buffers for rows like these."""
        two = torch.arange(2, device=self.device) % max(1, _count(rows, layout))
        return Bench(self.recorder, self.stages, self.reach, take(rows, layout, two), size, slots)

    # Latency -------------------------------------------------------------------------------------------------------------

    def latency(self, key: Any, rows: Rows, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
        """Answers ``[B, C]`` and exits ``[B]`` of one batch."""
        bench = self.bench(key, rows, layout, count, count)
        bench.load(rows, count)
        if len(self.stages) == 1:
            bucket = bench.bucket(0, count)
            self._latency_graph(bench, 0, bucket).replay()
            return bench.alone[bucket][:count].clone(), bench.done[:count].clone()
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
        found = bench.graphs.get(("latency", k, bucket))
        if found is not None:
            return found
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
            bench.alone[bucket] = self.whole(bench.view(0, bucket))

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
        letter = self.recorder.graph(functools.partial(box.post, torch.ones(1, dtype=torch.int64, device=self.device)))

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
        head = self.recorder.wrap(stage.net[0].heads[stage.exit])
        call = functools.partial(head, hidden[:size], tuple(p[:size] for p in previous))
        return median_ms(self.recorder.graph(call).replay, self.device)

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


def _whole(stage: Stage, rows: Rows) -> Tensor:
    """Logits of a stage that is the only one: the model as it is."""
    return stage(*rows)[1]


def quota_pipeline(stages: list[Stage], rows: Rows, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All stages of quota mode: after stage k the ``sizes[k]`` lowest scores go on. Returns answers and exits.

    Nothing is put in place on the way. Each stage keeps the ranks of its rows, which say where a row that went on is to be found,
    and one pass from the last stage back to the first picks every answer: a compiler makes a single kernel of it.
    """
    passed: list[tuple[Tensor, Tensor, int, int]] = []  # ranks, logits, rows that went on, exit
    for k, stage in enumerate(stages):
        rows, logits, score = stage(*rows)
        staying = 0 if score is None else sizes[k]
        if score is None or staying == 0:
            break
        if staying < score.shape[0]:
            rank = ranks(score)
            rows = take(rows, stage.after, in_order(rank, staying))
            passed.append((rank, logits, staying, stage.exit))
    output = logits
    done = torch.full((output.shape[0],), stage.exit, dtype=torch.int64, device=output.device)
    for rank, logits, staying, exit_index in reversed(passed):
        behind = rank.clamp(max=staying - 1)
        went_on = rank < staying
        output = torch.where(went_on.unsqueeze(1), output[behind], logits)
        done = torch.where(went_on, done[behind], exit_index)
    return output, done


def ranks(score: Tensor) -> Tensor:
    """Place of each score ``[b]`` in ascending order, ties by position; what is not a number comes first, as it stays longest.

    Counting beats a sort, which costs as much as a block at small ``b``.
    """
    score = torch.where(score.isnan(), -torch.inf, score)
    place = torch.arange(score.shape[0], device=score.device)
    if score.shape[0] > 1024:
        return torch.empty_like(place).scatter(0, score.sort(stable=True).indices, place)
    before = (score[None, :] < score[:, None]) | ((score[None, :] == score[:, None]) & (place[None, :] < place[:, None]))
    return before.sum(1)


def in_order(rank: Tensor, first: int) -> Tensor:
    """Positions of the rows ranked 0 to ``first - 1``. Counting here too: writing by index is a kernel that nothing fuses with."""
    place = torch.arange(rank.shape[0], device=rank.device)
    if rank.shape[0] > 1024:
        return torch.empty_like(place).scatter(0, rank, place)[:first]
    return torch.where(rank[None, :] == place[:first, None], place[None, :], 0).sum(1)
