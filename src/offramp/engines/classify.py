"""classify: run a model with exits so that what is not computed is time saved.

Three modes. *Latency*: one batch at a time; after an exit the survivors are gathered if that pays. *Throughput*: a stream of
inputs; each stage has a queue and runs when the queue fills a bucket, so that freed slots refill at once. *Quota*: a fixed number
leaves at each exit; static shapes, the budget met exactly, and answers that depend on batch mates.

In the first two modes an answer depends on its own input alone. Predictions of all current rows are written by index and
survivors alone are compacted: one gather and no reordering at the end.

This file is the host loop, which runs on any device. On CUDA `offramp.engines.graphs` runs the same stages as captured graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from offramp.core.batches import unpack_batch
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput, NoEffectWarning, NoSavingWarning
from offramp.core.trace import LatencyTable
from offramp.engines.graphs import GraphLoop, StreamLoop, ascending
from offramp.engines.profile import interpolate, median_ms, worthwhile
from offramp.engines.stages import Layout, Rows, Stage, begin, exit_costs, join, make_stages, take
from offramp.network import MultiExit


@dataclass(frozen=True)
class Answers:
    """What an engine returns for a batch.

    Attributes:
        output: ``[B, C]`` logits of the exit at which each row left.
        exit: ``[B]`` int64 index of that exit; K - 1 is the model's own output.
        exit_cost: ``[K]`` float64 FLOPs spent on a row that leaves at each exit.
    """

    output: Tensor
    exit: Tensor
    exit_cost: Tensor

    @property
    def cost(self) -> Tensor:
        """``[B]`` float64 FLOPs spent on each row; looked up when asked for, so that an answer does not wait for it."""
        return self.exit_cost[self.exit]


@dataclass(frozen=True)
class Latency:
    """One batch at a time, back as soon as possible.

    Attributes:
        batch_size: rows a batch usually has: what the engine measures and decides for. Other sizes run too.
        compact: gather survivors: ``None`` = where measurements say it pays, ``True`` = always, ``False`` = never (for comparison).
    """

    batch_size: int = 1
    compact: bool | None = None


@dataclass(frozen=True)
class Throughput:
    """A stream of inputs of any batch size, each stage run on full buckets; results come in input order.

    Attributes:
        bucket: rows a stage runs on.
        backlog: inputs admitted before the oldest must be finished, in buckets; bounds memory and the wait of a hard input.
    """

    bucket: int = 64
    backlog: int = 8


@dataclass(frozen=True)
class Quota:
    """A fixed number of rows leaves at each exit: the best-scoring ones of the batch, by the plan's shares.

    Answers depend on batch mates. Shapes are static, nothing waits for the host, and the budget is met exactly.

    Attributes:
        batch_size: rows a batch usually has.
    """

    batch_size: int = 32


Mode = Latency | Throughput | Quota


def quota_sizes(shares: Sequence[float], batch: int) -> list[int]:
    """Rows left after each exit, ``round(batch * (1 - cumulative share))``, never rising; one entry per early exit."""
    left, sizes = 1.0, []
    for share in shares[:-1]:
        left -= share
        sizes.append(max(0, min(round(batch * left), sizes[-1] if sizes else batch)))
    return sizes


@dataclass
class Runner:
    """A compiled plan. Call it on a batch, or stream an iterable through it. Made by `compile`.

    Attributes:
        mode: how it runs.
        decide: for each early exit whether it is checked.
        dropped: exits that the plan has but that do not pay here, with the reason.
        table: measured times, if they were taken.
        costs: ``[K]`` FLOPs per item to leave at each exit as run.
    """

    net: MultiExit
    plan: Plan
    mode: Mode
    stages: list[Stage]
    decide: tuple[bool, ...]
    costs: Tensor
    table: LatencyTable | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    loop: GraphLoop | None = None
    _known: dict[Any, tuple[list[int], Rows, Layout, Any]] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Answers:
        """Answers for one batch, inputs given as to the model.

        Raises:
            InvalidInput: the inputs do not fit the model.
        """
        if isinstance(self.mode, Throughput):
            return next(self.stream([(args, kwargs)]))
        with torch.inference_mode():
            if self.loop is not None:
                key, rows, layout, count = self._enter(args, kwargs)
                if not count:
                    return self._nothing()
                if isinstance(self.mode, Quota):
                    return self._answers(*self.loop.quota(key, rows, layout, count, quota_sizes(self.stage_shares(), count)))
                return self._answers(*self.loop.latency(key, rows, layout, count))
            args, kwargs = self._place(args, kwargs)
            return self._quota(args, kwargs) if isinstance(self.mode, Quota) else self._latency(args, kwargs)

    def stream(self, batches: Iterable[Any]) -> Iterator[Answers]:
        """Answers for each batch of an iterable, in order.

        Args:
            batches: what a data loader yields (labels are ignored), or ``(args, kwargs)`` pairs.
        """
        if isinstance(self.mode, Throughput):
            yield from self._throughput(batches)
            return
        for batch in batches:
            args, kwargs = _inputs(batch)
            yield self(*args, **kwargs)

    def _enter(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Rows, Layout, int]:
        """Rows, their layout, what identifies their shape, and how many.

        Inputs that are plain tensors of shapes seen before skip the checks: at batch 1 those cost as much as a block.
        """
        flat = (*args, *kwargs.values())
        shapes = (len(args), *kwargs, *((t.shape, t.dtype, t.device) if isinstance(t, Tensor) and t.ndim else id(t) for t in flat))
        if shapes in self._known:
            order, carried, layout, key = self._known[shapes]
            return key, (*(flat[i] for i in order), *carried), layout, int(flat[order[0]].shape[layout.dims[0][0]])
        placed_args, placed_kwargs = self._place(args, kwargs)
        rows, layout, count = begin(self.net, self.plan, placed_args, placed_kwargs)
        key = signature(rows, layout)
        order = [next((i for i, t in enumerate(flat) if t is r), -1) for r in rows[: len(layout.live)]]
        if -1 not in order and all(layout.batch_dims):  # given as they are used: nothing was moved, cast or nested
            self._known[shapes] = (order, rows[len(layout.live) :], layout, key)
        return key, rows, layout, count

    def loop_table(self, size: int) -> LatencyTable:
        """Capture the graphs for a batch size on repeated example rows and time them. Only with graphs."""
        if self.loop is None:
            raise InvalidInput("This engine has no graphs to time.")
        example = self.net.example.to(self.net.device, self.net.dtype)
        rows, layout, two = begin(self.net, self.plan, example.args, example.kwargs)
        key = signature(rows, layout)
        rows = take(rows, layout, torch.arange(size, device=self.net.device) % two)
        measured = self.loop.measure(key, rows, layout, size, warm=isinstance(self.mode, Latency))
        # The table is per segment; a stage of several segments has its time at the last of them.
        segment, head = torch.zeros(2, len(self.plan.exits), len(measured.batch_sizes), dtype=torch.float64)
        for k, stage in enumerate(self.stages):
            segment[stage.exit], head[stage.exit] = measured.segment_ms[k], measured.head_ms[k]
        return replace(measured, segment_ms=segment, head_ms=head)

    def stage_shares(self) -> list[float]:
        """Expected share leaving at the end of each stage; what a dropped exit would have let go leaves later."""
        shares, waiting = [], 0.0
        ends = {s.exit for s in self.stages}
        for k, share in enumerate(self.plan.shares):
            waiting += share
            if k in ends:
                shares.append(waiting)
                waiting = 0.0
        return shares

    def __post_init__(self) -> None:
        self._exit_cost = self.costs.to(self.net.device)

    def _place(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        device, dtype = self.net.device, self.net.dtype

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

        placed = tree_map(move, (tuple(args), dict(kwargs)))
        return placed[0], placed[1]

    def _answers(self, output: Tensor, exits: Tensor) -> Answers:
        return Answers(output, exits, self._exit_cost)

    def _nothing(self) -> Answers:
        """Answers for a batch without rows."""
        device = self.net.device
        return self._answers(torch.empty(0, self.net.num_outputs, device=device, dtype=self.net.dtype), torch.empty(0, dtype=torch.int64, device=device))

    def _threshold(self, stage: Stage) -> float:
        return self.plan.thresholds[stage.exit]

    def _latency(self, args: Any, kwargs: Any) -> Answers:
        rows, _, count = begin(self.net, self.plan, args, kwargs)
        device = self.net.device
        exits = torch.full((count,), len(self.plan.exits) - 1, device=device)
        index = torch.arange(count, device=device)  # where each row of the state came from
        waiting: Tensor | None = None  # rows of the state that have not left; None = all
        output: Tensor | None = None
        for number, stage in enumerate(self.stages):
            rows, logits, score = stage(*rows)
            if output is None:
                output = logits if stage.last else logits.new_empty(count, *logits.shape[1:])
            if stage.last:
                if waiting is None and index.numel() == count:
                    return self._answers(logits, exits)
                kept = slice(None) if waiting is None else waiting
                output[index[kept]] = logits[kept]
                break
            leaving = score >= self._threshold(stage)
            if waiting is not None:
                leaving &= waiting
            left = int(leaving.sum())
            if not left:
                continue
            gone = index[leaving]
            output[gone] = logits[leaving]
            exits[gone] = stage.exit
            waiting = ~leaving if waiting is None else waiting & ~leaving
            staying = int(waiting.sum()) if index.numel() != left else 0
            if not staying:
                break
            if self._compaction_pays(number, index.numel(), staying):
                keep = waiting.nonzero().squeeze(1)
                rows, index, waiting = take(rows, stage.after, keep), index[keep], None
        return self._answers(output, exits)

    def _compaction_pays(self, number: int, rows: int, staying: int) -> bool:
        """Whether the next stage on ``staying`` rows and a gather beat the next stage on all ``rows``."""
        if isinstance(self.mode, Latency) and self.mode.compact is not None:
            return self.mode.compact
        if self.table is None:
            return True
        sizes = self.table.batch_sizes
        following = self.stages[number + 1]
        times = self.table.segment_ms[following.start : following.stop].sum(0).tolist()
        gather = interpolate(sizes, self.table.gather_ms.tolist(), rows)
        return interpolate(sizes, times, rows) - interpolate(sizes, times, staying) > gather

    def _quota(self, args: Any, kwargs: Any) -> Answers:
        rows, _, count = begin(self.net, self.plan, args, kwargs)
        device = self.net.device
        exits = torch.full((count,), len(self.plan.exits) - 1, device=device)
        index = torch.arange(count, device=device)
        output: Tensor | None = None
        sizes = quota_sizes(self.stage_shares(), count)
        for number, stage in enumerate(self.stages):
            rows, logits, score = stage(*rows)
            if output is None:
                output = logits.new_empty(count, *logits.shape[1:])
            output[index] = logits
            if stage.last:
                break
            keep = ascending(score)[: sizes[number]]
            exits[index] = stage.exit
            exits[index[keep]] = len(self.plan.exits) - 1
            if not keep.numel():
                break
            rows, index = take(rows, stage.after, keep), index[keep]
        return self._answers(output, exits)

    def _graph_throughput(self, batches: Iterable[Any]) -> Iterator[Answers]:
        """Throughput mode over captured graphs. A batch of another signature waits until the queues are empty."""
        run: StreamLoop | None = None
        current: Any = None
        waiting = _Assembly(self)
        for batch in batches:
            with torch.inference_mode():
                key, rows, layout, count = self._enter(*_inputs(batch))
                if count and key != current:
                    yield from self._drain(run, waiting)
                    run, current = self.loop.stream(key, rows, layout, self.mode.bucket, self.mode.backlog), key
                waiting.expect(count)
                if run is None or not count:
                    continue
                run.admit(rows, count)
                while run.step():
                    yield from waiting.collect(run)
        with torch.inference_mode():
            yield from self._drain(run, waiting)

    def _drain(self, run: StreamLoop | None, waiting: _Assembly) -> Iterator[Answers]:
        while run is not None and run.unfinished:
            if not run.step(drain=True):
                run.finish()
            yield from waiting.collect(run)
        yield from waiting.empty_batches()

    def _throughput(self, batches: Iterable[Any]) -> Iterator[Answers]:
        if self.loop is not None:
            yield from self._graph_throughput(batches)
            return
        bucket = self.mode.bucket
        limit = bucket * self.mode.backlog
        stream = _Stream(self, bucket)
        for batch in batches:
            args, kwargs = self._place(*_inputs(batch))
            with torch.inference_mode():
                stream.admit(args, kwargs)
                while stream.run_full() or (stream.unfinished > limit and stream.run_fullest()):
                    pass
            yield from stream.finished()
        with torch.inference_mode():
            while stream.run_first():
                pass
        yield from stream.finished()

    def __str__(self) -> str:
        checked = [n for n, yes in zip(self.net.at, self.decide, strict=True) if yes]
        lines = [f"{type(self.mode).__name__} engine on {self.net.device}: checks {', '.join(checked) or 'no exit'}"]
        lines += [f"  dropped {name}: {why}" for name, why in self.dropped.items()]
        return "\n".join(lines)


class _Assembly:
    """Cuts the rows that a graph stream returns, in order, into the batches that went in."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.sizes: list[int] = []
        self.pieces: list[tuple[Tensor, Tensor]] = []
        self.held = 0

    def expect(self, rows: int) -> None:
        self.sizes.append(rows)

    def collect(self, run: StreamLoop) -> Iterator[Answers]:
        for first, end in run.finished():
            self.pieces.append(run.collect(first, end))
            self.held += end - first
        whole: list[int] = []
        while self.sizes and sum(whole) + self.sizes[0] <= self.held:
            whole.append(self.sizes.pop(0))
        if not whole:
            return
        taken = sum(whole)
        if not taken:
            yield from (self.runner._nothing() for _ in whole)
            return
        output, exits = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self.pieces, strict=True))
        self.pieces = [(output[taken:], exits[taken:])] if taken < self.held else []
        self.held -= taken
        yield from (self.runner._answers(*parts) for parts in zip(output[:taken].split(whole), exits[:taken].split(whole), strict=True))

    def empty_batches(self) -> Iterator[Answers]:
        """What is left when no row is waiting: batches without rows."""
        yield from (self.runner._nothing() for _ in self.sizes)
        self.sizes.clear()


class _Stream:
    """Queues of a throughput run. Rows that differ in another size than the batch (text lengths) wait in separate queues."""

    def __init__(self, runner: Runner, bucket: int) -> None:
        self.runner, self.bucket = runner, bucket
        self.queues: list[dict[Any, list[tuple[Rows, Tensor]]]] = [{} for _ in runner.stages]
        self.results: dict[int, list[Any]] = {}  # number of batch -> [output, exits, rows still unfinished]
        self.spans: list[tuple[int, int]] = []  # first row id and rows of each admitted batch
        self.next_id = 0
        self.next_out = 0
        self.unfinished = 0

    def admit(self, args: Any, kwargs: Any) -> None:
        rows, layout, count = begin(self.runner.net, self.runner.plan, args, kwargs)
        number = len(self.spans)
        self.spans.append((self.next_id, count))
        ids = torch.stack([torch.full((count,), number), torch.arange(count)], dim=1)  # on the host: batch, place in it
        self.results[number] = [None, torch.full((count,), -1, device=self.runner.net.device), count]
        self.next_id += count
        self.unfinished += count
        if count:
            self.queues[0].setdefault(signature(rows, layout), []).append((rows, ids))

    def _fill(self, stage: int) -> tuple[int, Any]:
        """Rows of the fullest queue of a stage, and its key."""
        return max(((sum(len(i) for _, i in parts), key) for key, parts in self.queues[stage].items()), key=lambda p: p[0], default=(0, None))

    def run_full(self) -> bool:
        """Run the deepest stage that has a full bucket."""
        for stage in reversed(range(len(self.queues))):
            count, key = self._fill(stage)
            if count >= self.bucket:
                self._run(stage, key)
                return True
        return False

    def run_fullest(self) -> bool:
        """Run the stage with most rows waiting, full or not."""
        fills = [(*self._fill(stage), stage) for stage in range(len(self.queues))]
        count, key, stage = max(fills, key=lambda f: f[0])
        if count:
            self._run(stage, key)
        return bool(count)

    def run_first(self) -> bool:
        """Run the shallowest stage that has rows, so that what it passes on fills the later buckets."""
        for stage in range(len(self.queues)):
            count, key = self._fill(stage)
            if count:
                self._run(stage, key)
                return True
        return False

    def _run(self, number: int, key: Any) -> None:
        runner = self.runner
        stage = runner.stages[number]
        parts = self.queues[number].pop(key)
        picked, total = [], 0
        while parts and total < self.bucket:
            rows, ids = parts.pop(0)
            room = self.bucket - total
            if len(ids) > room:
                device = rows[0].device
                head, tail = torch.arange(room, device=device), torch.arange(room, len(ids), device=device)
                parts.insert(0, (take(rows, stage.before, tail), ids[room:]))
                rows, ids = take(rows, stage.before, head), ids[:room]
            picked.append((rows, ids))
            total += len(ids)
        if parts:
            self.queues[number][key] = parts
        rows, ids = join([r for r, _ in picked], stage.before), torch.cat([i for _, i in picked])
        rows, logits, score = stage(*rows)
        if stage.last:
            self._finish(logits, ids, stage.exit)
            return
        staying = (score < runner._threshold(stage)).cpu()
        leave = (~staying).nonzero().squeeze(1)
        if leave.numel():
            self._finish(logits[leave.to(logits.device)], ids[leave], stage.exit)
        keep = staying.nonzero().squeeze(1)
        if keep.numel():
            survivors = take(rows, stage.after, keep.to(logits.device)) if leave.numel() else rows
            self.queues[number + 1].setdefault(key, []).append((survivors, ids[keep]))

    def _finish(self, logits: Tensor, ids: Tensor, exit_index: int) -> None:
        self.unfinished -= len(ids)
        for number in ids[:, 0].unique().tolist():
            mine = (ids[:, 0] == number).nonzero().squeeze(1)
            result = self.results[number]
            if result[0] is None:
                result[0] = logits.new_empty(self.spans[number][1], *logits.shape[1:])
            places = ids[mine, 1].to(logits.device)
            result[0][places] = logits[mine.to(logits.device)]
            result[1][places] = exit_index
            result[2] -= len(mine)

    def finished(self) -> Iterator[Answers]:
        while self.next_out < len(self.spans) and self.results[self.next_out][2] == 0:
            output, exits, _ = self.results.pop(self.next_out)
            self.next_out += 1
            yield self.runner._nothing() if output is None else self.runner._answers(output, exits)


def signature(rows: Rows, layout: Layout) -> Any:
    """What rows must share to run in one batch: every size but the batch, and the values of inputs that have no batch."""
    return tuple(
        tuple(s for d, s in enumerate(t.shape) if d not in dims) if dims else (tuple(t.shape), tuple(t.flatten().tolist()))
        for t, dims in zip(rows, layout.dims, strict=True)
    )


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
        return batch
    unpacked = unpack_batch(batch)
    return unpacked.args, unpacked.kwargs


def measure_table(net: MultiExit, plan: Plan, batch_sizes: Sequence[int]) -> LatencyTable:
    """Time every segment, head and gather at some batch sizes, on the network's device, on repeated example rows."""
    every = make_stages(net, plan, [True] * len(net.at))
    example = net.example.to(net.device, net.dtype)
    first, layout, two = begin(net, plan, example.args, example.kwargs)
    device = net.device
    segment_ms, head_ms, gather_ms = [], [], []
    with torch.inference_mode():
        for size in batch_sizes:
            rows = take(first, layout, torch.arange(size, device=device) % two)
            segments, heads, gathers = [], [], []
            for stage in every:
                whole = median_ms(lambda stage=stage, rows=rows: stage(*rows), device)
                head = 0.0
                following, _, _ = stage(*rows)
                if not stage.last:
                    state, previous = stage.head_inputs(following)
                    head = median_ms(lambda stage=stage, state=state, previous=previous: net.heads[stage.exit](state, previous), device)
                    half = torch.arange(max(1, size // 2), device=device)
                    gathers.append(median_ms(lambda stage=stage, rows=following, half=half: take(rows, stage.after, half), device))
                segments.append(max(whole - head, 0.0))
                heads.append(head)
                rows = following
            segment_ms.append(segments)
            head_ms.append(heads)
            gather_ms.append(max(gathers, default=0.0))
    flag = torch.zeros(1, device=device)
    sync = median_ms(lambda: bool(flag.any()), device) if device.type == "cuda" else 0.0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return LatencyTable(
        tuple(batch_sizes),
        torch.tensor(segment_ms, dtype=torch.float64).T.contiguous(),
        torch.tensor(head_ms, dtype=torch.float64).T.contiguous(),
        torch.tensor(gather_ms, dtype=torch.float64),
        sync,
        name,
    )


def compile(  # noqa: A001 - the verb, as in torch.compile
    net: MultiExit,
    plan: Plan,
    mode: Mode | None = None,
    *,
    measure: bool = True,
    table: LatencyTable | None = None,
    drop: bool | None = None,
    graphs: bool | None = None,
) -> Runner:
    """Make the engine that runs a plan.

    Args:
        net: network with exits; put in evaluation mode.
        plan: what `calibrate` gave.
        mode: `Latency` (default), `Throughput` or `Quota`.
        measure: time the stages first; without it the engine compacts always and drops nothing.
        table: measured times to use instead.
        drop: leave out exits that do not pay here; what would have left there leaves later. ``None`` = yes, unless the plan
            carries a guarantee, whose promise is about exactly these exits.
        graphs: capture CUDA graphs of compiled stages; ``None`` = on CUDA.

    Returns:
        The engine.

    Raises:
        FingerprintMismatch: the plan was made for another model.
        NotCuttable: the model cannot be run in segments.

    Warns:
        NoEffectWarning: the plan never leaves early.
        NoSavingWarning: no exit pays on this machine.
    """
    plan.check(net.fingerprint())
    if plan.exits != net.names:
        raise InvalidInput(f"The plan is for exits {plan.exits}, the network has {net.names}. Calibrate a trace of this network.")
    mode = mode if mode is not None else Latency()
    net.eval()
    size = mode.bucket if isinstance(mode, Throughput) else mode.batch_size
    if size < 1:
        raise InvalidInput(f"The batch size must be at least 1, got {size}.")
    decide = [t != float("inf") for t in plan.thresholds[:-1]]
    if isinstance(mode, Quota):
        decide = [share > 0 for share in plan.shares[:-1]]
    if not any(decide):
        warnings.warn("The plan never leaves early, so this runs the model as it is.", NoEffectWarning, stacklevel=2)
    use_graphs = graphs if graphs is not None else net.device.type == "cuda"
    guaranteed = plan.certificate is not None and plan.certificate.guaranteed
    with torch.inference_mode():
        runner = _build(net, plan, mode, decide, use_graphs)
        if measure and table is None and any(decide):
            table = runner.loop_table(size) if runner.loop is not None else measure_table(net, plan, sorted({1, *(2**p for p in range(2, size.bit_length(), 2)), size}))
        if table is None or not any(decide):
            return runner
        pays = worthwhile(plan, table, size, decide)
        losing = [k for k, (yes, pay) in enumerate(zip(decide, pays, strict=True)) if yes and not pay]
        if losing and (drop if drop is not None else not guaranteed):
            runner = _build(net, plan, mode, [yes and k not in losing for k, yes in enumerate(decide)], use_graphs)
            runner.dropped = {
                net.at[k]: f"checking it costs more than the {plan.shares[k]:.1%} leaving there save at batch size {size}" for k in losing
            }
            if runner.loop is not None and any(runner.decide) and isinstance(mode, Latency):
                runner.loop_table(size)
        if losing and len(losing) == sum(decide):
            kept = "the model runs as it is" if runner.dropped else "they are kept, as asked or because the guarantee is about exactly these exits"
            warnings.warn(f"No exit of this plan pays on this machine; {kept}.", NoSavingWarning, stacklevel=2)
        runner.table = table
    return runner


def _build(net: MultiExit, plan: Plan, mode: Mode, decide: Sequence[bool], graphs: bool) -> Runner:
    stages = make_stages(net, plan, decide)
    runner = Runner(net, plan, mode, stages, tuple(decide), exit_costs(net, plan, decide))
    if graphs:
        shares = runner.stage_shares()
        reach = [min(1.0, max(0.0, sum(shares[k:]))) for k in range(len(stages))]
        runner.loop = GraphLoop(stages, [plan.thresholds[s.exit] for s in stages], reach, net.device, compiled=net.device.type == "cuda")
    return runner


__all__ = ["Answers", "Latency", "Mode", "Quota", "Runner", "Throughput", "compile", "measure_table", "quota_sizes"]
