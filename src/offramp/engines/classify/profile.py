"""What pays: measured stage times, which exits are worth checking, and when to compact."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from offramp.core.certificate import Plan
from offramp.core.trace import LatencyTable
from offramp.engines.classify import host
from offramp.engines.classify.stages import begin, make_stages, take
from offramp.network import MultiExit


def median_ms(
    function: Callable[[], object], device: torch.device, *, warmup: int = 2, repeats: int = 7, budget_ms: float = 400.0
) -> float:
    """Median wall-clock milliseconds of a call, the device's work included; fewer repeats when a call is long.

    Args:
        function: what to time.
        device: where its work happens.
        warmup: calls before timing.
        repeats: timed calls, at least three.
        budget_ms: stop repeating after about this much.
    """
    for _ in range(warmup):
        function()
    samples: list[float] = []
    spent = 0.0
    while len(samples) < 3 or (len(samples) < repeats and spent < budget_ms):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
        spent += samples[-1]
    return statistics.median(samples)


def interpolate(sizes: Sequence[int], times: Sequence[float], rows: float) -> float:
    """Time at ``rows`` by linear interpolation through (0, 0) and the measured points; proportional beyond the last."""
    if rows <= 0:
        return 0.0
    low_size, low_time = 0.0, 0.0
    for size, measured in zip(sizes, times, strict=True):
        if rows <= size:
            return low_time + (measured - low_time) * (rows - low_size) / (size - low_size)
        low_size, low_time = float(size), measured
    return low_time * rows / low_size


def expected_ms(plan: Plan, table: LatencyTable, batch_size: int, keep: Sequence[bool], chained: bool) -> float:
    """Time of a batch when only the kept exits are checked, given the shares the plan expects.

    Every segment is paid by the rows that reach it, a checked exit costs a gather and the wait for the count, and a head costs where it
    runs: at a checked exit and, if ``chained``, at every exit before one. What an exit that is not kept let go leaves at the next one.

    Args:
        plan: gives the shares.
        table: measured times of every segment and head.
        batch_size: rows that come in.
        keep: for each early exit whether it is checked.
        chained: whether a checked exit needs the heads before it.
    """
    sizes = table.batch_sizes
    segment, head, gather = table.segment_ms.tolist(), table.head_ms.tolist(), table.gather_ms.tolist()
    total, reach, waiting = 0.0, float(batch_size), 0.0
    for k, share in enumerate(plan.shares):
        total += interpolate(sizes, segment[k], reach)
        waiting += share
        if k == len(keep):
            break
        if keep[k] or (chained and any(keep[k:])):
            total += interpolate(sizes, head[k], reach)
        if keep[k]:
            single = batch_size == 1  # nothing to gather, and only a row that comes here waits
            total += min(1.0, reach) * table.sync_ms if single else table.sync_ms + interpolate(sizes, gather, reach)
            reach, waiting = max(0.0, reach - batch_size * waiting), 0.0
    return total


def worthwhile(plan: Plan, table: LatencyTable, batch_size: int, decide: Sequence[bool], *, chained: bool = False) -> list[bool]:
    """Which of the checked exits to keep so that a batch takes the least time, by `expected_ms`.

    Exits are dropped while that saves time or costs none, the best step first. A step is one exit, or one and all after it: where a
    checked exit needs the heads before it, those are saved only together with it.

    Args:
        plan: gives the shares.
        table: measured times of every segment and head.
        batch_size: rows that come in.
        decide: for each early exit whether it is checked now.
        chained: whether heads read the answers of earlier ones (``needs_previous``); a stateful rule chains them too.
    """
    keep = list(decide)
    chained = chained or plan.rule.stateful
    best = expected_ms(plan, table, batch_size, keep, chained)
    while any(keep):
        kept = [k for k, yes in enumerate(keep) if yes]
        steps = [[yes and j != k for j, yes in enumerate(keep)] for k in kept]
        steps += [[yes and j < k for j, yes in enumerate(keep)] for k in kept[:-1]]
        time_ms, fewer = min((expected_ms(plan, table, batch_size, step, chained), step) for step in steps)
        if time_ms > best:
            break
        keep, best = fewer, time_ms
    return keep


def whole_ms(net: MultiExit, plan: Plan, size: int) -> float:
    """Time of all segments in one go, nothing checked on the way, on a batch of repeated example rows."""
    (stage,) = make_stages(net, plan, [False] * len(net.at))
    example = net.example.to(net.device, net.dtype)
    rows, layout, two = begin(net, plan, example.args, example.kwargs)
    rows = take(rows, layout, torch.arange(size, device=net.device) % two)
    with torch.inference_mode():
        return median_ms(functools.partial(stage, *rows), net.device)


def measure_table(net: MultiExit, plan: Plan, batch_sizes: Sequence[int]) -> LatencyTable:
    """Time every segment, head and gather at some batch sizes, on the network's device, on repeated example rows.

    ``sync_ms`` is what a decision costs beside them: on CUDA reading a count, elsewhere the host's own work.
    """
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
                whole = median_ms(functools.partial(stage, *rows), device)
                head = 0.0
                following, _, _ = stage(*rows)
                if not stage.last:
                    state, previous = stage.head_inputs(following)
                    head = median_ms(functools.partial(net.heads[stage.exit], state, previous), device)
                    half = torch.arange(max(1, size // 2), device=device)
                    gathers.append(median_ms(functools.partial(take, following, stage.after, half), device))
                segments.append(max(whole - head, 0.0))
                heads.append(head)
                rows = following
            segment_ms.append(segments)
            head_ms.append(heads)
            gather_ms.append(max(gathers, default=0.0))
        if device.type == "cuda":
            flag = torch.zeros(1, device=device)
            sync = median_ms(lambda: bool(flag.any()), device)
        else:
            few = batch_sizes[0]
            rows = take(first, layout, torch.arange(few, device=device) % two)
            nobody = [float("inf")] * len(every)
            whole = median_ms(lambda: host.latency(every, nobody, rows, few, lambda *_: False), device)
            sync = max(0.0, whole - sum(segment_ms[0]) - sum(head_ms[0])) / max(1, len(every) - 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return LatencyTable(
        tuple(batch_sizes),
        torch.tensor(segment_ms, dtype=torch.float64).T.contiguous(),
        torch.tensor(head_ms, dtype=torch.float64).T.contiguous(),
        torch.tensor(gather_ms, dtype=torch.float64),
        sync,
        name,
    )
