"""Commands: evaluate, bench, report."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from offramp.cli.base import WORK, app, inside, note_items, open_run, percent, table, trace_of, without_labels
from offramp.cli.data import Records
from offramp.cli.options import DataFlags, ModelFlags, RunFlags, command, console, whole_numbers
from offramp.cli.progress import stages
from offramp.core.bundle import read_json, write_json
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput, NoEffectWarning, NoSavingWarning
from offramp.core.trace import Trace
from offramp.core.warn import warn
from offramp.engines.classify import engine as classify
from offramp.measure.clock import compare, environment
from offramp.measure.pareto import Curve, anytime_curve, interpolate, random_exit, upper_hull
from offramp.measure.quality import outcome
from offramp.measure.statistics import accuracy_drop
from offramp.network import Example, MultiExit, load_plan, never

MODES: dict[str, Callable[[int], classify.Mode]] = {
    "latency": classify.Latency,
    "throughput": classify.Throughput,
    "quota": classify.Quota,
}


def _mode(name: str, batch_size: int) -> classify.Mode:
    if name not in MODES:
        raise InvalidInput(f"--mode is {', '.join(MODES)}; got {name!r}.")
    return MODES[name](batch_size)


def _open(model: ModelFlags, items: DataFlags, run: RunFlags, labels_needed: bool = True) -> tuple[MultiExit, Records, Plan]:
    """What a trial needs: the network, items prepared for it, and the plan that `calibrate` saved."""
    net, records = open_run(model, items, run, labels_needed)
    return net, records, load_plan(inside(run.out, "plan", "calibrate"))


def _shares(taken: torch.Tensor, exits: int) -> torch.Tensor:
    """``[K]`` share of the items that left at each exit (float64)."""
    return torch.bincount(taken, minlength=exits).double() / taken.numel()


@command(app, "evaluate", WORK)
def evaluate(
    model: ModelFlags,
    items: DataFlags,
    run: RunFlags,
    mode: Annotated[str, typer.Option(help="How to run: latency, throughput or quota.")] = "latency",
    keep_all_exits: Annotated[
        bool, typer.Option("--keep-all-exits", help="Check every exit, also those that do not pay on this machine.")
    ] = False,
) -> None:
    """Run the plan on items that nothing was chosen on, and compare it with what it must beat.

    Writes `test/` (a trace of these items, which `report` uses) and `evaluation.json`.

    Example: `offramp evaluate --config runs/photos/config.toml --part 0.8:1`
    """
    net, records, plan = _open(model, items, run)
    note_items(run, "evaluate", items)
    trace = trace_of(net, records, items, [plan.rule])
    trace.save(run.out / "test")
    runner = classify.compile(net, plan, _mode(mode, items.batch_size), drop=False if keep_all_exits else None)
    batches = without_labels(records.loader(items.batch_size, workers=items.workers))
    found = [(a.exit.cpu(), a.output.argmax(-1).cpu(), a.cost.cpu()) for a in runner.stream(batches)]
    taken, answered, spent = (torch.cat(parts) for parts in zip(*found, strict=True))
    spent = spent / trace.base_cost
    if trace.labels is None:
        raise InvalidInput("Evaluation needs labels.")
    right, full_right = answered == trace.labels, trace.predictions[:, -1] == trace.labels
    accuracy, cost, full = float(right.double().mean()), float(spent.mean()), float(full_right.double().mean())
    shares = _shares(taken, len(trace.exits))
    drop = accuracy_drop(full_right, right)
    fixed = Curve("fixed", upper_hull(anytime_curve(trace).points))
    at_fixed = interpolate(fixed, cost) if cost >= fixed.points[0].cost else None
    blind = random_exit(trace, shares)
    rows = [
        ("this plan", f"{cost:.4f}", percent(accuracy)),
        ("full model", "1.0000", percent(full)),
        ("one fixed exit or mix at this cost", f"{cost:.4f}", "-" if at_fixed is None else percent(at_fixed)),
        ("random exits, same shares", f"{blind.cost:.4f}", percent(blind.quality)),
    ]
    table(f"{trace.items:,} items of {records.source}", ("", "mean cost", "accuracy"), rows)
    table(
        "Exits",
        ("exit", "share", "expected"),
        [(n, percent(float(s)), percent(e)) for n, s, e in zip(trace.exits, shares, plan.shares, strict=True)],
    )
    same = float((taken == outcome(trace, plan).exits).double().mean())
    console.print(
        f"accuracy given up {percent(drop.value)} [{percent(drop.low)}, {percent(drop.high)}]; exits as replayed: {percent(same)}",
        highlight=False,
        markup=False,
    )
    for name, why in runner.dropped.items():
        console.print(f"not checked here: {name}: {why}", highlight=False, markup=False)
    write_json(
        run.out / "evaluation.json",
        {
            "items": trace.items,
            "data": records.source,
            "part": items.part,
            "mode": mode,
            "accuracy": accuracy,
            "mean_cost": cost,
            "full_accuracy": full,
            "accuracy_drop": [drop.value, drop.low, drop.high],
            "fixed_exit_accuracy": at_fixed,
            "random_exit_accuracy": blind.quality,
            "shares": shares.tolist(),
            "expected": {"mean_cost": plan.mean_cost, "shares": list(plan.shares)},
            "exits_as_replayed": same,
            "dropped": runner.dropped,
            "environment": environment(net.device),
        },
    )


@command(app, "bench", WORK)
def bench(
    model: ModelFlags,
    items: DataFlags,
    run: RunFlags,
    batch_sizes: Annotated[str, typer.Option(help="Incoming batch sizes to time.")] = "1,32",
    mode: Annotated[list[str] | None, typer.Option(help="latency, throughput, quota; repeat for more. By default latency.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Different batches that are run in turn.")] = 4,
    repeats: Annotated[int, typer.Option(min=3, help="Samples of each.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the first sample.")] = 3,
) -> None:
    """Time the plan against the full model on real items, sample by sample in turn.

    Writes `bench.json` with all raw samples, and with accuracy and mean cost of the engine over all items if they have labels. The full
    model is timed both as it is and in the engine; ratios are to the faster.

    Example: `offramp bench --config runs/photos/config.toml --part 0.8:1 --batch-sizes 1,32 --mode latency --mode throughput`
    """
    net, records, plan = _open(model, items, run, labels_needed=False)
    net.eval()
    results, rows = [], []
    with stages("timing") as say:
        for batch_size in whole_numbers(batch_sizes, "--batch-sizes"):
            ready = _batches(net, records, batch_size, batches)
            for name in mode or ["latency"]:
                say(f"timing: {name}, batch {batch_size}")
                result = _time(net, plan, name, batch_size, ready, warmup, repeats, records)
                results.append(result)
                efficiency = result["exit_efficiency"]
                rows.append(
                    (
                        name,
                        str(batch_size),
                        result["full_ms"],
                        result["median_ms"],
                        result["p95_ms"],
                        f"{result['full_ms'] / result['median_ms']:.2f}",
                        "-" if efficiency is None else f"{efficiency:.3f}",
                    )
                )
    write_json(run.out / "bench.json", {"runs": results, "environment": environment(net.device)})
    table("Milliseconds per batch", ("mode", "batch", "full model", "plan", "plan p95", "times as fast", "exit efficiency"), rows)
    for result in results:
        if result["median_ms"] > result["full_ms"] and result["shares"][-1] < 1:
            warn(
                f"{result['name']}: the plan leaves early and still takes {result['median_ms'] / result['full_ms']:.2f} times as long as "
                "the full model here. Try larger batches, or run the model as it is.",
                NoSavingWarning,
            )


def _batches(net: MultiExit, records: Records, size: int, count: int) -> list[Example]:
    """Full batches on the network's device; items repeat if there are too few."""
    wanted = torch.arange(size * count) % len(records)
    return [Example(*inputs).to(net.device, net.dtype) for inputs in without_labels(records.subset(wanted).loader(size))]


def _time(
    net: MultiExit, plan: Plan, mode: str, size: int, ready: list[Example], warmup: int, repeats: int, records: Records
) -> dict[str, Any]:
    runner = classify.compile(net, plan, _mode(mode, size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # the yardstick is meant to run the whole model
        whole = classify.compile(net, never(net, plan.rule), _mode("latency", size), measure=False)
    count = len(ready)

    def eager() -> None:
        with torch.inference_mode():
            for args, kwargs in ready:
                net.model(*args, **kwargs)

    def engine() -> None:
        for _ in whole.stream(ready):
            pass

    def adaptive() -> None:
        for _ in runner.stream(ready):
            pass

    compared = compare(
        {"full model": eager, "full model in the engine": engine, "plan": adaptive}, warmup=warmup, repeats=repeats, device=net.device
    )
    samples = {name: [ms / count for ms in timing.samples_ms] for name, timing in compared.timings.items()}
    exits_taken = torch.cat([a.exit.cpu() for a in runner.stream(ready)])
    ordered = sorted(samples["plan"])
    median = statistics.median(ordered)
    return {
        "name": f"{mode}, batch {size}",
        "mode": mode,
        "batch_size": size,
        "median_ms": median,
        "p95_ms": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        "full_ms": min(statistics.median(samples["full model"]), statistics.median(samples["full model in the engine"])),
        "exit_efficiency": _efficiency(runner, exits_taken, size, median),
        "shares": _shares(exits_taken, len(plan.exits)).tolist(),
        "dropped": runner.dropped,
        "fixed_exit_ms": _fixed_exits(runner, size),
        **_quality(runner, records, size, net.costs()[1]),
        "samples_ms": samples,
    }


def _quality(runner: classify.Runner, records: Records, size: int, base_cost: float) -> dict[str, float | None]:
    """Accuracy and mean cost of the engine as it was timed, over all items (some exits may have been dropped)."""
    if records.labels is None:
        return {"accuracy": None, "mean_cost": None}
    found = [(a.output.argmax(-1).cpu(), a.cost.cpu()) for a in runner.stream(without_labels(records.loader(size)))]
    answered, spent = (torch.cat(parts) for parts in zip(*found, strict=True))
    right = answered == records.labels
    return {"accuracy": float(right.double().mean()), "mean_cost": float(spent.mean()) / base_cost}


def _fixed_exits(runner: classify.Runner, size: int) -> list[float] | None:
    """Milliseconds per batch if everyone left at each exit, by the engine's measured table."""
    if runner.table is None or size not in runner.table.batch_sizes:
        return None
    column = runner.table.batch_sizes.index(size)
    times: list[float] = (runner.table.segment_ms[:, column].cumsum(0) + runner.table.head_ms[:, column]).tolist()
    return times


def _efficiency(runner: Any, taken: torch.Tensor, size: int, median_ms: float) -> float | None:
    """Ideal over measured time: ideal pays each segment, at its full-batch time, only for the share of items that reaches it."""
    if runner.table is None or size not in runner.table.batch_sizes:
        return None
    column = runner.table.segment_ms[:, runner.table.batch_sizes.index(size)]
    reach = torch.stack([(taken >= k).double().mean() for k in range(len(column))])
    return float((reach * column).sum()) / median_ms


@command(app, "report", WORK)
def report(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    data: Annotated[str | None, typer.Option(help="The items of `evaluate`, to show the easiest and hardest.")] = None,
    split: Annotated[str | None, typer.Option(help="Their split.")] = None,
    part: Annotated[str | None, typer.Option(help="Their part; by default the one that was recorded.")] = None,
    part_seed: Annotated[int | None, typer.Option(help="Seed of the order; by default the one that was recorded.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    text_column: Annotated[list[str] | None, typer.Option(help="Column of the text.")] = None,
    classes: Annotated[list[str] | None, typer.Option(help="Class names.")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Early exits: cost and quality",
) -> None:
    """Write one HTML file with the pictures: cost against quality, who leaves where, reliability, easiest and hardest inputs.

    Shows the items of `evaluate` if there are any, else those of `record`, and the times of `bench` if there are any. Needs no model.

    Example: `offramp report --config runs/photos/config.toml`
    """
    from offramp.measure.report import report as write_report  # needs a plotting library

    name = "test" if (out / "test").is_dir() else "trace"
    trace = Trace.load(inside(out, name, "record"))
    plan = load_plan(out / "plan") if (out / "plan").is_dir() else None
    runs = read_json(out / "bench.json")["runs"] if (out / "bench.json").is_file() else []
    examples = None
    if data is not None:
        part = str(trace.provenance.get("part", "0:1")) if part is None else part
        seed = int(trace.provenance.get("part_seed", 0)) if part_seed is None else part_seed
        flags = DataFlags(
            data=data, split=split, part=part, part_seed=seed, label_column=label_column, text_column=text_column, classes=classes
        )
        records = flags.read(None, labels_needed=False)
        if len(records) != trace.items:
            raise InvalidInput(
                f"{data}, part {part}, has {len(records)} items but the trace has {trace.items}: "
                "give the --data and --part of `offramp evaluate`."
            )
        raw = [records.raw(int(row)) for row in records.rows]
        examples = raw if records.kind == "text" else _stack(raw) if records.kind == "image" else None
    path = write_report(out / "report.html", trace=trace, plan=plan, runs=runs, examples=examples, class_names=classes, title=title)
    console.print(f"Saved {path}.")


def _stack(images: Sequence[Any]) -> torch.Tensor | None:
    """Images of one size as ``[N, H, W, C]`` uint8, else nothing: the report shows pictures of one size."""
    tensors = [torch.as_tensor(i) for i in images]
    tensors = [t.movedim(0, -1) if t.ndim == 3 and t.shape[0] in (1, 3) and t.shape[-1] not in (1, 3) else t for t in tensors]
    tensors = [t if t.dtype == torch.uint8 else (t.clamp(0, 1) * 255).to(torch.uint8) for t in tensors]
    return torch.stack(tensors) if len({tuple(t.shape) for t in tensors}) == 1 else None
