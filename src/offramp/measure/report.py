"""One self-contained HTML file about a trace and its plans: no network, no script, no external font. Needs the extra ``report``."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.core.bundle import write_text
from offramp.core.certificate import Estimate, Plan
from offramp.core.errors import InvalidInput, NotReplayable
from offramp.core.trace import LatencyTable, Trace
from offramp.measure import plots
from offramp.measure.clock import environment as this_environment
from offramp.measure.page import figure, page, paragraph, pixels, png_uri, table, tiles
from offramp.measure.pareto import Curve, Point, anytime_curve, curve, mixture_curve, outcome_point, random_exit, sweep
from offramp.measure.plots import percent
from offramp.measure.quality import Outcome, exit_quality, exit_reliability, item_quality, monotonicity, outcome, overthinking
from offramp.measure.statistics import accuracy_drop, bootstrap_difference, bootstrap_mean, wilson

_MAX_SMALL = 8
"""Small multiples shown at most; more exits than that are thinned evenly, and the page says so."""
_OVERTHOUGHT = (
    "Right at an early exit, wrong at the end; those the early exit was surest of. The mark says whether the plan kept the right answer."
)
_SHOWN = 8
"""Examples of each kind."""
_RIGHT, _WRONG, _THEN, _TIMES = "\N{CHECK MARK}", "\N{BALLOT X}", " \N{RIGHTWARDS ARROW} ", "\N{MULTIPLICATION SIGN}"
_BOOTSTRAP_ITEMS = 5_000
"""Above this many items an interval uses the normal approximation: the bootstrap agrees with it there and costs seconds."""


def report(
    path: str | os.PathLike[str],
    *,
    trace: Trace,
    plan: Plan | None = None,
    plans: Sequence[Plan] | Mapping[str, Plan] = (),
    baselines: Sequence[Point | Curve] = (),
    runs: Sequence[Mapping[str, Any]] = (),
    examples: Tensor | Sequence[Any] | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "Early exits: cost and quality",
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report.

    The numbers are those of the items in ``trace``: for honest figures, items that no threshold was chosen on.

    Args:
        path: the HTML file; written atomically, its folder is made if missing.
        trace: N items through K exits.
        plan: the plan that histograms, thresholds and examples show.
        plans: further plans, e.g. one per budget; a mapping names them.
        baselines: what the adaptive model must beat: smaller static models as `Point`, other methods as `Curve`; cost in FLOPs
            per item over this base model's.
        runs: measured engine runs. ``name`` (str), ``batch_size`` (int) and ``median_ms`` (float, *per batch*) are needed;
            ``mode``, ``p95_ms``, ``full_ms`` (the full model, same batch), ``exit_efficiency``, ``accuracy`` and ``mean_cost``
            are shown if given, and so is ``fixed_exit_ms`` (K numbers per batch: everyone leaves at that exit); other keys are
            ignored.
        examples: the N inputs in the order of the trace: images ``[N, H, W]``, ``[N, H, W, C]`` uint8 or ``[N, C, H, W]`` float
            (C of 1, 3 or 4), or N strings.
        class_names: C names.
        title: of the page.
        environment: machine and versions, as `offramp.measure.environment` gives it; this machine's by default.

    Returns:
        The path.

    Raises:
        InvalidInput: plans for other exits, examples that do not match the trace, or a run without a needed key.
        MissingExtra: matplotlib is not installed.
    """
    named = _named_plans(plan, plans)
    _check(trace, named, runs, examples)
    results: dict[str, Outcome] = {}
    blocked = ""
    try:
        results = {name: outcome(trace, p) for name, p in named.items()}
    except NotReplayable as error:
        blocked = str(error)  # shown on the page in place of what cannot be computed
    main = next(iter(results), None) if plan is not None else None

    sections = [
        ("summary", "Summary", _summary(trace, named, results, blocked)),
        ("cost", "Quality against cost", _cost(trace, named, results, baselines, runs, main)),
        ("exits", "Where items leave", _exits(trace, named, results, main)),
        ("reliability", "Can the exits' confidence be trusted?", _reliability(trace)),
        ("overthinking", "Overthinking", _overthinking(trace)),
        ("examples", "Easiest and hardest inputs", _examples(trace, results.get(main) if main else None, examples, class_names)),
        ("latency", "Measured time per segment", _latency(trace.latency)),
        ("machine", "Machine and versions", _machine(trace, environment)),
    ]
    kept = [(key, heading, body) for key, heading, body in sections if body]
    early = len(trace.exits) - 1
    about = f"{trace.items:,} items, {early} early exit{'' if early == 1 else 's'}; base model {_flops(trace.base_cost)} per item"
    write_text(path, page(title, about, kept))
    return Path(path)


# ------------------------------------------------------------------------------------------------ input


def _named_plans(plan: Plan | None, plans: Sequence[Plan] | Mapping[str, Plan]) -> dict[str, Plan]:
    """All plans by a readable name, the main one first."""
    named: dict[str, Plan] = {}
    if plan is not None:
        named["this plan"] = plan
    more = plans.items() if isinstance(plans, Mapping) else ((_plan_name(p, i), p) for i, p in enumerate(plans))
    for name, other in more:
        if other is plan:
            named = {name: plan, **{k: v for k, v in named.items() if v is not plan}} if isinstance(plans, Mapping) else named
            continue
        unique = next(n for n in itertools.chain([str(name)], (f"{name} ({i})" for i in itertools.count(2))) if n not in named)
        named[unique] = other
    return named


def _plan_name(plan: Plan, index: int) -> str:
    asked = plan.certificate.requested if plan.certificate else {}
    if "mean_cost" in asked:
        return f"{type(plan.rule).__name__}, cost {percent(asked['mean_cost'], 0)}"
    inner = ", ".join(f"{k} {v:.4g}" for k, v in asked.items())
    return f"{type(plan.rule).__name__}, {inner}" if inner else f"{type(plan.rule).__name__}, plan {index + 1}"


def _check(trace: Trace, named: Mapping[str, Plan], runs: Sequence[Mapping[str, Any]], examples: Any) -> None:
    if trace.items == 0:
        raise InvalidInput("The trace holds no items; there is nothing to report.")
    for name, p in named.items():
        if p.exits != trace.exits:
            raise InvalidInput(f"{name} was made for exits {list(p.exits)}; the trace has {list(trace.exits)}.")
    for i, run in enumerate(runs):
        missing = [k for k in ("name", "batch_size", "median_ms") if run.get(k) is None]
        if missing:
            raise InvalidInput(f"runs[{i}] lacks {', '.join(missing)}; it has {sorted(run)}.")
        if int(run["batch_size"]) < 1 or not float(run["median_ms"]) > 0:
            raise InvalidInput(f"runs[{i}] needs batch_size >= 1 and median_ms > 0, got {run['batch_size']} and {run['median_ms']}.")
        if run.get("fixed_exit_ms") is not None and len(run["fixed_exit_ms"]) != len(trace.exits):
            raise InvalidInput(f"runs[{i}] has fixed_exit_ms of {len(run['fixed_exit_ms'])} exits, the trace has {len(trace.exits)}.")
    if examples is not None and len(examples) != trace.items:
        raise InvalidInput(f"examples must be the trace's {trace.items} items in order, got {len(examples)}.")


# ------------------------------------------------------------------------------------------------ small HTML parts


def _between(e: Estimate, shown: Any) -> str:
    return f"{shown(e.low)} to {shown(e.high)}"


def _points(value: float) -> str:
    return f"{100 * value:.2f}"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ("never" if value > 0 else "always")


def _flops(value: float) -> str:
    for scale, unit in ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} FLOPs"


def _thin(count: int) -> list[int]:
    """At most `_MAX_SMALL` indices of ``count``, evenly spread, first and last among them."""
    if count <= _MAX_SMALL:
        return list(range(count))
    return sorted({round(i * (count - 1) / (_MAX_SMALL - 1)) for i in range(_MAX_SMALL)})


# ------------------------------------------------------------------------------------------------ sections


def _mean(values: Tensor, level: float = 0.95) -> Estimate:
    if ((values == 0) | (values == 1)).all():  # resampling a share of 0 or 1 would claim certainty
        return wilson(int(values.sum()), values.numel(), level)
    if values.numel() <= _BOOTSTRAP_ITEMS:
        return bootstrap_mean(values, level, draws=1000)
    x = values.double()
    half = 1.959964 * float(x.std()) / math.sqrt(x.numel())
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, level)


def _drop(result: Outcome) -> Estimate:
    """Quality lost against the full model on the same items."""
    if result.binary:
        return accuracy_drop(result.full_quality > 0.5, result.quality > 0.5)
    if result.quality.numel() <= _BOOTSTRAP_ITEMS:
        return bootstrap_difference(result.full_quality, result.quality, draws=1000)
    return _mean(result.full_quality.double() - result.quality.double())


def _realised(name: str, trace: Trace, result: Outcome | None) -> Estimate | None:
    """What these items give for a requested quantity, where it can be computed from a trace."""
    if result is None:
        return None
    if name in ("mean_cost", "cost", "budget"):
        return _mean(result.cost)
    if name == "peak_cost":
        deepest = float(result.cost.max())
        return Estimate(deepest, deepest, deepest, 0.95)
    if name == "left_early":
        return _mean((result.exits < len(trace.exits) - 1).double())
    if name in ("max_drop", "accuracy_drop", "drop"):
        return _drop(result)
    if name in ("error", "max_error", "risk"):
        return _mean(1 - result.quality.double())
    if name in ("disagreement", "max_disagreement"):
        return _mean((result.predictions != trace.predictions[:, -1]).double())
    return None


def _summary(trace: Trace, named: Mapping[str, Plan], results: Mapping[str, Outcome], blocked: str) -> str:
    quality = item_quality(trace)
    heads = []
    if not quality.name.startswith("agreement"):  # the full model agrees with itself
        heads.append((f"{quality.name}, full model", percent(float(quality.values[:, -1].double().mean()), 2), f"{trace.items:,} items"))
    out = ""
    if results:
        name, result = next(iter(results.items()))
        drop, cost = _drop(result), _mean(result.cost)
        heads += [
            (
                f"{quality.name}, {name}",
                percent(result.mean_quality, 2),
                f"drop {100 * drop.value:.2f} points ({_between(drop, _points)})",
            ),
            ("mean cost", percent(cost.value), f"of the full model's FLOPs ({_between(cost, percent)})"),
            ("leave before the end", percent(1 - float(result.shares[-1])), f"{len(trace.exits) - 1} early exits"),
        ]
    out += tiles(heads) if heads else ""
    if blocked:
        out += paragraph(f"The plans cannot be replayed on this trace. {blocked}", "note")
    rows = []
    for name, p in named.items():
        asked = dict(p.certificate.requested) if p.certificate else {}
        held = p.certificate.realised if p.certificate else {}
        result_of = results.get(name)
        for key in dict.fromkeys([*asked, *held, "mean_cost"]):
            if key == "delta":
                continue
            here = _realised(key, trace, result_of)
            show = percent if key in _SHARES else _number
            rows.append(
                (
                    name,
                    key,
                    show(asked[key]) if key in asked else "-",
                    f"{show(held[key].value)} ({_between(held[key], show)})" if key in held else "-",
                    f"{show(here.value)} ({_between(here, show)})" if here is not None else "not from a trace",
                    (f"{100 * (here.value - asked[key]):+.1f} points" if key in _SHARES else f"{here.value - asked[key]:+.4g}")
                    if here is not None and key in asked
                    else "-",
                )
            )
    if rows:
        header = ("plan", "quantity", "requested", "realised, calibration items", "realised, these items", "these minus requested")
        out += table(header, rows, "Requested and realised", text_columns=2)
        out += paragraph(
            "Intervals are 95 %, over items. Costs are FLOPs over those of the model without exits; heads are counted.", "fine"
        )
    costed = [n for n, p in named.items() if n in results and p.certificate and "mean_cost" in p.certificate.requested]
    side = ""
    if len(costed) > 1:
        got = [_mean(results[n].cost) for n in costed]
        asked_costs = [named[n].certificate.requested["mean_cost"] for n in costed]  # type: ignore[union-attr]
        low, high = [e.low for e in got], [e.high for e in got]
        side = figure(plots.requested_realised(costed, asked_costs, [e.value for e in got], low, high, key="budget"))
    words = ""
    for name, p in named.items():
        if p.certificate is not None:
            kind = "guarantee" if p.certificate.guaranteed else "estimate, no guarantee"
            words += (
                f"<details{' open' if name == next(iter(named)) else ''}><summary>Certificate: {escape(name)} ({kind})</summary>"
                f"<pre tabindex=0>{escape(str(p.certificate))}</pre>{paragraph('Assumes: ' + p.certificate.assumptions, 'fine')}</details>"
            )
    if side and words:
        return f'{out}<div class="split">{side}<div>{words}</div></div>'
    return out + words + (f'<div class="pair">{side}</div>' if side else "")


_SHARES = frozenset(
    (
        "mean_cost",
        "cost",
        "budget",
        "max_drop",
        "accuracy_drop",
        "drop",
        "error",
        "max_error",
        "risk",
        "disagreement",
        "max_disagreement",
        "left_early",
        "peak_cost",
    )
)


def _cost(
    trace: Trace,
    named: Mapping[str, Plan],
    results: Mapping[str, Outcome],
    baselines: Sequence[Point | Curve],
    runs: Sequence[Mapping[str, Any]],
    main: str | None,
) -> str:
    quality = item_quality(trace).name
    curves: list[Curve] = []
    points: list[Point] = []
    notes = "Fixed exit: everyone leaves at the same place. Best random mix: exits drawn blindly, the best for each budget."
    placed = [outcome_point(r, n) for n, r in results.items()]
    if len(placed) > 1:
        curves.append(curve("plans", placed))
    first = next(iter(results), None)
    if first is not None and len(trace.exits) > 1:
        rule = named[first].rule
        curves.append(sweep(trace, rule))
        notes += " One threshold: the plan's score with a single threshold for all exits, swept; nothing is fitted to these items."
    curves.append(mixture_curve(trace))
    if main is not None:
        points += [outcome_point(results[main], main), random_exit(trace, results[main].shares)]
    elif len(placed) == 1:
        points += placed
    for baseline in baselines:
        if isinstance(baseline, Curve):
            curves.append(baseline)
        else:
            points.append(baseline)
    figures = [
        figure(
            plots.pareto_chart(
                curves, points, dots=[anytime_curve(trace)], key="flops", title=f"{quality.capitalize()} against FLOPs", quality=quality
            ),
            notes,
        )
    ]
    figures += _timed(trace, runs, baselines, quality)
    out = f'<div class="pair">{"".join(figures)}</div>'
    if main is not None:
        here, blind = results[main].mean_quality, random_exit(trace, results[main].shares).quality
        out += paragraph(
            f"At the same cost and the same exit shares, exits drawn at random give {percent(blind, 2)} {quality}; "
            f"choosing them by score gives {percent(here, 2)}."
        )
    return out + _runs_table(runs)


def _timed(trace: Trace, runs: Sequence[Mapping[str, Any]], baselines: Sequence[Point | Curve], quality: str) -> list[str]:
    """One picture of quality against milliseconds per item for each batch size that has runs with accuracy."""
    full = float(item_quality(trace).values[:, -1].double().mean())
    out = []
    sizes = sorted({int(r["batch_size"]) for r in runs if r.get("accuracy") is not None})
    for size in [sizes[i] for i in sorted({0, len(sizes) // 2, len(sizes) - 1})] if sizes else []:
        points: list[Point] = []
        for r in runs:
            if int(r["batch_size"]) == size and r.get("accuracy") is not None:
                mode = f" ({r['mode']})" if r.get("mode") else ""
                points.append(Point(f"{r['name']}{mode}", float(r["median_ms"]) / size, float(r["accuracy"])))
        whole = [float(r["full_ms"]) / size for r in runs if int(r["batch_size"]) == size and r.get("full_ms")]
        if whole:
            points.insert(0, Point("full model", sorted(whole)[len(whole) // 2], full))
        points += [
            Point(b.name, b.latency_ms, b.quality)
            for b in baselines
            if isinstance(b, Point) and b.latency_ms is not None and b.batch_size in (None, size)
        ]
        fixed = next((r["fixed_exit_ms"] for r in runs if int(r["batch_size"]) == size and r.get("fixed_exit_ms")), None)
        dots = []
        if fixed is not None:
            each = item_quality(trace).values.double().mean(0).tolist()
            dots = [curve("fixed exit", [Point(n, ms / size, q) for n, ms, q in zip(trace.exits, fixed, each, strict=True)])]
        picture = plots.pareto_chart(
            [],
            points,
            dots=dots,
            key=f"ms-{size}",
            title=f"{quality.capitalize()} against measured time, batch {size}",
            quality=quality,
            cost="median time per item (ms)",
            unit="ms",
        )
        out.append(figure(picture, "Batch time over batch size."))
    return out


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return ""

    def get(run: Mapping[str, Any], key: str, shown: Any) -> str:
        return shown(float(run[key])) if run.get(key) is not None else "-"

    rows = []
    for r in runs:
        ratio = f"{float(r['full_ms']) / float(r['median_ms']):.2f}" if r.get("full_ms") else "-"
        rows.append(
            (
                str(r["name"]),
                str(r.get("mode") or "-"),
                str(int(r["batch_size"])),
                f"{float(r['median_ms']):.4g}",
                get(r, "p95_ms", lambda v: f"{v:.4g}"),
                get(r, "full_ms", lambda v: f"{v:.4g}"),
                ratio,
                get(r, "exit_efficiency", lambda v: f"{v:.3f}"),
                get(r, "mean_cost", percent),
                get(r, "accuracy", lambda v: percent(v, 2)),
            )
        )
    header = (
        "run",
        "mode",
        "batch",
        "median ms",
        "p95 ms",
        "full model ms",
        "full / run (time)",
        "exit efficiency",
        "mean cost",
        "accuracy",
    )
    note = (
        "Milliseconds are per batch. Exit efficiency: ideal time over measured time, where ideal pays each segment only for the items "
        "that reach it."
    )
    return table(header, rows, "Measured runs", text_columns=2) + paragraph(note, "fine")


def _exits(trace: Trace, named: Mapping[str, Plan], results: Mapping[str, Outcome], main: str | None) -> str:
    name = main or next(iter(results), None)
    if name is None:
        return ""
    plan, result = named[name], results[name]
    histogram = plots.exit_histogram(result.shares, trace.exits, key="shares", title=f"Exits taken, {name}", expected=plan.shares)
    quality = item_quality(trace)
    rows = []
    for k, exit_name in enumerate(trace.exits):
        taken = result.exits == k
        count = int(taken.sum())
        rows.append(
            (
                exit_name,
                _number(plan.thresholds[k]) if k + 1 < len(trace.exits) else "takes the rest",
                f"{count:,}",
                percent(float(trace.cost[k]) / trace.base_cost),
                percent(float(result.quality[taken].double().mean()), 2) if count else "-",
                percent(float(result.full_quality[taken].double().mean()), 2) if count else "-",
                percent(float(quality.values[:, k].double().mean()), 2),
            )
        )
    header = (
        "exit",
        "threshold",
        "items leaving",
        "cost to here",
        f"{quality.name} of those",
        "full model on those",
        f"{quality.name}, all items",
    )
    pair = f'<div class="split">{figure(histogram)}<div>{table(header, rows, "Exit by exit")}</div></div>'
    early = [k for k in range(len(trace.exits) - 1)]
    if not early:
        return pair
    shown = [early[i] for i in _thin(len(early))]
    right = quality.values > 0.5 if quality.binary and trace.labels is not None else None
    small = []
    for k in shown:
        if not bool(result.scores[:, k].isfinite().any()):
            continue
        picture = plots.score_distribution(
            result.scores[:, k], None if right is None else right[:, k], plan.thresholds[k], trace.exits[k], key=f"score-{k}"
        )
        small.append(figure(picture, small=True))
    left_out = f" {len(shown)} of {len(early)} early exits are shown." if len(shown) < len(early) else ""
    words = (
        f"Scores of {type(plan.rule).__name__} over all items; an item leaves at the first exit where its score reaches the threshold."
        f"{left_out}"
    )
    return pair + "<h3>Scores and thresholds</h3>" + paragraph(words) + f'<div class="smalls">{"".join(small)}</div>'


def _reliability(trace: Trace) -> str:
    if trace.logits is None or trace.labels is None:
        lacking = "logits were not kept" if trace.logits is None else "the items have no labels"
        return paragraph(f"Not available: {lacking} when the trace was recorded.", "note")
    if trace.predictions.is_floating_point():
        return ""  # confidence of a class is not defined for regression
    facts = exit_quality(trace)
    diagrams = exit_reliability(trace, 10)
    shown = _thin(len(trace.exits))
    small = [figure(plots.reliability_diagram(diagrams[k], trace.exits[k], key=f"reliable-{k}"), small=True) for k in shown]
    rows = [
        (
            name,
            percent(float(facts.accuracy[k]), 2),
            percent(float(facts.disagreement[k]), 2),
            f"{float(facts.ece[k]):.4f}",
            f"{float(facts.ece_equal_mass[k]):.4f}",
            f"{float(facts.nll[k]):.4f}",
            f"{float(facts.brier[k]):.4f}",
        )
        for k, name in enumerate(trace.exits)
    ]
    header = ("exit", "accuracy", "differs from the full model", "ECE, equal width", "ECE, equal mass", "NLL (nats)", "Brier (0 to 2)")
    left_out = f" {len(shown)} of {len(trace.exits)} exits are shown." if len(shown) < len(trace.exits) else ""
    words = (
        "Accuracy of the items in each of ten bins of confidence (top-1 probability). Below the dashed line the exit promises more than it "
        f"keeps. Grey bars: share of items per bin, not to scale with accuracy.{left_out}"
    )
    whole = table(header, rows, "Every exit over all items; ECE with 15 bins")
    return paragraph(words) + f'<div class="smalls">{"".join(small)}</div>' + whole


def _overthinking(trace: Trace) -> str:
    if trace.labels is None or trace.predictions.is_floating_point() or len(trace.exits) < 2:
        return paragraph("Not available: it needs labelled items, class predictions and at least one early exit.", "note")
    facts = overthinking(trace)
    heads = [
        ("right early, wrong at the end", percent(facts.destructive, 2), "going on did harm"),
        ("right early, right at the end", percent(facts.wasteful, 2), "going on was not needed"),
        ("right at some exit", percent(facts.oracle, 2), f"an oracle would pay {percent(facts.oracle_cost)} of the cost"),
    ]
    if trace.logits is not None:
        steps = monotonicity(trace)
        at = steps.tolerances.index(0.1)
        heads.append(
            ("true-class probability falls by > 0.1", percent(float(steps.violations[at]), 2), "of items, from some exit to a later one")
        )
    picture = plots.overthinking_bars(facts, trace.exits, key="overthinking")
    return tiles(heads) + f'<div class="pair">{figure(picture)}</div>'


# ------------------------------------------------------------------------------------------------ examples


def _pick(trace: Trace, result: Outcome) -> list[tuple[str, str, list[int]]]:
    """Item indices to show: (heading, explanation, indices)."""
    early = result.scores[:, :-1]
    last = len(trace.exits) - 1
    left_early = result.exits < last
    groups = []
    first = int(result.exits.min())
    score = torch.where(left_early & (result.exits == first), result.scores[:, first].double(), -math.inf)
    easy = [int(i) for i in score.argsort(descending=True, stable=True)[:_SHOWN] if left_early[i] and result.exits[i] == first]
    if easy:
        groups.append(("Easiest", f"Leave first (at {trace.exits[first]}), with the highest scores.", easy))
    best = early.double().amax(1) if last else torch.zeros(trace.items, dtype=torch.float64)
    hard = [int(i) for i in torch.where(left_early, math.inf, best).argsort(stable=True)[:_SHOWN] if not left_early[i]]
    if hard:
        groups.append(("Hardest", "Reach the end; no early exit gave them more than a low score.", hard))
    if trace.labels is not None and not trace.predictions.is_floating_point() and last:
        right = trace.predictions == trace.labels.long()[:, None]
        spoilt = right[:, :-1].any(1) & ~right[:, -1]
        confidence = torch.where(right[:, :-1], early.double(), -math.inf).amax(1)
        surest = torch.where(spoilt, confidence, -math.inf).argsort(descending=True, stable=True)
        worst = [int(i) for i in surest[:_SHOWN] if spoilt[i]]
        if worst:
            groups.append(
                (
                    "Overthought",
                    _OVERTHOUGHT,
                    worst,
                )
            )
    return groups


def _examples(trace: Trace, result: Outcome | None, examples: Any, class_names: Sequence[str] | None) -> str:
    if examples is None:
        return ""
    if result is None:
        return paragraph("Examples need a plan that can be replayed.", "note")
    groups = _pick(trace, result)
    chosen = list(dict.fromkeys(i for _, _, rows in groups for i in rows))
    texts = not isinstance(examples, Tensor) and all(isinstance(examples[i], str) for i in chosen)
    if texts:
        bodies = {i: f'<blockquote dir="auto">{escape(_clip(examples[i]))}</blockquote>' for i in chosen}
    else:
        shown = pixels([torch.as_tensor(examples[i]) for i in chosen])
        bodies = {
            i: f'<img src="{png_uri(p)}" width="{p.shape[1]}" height="{p.shape[0]}"'
            f'{" class=pixel" if max(p.shape[:2]) < 96 else ""} alt="{escape(_alt(trace, i, class_names))}">'
            for i, p in zip(chosen, shown, strict=True)
        }
    out = ""
    for heading, words, rows in groups:
        cards = "".join(f"<li>{bodies[i]}{_facts(trace, result, i, class_names)}</li>" for i in rows)
        out += f"<h3>{heading}</h3>{paragraph(words)}<ul class={'texts' if texts else 'images'}>{cards}</ul>"
    return out


def _clip(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _class(value: Tensor, names: Sequence[str] | None) -> str:
    if value.is_floating_point():
        return f"{float(value):.4g}"
    index = int(value)
    return str(names[index]) if names is not None and 0 <= index < len(names) else str(index)


def _alt(trace: Trace, item: int, names: Sequence[str] | None) -> str:
    label = (
        f"labelled {_class(trace.labels[item], names)}"
        if trace.labels is not None
        else f"answered {_class(trace.predictions[item, -1], names)}"
    )
    return f"Item {item}, {label}"


def _facts(trace: Trace, result: Outcome, item: int, names: Sequence[str] | None) -> str:
    """What was answered, where, and how the other exits answered."""
    k = int(result.exits[item])
    said = _class(result.predictions[item], names)
    verdict = ""
    if trace.labels is not None:
        label = _class(trace.labels[item], names)
        good = float(result.quality[item]) > 0.5
        verdict = f'<b class="{"good" if good else "bad"}">{_RIGHT if good else _WRONG} {escape(said)}</b>'
        verdict += "" if good else f" <span>label {escape(label)}</span>"
    else:
        verdict = f"<b>{escape(said)}</b>"
    if k < len(trace.exits) - 1:
        where = f"{trace.exits[k]}, score {float(result.scores[item, k]):.3g}"
    elif len(trace.exits) > 1:
        where = f"{trace.exits[k]}, best early score {float(result.scores[item, :-1].max()):.3g}"
    else:
        where = trace.exits[k]
    answers = [_class(v, names) for v in trace.predictions[item]]
    runs = [(a, len(list(g))) for a, g in itertools.groupby(answers)]
    path = _THEN.join(a + (f" {_TIMES}{n}" if n > 1 else "") for a, n in runs)
    return f"<p>{verdict}<br><small>{escape(where)}<br>exits say: {escape(path)}</small></p>"


# ------------------------------------------------------------------------------------------------ machine


def _latency(times: LatencyTable | None) -> str:
    if times is None:
        return ""
    header = ("piece", *(f"batch {b}" for b in times.batch_sizes))
    rows: list[tuple[str, ...]] = []
    for k, (segment, head) in enumerate(zip(times.segment_ms.tolist(), times.head_ms.tolist(), strict=True)):
        rows.append((f"segment {k + 1}", *(f"{v:.4g}" for v in segment)))
        if any(head):
            rows.append((f"head and rule {k + 1}", *(f"{v:.4g}" for v in head)))
    rows.append(("gather survivors", *(f"{v:.4g}" for v in times.gather_ms.tolist())))
    total = (times.segment_ms.sum(0)).tolist()
    rows.append(("all segments, per item", *(f"{v / b:.4g}" for v, b in zip(total, times.batch_sizes, strict=True))))
    return table(header, rows, f"Median milliseconds per batch on {times.device}") + paragraph(
        f"Reading how many items left takes {times.sync_ms:.3g} ms.", "fine"
    )


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return rows


def _machine(trace: Trace, environment: Mapping[str, Any] | None) -> str:
    rows = _flat(environment if environment is not None else this_environment())
    out = table(("what", "value"), rows, "This report was written on", text_columns=2)
    told = [("model fingerprint", trace.fingerprint)] if trace.fingerprint else []
    told += _flat(trace.provenance)
    return out + (table(("what", "value"), told, "The trace was recorded from", text_columns=2) if told else "")
