"""Exit efficiency of the classify engine: ideal time / measured time, beside the strongest full model of the same run.

Ideal = sum over segments of (share of rows that reach it x the segment's time at the full batch). ``ideal_ms`` takes that time in a
chain: all segments one after another over different batches, in the same rounds as the engine, so that caches, clocks and drift of
the machine are those of the running model. On CUDA ``ideal_alone_ms`` is beside it: each segment repeated by itself, which finds its
weights in the cache and is therefore a stricter yardstick than the model itself can meet.

Thresholds let about the same share of all rows leave at every exit. ``median_ms`` is per batch with batches given one after another,
``waited_ms`` with each waited for. Weights and inputs are random: this measures time, not accuracy. The full model is compiled and
captured as a CUDA graph (on a CPU: run eagerly, as the engine's segments are).

    python benchmarks/efficiency.py --model vit_base_patch16_224 --exits blocks.2,blocks.5,blocks.8 --dtype bfloat16 --batch 1,32,256 \
        --incoming 1,8,32,256 --bucket 256 --items 2048 --out benchmarks/results/efficiency_vit_base_h100.json
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from offramp.core.bundle import write_json
from offramp.core.certificate import Plan
from offramp.core.errors import OfframpWarning
from offramp.engines.capture import Graph
from offramp.engines.classify.engine import Latency, Quota, Runner, Throughput, compile
from offramp.engines.classify.record import record
from offramp.exits import MeanPool, PooledLinear, TokenPool
from offramp.measure.clock import compare, environment
from offramp.measure.hardware import ceilings
from offramp.network import MultiExit, attach, never
from offramp.policies import Confidence


def inputs(items: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random smooth pictures of varying contrast, so that scores differ between items."""
    generator = torch.Generator(device).manual_seed(0)
    coarse = torch.randn(items, 3, 8, 8, generator=generator, device=device)
    contrast = torch.rand(items, 1, 1, 1, generator=generator, device=device) * 3
    parts = [torch.nn.functional.interpolate(c, size=(size, size), mode="bilinear").to(dtype) for c in (coarse * contrast).split(256)]
    return torch.cat(parts)


def equal_shares(net: MultiExit, images: Tensor, share: float) -> Plan:
    """Thresholds that let ``share`` of all items leave at each early exit."""
    trace = record(net, images.split(256), progress=False)
    scores, waiting, thresholds, shares = trace.scores(Confidence()), torch.ones(trace.items, dtype=torch.bool), [], []
    for k in range(len(net.at)):
        ordered = scores[waiting, k].sort().values
        cut = len(ordered) - round(share * trace.items)
        thresholds.append(float((ordered[cut - 1] + ordered[cut]) / 2))
        leaving = waiting & (scores[:, k] >= thresholds[-1])
        shares.append(int(leaving.sum()) / trace.items)
        waiting &= ~leaving
    return Plan(Confidence(), net.names, (*thresholds, float("-inf")), (*shares, 1 - sum(shares)), 0.0, fingerprint=net.fingerprint())


class Clock:
    """Wall-clock samples of whole passes, in turn, the device's work included."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def passes(self, functions: dict[str, Callable[[], object]], calls: int = 1) -> dict[str, list[float]]:
        done = compare(functions, warmup=1, repeats=self.repeats, device=self.device, calls=calls)
        return {name: list(timing.samples_ms) for name, timing in done.timings.items()}


class Static:
    """A callable as one captured graph with input and output buffers of its own: the strongest form of a fixed model."""

    def __init__(self, function: Callable[..., Any], example: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(t.clone() for t in example)
        self.output: Any = None
        compiled = torch.compile(function, dynamic=False) if example[0].is_cuda else function

        def call() -> None:
            self.output = compiled(*self.inputs)

        with torch.inference_mode():
            self.graph = Graph(call, example[0].device, None)

    def __call__(self, *values: Tensor) -> Any:
        with torch.inference_mode():
            for buffer, value in zip(self.inputs, values, strict=True):
                buffer.copy_(value)
            self.graph.replay()
            return self.output.clone() if isinstance(self.output, Tensor) else self.output


class Chain:
    """All segments at one batch size, one after another, each timed: what the model does, with a clock in between.

    On CUDA each segment is a captured graph and the clock is events on the device.
    """

    def __init__(self, net: MultiExit, images: Tensor) -> None:
        self.cut = net.cut()
        self.cuda = images.is_cuda
        self.fixed: list[Static] = []
        self.marks: list[list[torch.cuda.Event]] = []
        self.samples: list[list[float]] = [[] for _ in self.cut.segments]
        if not self.cuda:
            return
        with torch.inference_mode():
            state = self.cut.begin(images)
            for k, segment in enumerate(self.cut.segments):
                torch._dynamo.reset()
                self.fixed.append(Static(segment.module, tuple(state.values[n] for n in segment.inputs)))
                state = self.cut.run(state, k, k + 1)

    def __call__(self, batch: Tensor) -> None:
        if self.cuda:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.fixed) + 1)]
            with torch.inference_mode():
                self.fixed[0].inputs[0].copy_(batch)
            marks[0].record()
            for fixed, mark in zip(self.fixed, marks[1:], strict=True):
                fixed.graph.replay()
                mark.record()
            self.marks.append(marks)
            return
        with torch.inference_mode():
            state = self.cut.begin(batch)
            for k, times in enumerate(self.samples):
                start = time.perf_counter()
                state = self.cut.run(state, k, k + 1)
                times.append((time.perf_counter() - start) * 1e3)

    def median_ms(self) -> list[float]:
        """Milliseconds of each segment; call after the device is done."""
        for marks in self.marks:
            for times, first, last in zip(self.samples, marks, marks[1:], strict=False):
                times.append(first.elapsed_time(last))
        self.marks.clear()
        return [statistics.median(times) for times in self.samples]

    def alone_ms(self, clock: Clock) -> list[float] | None:
        """Each segment repeated by itself; on a CPU nothing, where that would only say how large the cache is."""
        if not self.cuda:
            return None
        return [statistics.median(clock.passes({"segment": fixed.graph.replay}, calls=20)["segment"]) for fixed in self.fixed]


def ideal(reach: list[float], segment_ms: list[float]) -> float:
    return sum(r * t for r, t in zip(reach, segment_ms, strict=True))


def efficiency(
    reach: list[float],
    segment_ms: list[float],
    chain: list[float] | None,
    alone_ms: list[float] | None,
    samples: list[float],
    batches: float,
) -> dict[str, Any]:
    """Fields of a row: ideal times of ``batches`` full batches and what share of the measured time they are.

    Args:
        reach: share of the rows that reaches each segment.
        segment_ms: of the chain, medians.
        chain: times of the whole chain in the rounds of ``samples``. On a machine that drifts the ratio is taken within each round and
            its median reported; without, medians are divided.
        alone_ms: of each segment repeated by itself.
        samples: measured times.
        batches: full batches that a sample holds.
    """
    row: dict[str, Any] = {"reach": [round(r, 4) for r in reach], "ideal_ms": ideal(reach, segment_ms) * batches}
    row["exit_efficiency"] = row["ideal_ms"] / statistics.median(samples)
    if chain is not None:
        share = ideal(reach, segment_ms) / sum(segment_ms)
        row["exit_efficiency"] = statistics.median(share * c / m for c, m in zip(chain, samples, strict=True))
    if alone_ms is not None:
        row["ideal_alone_ms"] = ideal(reach, alone_ms) * batches
        row["exit_efficiency_alone"] = row["ideal_alone_ms"] / statistics.median(samples)
    return row


def drive(runner: Callable[..., Any], batches: Iterable[Tensor], sync: Callable[[], None] | None = None) -> None:
    """Batches one after another; with ``sync`` each is waited for before the next is given."""
    for batch in batches:
        runner(batch)
        if sync is not None:
            sync()


def throughput(
    net: MultiExit,
    plan: Plan,
    model: torch.nn.Module,
    images: Tensor,
    bucket: int,
    incoming_sizes: list[int],
    clock: Clock,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Rows of throughput mode: whole streams, filling and draining included."""
    chain = Chain(net, images[:bucket])
    alone = chain.alone_ms(clock)
    torch._dynamo.reset()
    engine = compile(net, plan, Throughput(bucket), drop=False, measure=False)
    whole = len(images) // bucket * bucket
    torch._dynamo.reset()
    full = Static(model, (images[:bucket],))
    functions: dict[str, Callable[[], object]] = {
        "full": lambda: drive(full, images[:whole].split(bucket)),
        "chain": lambda: drive(chain, images[:whole].split(bucket)),
    }
    exits_at = {}
    for incoming in incoming_sizes:
        batches = images[:whole].split(incoming)
        exits_at[incoming] = torch.cat([a.exit for a in engine.stream(batches)])
        functions[f"throughput_{incoming}"] = lambda batches=batches: [None for _ in engine.stream(batches)]
    samples = clock.passes(functions)
    full_ms, segment_ms = statistics.median(samples["full"]), chain.median_ms()
    keep({"mode": "full", "bucket": bucket, "median_ms": full_ms, "items": whole, "segment_ms": segment_ms, "samples_ms": samples["full"]})
    for incoming, exits_found in exits_at.items():
        times = samples[f"throughput_{incoming}"]
        reach = [float((exits_found >= k).float().mean()) for k in range(len(net.names))]
        median = statistics.median(times)
        keep(
            {
                "mode": "throughput",
                "incoming": incoming,
                "bucket": bucket,
                "items": whole,
                "median_ms": median,
                **efficiency(reach, segment_ms, None if images.is_cuda else samples["chain"], alone, times, whole / bucket),
                "over_full": statistics.median(t / f for t, f in zip(times, samples["full"], strict=True)),
                "samples_ms": times,
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--exits", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--incoming", default="1,8,64")
    parser.add_argument("--bucket", type=int, default=64)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--share", type=float, default=0.27)
    parser.add_argument("--modes", default="latency,quota,never,throughput", help="which to measure beside the full model")
    parser.add_argument("--pool", choices=("mean", "token"), default="mean", help="what the linear heads read")
    parser.add_argument(
        "--attention", choices=("default", "flash"), default="default", help="flash: not cuDNN's, for full model and engine"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    modes = args.modes.split(",")
    import timm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    if args.attention == "flash":
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().to(device, dtype)
    images = inputs(args.items, args.size, device, dtype)
    net = attach(
        model, args.exits.split(","), example=images[:2], head=PooledLinear(TokenPool() if args.pool == "token" else MeanPool())
    ).eval()
    plan = equal_shares(net, images, args.share)
    clock = Clock(device, args.repeats)
    environ = environment(device)
    limit = ceilings(device, dtype)
    rows: list[dict[str, Any]] = []
    done: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "exits": list(net.at),
        "pool": args.pool,
        "attention": args.attention,
        "planned_shares": plan.shares,
        "environment": environ,
    }
    done["ceilings"] = limit.to_dict()
    done["rows"] = rows

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        write_json(args.out, done)
        print(
            "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if not k.endswith("samples_ms")),
            flush=True,
        )

    warnings.simplefilter("ignore", OfframpWarning)
    if "throughput" in modes:
        throughput(net, plan, model, images, args.bucket, [int(b) for b in args.incoming.split(",")], clock, keep)

    for size in (int(b) for b in args.batch.split(",")):
        torch._dynamo.reset()
        full = Static(model, (images[:size],))
        batches = images[: max(size, args.items if size > 1 else min(args.items, 128 if device.type == "cpu" else 256))].split(size)
        batches = [b for b in batches if b.shape[0] == size]
        engines: dict[str, Runner] = {}
        for name, mode in (("latency", Latency(size)), ("quota", Quota(size))):
            if name not in modes:
                continue
            torch._dynamo.reset()
            engines[name] = compile(net, plan, mode, drop=False, measure=name == "latency")
        if "never" in modes:
            torch._dynamo.reset()
            engines["never"] = compile(net, never(net, Confidence()), Latency(size))
        exits = {name: torch.cat([engine(b).exit for b in batches]) for name, engine in engines.items()}
        runners: dict[str, Callable[..., Any]] = {"full": full, **engines}
        chain = Chain(net, images[:size])
        alone = chain.alone_ms(clock)
        runners["chain"] = chain
        samples = clock.passes({n: (lambda r=r, batches=batches: drive(r, batches)) for n, r in runners.items()})
        chained = samples.pop("chain")
        del runners["chain"]
        segment_ms = chain.median_ms()
        # On a CPU a call returns when it is done, so waiting changes nothing.
        waited = (
            samples
            if device.type == "cpu"
            else clock.passes({n: (lambda r=r, batches=batches: drive(r, batches, clock.sync)) for n, r in runners.items()})
        )
        flops = net.costs()[1] * size
        for name, times in samples.items():
            median = statistics.median(times) / len(batches)
            row: dict[str, Any] = {"mode": name, "batch": size, "median_ms": median, "samples_ms": [t / len(batches) for t in times]}
            row["waited_ms"] = statistics.median(waited[name]) / len(batches)
            if name in exits:
                reach = [float((exits[name] >= k).float().mean()) for k in range(len(net.names))]
                row |= efficiency(reach, segment_ms, None if device.type == "cuda" else chained, alone, times, len(batches))
                row["ideal_ms"] /= len(batches)
                if alone is not None:
                    row["ideal_alone_ms"] /= len(batches)
            else:
                row["segment_ms"] = segment_ms
                row["floor_ms"] = limit.floor_ms(flops, sum(s.param_bytes for s in net.cut().spec.segments))
            row["over_full"] = statistics.median(t / f for t, f in zip(times, samples["full"], strict=True))
            keep(row)


if __name__ == "__main__":
    main()
