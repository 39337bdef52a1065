"""What pays: measured stage times, which exits are worth checking, and when to compact."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from offramp.core.certificate import Plan
from offramp.core.trace import LatencyTable
from offramp.engines.stages import begin, make_stages, take
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


def worthwhile(plan: Plan, table: LatencyTable, batch_size: int, decide: Sequence[bool]) -> list[bool]:
    """Which of the checked exits save more time than they cost at a batch size, given the shares the plan expects.

    An exit is worth checking if the time saved behind it exceeds its head, its gather and the wait for the count:
    ``R(n) - R(n - m) > head(n) + gather(n) + sync`` with ``n`` rows reaching it, ``m`` leaving and ``R`` the time of all
    later segments. Exits are dropped one at a time, the one that loses most first; what it let go leaves at the next one.
    """
    early = len(plan.exits) - 1
    sizes = table.batch_sizes
    segment, head, gather = table.segment_ms.tolist(), table.head_ms.tolist(), table.gather_ms.tolist()
    keep = list(decide)
    if plan.rule.stateful:
        return keep  # a later score needs the earlier heads anyway, so dropping one saves nothing

    def gains() -> list[float]:
        shares = [0.0] * (early + 1)
        waiting = 0.0
        for k in range(early + 1):
            waiting += plan.shares[k]
            if k == early or keep[k]:
                shares[k], waiting = waiting, 0.0
        gained = []
        for k in range(early):
            reach = batch_size * sum(shares[k:])
            leave = batch_size * shares[k]
            saved = sum(
                interpolate(sizes, segment[j], reach) - interpolate(sizes, segment[j], reach - leave) for j in range(k + 1, early + 1)
            )
            wait = table.sync_ms if batch_size > 1 else min(1.0, reach) * table.sync_ms
            paid = interpolate(sizes, head[k], reach) + interpolate(sizes, gather, reach) * (batch_size > 1) + wait
            gained.append(saved - paid)
        return gained

    while any(keep):
        losing = [(gain, k) for k, gain in enumerate(gains()) if keep[k] and gain <= 0]
        if not losing:
            break
        keep[min(losing)[1]] = False
    return keep


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
