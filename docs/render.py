"""Fills the marked blocks of README and the documentation, and draws their pictures, from committed results and the systems' cards.

    python docs/render.py            write
    python docs/render.py --check    fail if something is out of date

A block is ``<!-- render: NAME -->`` ... ``<!-- end -->``. Figures are never typed: what has no result says so. Pictures are drawn by
`offramp.measure.plots`, and the same results give the same bytes.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.measure.image_plots import CostPoint, cost_quality
from offramp.measure.pareto import Curve, Point, curve
from offramp.measure.plots import Picture, pareto_chart, promise_histograms, standalone

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "img"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- render: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PREFERRED = ("cifar", "sst2", "digits")

# What the classify engine is held to: exit efficiency at least this, by kind of device, mode and size of batch (throughput: of any
# size that batches arrive in). Never leaving may take this many times as long as the full model.
BARS: Mapping[str, Mapping[tuple[str, int | None], float]] = {
    "cpu": {("latency", 64): 0.90, ("latency", 1): 0.85, ("throughput", None): 0.92},
    "cuda": {("latency", 256): 0.88, ("latency", 32): 0.75, ("quota", 256): 0.92, ("quota", 32): 0.92, ("throughput", None): 0.90},
}
NEVER = 1.03


@functools.cache
def results() -> dict[str, Any]:
    """Every committed result by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def reproductions() -> list[dict[str, Any]]:
    return [r for r in results().values() if isinstance(r, dict) and str(r.get("schema", "")).startswith("offramp.reproduce/")]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine(environment: Mapping[str, Any]) -> str:
    """The device in words, whatever a result calls it."""
    for key in ("gpu", "device_name", "cuda_device", "cpu", "device"):
        value = environment.get(key)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, Mapping) and value.get("name"):
            return str(value["name"])
    return "device not recorded"


def nothing(how: str) -> str:
    return f"*No result is committed yet; `{how}` makes it.*"


# ------------------------------------------------------------------------------------------------------------ the pictures


def chosen() -> list[dict[str, Any]]:
    """Reproductions of the one variant that README shows: the hardest data there are results for."""
    found = reproductions()
    for variant in PREFERRED:
        if picked := [r for r in found if r["variant"] == variant]:
            return picked
    return []


def static_models(picked: Sequence[Mapping[str, Any]]) -> Curve:
    """Mean cost and accuracy over seeds of the static models trained beside the first system."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for seed in picked[0]["seeds"]:
        for point in seed["static"]:
            by_name.setdefault(point["name"], []).append((point["cost"], point["accuracy"]))
    means = {name: [statistics.fmean(column) for column in zip(*points, strict=True)] for name, points in by_name.items()}
    return curve("static models trained alone", [Point(name, cost, accuracy) for name, (cost, accuracy) in means.items()])


def pareto_picture() -> Picture | None:
    picked = chosen()
    if not picked:
        return None
    lines = []
    for result in picked:
        budgets = [b for b in result["summary"]["budgets"] if "cost" in b and "accuracy" in b]
        lines.append(curve(result["system"], [Point(f"budget {b['budget']:g}", b["cost"][0], b["accuracy"][0]) for b in budgets]))
    title = f"Accuracy against cost, {picked[0]['variant']}, mean of {len(picked[0]['seeds'])} seeds"
    return pareto_chart(lines, dots=[static_models(picked)], key="pareto", title=title, size=(6.4, 3.2))


def promises() -> dict[str, Any] | None:
    """The result of trying the guarantee on recorded traces."""
    return next((r for r in results().values() if isinstance(r, dict) and r.get("benchmark") == "guarantee"), None)


def in_population(result: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Rows by trace and method whose drop is taken over the whole population, exactly."""
    return {name: {r["method"]: r for r in found["rows"] if r["scheme"] == "population"} for name, found in result["traces"].items()}


def guarantee_picture() -> Picture | None:
    result = promises()
    if result is None:
        return None
    drops = {name: {method: row["drops"] for method, row in rows.items()} for name, rows in in_population(result).items()}
    title = f"True accuracy drop where at most {result['max_drop']:.1%} was promised with probability {1 - result['delta']:g}"
    return promise_histograms(drops, result["max_drop"], key="guarantee", title=title)


def shown(page: Path, name: str, picture: Picture) -> str:
    """A picture in Markdown, by its path from the page."""
    return f"![{picture.alt}]({os.path.relpath(PICTURES / f'{name}.svg', page.parent)})"


# ------------------------------------------------------------------------------------------------------------ the blocks


def pareto(page: Path) -> str:
    picked, picture = chosen(), pareto_picture()
    if picture is None:
        return nothing("make bench")
    settings = {
        (r["system"], b["cost"][0], b["accuracy"][0], b["static"][0])
        for r in picked
        for b in r["summary"]["budgets"]
        if all(k in b for k in ("cost", "accuracy", "static"))
    }
    ahead = sum(accuracy > static for _, _, accuracy, static in settings)
    note = (
        f"Of {len(settings)} settings of the {len(picked)} systems, {ahead} are more accurate than a smaller static model trained from "
        f"scratch (or a mix of two) at the same cost."
    )
    return f"{shown(page, 'pareto', picture)}\n\n{picture.title}. Trained and measured on {machine(picked[0]['environment'])}. {note}"


def guarantee(page: Path) -> str:
    result, picture = promises(), guarantee_picture()
    if result is None or picture is None:
        return nothing("make -C benchmarks results/guarantee_traces.json")
    rows = []
    for name, found in in_population(result).items():
        for method, row in found.items():
            low, high = row["share_95"]
            cells = [f"{row['share']:.1%} [{low:.1%}, {high:.1%}]", f"{row['mean']['drop']:.4f}", f"{row['mean']['cost']:.3f}"]
            rows.append([name, method, *cells, "yes" if row["within_slack"] else "no"])
    head = ["recorded trace", "method", "beyond the limit [95 %]", "mean drop", "mean cost", "promise kept"]
    note = (
        f"{result['draws']} calibrations a row, each on items drawn anew from the trace, the drop taken over all of its items. "
        f"`naive` takes the cheapest threshold that looks right on the calibration items. Kept means at most "
        f"{result['allowed_violations']} violations: {result['delta']:.0%} and binomial slack."
    )
    return f"{shown(page, 'guarantee', picture)}\n\n{picture.title}.\n\n{table(head, rows)}\n\n{note}"


def demo(page: Path) -> str:
    found = [r for r in results().values() if isinstance(r, dict) and r.get("benchmark") == "demo"]
    if not found:
        return nothing("make bench")
    result = found[0]
    reference = result["timing"]["timings"]["full model"]
    passes = len(reference["samples_ms"])
    rows = [["full model", f"{result['engines'][0]['full_ms']:.1f}", "1", "1", "-", f"{result['budgets'][0]['full_accuracy']:.2%}"]]
    for run in result["engines"]:
        low, high = run["exit_efficiency_95"]
        cells = [f"{run['median_ms']:.1f}", f"{run['time_ratio']:.2f}", f"{run['mean_cost']:.2f}"]
        rows.append([run["name"], *cells, f"{run['exit_efficiency']:.2f} [{low:.2f}, {high:.2f}]", f"{run['accuracy']:.2%}"])
    head = ["engine", f"ms per {result['engines'][0]['batch_size']} images", "time / full", "cost", "exit efficiency", "test accuracy"]
    return table(head, rows) + f"\n\nMedian of {passes} interleaved passes of `make demo` on {machine(result['environment'])}."


def efficiencies() -> list[tuple[str, dict[str, Any]]]:
    """Results of `benchmarks/efficiency.py` with their file names, GPUs first and of one model the newest first."""
    found = [(n, r) for n, r in results().items() if isinstance(r, dict) and "planned_shares" in r and "rows" in r]
    found.sort(key=lambda pair: str(pair[1]["environment"].get("date")), reverse=True)
    return sorted(found, key=lambda pair: (device(pair[1]) == "cpu", pair[1]["model"]))


def when(environment: Mapping[str, Any]) -> str:
    """Day, time and state of the code of a measurement, as far as they are recorded."""
    date, commit = environment.get("date"), environment.get("commit")
    day = f"{date[:10]} {date[11:16]}" if date else "date not recorded"
    changed = " with uncommitted changes" if environment.get("uncommitted_changes") else ""
    return f"{day}, {f'commit {commit[:7]}{changed}' if commit else 'commit not recorded'}"


def device(result: Mapping[str, Any]) -> str:
    return str(result["environment"]["device"]).partition(":")[0]


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def waited_ratio(row: Mapping[str, Any], full: Mapping[str, Any]) -> float | None:
    """Time over the full model's, each batch waited for before the next is given."""
    return row["waited_ms"] / full["waited_ms"] if "waited_ms" in row and "waited_ms" in full else None


def judged(kind: str, row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """The bar of a row and whether it is met."""
    if row["mode"] == "never":
        waited = waited_ratio(row, full) if kind == "cuda" else None  # on a CPU a call returns when it is done
        return f"<= {NEVER:g}: {verdict(row['over_full'] <= NEVER)}" + (
            "" if waited is None else f"; waited for: {verdict(waited <= NEVER)}"
        )
    bar = BARS[kind].get((row["mode"], row.get("batch")))
    return "-" if bar is None else f">= {bar:.2f}: {verdict(row['exit_efficiency'] >= bar)}"


def highest(ratios: Mapping[int, float]) -> str:
    """The highest ratio, at which batch, and whether it is within the bar for never leaving."""
    if not ratios:
        return "not measured"
    size = max(ratios, key=lambda batch: ratios[batch])
    return f"{ratios[size]:.3f} at batch {size}{'' if ratios[size] <= NEVER else ' **missed**'}"


def full_of(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The full model of the same pass."""
    size = "bucket" if row["mode"] == "throughput" else "batch"
    return next(r for r in rows if r["mode"] == "full" and r.get(size) == row[size])


NAMES = {"full": "full model", "never": "never leaving"}


def efficiency(page: Path) -> str:
    parts = []
    for name, result in efficiencies():
        kind, rows = device(result), result["rows"]
        cuda = kind == "cuda"
        where = f"exits after {', '.join(result['exits'])}, on {machine(result['environment'])}"
        parts.append(f"**{result['model']}**, {result['dtype']}, {where}; {when(result['environment'])} (`{name}`)")
        batches, streams = [], []
        for row in sorted(rows, key=lambda r: r.get("batch", 0)):
            full = row if row["mode"] == "full" else full_of(rows, row)
            found = [
                number(row.get("exit_efficiency")) + (f" ({row['exit_efficiency_alone']:.3f})" if "exit_efficiency_alone" in row else "")
            ]
            if "batch" in row:
                waited = [f"{row['waited_ms']:.3g} ({number(waited_ratio(row, full))})"] if cuda else []
                cells = [f"{row['median_ms']:.3g}", number(row["over_full"]), *waited, *found]
                batches.append([f"{NAMES.get(row['mode'], row['mode'])}, {row['batch']}", *cells, judged(kind, row, full)])
            else:
                arriving = str(row["incoming"]) if "incoming" in row else f"full model at {row['bucket']}"
                cells = [f"{1e3 * row['items'] / row['median_ms']:,.1f}", number(row.get("over_full", 1.0)), *found]
                streams.append([arriving, *cells, judged(kind, row, full)])
        last = [f"exit efficiency{' (alone)' if cuda else ''}", "bar"]
        if batches:
            parts.append(table(["mode, batch", "ms", "time / full", *(["waited for (/ full)"] if cuda else []), *last], batches))
        if streams:
            buckets = ", ".join(str(b) for b in sorted({r["bucket"] for r in rows if r["mode"] == "throughput"}))
            parts.append(f"Throughput mode, bucket {buckets}:")
            parts.append(table(["batches arriving", "items / s", "time / full", *last], streams))
    return "\n\n".join(parts) or nothing("make bench")


def bars(page: Path) -> str:
    """One table a kind of device: every bar and the exit efficiency held against it."""
    parts = []
    for kind, limits in BARS.items():
        found = [(n, r) for n, r in efficiencies() if device(r) == kind]
        if not found:
            parts.append(f"{kind.upper()}: {nothing('make -C benchmarks ' + {'cpu': 'cpu', 'cuda': 'gpu'}[kind])}")
            continue
        head = ["model", *(f"{mode}, {f'batch {size}' if size else 'lowest'} (>= {bar:.2f})" for (mode, size), bar in limits.items())]
        head.append(f"never leaving, time / full, highest (<= {NEVER:g})")
        head += [*(["the same, each batch waited for"] if kind == "cuda" else []), "measured"]
        lines = []
        for _, result in found:
            rows, cells = result["rows"], []
            for (mode, size), bar in limits.items():
                meant = [r for r in rows if r["mode"] == mode and r.get("batch") == size]
                if not meant:
                    cells.append("not measured")
                    continue
                row = min(meant, key=lambda r: r["exit_efficiency"])
                alone = f" ({row['exit_efficiency_alone']:.3f})" if "exit_efficiency_alone" in row else ""
                at = f", arriving by {row['incoming']}" if len(meant) > 1 else ""
                cells.append(f"{row['exit_efficiency']:.3f}{alone}{at}{'' if row['exit_efficiency'] >= bar else ' **missed**'}")
            never = [r for r in rows if r["mode"] == "never"]
            cells.append(highest({r["batch"]: r["over_full"] for r in never}))
            if kind == "cuda":
                ratios = {r["batch"]: waited_ratio(r, full_of(rows, r)) for r in never}
                cells.append(highest({size: ratio for size, ratio in ratios.items() if ratio is not None}))
            lines.append([result["model"], *cells, when(result["environment"])])
        machines = " and ".join(dict.fromkeys(machine(r["environment"]) for _, r in found))
        dtypes = ", ".join(dict.fromkeys(r["dtype"] for _, r in found))
        both = any("exit_efficiency_alone" in row for _, r in found for row in r["rows"])
        extra = " In brackets: against each segment repeated alone." if both else ""
        parts.append(f"{table(head, lines)}\n\nExit efficiency on {machines}, {dtypes}.{extra}")
    return "\n\n".join(parts)


def claims(page: Path) -> str:
    """A table for each system and claim, a row for each data set."""
    rows: dict[tuple[str, str, str], list[list[str]]] = {}
    for r in sorted(reproductions(), key=lambda r: (r["system"], r["variant"])):
        p, m = r["predicate"], r["measured"]
        test = f"{p['metric']} {p['relation']} {p['value']:g}" + (f" at cost {p['budget']:g}" if p.get("budget") is not None else "")
        got = "-" if m is None else f"{m['value']:.4f} [{m['low']:.4f}, {m['high']:.4f}]"
        rows.setdefault((r["system"], r["claim"], test), []).append([r["variant"], got, r["verdict"]])
    parts = [
        f"**{system}**: {claim} As a test: {test}.\n\n{table(['data', 'measured', 'verdict'], found)}"
        for (system, claim, test), found in rows.items()
    ]
    return "\n\n".join(parts) or nothing("make -C benchmarks cpu")


def systems(page: Path) -> str:
    from offramp import systems as found

    rows = []
    for name in found.list_systems():
        card = found.load_card(name)
        paper = f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
        delta = "; ".join(f"{axis}: {what}" for axis, what in (card.delta or {}).items())
        base = f"{card.delta_from} ({delta})" if card.delta_from else "-"
        claimed = ", ".join(word for word in ("lossless", "guaranteed", "trained") if getattr(card, word))
        rows.append([f"`{name}`", f"{paper}, {card.venue} {card.year}", card.engine, base, claimed or "-", card.status])
    return table(["system", "paper", "engine", "delta from", "is", "status"], rows)


# ---------------------------------------------------------------------------------------------- language models writing text

# What decoding is held to on CUDA: tokens per second of plain decoding, both over transformers' own ways, the share of the bandwidth
# limit that drafts reach, how often the host waits in a round, more rows beside plain, memory of drafts beside plain; on a trained
# model the speed-up and how far a prediction may be off.
PLAIN_TOKENS, PLAIN_OVER_GREEDY, OVER_EARLY_EXIT, OF_LIMIT, WAITS, MORE_ROWS, MEMORY = 700, 10, 20, 1.0, 1, 0.97, 1.05
TRAINED_SPEEDUP, PREDICTION = 1.5, 0.15


def benchmarked(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Results of one benchmark with their file names, GPUs first, the newest first."""
    found = [(n, r) for n, r in results().items() if isinstance(r, dict) and r.get("benchmark") == name]
    found.sort(key=lambda pair: str(pair[1]["environment"].get("date")), reverse=True)
    return sorted(found, key=lambda pair: device(pair[1]) == "cpu")


def headline(name: str, result: Mapping[str, Any], what: str) -> str:
    left = result.get("left_out") or []
    missing = f" Left out for want of time: {'; '.join(left)}." if left else ""
    failed = f" Failed: {'; '.join(f'{k} ({v})' for k, v in result['errors'].items())}." if result.get("errors") else ""
    tuning = f", compiler: {result['tuning']}" if result.get("tuning") else ""
    where = f"{result['dtype']}{tuning}, on {machine(result['environment'])}"
    return f"{what}, {where}; {when(result['environment'])} (`{name}`).{missing}{failed}"


def same_text(found: Mapping[str, Any] | None) -> str:
    """How texts compare with those of plain decoding."""
    if found is None:
        return "-"
    differ = found["texts"] - found["equal"]
    far = "" if found.get("not_near_ties") is None else f", {found['not_near_ties']} of them not at a near tie"
    return "equal" if not differ else f"{differ} of {found['texts']} differ{far}"


def decoding_bars(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Each bar of the decoding benchmark that its rows can answer, the measured number and whether it is met."""
    speed = {(r["way"], r["rows"]): r["tokens_per_s"] for r in rows}
    plain, greedy = speed.get(("ours, plain", 1)), speed.get(("transformers, greedy", 1))
    drafts = [r for r in rows if r["rows"] == 1 and "of_bandwidth_limit" in r and r["way"] != "ours, plain"]
    early = speed.get(("transformers, assistant_early_exit", 1))
    found: list[tuple[str, float | None, bool]] = []
    if plain is not None:
        found.append((f"plain, tokens/s >= {PLAIN_TOKENS}", plain, plain >= PLAIN_TOKENS))
        if greedy is not None:
            found.append((f"plain over transformers' greedy >= {PLAIN_OVER_GREEDY}", plain / greedy, plain / greedy >= PLAIN_OVER_GREEDY))
    if drafts:
        best = max(drafts, key=lambda r: r["tokens_per_s"])
        share = best["of_bandwidth_limit"]
        found.append((f"drafts over the bandwidth limit of plain decoding >= {OF_LIMIT:g}", share, share >= OF_LIMIT))
        if early is not None:
            over = best["tokens_per_s"] / early
            found.append((f"drafts over transformers' assistant_early_exit >= {OVER_EARLY_EXIT}", over, over >= OVER_EARLY_EXIT))
        if waits := [r["synchronisations"]["per_round"] for r in drafts if "synchronisations" in r]:
            found.append((f"waits of the host in a round = {WAITS}", max(waits), round(max(waits), 2) == WAITS))
    if more := [r["over_plain"] for r in rows if r["rows"] > 1 and r["way"] == "ours, length by round"]:
        found.append((f"more rows, length by round, over plain, lowest >= {MORE_ROWS}", min(more), min(more) >= MORE_ROWS))
    peaks = [r["peak_bytes"] for r in sorted(rows, key=lambda r: r["way"] != "ours, plain, long prompt") if r.get("peak_bytes")]
    if len(peaks) == 2:
        found.append((f"memory of drafts over plain, long prompt <= {MEMORY}", peaks[1] / peaks[0], peaks[1] / peaks[0] <= MEMORY))
    return [[what, number(value), verdict(met)] for what, value, met in found]


def decoding(page: Path) -> str:
    """Tokens per second in the shape of a large model, of random weights."""
    parts = []
    for name, result in benchmarked("decoding"):
        shape, rows = result["shape"], result["rows"]
        what = (
            f"**Llama shape, {shape['blocks']} blocks, {shape['width']} wide**, {shape['heads']} heads, {shape['kv_heads']} of keys, "
            f"{shape['vocabulary']:,} tokens, random weights, exit after block {result['exit']} made to agree at "
            f"{result['agreement']:.1%} of the tokens that the model writes"
        )
        plain = {r["rows"]: r["tokens_per_s"] for r in rows if r["way"] == "ours, plain"}
        lines = []
        for r in rows:
            over = r["tokens_per_s"] / plain[r["rows"]] if r["rows"] in plain and "prompt_tokens" not in r else None
            waits = r["synchronisations"]["per_round"] if "synchronisations" in r else None
            cells = [f"{r['tokens_per_s']:,.0f}", number(r.get("of_bandwidth_limit"), 2), number(over, 2), number(r.get("acceptance"), 2)]
            cells += [number(r.get("tokens_per_round"), 2), number(waits, 2), same_text(r.get("against_plain"))]
            lines.append([r["way"], str(r["rows"]), *cells])
        head = ["way", "rows", "tokens/s", "of the bandwidth limit", "over plain", "acceptance", "tokens a round", "waits a round", "text"]
        parts.append(headline(name, result, what))
        if lines:
            parts.append(table(head, lines))
        if tried := [
            [how.replace("+", ", "), drafts, number(r["round_ms"]), number(r["capture_s"], 1)]
            for how, by in result.get("tunings", {}).items()
            for drafts, r in by.items()
        ]:
            parts.append(table(["compiler", "drafts", "ms a round", "s to capture it"], tried))
        if device(result) != "cpu" and (found := decoding_bars(rows)):
            parts.append(table(["bar", "measured", ""], found))
    return "\n\n".join(parts) or nothing("make -C benchmarks results/decoding_llama_1b_h100.json")


def writing(page: Path) -> str:
    """How fast texts are written, in a few lines."""
    lines: list[list[str]] = []
    for _, result in benchmarked("decoding"):
        speed = {(r["way"], r["rows"]): r["tokens_per_s"] for r in result["rows"] if "prompt_tokens" not in r}
        where = machine(result["environment"])
        shape = f"{result['shape']['blocks']} blocks of {result['shape']['width']}, exit made to agree at {result['agreement']:.0%}"
        for rows in sorted({n for _, n in speed}):
            plain = speed.get(("ours, plain", rows))
            ours = {w: v for (w, n), v in speed.items() if n == rows and w.startswith("ours") and w != "ours, plain"}
            if plain is None or not ours or any(cells[:2] == [shape, str(rows)] and cells[-1] == where for cells in lines):
                continue
            best = max(ours.values())
            greedy, early = (speed.get((f"transformers, {w}", rows)) for w in ("greedy", "assistant_early_exit"))
            beside = [f"{plain / greedy:.0f} times greedy `generate`"] if greedy else []
            against = [f"{best / early:.0f} times `assistant_early_exit`"] if early else []
            speeds = [f"{plain:,.0f}", f"{best:,.0f}", f"{best / plain:.2f}"]
            lines.append([shape, str(rows), *speeds, "; ".join(beside + against) or "-", where])
    for _, result in benchmarked("decoding_trained"):
        rows = {r["group"]: r for r in result["rows"] if r["way"] == "verified"}
        if (whole := rows.pop("all", None)) is None or device(result) == "cpu":
            continue
        each = [r["speedup"] for r in rows.values()]
        shape = f"{result['shape']['blocks']} blocks, {result['model']['model']['parameters'] / 1e6:.0f} M, trained with its exit"
        speeds = [f"{whole['plain_tokens_per_s']:,.0f}", f"{whole['tokens_per_s']:,.0f}", f"{whole['speedup']:.2f}"]
        spread = f"{min(each):.2f} to {max(each):.2f} on {len(each)} groups of prompts"
        lines.append([shape, "1", *speeds, spread, machine(result["environment"])])
    if not lines:
        return nothing("make -C benchmarks results/decoding_llama_1b_h100.json")
    head = ["model", "texts at once", "plain, tokens/s", "with drafts", "times plain", "beside transformers, or by group", "on"]
    return f"{table(head, sorted(lines, key=lambda cells: int(cells[1])))}\n\nPlain is ours: compiled, one captured graph a step."


def decoding_trained(page: Path) -> str:
    """Speed-ups on a trained model, group by group of prompts."""
    parts = []
    for name, result in benchmarked("decoding_trained"):
        shape, chosen = result["shape"], result.get("chosen")
        parameters = result["model"]["model"]["parameters"] / 1e6
        what = f"**Trained model, {shape['blocks']} blocks, {parameters:.0f} M parameters**"
        if chosen is not None:
            what += f", drafts of {chosen['draft_length']} from the exit after block {chosen['exit']} ({chosen['head']})"
        by_round = {r["group"]: r["speedup"] for r in result["rows"] if r["way"] == "by_round"}
        lines = []
        for r in (r for r in result["rows"] if r["way"] == "verified"):
            cells = [str(r["prompts"]), f"{r['plain_tokens_per_s']:,.0f}", f"{r['tokens_per_s']:,.0f}", number(r["acceptance"], 2)]
            cells += [number(r["tokens_per_round"], 2), number(r["speedup"], 2), number(by_round.get(r["group"]), 2)]
            lines.append([r["group"], *cells, number(r["predicted"], 2), number(r["predicted_over_measured"], 2)])
        head = ["group", "prompts", "plain, tokens/s", "drafts, tokens/s", "acceptance", "tokens a round", "speed-up", "length by round",
                "predicted", "predicted / measured"]  # fmt: skip
        parts += [headline(name, result, what), table(head, lines)]
        notes = [f"Texts beside plain decoding's: {same_text(result['divergences'])}."] if "divergences" in result else []
        notes += [f"In float32: {same_text(r)} ({r['texts']} prompts)." for r in result["rows"] if r["way"] == "float32"]
        whole = next((r for r in result["rows"] if r["way"] == "verified" and r["group"] == "all"), None)
        if whole is not None and device(result) != "cpu":
            off = abs(whole["predicted_over_measured"] - 1)
            groups = [r for r in result["rows"] if r["way"] == "verified" and r is not whole]
            worst = max((abs(r["predicted_over_measured"] - 1) for r in groups), default=off)
            notes.append(f"Speed-up of all groups >= {TRAINED_SPEEDUP}: {verdict(whole['speedup'] >= TRAINED_SPEEDUP)}.")
            notes.append(f"Prediction within {PREDICTION:.0%}: {verdict(off <= PREDICTION)}; of one group at worst: {worst:.1%} off.")
        parts.append(" ".join(notes))
    return "\n\n".join(filter(None, parts)) or nothing("make -C benchmarks results/decoding_trained_h100.json")


def exactness(page: Path) -> str:
    """Texts against plain decoding and transformers, by device, type and engine; samples, caches and batch mates."""
    found = [r for _, r in benchmarked("exactness")]
    lines = []
    for result in found:
        for key in sorted({(r["engine"], r["rows"]) for r in result["rows"]}):
            rows = [r for r in result["rows"] if (r["engine"], r["rows"]) == key]
            kept = {d: [r["acceptance"] for r in rows if r["drafts"] == d and r["draft_length"]] for d in ("good", "bad", "random")}
            shares = [f"{min(v):.2f} to {max(v):.2f}" if v else "-" for v in kept.values()]
            texts = [same_text(_added([r[against] for r in rows])) for against in ("against_plain", "against_transformers")]
            prompts = max(r["against_plain"]["texts"] for r in rows)
            ways = f"{len({(r['system'], r['drafts']) for r in rows})}, {prompts} prompts each"
            lines.append([machine(result["environment"]), result["dtype"], *key, ways, *shares, *texts])
    if not lines:
        return nothing("make -C benchmarks results/exactness_cpu.json")
    head = [
        "device",
        "type",
        "engine",
        "prompts at a time",
        "ways",
        "good drafts kept",
        "bad",
        "random",
        "beside plain",
        "beside transformers",
    ]
    parts = [table(head, lines)]
    for result in found:
        where, said = f"{machine(result['environment'])}, {result['dtype']}", []
        if (sampled := result.get("sampling")) is not None:
            said.append(f"{sampled['tests']} chi-square tests of {sampled['draws']:,} texts each, lowest p {sampled['lowest_p']:.3f}")
        if result.get("cache"):
            most = max(r["largest_difference"] for r in result["cache"])
            said.append(f"keys and values after a text within {most:.1e} of one forward over it ({len(result['cache'])} ways)")
        if result.get("mates"):
            alone = sum(r["equal"] for r in result["mates"])
            said.append(f"{alone} of {sum(r['rows'] for r in result['mates'])} rows the same alone and in a batch")
        if said:
            parts.append(f"{where}: {'; '.join(said)}.")
    return "\n\n".join(parts)


def _added(each: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(r[name] for r in each) for name in ("texts", "equal", "not_near_ties")}


def lm_systems(page: Path) -> str:
    """Every language-model system on one trained model."""
    parts = []
    for name, result in benchmarked("lm_systems"):
        rows = result["rows"]
        what = f"**Systems on the trained model**, each trained {result['seconds_of_training']:g} s by its recipe"
        parts.append(headline(name, result, what))
        drafts = [
            [
                r["system"], str(r["exit"]), str(r["draft_length"]), number(r["acceptance"], 2), number(r["tokens_per_round"], 2),
                f"{r['tokens_per_s']:,.0f}", f"{r['plain_tokens_per_s']:,.0f}", number(r["speedup"], 2), same_text(r["against_plain"]),
            ]
            for r in rows if r["way"] == "drafts"
        ]  # fmt: skip
        peers = [[r["way"], "-", "-", "-", "-", f"{r['tokens_per_s']:,.0f}", "-", "-", "-"] for r in rows if r["system"] == "-"]
        if drafts or peers:
            head = ["verified drafts", "exit after", "most drafts", "acceptance", "tokens a round", "tokens/s", "plain, tokens/s",
                    "speed-up", "text"]  # fmt: skip
            parts.append(table(head, drafts + peers))
        captured = [
            [
                f"{r['limit']:g}", number(r["threshold"], 2), number(r["left"], 2), number(r["disagreed"] / max(1, r["audited"])),
                number(r["left"] * r["disagreed"] / max(1, r["audited"])),
                f"{r['tokens_per_s']:,.0f}", f"{r['plain_tokens_per_s']:,.0f}", number(r["speedup"], 2),
            ]
            for r in rows if r["way"] == "captured leaves"
        ]  # fmt: skip
        if captured:
            head = ["tokens leave at the first exit and catch up, in captured rounds: most of all tokens that may disagree", "threshold",
                    "left", "of them disagreed", "of all", "tokens/s", "plain, tokens/s", "speed-up"]  # fmt: skip
            parts.append(table(head, captured))
        tokens = result["even_prompts"] * result["even_new_tokens"]
        leaves = [
            [
                r["system"], r["fill"], number(r["left"], 2), number(r["blocks_share"], 2), number(r["cost"], 2), number(r["agreement"]),
                f"{r['perplexity']:.2f} ({r['perplexity_plain']:.2f})", f"{r['perplexity_first']:.2f} ({r['perplexity_first_plain']:.2f})",
                f"{tokens / r['reference_s']:,.0f} ({tokens / r['reference_plain_s']:,.0f})",
            ]
            for r in rows if r["way"] == "leaves"
        ]  # fmt: skip
        if leaves:
            head = ["tokens that leave", "fill", "left", "blocks / plain", "weights read / plain", "agreement",
                    "perplexity of the text (plain's)", "under the first model (plain's)",
                    f"tokens/s, {result['even_prompts']} texts at once, eager (plain's)"]  # fmt: skip
            parts.append(table(head, leaves))
    return "\n\n".join(parts) or nothing("make -C benchmarks results/lm_systems_h100.json")


# ------------------------------------------------------------------------------------------------------------ denoisers

# What denoising is held to on CUDA at batch 64: exit efficiency of schedules, and of rules that decide for each sample.
SCHEDULES, RULES = 0.90, 0.80
COST_SLACK = 1.02
DRAWN = 1.25
"""Settings whose FID is more than this over the full model's are in the table and not in the picture."""
RIVALS = ("few-steps", "dpm++", "heun", "deepcache", "static-schedule")
MEASURED = ("StateChange", "ResidualChange", "InputChange", "Uncertainty", "Chance")


def spread(values: Sequence[float]) -> str:
    """A mean, and from where to where, if there are several."""
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def title_of(way: Mapping[str, Any]) -> str:
    return f"{way['name']}, {way['setting']}" if way["setting"] else str(way["name"])


def settings(result: Mapping[str, Any], family: str) -> list[list[str]]:
    """A line for every planned setting of which something was measured; distances are of the seeds that all settings have."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    times: dict[tuple[str, int], Mapping[str, Any]] = {}
    for r in result["rows"]:
        if r.get("system") == family and r["group"] == "quality":
            found.setdefault(r["way"], {})[r["rows"]] = r
        if r.get("system") == family and r["group"] == "time":
            times[r["way"], r["rows"]] = r
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values()))) if found else []
    timed = {batch for _, batch in times}
    lines = []
    for way in result["plans"][family]:
        title = title_of(way)
        rows = [found[title][s] for s in seeds] if title in found else []
        if not rows and all(t != title for t, _ in times):
            continue
        kind = "full" if title == "full model" else "control" if way["control"] else "chosen" if way["about"].get("chosen") else "system"
        over = [1.0 if kind == "full" and b in timed else times.get((title, b), {}).get("over_full") for b in (1, 8, 64)]
        largest = times.get((title, 64), {})
        whole = f" ({largest['exit_efficiency_whole']:.3f})" if "exit_efficiency_whole" in largest else ""
        cells = [number(rows[0]["flops"] if rows else None), *(number(v) for v in over), number(largest.get("exit_efficiency")) + whole]
        if rows:
            first = rows[0]
            cells += [spread([r["fid"] for r in rows]), spread([r["fid_random"] for r in rows]), f"{first['kid']:.3g}"]
            cells += [number(first.get("psnr_db"), 1), number(first.get("explained"), 2)]
            cells += ["-" if first.get("cache_bytes") is None else f"{first['cache_bytes']:,.0f}"]
        lines.append([title, kind, *cells, *["not measured"] * (0 if rows else 6)])
    return lines


def against(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every setting of a system against every control at the same cost: its distance less the control's."""
    controls = list(dict.fromkeys(r["control"] for r in rows))
    ways: dict[str, dict[str, Mapping[str, Any]]] = {}
    for r in rows:
        ways.setdefault(r["way"], {})[r["control"]] = r

    def cell(r: Mapping[str, Any] | None) -> str:
        if r is None or r["difference"] is None:
            return "-"
        return f"{r['difference'][0]:+.3g}" + ("" if r["verdict"] in ("better", "worse") else " ~")

    costs = {way: next(iter(by.values()))["cost"] for way, by in ways.items()}
    return table(["setting", "cost", *controls], [[w, number(costs[w]), *(cell(by.get(c)) for c in controls)] for w, by in ways.items()])


def half_time(found: Mapping[str, Any]) -> list[str]:
    """The composition at half of the measured time against the controls, as a line of bars."""
    rivals = ", ".join(
        f"{name} not as cheap" if c["fid"] is None else f"{name} {c['fid']:.3g} ({c['verdict']})" for name, c in found["controls"].items()
    )
    what = f"FID of {found['way']}, at {found['time_over_full']:.2f} of the time, batch {found['batch']}, below all of these"
    if found.get("not_measured"):
        words = f"not judged: {len(found['not_measured'])} settings of these controls are not measured"
    elif not 0.4 <= found["time_over_full"] <= 0.6:
        words = "not at half of the time"
    else:
        words = verdict(found["lower_than_all"]) + ("" if found["beyond_the_spread"] else ", not clear of the spread over seeds")
        above = {name: c["next_dearer_fid"] for name, c in found["controls"].items() if c.get("next_dearer_fid") is not None}
        dearer = [name for name, fid in above.items() if found["fid"] >= fid]
        words += f"; not below the next dearer setting of {', '.join(dearer)}" if dearer else "; below the next dearer setting of each"
        gaps = [g["difference"][2] for g in found.get("by_images", {}).values()]
        if not dearer and gaps:
            words += f", {'' if max(gaps) < 0 else 'not '}clear of chance over images"
    return [what, f"{found['fid']:.3g}; {rivals}", words]


def denoising_bars(result: Mapping[str, Any], family: str) -> list[list[str]]:
    """Exit efficiencies at batch 64 against their bars, and the composition at half of the measured time against the controls."""
    plans = result.get("plans", {}).get(family, [])
    ruled = {title_of(w) for w in plans if any(p["args"]["signal"]["type"] in MEASURED for p in w["points"])}
    rows = [r for r in result["rows"] if r.get("system") == family and r["group"] == "time" and r["rows"] == 64 and "exit_efficiency" in r]
    out = []
    for what, bar, meant in (
        ("schedules", SCHEDULES, [r for r in rows if r["way"] not in ruled]),
        ("rules by sample", RULES, [r for r in rows if r["way"] in ruled]),
    ):
        if meant:
            least = min(meant, key=lambda r: r["exit_efficiency"])
            value = least["exit_efficiency"]
            out.append(
                [f"exit efficiency of {what}, batch 64, lowest >= {bar:.2f}", f"{value:.3f} ({least['way']})", verdict(value >= bar)]
            )
    about = result.get("verdicts", {}).get(family, {})
    over = [(r["executed"] / r["asked"], r["way"]) for r in about.get("over_cost", [])]
    if over:
        most, beyond = max(over), sum(o > COST_SLACK for o, _ in over)
        words = verdict(beyond == 0) if beyond == 0 else f"{verdict(False)} by {beyond} of {len(over)} settings"
        out.append([f"executed FLOPs over the cost asked for, highest <= {COST_SLACK}", f"{most[0]:.3f} ({most[1]})", words])
    return out + [half_time(found) for found in about.get("half_time", [])]


def measured_by(result: Mapping[str, Any], family: str) -> str:
    """How many calls measured, beside how many others, and where it was another machine or commit than the headline's."""
    calls, own = result.get("calls", []), result["environment"]
    used = {r["call"] for r in result["rows"] if r.get("system") == family and "call" in r}
    used |= {result["planned_in"][family]} if family in result.get("planned_in", {}) else set()
    if not used:
        return ""
    most = max(calls[c].get("beside", 0) for c in used)
    beside = f", up to {most + 1} processes side by side on one host" if most else ""
    said = f" By {len(used)} call{'s' if len(used) > 1 else ''}{beside}." if len(used) > 1 or most else ""
    elsewhere: dict[str, list[str]] = {}
    for c in sorted(used):
        there = calls[c]["environment"]
        if any(there.get(k) != own.get(k) for k in ("device_name", "commit", "uncommitted_changes")):
            elsewhere.setdefault(f"on {machine(there)}, {when({**there, 'date': None}).partition(', ')[2]}", []).append(calls[c]["parts"])
    return said + "".join(f" Of these {'; '.join(dict.fromkeys(parts))} {where}." for where, parts in elsewhere.items())


def imaging(page: Path) -> str:
    """The best composition at about half of the time beside what needs no method, in a few lines."""
    lines: list[list[str]] = []
    seeds = set()
    for _, result in benchmarked("diffusion"):
        for family, about in result.get("verdicts", {}).items():
            full = [r["fid"] for r in result["rows"] if (r["group"], r.get("system"), r["way"]) == ("quality", family, "full model")]
            for found in (h for h in about.get("half_time", []) if h["batch"] == 64):
                beside = (found["controls"].get(n, {"fid": None})["fid"] for n in RIVALS)
                ours = [found["way"].removeprefix("ours: "), f"{found['time_over_full']:.2f}", f"{found['fid']:.4g}"]
                cells = ["not as cheap" if fid is None else f"{fid:.4g}" for fid in beside]
                lines.append([family, f"{statistics.fmean(full):.4g}", *ours, *cells, machine(result["environment"])])
                seeds.add(about["seeds"])
    if not lines:
        return nothing("make -C benchmarks diffusion")
    head = ["model", "FID, all steps", "ours", "time / full", "FID", *RIVALS, "on"]
    said = "Lower is better; the features are of a network that was trained on the same images."
    if min(seeds) < 2:
        said += " Of one seed, so that small differences may be chance."
    return f"{table(head, lines)}\n\n{said}"


@functools.cache
def diffusion_pictures() -> dict[str, tuple[Picture, int]]:
    """FID against executed FLOPs and against time by result and family, and how many settings lie above the picture."""
    pictures = {}
    for name, result in benchmarked("diffusion"):
        if device(result) == "cpu":
            continue
        for family in result.get("plans", {}):
            quality: dict[str, dict[int, Mapping[str, Any]]] = {}
            times = {}
            for r in (r for r in result["rows"] if r.get("system") == family):
                if r["group"] == "quality":
                    quality.setdefault(r["way"], {})[r["rows"]] = r
                elif r["group"] == "time" and r["rows"] == 64:
                    times[r["way"]] = r["over_full"]
            for kind in ("flops", "time"):
                points, full = [], None
                for way in result["plans"][family]:
                    found = list(quality.get(title_of(way), {}).values())
                    cost = 1.0 if title_of(way) == "full model" else times.get(title_of(way)) if kind == "time" else None
                    cost = found[0]["flops"] if found and kind == "flops" else cost
                    if not found or cost is None:
                        continue
                    setting = "" if way["control"] else str(way["setting"]).removeprefix("cost ").partition(" ")[0]
                    point = CostPoint(way["name"], setting, cost, tuple(r["fid"] for r in found), way["control"])
                    if title_of(way) == "full model":
                        full = point
                    else:
                        points.append(point)
                if full is None or not points:
                    continue
                if not (drawn := [q for q in points if q.mean <= DRAWN * full.mean]):
                    continue
                words = "executed FLOPs" if kind == "flops" else "measured time at batch 64"
                key = f"{name.removesuffix('.json').replace('_', '-')}-{family}-{kind}"
                title = f"FID against {words}, {family}, {result['samples']:,} images, {machine(result['environment'])}"
                axis = f"{words} (share of the full model)"
                picture = cost_quality(drawn, key=key, title=title, cost=axis, full=full, size=(6.4, 4.4))
                pictures[key] = picture, len(points) - len(drawn)
    return pictures


def diffusion(page: Path) -> str:
    """Every diffusion system against every control."""
    parts = []
    for name, result in benchmarked("diffusion"):
        about = {**result, "left_out": []}  # of the last call only; what is missing is said of each family
        gone = result.get("missing", {})
        for family in dict.fromkeys([*result.get("plans", {}), *gone]):
            floor = result.get("features")
            real = f" (real against real: FID {floor['floor_mean']:.3g}, {floor['floor_count']:,} images)" if floor else ""
            what = f"**{family}**, {result['steps']} steps, guidance {result['guidance']:g}, {result['samples']:,} images a seed{real}"
            said = " ".join(gone.get(family, []))
            parts.append(headline(name, about, what) + measured_by(result, family) + (f" {said}" if said else ""))
            if not (lines := settings(result, family) if family in result.get("plans", {}) else []):
                continue
            start = f"{name.removesuffix('.json').replace('_', '-')}-{family}-"
            for key, (picture, above) in diffusion_pictures().items():
                if key.startswith(start):
                    beyond = f" {above} settings with an FID over {DRAWN:g} times the full model's are in the table alone." if above else ""
                    parts.append(f"{shown(page, key, picture)}\n\n{picture.title}.{beyond}")
            head = ["setting", "kind", "FLOPs / full", "time / full, batch 1", "batch 8", "batch 64",
                    "exit efficiency, batch 64 (of the whole model's time)", "FID", "FID, random network", "KID", "PSNR to full, dB",
                    "depth explained by the step", "cache bytes an image"]  # fmt: skip
            parts.append(table(head, lines))
            judged_of = result.get("verdicts", {}).get(family, {})
            by_time = judged_of.get("by_time", {})
            compared = [("executed FLOPs", judged_of.get("by_flops", []))]
            compared += [(f"measured time, batch {b}", by_time[b]) for b in sorted(by_time, key=int)[-1:]]
            for at, found in compared:
                if found:
                    note = "below 0 the setting is better; ~: not clear of the spread over seeds, or of one seed only"
                    parts += [f"{family}, FID less that of each control at equal {at} ({note}):", against(found)]
            if device(result) != "cpu" and (found := denoising_bars(result, family)):
                parts.append(table(["bar", "measured", ""], found))
        if rows := [r for r in result["rows"] if r["group"] == "text"]:
            lines = [
                [r["system"], r["way"], str(r["rows"]), number(r.get("flops")), number(r.get("over_full")), r.get("unsupported", "")]
                for r in rows
            ]
            parts.append("Denoisers with cross attention and two guidance branches, random weights (speed only):")
            parts.append(table(["denoiser", "setting", "batch", "FLOPs / full", "time / full", "not run because"], lines))
    return "\n\n".join(parts) or nothing("make -C benchmarks diffusion")


_BLOCKS = (pareto, guarantee, demo, efficiency, bars, claims, systems)
_TEXT_BLOCKS = (decoding, writing, exactness, decoding_trained, lm_systems)
RENDERERS: dict[str, Callable[[Path], str]] = {f.__name__: f for f in (*_BLOCKS, *_TEXT_BLOCKS, diffusion, imaging)}


def main() -> int:
    wanted: dict[Path, str] = {}
    for page in PAGES:
        text = page.read_text()
        wanted[page] = BLOCK.sub(lambda m, page=page: f"{m.group(1)}{RENDERERS[m.group(2)](page)}\n{m.group(3)}", text)
    drawn = {name: picture for name, (picture, _) in diffusion_pictures().items()}
    for name, picture in (("pareto", pareto_picture()), ("guarantee", guarantee_picture()), *drawn.items()):
        if picture is not None:
            wanted[PICTURES / f"{name}.svg"] = standalone(picture)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run `python docs/render.py`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
