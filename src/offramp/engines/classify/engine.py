"""classify: run a model with exits so that what is not computed is time saved.

Three modes. *Latency*: one batch at a time; after an exit the survivors are gathered if that pays. *Throughput*: a stream of
inputs; each stage has a queue and runs when the queue fills a bucket, so that freed slots refill at once. *Quota*: a fixed number
leaves at each exit; static shapes, the budget met exactly, and answers that depend on batch mates.

In the first two modes an answer depends on its own input alone.

This file is the way in: what is run, and on which inputs. Stages run in `host.py` and `queues.py` on any device, and in
`graphs.py` and `graph_stream.py` as captured graphs on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.batches import unpack_batch
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput, NoEffectWarning, NoSavingWarning
from offramp.core.trace import LatencyTable
from offramp.core.warn import warn
from offramp.engines.classify import host
from offramp.engines.classify.graph_stream import Streams
from offramp.engines.classify.graphs import MAX_SIGNATURES, GraphLoop, quota_pipeline
from offramp.engines.classify.modes import Latency, Mode, Quota, Throughput, quota_sizes
from offramp.engines.classify.profile import expected_ms, interpolate, measure_table, whole_ms, worthwhile
from offramp.engines.classify.queues import Answers, Queues
from offramp.engines.classify.stages import Layout, Rows, Stage, begin, exit_costs, make_stages, placed, signature, take
from offramp.network import Example, MultiExit


@dataclass
class Runner:
    """A compiled plan. Call it on a batch, or stream an iterable through it. Made by `compile`.

    Attributes:
        mode: how it runs.
        decide: for each early exit whether it is checked.
        dropped: exits that the plan has but that do not pay here, with the reason.
        table: measured times, if they were taken.
        costs: ``[K]`` FLOPs per item to leave at each exit as run.
        thresholds: of each stage; the last is not used.
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
    _known: dict[Any, tuple[list[int], Rows, Layout, Any, int]] = field(default_factory=dict, repr=False)
    _streams: Streams | None = field(default=None, repr=False)

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
                    return self._answers(None, None)
                if isinstance(self.mode, Quota):
                    return self._answers(*self.loop.quota(key, rows, layout, count, quota_sizes(self.stage_shares(), count)))
                return self._answers(*self.loop.latency(key, rows, layout, count))
            if len(self.stages) == 1 and not any(m.training for m in self._modules):
                return self._whole(args, kwargs)
            rows, _, count = begin(self.net, self.plan, *self._place(args, kwargs))
            if isinstance(self.mode, Quota):
                return self._answers(*quota_pipeline(self.stages, rows, tuple(quota_sizes(self.stage_shares(), count))))
            return self._answers(*host.latency(self.stages, self.thresholds, rows, count, self._compaction_pays))

    def _whole(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Answers:
        """Nothing is checked on the way, so the model itself runs, at its own speed: the same answer bit for bit as its cut."""
        _, rows, _, count = self._enter(args, kwargs)  # checks the inputs; shapes seen before cost next to nothing
        if not count:
            return self._answers(None, None)
        given = (*args, *kwargs.values())
        if len(given) > len(rows) or any(t is not r for t, r in zip(given, rows, strict=False)):  # moved, cast, nested or reordered
            args, kwargs = self._place(args, kwargs)
        output = self.net.select(self.net.model(*args, **kwargs))
        exits = torch.full((count,), self.stages[-1].exit, device=output.device)
        return self._answers(output, exits)

    def stream(self, batches: Iterable[Any]) -> Iterator[Answers]:
        """Answers for each batch of an iterable, in order.

        Args:
            batches: what a data loader yields (labels are ignored), or ``(args, kwargs)`` pairs.
        """
        if isinstance(self.mode, Throughput):
            yield from self._throughput(self.mode, batches)
            return
        for batch in batches:
            args, kwargs = _inputs(batch)
            yield self(*args, **kwargs)

    def _enter(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Rows, Layout, int]:
        """Rows, their layout, what identifies their shape, and how many.

        Inputs that are plain tensors of shapes seen before skip the checks: at batch 1 those cost as much as a block.
        """
        flat = (*args, *kwargs.values())
        marks = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else (type(t), t) for t in flat]
        try:
            known = self._known.get(shapes := (len(args), *kwargs, *marks))
        except TypeError:  # nested inputs, which have no hash
            known, shapes = None, None
        if known is not None:
            order, carried, layout, key, count = known
            return key, (*[flat[i] for i in order], *carried), layout, count
        plain = all(t.ndim if isinstance(t, Tensor) else isinstance(t, bool | int | float | str | None) for t in flat)
        rows, layout, count = begin(self.net, self.plan, *self._place(args, kwargs))
        key = signature(rows, layout)
        order = [next((i for i, t in enumerate(flat) if t is r), -1) for r in rows[: len(layout.live)]]
        # Given as they are used: nothing was moved, cast or nested, and no tensor stands for two inputs.
        if shapes and plain and -1 not in order and len(set(order)) == len(order) and all(layout.batch_dims):
            if len(self._known) >= 8 * MAX_SIGNATURES:
                self._known.clear()
            self._known[shapes] = (order, rows[len(layout.live) :], layout, key, count)
        return key, rows, layout, count

    def _entered(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Rows, Layout, int]]:
        for batch in batches:  # the loader's code is not inference
            args, kwargs = _inputs(batch)
            with torch.inference_mode():
                entered = self._enter(args, kwargs)
            yield entered

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
        shares: list[float] = []
        waiting = 0.0
        ends = {s.exit for s in self.stages}
        for k, share in enumerate(self.plan.shares):
            waiting += share
            if k in ends:
                shares.append(waiting)
                waiting = 0.0
        return shares

    def __post_init__(self) -> None:
        self._exit_cost = self.costs.to(self.net.device)
        self._modules = list(self.net.model.modules())
        self.thresholds = [self.plan.thresholds[s.exit] for s in self.stages]

    def _place(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Example:
        return Example(tuple(args), dict(kwargs)).to(self.net.device, self.net.dtype)

    def _answers(self, output: Tensor | None, exits: Tensor | None) -> Answers:
        """Answers from outputs and exits; from ``None`` those of a batch without rows."""
        if output is None or exits is None:
            device = self.net.device
            output = torch.empty(0, self.net.num_outputs, device=device, dtype=self.stages[-1].dtype)
            exits = torch.empty(0, dtype=torch.int64, device=device)
        return Answers(output, exits, self._exit_cost)

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

    def _throughput(self, mode: Throughput, batches: Iterable[Any]) -> Iterator[Answers]:
        if self.loop is not None:
            if self._streams is None:
                self._streams = Streams(self.loop, mode.bucket, mode.backlog, self._answers)
            yield from self._streams.run(self._entered(batches))
            return
        limit = mode.bucket * mode.backlog
        stream = Queues(self.stages, self.thresholds, mode.bucket, self._answers)
        for batch in batches:
            given = self._place(*_inputs(batch))
            with torch.inference_mode():
                stream.admit(*begin(self.net, self.plan, *given))
                while stream.run_full() or (stream.behind() > limit and stream.run_oldest()):
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


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
        return batch
    unpacked = unpack_batch(batch)
    return unpacked.args, unpacked.kwargs


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
    if plan.exits != net.names:
        raise InvalidInput(f"The plan is for exits {plan.exits}, the network has {net.names}. Calibrate a trace of this network.")
    plan.check(net.fingerprint())
    mode = mode if mode is not None else Latency()
    net.eval()
    plan = replace(plan, rule=placed(plan.rule, net.device))
    size = mode.bucket if isinstance(mode, Throughput) else mode.batch_size
    if size < 1:
        raise InvalidInput(f"The batch size must be at least 1, got {size}.")
    if isinstance(mode, Throughput) and mode.backlog < 1:
        raise InvalidInput(f"The backlog must be at least 1 bucket, got {mode.backlog}.")
    decide = [t != float("inf") for t in plan.thresholds[:-1]]
    if isinstance(mode, Quota):
        decide = [share > 0 for share in plan.shares[:-1]]
    if not any(decide):
        warn("The plan never leaves early, so this runs the model as it is.", NoEffectWarning)
    use_graphs = graphs if graphs is not None else net.device.type == "cuda"
    guaranteed = plan.certificate is not None and plan.certificate.guaranteed
    with torch.inference_mode():
        runner = _build(net, plan, mode, decide, use_graphs)
        timed = measure and table is None and any(decide)
        if timed:
            sizes = sorted({1, *(4**p for p in range(1, 16) if 4**p < size), size})
            table = runner.loop_table(size) if runner.loop is not None else measure_table(net, plan, sizes)
        if table is None or not any(decide):
            return runner
        pays = worthwhile(plan, table, size, decide, chained=runner.stages[0].keep_previous)
        if timed and runner.loop is None and any(pays):
            chained = runner.stages[0].keep_previous or plan.rule.stateful
            if expected_ms(plan, table, size, pays, chained) > whole_ms(net, plan, size):  # so small that deciding costs more than running
                pays = [False] * len(pays)
        losing = [k for k, (yes, pay) in enumerate(zip(decide, pays, strict=True)) if yes and not pay]
        if losing and (drop if drop is not None else not guaranteed):
            runner = _build(net, plan, mode, [yes and k not in losing for k, yes in enumerate(decide)], use_graphs)
            runner.dropped = {
                net.at[k]: f"checking it costs more than the {plan.shares[k]:.1%} leaving there save at batch size {size}" for k in losing
            }
            if runner.loop is not None and any(runner.decide) and isinstance(mode, Latency):
                runner.loop_table(size)
        if losing and len(losing) == sum(decide):
            kept = "the model runs as it is" if runner.dropped else "they are kept, as asked or because a guarantee is about exactly them"
            warn(f"No exit of this plan pays on this machine; {kept}.", NoSavingWarning)
        runner.table = table
    return runner


def _build(net: MultiExit, plan: Plan, mode: Mode, decide: Sequence[bool], graphs: bool) -> Runner:
    stages = make_stages(net, plan, decide)
    runner = Runner(net, plan, mode, stages, tuple(decide), exit_costs(net, plan, decide))
    if graphs:
        shares = runner.stage_shares()
        reach = [min(1.0, max(0.0, sum(shares[k:]))) for k in range(len(stages))]
        runner.loop = GraphLoop(stages, runner.thresholds, reach, net.device, compiled=net.device.type == "cuda")
    return runner


__all__ = ["Answers", "Latency", "Mode", "Quota", "Runner", "Throughput", "compile", "measure_table", "quota_sizes"]
