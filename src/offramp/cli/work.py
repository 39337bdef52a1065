"""Commands: fit, record, calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from offramp import budget, exits, systems, train
from offramp.cli.base import (
    WORK,
    app,
    device_of,
    inside,
    note_items,
    open_model,
    open_run,
    percent,
    rule_named,
    table,
    trace_of,
)
from offramp.cli.config import write_toml
from offramp.cli.data import Records
from offramp.cli.options import DataFlags, ModelFlags, RunFlags, command, console, whole_numbers
from offramp.cli.parts import parse_part
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.core.system import System
from offramp.core.trace import LatencyTable, Trace
from offramp.engines.classify import engine as classify
from offramp.network import MultiExit, attach, never
from offramp.policies.threshold import Confidence
from offramp.train.recipe import Joint


@command(app, "fit", WORK)
def fit(
    model: ModelFlags,
    items: DataFlags,
    run: RunFlags,
    system: Annotated[
        str | None, typer.Option(help="A published method, whose exits, heads and training are used. See `offramp systems`.")
    ] = None,
    at: Annotated[list[str] | None, typer.Option(help="Module path to exit after; repeat for more. By default chosen by cost.")] = None,
    exits_count: Annotated[int | None, typer.Option("--exits", min=1, help="How many exits, evenly spaced by cost.")] = None,
    head: Annotated[str | None, typer.Option(help="Head of every exit, such as PooledLinear or MLP.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Training, such as Frozen, Joint(weights=IndexWeighted()) or Frozen(Distill()).")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the items.")] = 3,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="One rate for all weights, falling by a cosine; by default 5e-5 for the model and 1e-3 for heads."),
    ] = None,
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
    device = device_of(run)
    torch.manual_seed(seed)
    loaded, records = open_model(model, items)
    chosen = systems.build(system) if system else None
    net = attach(
        loaded.model,
        at or exits_count,
        example=records.inputs(2),
        head=None if head is None else parse_part(head, exits.PARTS, "head"),
        system=chosen,
    )
    records.check_labels(net.num_outputs)
    how = (
        parse_part(recipe, train.PARTS, "recipe")
        if recipe
        else chosen.recipe
        if chosen is not None and chosen.recipe is not None
        else Joint()
    )
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
        scheduler=None
        if learning_rate is None
        else lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps)),
        mixed_precision=mixed_precision,
        seed=seed,
        resume=not restart,
    )
    repeatable = model.weights is not None or model.pretrained or model.model.startswith("hf:")
    net.save(run.out / "adapter", include_base=any(phase.recipe.trains_model for phase in how.phases()) or not repeatable)
    _write_config(model, items, run, net, records)
    note_items(run, "fit", items)
    epoch_losses = [r["loss"] for r in result.history if r["event"] == "epoch" and r["loss"] is not None]
    table("Training", ("epoch", "mean loss"), [(str(i + 1), float(v)) for i, v in enumerate(epoch_losses)])
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
    time_at: Annotated[
        str | None, typer.Option(help="Batch sizes at which to time every segment, such as 1,32: needed for latency targets.")
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="The items have no labels.")] = False,
) -> None:
    """Run every exit on every item once and keep what calibration needs.

    Use items that were not trained on: thresholds are chosen on them. Writes `trace/`.

    Example: `offramp record --config runs/photos/config.toml --part 0.6:0.8`
    """
    net, records = open_run(model, items, run, labels_needed=not unlabelled)
    note_items(run, "record", items)
    rules = [rule_named(text, None) for text in rule or ()]
    trace = trace_of(net, records, items, rules, latency_table(net, time_at, rules[0] if rules else Confidence()))
    trace.save(run.out / "trace")
    show_trace(trace, f"{trace.items:,} items of {records.source}")
    console.print(f"Saved {run.out / 'trace'}. Next: offramp calibrate --out {run.out} --mean-cost 0.5")


def latency_table(net: MultiExit, sizes: str | None, rule: Rule) -> LatencyTable | None:
    if sizes is None:
        return None
    return classify.measure_table(net.eval(), never(net, rule), sorted(set(whole_numbers(sizes, "--time-at"))))


def show_trace(trace: Trace, title: str) -> None:
    right = None if trace.losses is None else (1 - trace.losses.double().mean(0)).tolist()
    same = (trace.predictions == trace.predictions[:, -1:]).double().mean(0).tolist()
    rows = []
    for k, name in enumerate(trace.exits):
        row = [name, f"{float(trace.cost[k]) / trace.base_cost:.3f}", "-" if right is None else percent(right[k]), percent(same[k])]
        if trace.latency is not None:
            until = trace.latency.segment_ms[: k + 1].sum(0) + trace.latency.head_ms[: k + 1].sum(0)
            row += [f"{v:.3g}" for v in until.tolist()]
        rows.append(row)
    timed = [] if trace.latency is None else [f"ms at batch {b}" for b in trace.latency.batch_sizes]
    table(title, ("exit", "cost", "accuracy", "agrees with full", *timed), rows)


@dataclass
class TargetFlags:
    """What is asked for; several limits together must all be met."""

    mean_cost: Annotated[
        float | None, typer.Option(help="Mean FLOPs per item, as a share of the full model's.", rich_help_panel="Target")
    ] = None
    max_drop: Annotated[
        float | None, typer.Option(help="Accuracy given up against the full model, guaranteed.", rich_help_panel="Target")
    ] = None
    max_error: Annotated[float | None, typer.Option(help="Error, guaranteed.", rich_help_panel="Target")] = None
    max_disagreement: Annotated[
        float | None,
        typer.Option(help="Share answered otherwise than by the full model, guaranteed; needs no labels.", rich_help_panel="Target"),
    ] = None
    delta: Annotated[float, typer.Option(help="Probability that a guarantee may fail.", rich_help_panel="Target")] = 0.1
    in_expectation: Annotated[bool, typer.Option("--in-expectation", help="Bound the expected risk instead.", rich_help_panel="Target")] = (
        False
    )
    mean_ms: Annotated[
        float | None, typer.Option(help="Mean milliseconds until the answer; needs record --time-at.", rich_help_panel="Target")
    ] = None
    p95_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that 95 % of the items keep; needs record --time-at.", rich_help_panel="Target")
    ] = None
    at_batch: Annotated[int, typer.Option(min=1, help="Batch size of the milliseconds.", rich_help_panel="Target")] = 1
    peak_cost: Annotated[
        float | None, typer.Option(help="No item may cost more than this share of the full model's FLOPs.", rich_help_panel="Target")
    ] = None
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
    rule: Annotated[
        str | None, typer.Option(help="When to leave: Confidence, Margin, Entropy, Patience, Energy(temperature=2) ...")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How thresholds are chosen: OptimalStopping, GeometricShares, LTT(bound=WSR()) ...")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A published method, whose rule, method and budget are the defaults.")] = None,
) -> None:
    """Choose when to leave, for a budget or with a guarantee. Needs no model: it reads the trace.

    Writes `plan/` and prints what was asked for beside what the recorded items gave.

    Example: `offramp calibrate --out runs/photos --rule Margin --max-drop 0.01 --delta 0.05`
    """
    trace = Trace.load(inside(out, "trace", "record"))
    chosen = systems.build(system) if system else None
    wanted = target.target(chosen)
    how = parse_part(method, METHODS_BY_NAME, "method") if method else None
    if how is None and chosen is not None and isinstance(chosen.calibrator, _kind_of_method(wanted)):
        how = chosen.calibrator
    plan = budget.calibrate(trace, rule_named(rule, chosen), wanted, method=how)
    plan.save(out / "plan")
    _show_plan(plan)
    console.print(f"Saved {out / 'plan'}. Next: offramp evaluate --config {out / 'config.toml'} --part ...")


def _kind_of_method(target: Any) -> type:
    parts = target.targets if isinstance(target, budget.All) else (target,)
    return budget.Procedure if any(isinstance(t, budget.Risk) for t in parts) else budget.CostMethod


def _show_plan(plan: Plan) -> None:
    table(
        f"Plan: {systems.describe(plan.rule)}, mean cost {plan.mean_cost:.3f} of the full model",
        ("exit", "leave if score >=", "share"),
        [(n, f"{t:.5g}", percent(s)) for n, t, s in zip(plan.exits, plan.thresholds, plan.shares, strict=True)],
    )
    if plan.certificate is not None:
        console.print(str(plan.certificate), highlight=False, markup=False)
