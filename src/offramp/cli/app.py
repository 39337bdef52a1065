"""The commands of ``offramp``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Table

from offramp import budget, exits, policies, systems, train
from offramp.cli import models
from offramp.cli import reproduce as reproducing
from offramp.cli.config import write_toml
from offramp.cli.data import Records
from offramp.cli.options import DataFlags, ModelFlags, RunFlags, command, console, errors, whole_numbers
from offramp.cli.parts import parse_part
from offramp.core.batches import unpack_batch
from offramp.core.bundle import load_bundle, read_json, write_json
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.core.system import System
from offramp.core.trace import LatencyTable, Trace
from offramp.engines import classify
from offramp.engines.record import record as record_trace
from offramp.measure.clock import compare, environment
from offramp.measure.pareto import Curve, anytime_curve, interpolate, random_exit, upper_hull
from offramp.measure.quality import outcome
from offramp.measure.statistics import accuracy_drop
from offramp.network import MultiExit, attach, load, load_plan, never

app = typer.Typer(
    name="offramp",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Give a trained network only as much compute as each input needs: attach exits, train them, choose when to leave, run.\n\n"
    "The usual order is fit, record, calibrate, evaluate, bench, report, all with the same --out folder. "
    "`offramp COMMAND --help` has an example of each. Every flag can come from a TOML file: `--config run.toml`.",
)
WORK, OTHER, METHODS = "Work, in this order", "Models", "Published methods"


# ---- what several commands do --------------------------------------------------------------------------------------------


def _device(run: RunFlags) -> torch.device:
    name = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _open(model: ModelFlags, items: DataFlags, width: int | None = None, labels_needed: bool = True) -> tuple[models.Loaded, Records]:
    """The model, and the items prepared for it."""
    plain = items.read(None, labels_needed=labels_needed)
    scheme = model.model.partition(":")[0]
    classes = model.num_classes or width or (len(plain.classes) if scheme in ("timm", "python") and plain.classes else None)
    loaded = models.load_model(
        model.model, kind="text" if plain.kind == "text" else "image", num_classes=classes, weights=model.weights, pretrained=model.pretrained
    )
    return loaded, items.read(loaded, labels_needed=labels_needed)


def _open_run(model: ModelFlags, items: DataFlags, run: RunFlags, labels_needed: bool = True) -> tuple[MultiExit, Records]:
    """The network that `fit` saved in the run's folder, and items prepared for it."""
    content, _ = load_bundle(_inside(run.out, "adapter", "fit"), "adapter", "adapter")
    loaded, records = _open(model, items, int(content["num_outputs"]), labels_needed)
    net = load(loaded.model, run.out / "adapter", example=records.inputs(2))
    records.check_labels(net.num_outputs)
    return net.to(_device(run)), records


def _inside(out: Path, name: str, made_by: str) -> Path:
    if not (out / name).is_dir():
        raise InvalidInput(f"{out} has no {name}/: run `offramp {made_by} --out {out}` first.")
    return out / name


def _rule(text: str | None, system: System | None) -> Rule:
    if text is not None:
        rule: Rule = parse_part(text, policies.PARTS, "rule")
        return rule
    return system.rule if system is not None else policies.Confidence()


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], justify: Literal["left", "right"] = "right") -> None:
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


# ---- work ----------------------------------------------------------------------------------------------------------------


@command(app, "fit", WORK)
def fit(
    model: ModelFlags,
    items: DataFlags,
    run: RunFlags,
    system: Annotated[str | None, typer.Option(help="A published method, whose exits, heads and training are used. See `offramp systems`.")] = None,
    at: Annotated[list[str] | None, typer.Option(help="Module path to exit after; repeat for more. By default chosen by cost.")] = None,
    exits_count: Annotated[int | None, typer.Option("--exits", min=1, help="How many exits, evenly spaced by cost.")] = None,
    head: Annotated[str | None, typer.Option(help="Head of every exit, such as PooledLinear or MLP.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Training, such as Frozen, Joint(weights=IndexWeighted()) or Frozen(Distill()).")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the items.")] = 3,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="One rate for all weights, falling by a cosine; by default 5e-5 for the model and 1e-3 for heads.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of AdamW, with --learning-rate.")] = 0.01,
    eval_part: Annotated[str | None, typer.Option(help="Part of the data that is evaluated after every epoch, such as 0.6:0.7.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Start afresh instead of resuming a run in the folder.")] = False,
) -> None:
    """Attach exits to a model and train them.

    Writes `adapter/` (the added weights; all weights if the model was trained too), `training/` (metrics and checkpoints) and
    `config.toml`, which the later commands can take: `--config OUT/config.toml`. A run that was interrupted resumes.

    Example: `offramp fit --model timm:resnet18 --pretrained --data photos --part 0:0.6 --recipe Frozen --epochs 5 --out runs/photos`
    """
    device = _device(run)
    torch.manual_seed(seed)
    loaded, records = _open(model, items)
    chosen = systems.build(system) if system else None
    net = attach(
        loaded.model,
        at or exits_count,
        example=records.inputs(2),
        head=None if head is None else parse_part(head, exits.PARTS, "head"),
        system=chosen,
    )
    records.check_labels(net.num_outputs)
    how = parse_part(recipe, train.PARTS, "recipe") if recipe else chosen.recipe if chosen is not None and chosen.recipe is not None else train.Joint()
    if not isinstance(how, train.Recipe):
        raise InvalidInput(f"{recipe} is not a recipe. Recipes: Joint, Frozen, TwoStage, Distill, Alternating.")
    net.to(device)
    console.print(f"{type(loaded.model).__name__}: exits after {', '.join(net.at)}; {len(records):,} items, {net.num_outputs} classes")
    evaluation = DataFlags(**{**vars(items), "part": eval_part}).read(loaded) if eval_part else None
    result = train.fit(
        net,
        records.loader(items.batch_size, shuffle=True, workers=items.workers),
        how,
        epochs=epochs,
        output_dir=run.out / "training",
        eval_loader=None if evaluation is None else evaluation.loader(items.batch_size, workers=items.workers),
        optimizer=None if learning_rate is None else lambda weights: torch.optim.AdamW(weights, learning_rate, weight_decay=weight_decay),
        scheduler=None if learning_rate is None else lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps)),
        mixed_precision=mixed_precision,
        seed=seed,
        resume=not restart,
    )
    repeatable = model.weights is not None or model.pretrained or model.model.startswith("hf:")
    net.save(run.out / "adapter", include_base=any(phase.recipe.trains_model for phase in how.phases()) or not repeatable)
    _write_config(model, items, run, net, records)
    epoch_losses = [r["loss"] for r in result.history if r["event"] == "epoch" and r["loss"] is not None]
    _table("Training", ("epoch", "mean loss"), [(str(i + 1), float(v)) for i, v in enumerate(epoch_losses)])
    console.print(f"Saved {run.out / 'adapter'}. Next: offramp record --config {run.out / 'config.toml'} --part ...")


def _write_config(model: ModelFlags, items: DataFlags, run: RunFlags, net: MultiExit, records: Records) -> None:
    """What later commands need to make the same network and read data alike."""
    kept = {k: v for k, v in {**vars(model), **vars(items)}.items() if k not in ("part", "batch_size", "workers", "pretrained")}
    if model.pretrained:
        kept["pretrained"] = True
    named = records.classes and records.classes != tuple(str(i) for i in range(len(records.classes)))
    kept |= {"num_classes": net.num_outputs, "classes": list(records.classes) if named else None, "out": run.out}
    write_toml(run.out / "config.toml", kept)


@command(app, "record", WORK)
def record(
    model: ModelFlags,
    items: DataFlags,
    run: RunFlags,
    rule: Annotated[list[str] | None, typer.Option(help="Rule whose scores to record; needed for rules that read hidden states.")] = None,
    time_at: Annotated[str | None, typer.Option(help="Batch sizes at which to time every segment, such as 1,32: needed for latency targets.")] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="The items have no labels.")] = False,
) -> None:
    """Run every exit on every item once and keep what calibration needs.

    Use items that were not trained on: thresholds are chosen on them. Writes `trace/`.

    Example: `offramp record --config runs/photos/config.toml --part 0.6:0.8`
    """
    net, records = _open_run(model, items, run, labels_needed=not unlabelled)
    rules = [_rule(text, None) for text in rule or ()]
    trace = _record(net, records, items, rules, _latency(net, time_at, rules[0] if rules else policies.Confidence()))
    trace.save(run.out / "trace")
    _show_trace(trace, f"{trace.items:,} items of {records.source}")
    console.print(f"Saved {run.out / 'trace'}. Next: offramp calibrate --out {run.out} --mean-cost 0.5")


def _record(net: MultiExit, records: Records, items: DataFlags, rules: Sequence[Rule], latency: LatencyTable | None = None) -> Trace:
    loader = records.loader(items.batch_size, workers=items.workers)
    return record_trace(net, loader, rules=rules, latency=latency, provenance={"data": records.source, "part": items.part, "part_seed": items.part_seed})


def _latency(net: MultiExit, sizes: str | None, rule: Rule) -> LatencyTable | None:
    if sizes is None:
        return None
    return classify.measure_table(net.eval(), never(net, rule), sorted(set(whole_numbers(sizes, "--time-at"))))


def _show_trace(trace: Trace, title: str) -> None:
    right = None if trace.losses is None else (1 - trace.losses.double().mean(0)).tolist()
    same = (trace.predictions == trace.predictions[:, -1:]).double().mean(0).tolist()
    rows = []
    for k, name in enumerate(trace.exits):
        row = [name, f"{float(trace.cost[k]) / trace.base_cost:.3f}", "-" if right is None else _percent(right[k]), _percent(same[k])]
        if trace.latency is not None:
            until = trace.latency.segment_ms[: k + 1].sum(0) + trace.latency.head_ms[: k + 1].sum(0)
            row += [f"{v:.3g}" for v in until.tolist()]
        rows.append(row)
    timed = [] if trace.latency is None else [f"ms at batch {b}" for b in trace.latency.batch_sizes]
    _table(title, ("exit", "cost", "accuracy", "agrees with full", *timed), rows)


@dataclass
class TargetFlags:
    """What is asked for; several limits together must all be met."""

    mean_cost: Annotated[float | None, typer.Option(help="Mean FLOPs per item, as a share of the full model's.", rich_help_panel="Target")] = None
    max_drop: Annotated[float | None, typer.Option(help="Accuracy given up against the full model, guaranteed.", rich_help_panel="Target")] = None
    max_error: Annotated[float | None, typer.Option(help="Error, guaranteed.", rich_help_panel="Target")] = None
    max_disagreement: Annotated[float | None, typer.Option(help="Share answered otherwise than by the full model, guaranteed; needs no labels.", rich_help_panel="Target")] = None
    delta: Annotated[float, typer.Option(help="Probability that a guarantee may fail.", rich_help_panel="Target")] = 0.1
    in_expectation: Annotated[bool, typer.Option("--in-expectation", help="Bound the expected risk instead.", rich_help_panel="Target")] = False
    mean_ms: Annotated[float | None, typer.Option(help="Mean milliseconds until the answer; needs record --time-at.", rich_help_panel="Target")] = None
    p95_ms: Annotated[float | None, typer.Option(help="Milliseconds that 95 % of the items keep; needs record --time-at.", rich_help_panel="Target")] = None
    at_batch: Annotated[int, typer.Option(min=1, help="Batch size of the milliseconds.", rich_help_panel="Target")] = 1
    peak_cost: Annotated[float | None, typer.Option(help="No item may cost more than this share of the full model's FLOPs.", rich_help_panel="Target")] = None
    utility: Annotated[float | None, typer.Option(help="Maximise quality minus this times cost.", rich_help_panel="Target")] = None

    def target(self, system: System | None) -> Any:
        found: list[Any] = []
        if self.mean_cost is not None:
            found.append(budget.MeanCost(self.mean_cost))
        for name in ("max_drop", "max_error", "max_disagreement"):
            if getattr(self, name) is not None:
                found.append(budget.Risk(**{name: getattr(self, name)}, delta=self.delta, in_expectation=self.in_expectation))
        for name in ("mean_ms", "p95_ms"):
            if getattr(self, name) is not None:
                found.append(budget.Latency(**{name: getattr(self, name)}, batch_size=self.at_batch))
        if self.peak_cost is not None:
            found.append(budget.PeakCost(self.peak_cost))
        if self.utility is not None:
            found.append(budget.Utility(self.utility))
        if not found and system is not None and system.target is not None:
            return system.target
        if not found:
            raise InvalidInput("Say what is wanted: --mean-cost 0.5, --max-drop 0.01, --p95-ms 20, --utility 0.1 or another target.")
        return found[0] if len(found) == 1 else budget.All(*found)


METHODS_BY_NAME: dict[str, type] = {
    c.__name__: c
    for c in (
        budget.GeometricShares, budget.QuantileCost, budget.ExponentialWeights, budget.OptimalStopping, budget.LTT, budget.CRC, budget.RCPS,
        budget.PointEstimate, budget.SharedThreshold, budget.DesignedPath, budget.Hoeffding, budget.Bentkus, budget.HoeffdingBentkus,
        budget.ClopperPearson, budget.WSR,
    )
}  # fmt: skip


@command(app, "calibrate", WORK)
def calibrate(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    target: TargetFlags,
    rule: Annotated[str | None, typer.Option(help="When to leave: Confidence, Margin, Entropy, Patience, Energy(temperature=2) ...")] = None,
    method: Annotated[str | None, typer.Option(help="How thresholds are chosen: OptimalStopping, GeometricShares, LTT(bound=WSR()) ...")] = None,
    system: Annotated[str | None, typer.Option(help="A published method, whose rule, method and budget are the defaults.")] = None,
) -> None:
    """Choose when to leave, for a budget or with a guarantee. Needs no model: it reads the trace.

    Writes `plan/` and prints what was asked for beside what the recorded items gave.

    Example: `offramp calibrate --out runs/photos --rule Margin --max-drop 0.01 --delta 0.05`
    """
    trace = Trace.load(_inside(out, "trace", "record"))
    chosen = systems.build(system) if system else None
    wanted = target.target(chosen)
    how = parse_part(method, METHODS_BY_NAME, "method") if method else None
    if how is None and chosen is not None and isinstance(chosen.calibrator, _kind_of_method(wanted)):
        how = chosen.calibrator
    plan = budget.calibrate(trace, _rule(rule, chosen), wanted, method=how)
    plan.save(out / "plan")
    _show_plan(plan)
    console.print(f"Saved {out / 'plan'}. Next: offramp evaluate --config {out / 'config.toml'} --part ...")


def _kind_of_method(target: Any) -> type:
    parts = target.targets if isinstance(target, budget.All) else (target,)
    return budget.Procedure if any(isinstance(t, budget.Risk) for t in parts) else budget.CostMethod


def _show_plan(plan: Plan) -> None:
    _table(
        f"Plan: {systems.describe(plan.rule)}, mean cost {plan.mean_cost:.3f} of the full model",
        ("exit", "leave if score >=", "share"),
        [(n, f"{t:.5g}", _percent(s)) for n, t, s in zip(plan.exits, plan.thresholds, plan.shares, strict=True)],
    )
    if plan.certificate is not None:
        console.print(str(plan.certificate), highlight=False, markup=False)


MODES = ("latency", "throughput", "quota")


def _mode(name: str, batch_size: int) -> Any:
    if name not in MODES:
        raise InvalidInput(f"--mode is {', '.join(MODES)}; got {name!r}.")
    made = {"latency": classify.Latency, "throughput": classify.Throughput, "quota": classify.Quota}
    return made[name](batch_size)


@command(app, "evaluate", WORK)
def evaluate(
    model: ModelFlags,
    items: DataFlags,
    run: RunFlags,
    mode: Annotated[str, typer.Option(help="How to run: latency, throughput or quota.")] = "latency",
    keep_all_exits: Annotated[bool, typer.Option("--keep-all-exits", help="Check every exit, also those that do not pay on this machine.")] = False,
) -> None:
    """Run the plan on items that nothing was chosen on, and compare it with what it must beat.

    Writes `test/` (a trace of these items, which `report` uses) and `evaluation.json`.

    Example: `offramp evaluate --config runs/photos/config.toml --part 0.8:1`
    """
    net, records = _open_run(model, items, run)
    plan = load_plan(_inside(run.out, "plan", "calibrate"))
    trace = _record(net, records, items, [plan.rule])
    trace.save(run.out / "test")
    runner = classify.compile(net, plan, _mode(mode, items.batch_size), drop=False if keep_all_exits else None)
    found_exit, found_answer, found_cost = [], [], []
    for answers in runner.stream(_without_labels(records.loader(items.batch_size, workers=items.workers))):
        found_exit.append(answers.exit.cpu())
        found_answer.append(answers.output.argmax(-1).cpu())
        found_cost.append(answers.cost.cpu())
    taken, answered, spent = torch.cat(found_exit), torch.cat(found_answer), torch.cat(found_cost) / trace.base_cost
    if trace.labels is None:
        raise InvalidInput("Evaluation needs labels.")
    right, full_right = answered == trace.labels, trace.predictions[:, -1] == trace.labels
    accuracy, cost, full = float(right.double().mean()), float(spent.mean()), float(full_right.double().mean())
    shares = torch.bincount(taken, minlength=len(trace.exits)).double() / trace.items
    drop = accuracy_drop(full_right, right)
    fixed = Curve("fixed", upper_hull(anytime_curve(trace).points))
    at_fixed = interpolate(fixed, cost) if cost >= fixed.points[0].cost else None
    blind = random_exit(trace, shares)
    rows = [
        ("this plan", f"{cost:.4f}", _percent(accuracy)),
        ("full model", "1.0000", _percent(full)),
        ("one fixed exit or mix at this cost", f"{cost:.4f}", "-" if at_fixed is None else _percent(at_fixed)),
        ("random exits, same shares", f"{blind.cost:.4f}", _percent(blind.quality)),
    ]
    _table(f"{trace.items:,} items of {records.source}", ("", "mean cost", "accuracy"), rows)
    _table("Exits", ("exit", "share", "expected"), [(n, _percent(float(s)), _percent(e)) for n, s, e in zip(trace.exits, shares, plan.shares, strict=True)])
    same = float((taken == outcome(trace, plan).exits).double().mean())
    console.print(f"accuracy given up {_percent(drop.value)} [{_percent(drop.low)}, {_percent(drop.high)}]; exits as replayed: {_percent(same)}", highlight=False, markup=False)
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


def _without_labels(loader: Iterable[Any]) -> Iterable[Any]:
    for batch in loader:
        args, kwargs, _ = unpack_batch(batch)
        yield args, kwargs


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

    Writes `bench.json` with all raw samples. The full model is timed both as it is and in the engine; ratios are to the faster.

    Example: `offramp bench --config runs/photos/config.toml --part 0.8:1 --batch-sizes 1,32 --mode latency --mode throughput`
    """
    net, records = _open_run(model, items, run, labels_needed=False)
    net.eval()
    plan = load_plan(_inside(run.out, "plan", "calibrate"))
    results, rows = [], []
    with console.status("timing") as status:
        for batch_size in whole_numbers(batch_sizes, "--batch-sizes"):
            ready = _batches(net, records, batch_size, batches)
            for name in mode or ["latency"]:
                status.update(f"timing: {name}, batch {batch_size}")
                result = _time(net, plan, name, batch_size, ready, warmup, repeats)
                results.append(result)
                efficiency = result["exit_efficiency"]
                rows.append(
                    (name, str(batch_size), result["full_ms"], result["median_ms"], result["p95_ms"], f"{result['full_ms'] / result['median_ms']:.2f}",
                     "-" if efficiency is None else f"{efficiency:.3f}")  # fmt: skip
                )
    write_json(run.out / "bench.json", {"runs": results, "environment": environment(net.device)})
    _table("Milliseconds per batch", ("mode", "batch", "full model", "plan", "plan p95", "times as fast", "exit efficiency"), rows)


def _batches(net: MultiExit, records: Records, size: int, count: int) -> list[Any]:
    """Full batches on the network's device; items repeat if there are too few."""
    wanted = torch.arange(size * count) % len(records)
    found = []
    for args, kwargs in _without_labels(records.subset(wanted).loader(size)):
        placed = [{k: _place(v, net) for k, v in part.items()} if isinstance(part, Mapping) else tuple(_place(v, net) for v in part) for part in (args, kwargs)]
        found.append(tuple(placed))
    return found


def _place(value: Any, net: MultiExit) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(net.device, net.dtype) if value.is_floating_point() else value.to(net.device)


def _time(net: MultiExit, plan: Plan, mode: str, size: int, ready: list[Any], warmup: int, repeats: int) -> dict[str, Any]:
    runner = classify.compile(net, plan, _mode(mode, size))
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

    compared = compare({"full model": eager, "full model in the engine": engine, "plan": adaptive}, warmup=warmup, repeats=repeats, device=net.device)
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
        "shares": (torch.bincount(exits_taken, minlength=len(plan.exits)).double() / exits_taken.numel()).tolist(),
        "dropped": runner.dropped,
        "samples_ms": samples,
    }


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
    part: Annotated[str, typer.Option(help="Their part.")] = "0:1",
    part_seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    text_column: Annotated[list[str] | None, typer.Option(help="Column of the text.")] = None,
    classes: Annotated[list[str] | None, typer.Option(help="Class names.")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Early exits: cost and quality",
) -> None:
    """Write one HTML file with the pictures: cost against quality, who leaves where, reliability, easiest and hardest inputs.

    Shows the items of `evaluate` if there are any, else those of `record`, and the times of `bench` if there are any. Needs no model.

    Example: `offramp report --config runs/photos/config.toml --part 0.8:1`
    """
    from offramp.measure.report import report as write_report  # needs a plotting library

    name = "test" if (out / "test").is_dir() else "trace"
    trace = Trace.load(_inside(out, name, "record"))
    plan = load_plan(out / "plan") if (out / "plan").is_dir() else None
    runs = read_json(out / "bench.json")["runs"] if (out / "bench.json").is_file() else []
    examples = None
    if data is not None:
        flags = DataFlags(data=data, split=split, part=part, part_seed=part_seed, label_column=label_column, text_column=text_column, classes=classes)
        records = flags.read(None, labels_needed=False)
        if len(records) != trace.items:
            raise InvalidInput(f"{data}, part {part}, has {len(records)} items but the trace has {trace.items}: give the --part of `offramp evaluate`.")
        raw = [records.raw(int(row)) for row in records.rows]
        examples = raw if records.kind == "text" else _stack(raw) if records.kind == "image" else None
    path = write_report(out / "report.html", trace=trace, plan=plan, runs=runs, examples=examples, class_names=classes, title=title)
    console.print(f"Saved {path}.")


@command(app, "probe", OTHER)
def probe(
    model: Annotated[str | None, typer.Option(help="Your model, as for fit; by default the families of timm, transformers and diffusers.")] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of one input of --model, such as 3x224x224; by default what it was made for.")] = None,
    at: Annotated[list[str] | None, typer.Option(help="Module path to exit after, with --model; repeat for more.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Width of the answer of --model.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only this family, such as timm/vit; repeat for more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for capabilities.json and capabilities.md.")] = None,
) -> None:
    """Say whether models can be cut for early exits, and what of it was measured.

    Each is exported, cut after some blocks, and compared bit for bit with the uncut model at batch 1, 3 and 7.

    Example: `offramp probe --model timm:resnet18` or `offramp probe --family timm/resnet --out capabilities`
    """
    from offramp.engines import probe as probing  # imports the lists of families

    if model is None:
        if shape or at or num_classes:
            raise InvalidInput("--shape, --at and --num-classes describe a --model; families have their own.")
        rows = probing.probe(
            family or None,
            json_path=None if out is None else out / "capabilities.json",
            markdown_path=None if out is None else out / "capabilities.md",
        )
    else:
        loaded = models.load_model(model, num_classes=num_classes)
        rows = [probing.probe_model(loaded.model, _example(loaded, shape), at=at, name=model)]
        if out is not None:
            write_json(out / "capabilities.json", probing.matrix(rows))
    shown = [(r.family, "yes" if r.supported else "no", _said(r.bit_exact), _said(r.exits), r.reason or "-") for r in rows]
    _table("", ("model", "supported", "bit-exact", "exits", "reason"), shown, "left")
    if model is not None and not rows[0].supported:
        raise typer.Exit(1)


def _said(value: Any) -> str:
    """A probed value; what was not found out is unknown."""
    if value.source == "unknown":
        return "unknown"
    found = value.value
    if isinstance(found, Mapping):
        return ", ".join(f"{key}: {_yes(v)}" for key, v in found.items())
    return ", ".join(map(_yes, found)) if isinstance(found, list | tuple) else _yes(found)


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _example(loaded: models.Loaded, shape: str | None) -> Any:
    """Random inputs for a model: images or vectors of a shape, or token ids."""
    if shape is not None:
        parts = shape.lower().split("x")
        if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            raise InvalidInput(f"--shape is sizes joined by x, such as 3x224x224, got {shape!r}.")
        return torch.randn(2, *map(int, parts))
    if loaded.images is not None and loaded.images.size is not None:
        return torch.randn(2, loaded.images.channels or 3, *loaded.images.size)
    if loaded.tokenizer is not None:
        return {"input_ids": torch.randint(0, int(loaded.model.config.vocab_size), (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    raise InvalidInput("The model does not say what it takes: give --shape, such as 3x224x224.")


def _stack(images: Sequence[Any]) -> torch.Tensor | None:
    """Images of one size as ``[N, H, W, C]`` uint8, else nothing: the report shows pictures of one size."""
    tensors = [torch.as_tensor(i) for i in images]
    tensors = [t.movedim(0, -1) if t.ndim == 3 and t.shape[0] in (1, 3) and t.shape[-1] not in (1, 3) else t for t in tensors]
    tensors = [t if t.dtype == torch.uint8 else (t.clamp(0, 1) * 255).to(torch.uint8) for t in tensors]
    return torch.stack(tensors) if len({tuple(t.shape) for t in tensors}) == 1 else None


# ---- published methods -----------------------------------------------------------------------------------------------------


@command(app, "systems", METHODS)
def list_them(engine: Annotated[str | None, typer.Option(help="Only those of one engine: classify, generate, denoise, stream, split.")] = None) -> None:
    """List the published methods.

    Example: `offramp systems --engine classify`
    """
    rows = []
    for card in map(systems.load_card, systems.list_systems()):
        if engine is None or card.engine == engine:
            claims = [word for word, holds in (("lossless", card.lossless), ("guaranteed", card.guaranteed), ("no training", not card.trained)) if holds]
            rows.append((card.name, str(card.year), card.venue, card.engine, card.delta_from or "-", ", ".join(claims) or "-", card.status))
    _table("", ("name", "year", "venue", "engine", "delta from", "claims", "status"), rows, "left")


@command(app, "show", METHODS)
def show(name: Annotated[str, typer.Argument(help="Of the system.")]) -> None:
    """Print what a method is: its card, the parts it is made of, what deviates from the authors' code.

    Example: `offramp show pabee`
    """
    console.print(systems.show(name), highlight=False, markup=False, soft_wrap=True)


@command(app, "diff", METHODS)
def diff(
    left: Annotated[str, typer.Argument(help="A system.")],
    right: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Print where two methods differ, computed from the parts they are made of.

    Example: `offramp diff branchynet pabee`
    """
    found = systems.diff(left, right)
    if not found:
        console.print(f"{left} and {right} are made of the same parts.")
        return
    _table("", ("axis", left, right), [(d.axis, d.left, d.right) for d in found], "left")


@command(app, "cite", METHODS)
def cite(names: Annotated[list[str], typer.Argument(help="Systems.")]) -> None:
    """Print BibTeX.

    Example: `offramp cite branchynet pabee`
    """
    typer.echo(systems.cite(*names))


def _configs(folder: Path | None) -> Path:
    """Folder of the reproductions: as given, else ``benchmarks/configs`` here or in the checkout of this package."""
    places = [folder] if folder is not None else [Path("benchmarks/configs"), Path(__file__).resolve().parents[3] / "benchmarks" / "configs"]
    found = next((p for p in places if p.is_dir()), None)
    if found is None:
        raise InvalidInput(f"No folder {places[0]}. Reproductions are configured in a checkout's benchmarks/configs; name another with --configs.")
    return found


@command(app, "reproduce", METHODS)
def reproduce(
    name: Annotated[str, typer.Argument(help="Of the system.")],
    variant: Annotated[str, typer.Option(help="A table of benchmarks/configs/NAME.toml: digits runs in a minute; others need --data.")] = "digits",
    data: Annotated[str | None, typer.Option(help="Path of the data, for variants that read a path.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default CUDA where there is one.")] = None,
    configs: Annotated[Path | None, typer.Option(help="Folder of the configurations.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder for the result; by default benchmarks/results beside the configurations.")] = None,
) -> None:
    """Train a method small on real data and measure the claim its paper makes, beside what it must beat.

    Example: `offramp reproduce msdnet-budget --variant cifar --data cifar10.npz --device cuda`
    """
    card = systems.load_card(name)
    folder = _configs(configs)
    settings = reproducing.load_settings(folder / f"{card.name}.toml", variant)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with errors.status(card.name) as status:
        result = reproducing.reproduce(card.name, settings, variant=variant, data=data, device=where, say=lambda text: status.update(text))
    _show_result(result)
    path = reproducing.save(result, results or folder.parent / "results")
    console.print(f"Saved {path}.")


def _show_result(result: Mapping[str, Any]) -> None:
    def cell(value: Sequence[float] | None) -> str:
        return "-" if value is None else f"{100 * value[0]:.2f} ± {100 * (value[0] - value[1]):.2f}"

    rows = [("full", "1.000", cell(result["summary"]["full_accuracy"]), "", "", "")]
    for row in result["summary"]["budgets"]:
        cost = f"{row['cost'][0]:.3f}" if "cost" in row else "infeasible"
        rows.append((f"{row['budget']:g}", cost, *(cell(row.get(k)) for k in ("accuracy", "fixed", "random", "static"))))
    title = f"{result['system']}, {result['variant']}: accuracy in %, mean ± half of the 95 % interval over {len(result['seeds'])} seeds"
    _table(title, ("budget", "cost", "this method", "fixed exit", "random exit", "smaller model"), rows)
    measured = result["measured"]
    console.print(f"claim     {result['claim']}", highlight=False, markup=False)
    p = result["predicate"]
    where = f"at cost {p['budget']:g}" if p["budget"] is not None else f"{p['over']} over budgets"
    if measured is not None:
        console.print(f"measured  {p['metric']} ({where}) {measured['value']:.4f} [{measured['low']:.4f}, {measured['high']:.4f}]; claimed {p['relation']} {p['value']:g}", highlight=False, markup=False)
    console.print(f"verdict   {result['verdict']}", highlight=False, markup=False)


__all__ = ["app"]
