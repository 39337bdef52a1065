"""Fills the marked blocks of README and the documentation from committed results and from the cards of the systems.

    python docs/render.py            write
    python docs/render.py --check    fail if something is out of date

A block is ``<!-- render: NAME -->`` ... ``<!-- end -->``. Figures are never typed: what has no result says so.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURE = ROOT / "docs" / "img" / "pareto.svg"
BLOCK = re.compile(r"(<!-- render: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PREFERRED = ("cifar", "sst2", "digits")
COLOURS = ("#1b6ca8", "#c8553d", "#2e8b57", "#7b4fa3", "#b58900", "#3b8ea5")


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


# ------------------------------------------------------------------------------------------------------------ the figure


def chosen() -> list[dict[str, Any]]:
    """Reproductions of the one variant that README shows: the hardest data there are results for."""
    found = reproductions()
    for variant in PREFERRED:
        if picked := [r for r in found if r["variant"] == variant]:
            return picked
    return []


def curves(picked: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Mean cost and accuracy over seeds of every system and of the static models trained beside the first of them."""
    lines = {}
    for result in picked:
        points = [(r["cost"][0], r["accuracy"][0]) for r in result["summary"]["budgets"] if "cost" in r and "accuracy" in r]
        lines[result["system"]] = sorted(points)
    by_name: dict[str, list[tuple[float, float]]] = {}
    for seed in picked[0]["seeds"]:
        for point in seed["static"]:
            by_name.setdefault(point["name"], []).append((point["cost"], point["accuracy"]))
    means = [tuple(statistics.fmean(column) for column in zip(*points, strict=True)) for points in by_name.values()]
    lines["smaller static models"] = sorted((cost, accuracy) for cost, accuracy in means)
    return lines


def svg(lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """Accuracy against cost as a small picture."""
    wide, high, left, right, top, bottom = 720, 400, 64, 190, 40, 52
    ys = [y for points in lines.values() for _, y in points]
    span = max(ys) - min(ys) or 0.01
    step = next(s for s in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if span / s <= 6)
    first, last = math.floor(min(ys) / step), math.ceil(max(ys) / step)
    low, up = first * step, last * step
    xmax = max(1.05, *(x for points in lines.values() for x, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (wide - left - right) * x / xmax, top + (high - top - bottom) * (up - y) / (up - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="#fff"/><text x="{left}" y="22" font-size="14" fill="#222">{title}</text>',
    ]
    for i in range(6):
        x, _ = at(0.2 * i, low)
        out.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{high - bottom}" stroke="#eee"/>')
        out.append(f'<text x="{x:.1f}" y="{high - bottom + 18}" text-anchor="middle" fill="#444">{20 * i} %</text>')
    for i in range(first, last + 1):
        _, y = at(0, i * step)
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{wide - right}" y2="{y:.1f}" stroke="#eee"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{100 * i * step:g}</text>')
    middle = (left + wide - right) / 2
    label = "mean cost, share of the full model's FLOPs"
    out.append(f'<text x="{middle:.0f}" y="{high - 12}" text-anchor="middle" fill="#222">{label}</text>')
    for number, (name, points) in enumerate(lines.items()):
        static = name.startswith("smaller")
        colour = "#777" if static else COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        dash = ' stroke-dasharray="5 4"' if static else ""
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (at(*p) for p in points)]
        y = top + 8 + 20 * number
        out.append(f'<line x1="{wide - right + 14}" y1="{y}" x2="{wide - right + 36}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>')
        out.append(f'<text x="{wide - right + 42}" y="{y + 4}" fill="#222">{name}</text>')
    out.append("</svg>\n")
    return "\n".join(out)


def title_of(picked: Sequence[Mapping[str, Any]]) -> str:
    return f"Accuracy (%) against cost, {picked[0]['variant']}, mean of {len(picked[0]['seeds'])} seeds"


# ------------------------------------------------------------------------------------------------------------ the blocks


def pareto(page: Path) -> str:
    picked = chosen()
    if not picked:
        return nothing("make bench")
    where = "docs/img/pareto.svg" if page.parent == ROOT else "img/pareto.svg"
    return f"![{title_of(picked)}]({where})\n\n{title_of(picked)}. Trained and measured on {machine(picked[0]['environment'])}."


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


def efficiency(page: Path) -> str:
    parts = []
    for name, result in results().items():
        if not isinstance(result, dict) or "planned_shares" not in result or "rows" not in result:
            continue
        rows = []
        for row in result["rows"]:
            size = f"{row['batch']}" if "batch" in row else f"arriving by {row['incoming']}, bucket {row['bucket']}"
            ideal, ratio = row.get("exit_efficiency"), row.get("over_full")
            cells = [f"{row['median_ms']:.3g}", "-" if ratio is None else f"{ratio:.3f}", "-" if ideal is None else f"{ideal:.3f}"]
            rows.append([row["mode"].partition("_")[0], size, *cells])
        where = f"exits after {', '.join(result['exits'])}, on {machine(result['environment'])}"
        head = f"**{result['model']}**, {result['dtype']}, {where} (`{name}`)"
        parts.append(head + "\n\n" + table(["mode", "batch", "ms", "time / full", "exit efficiency"], rows))
    return "\n\n".join(parts) or nothing("make bench")


def claims(page: Path) -> str:
    rows = []
    for r in sorted(reproductions(), key=lambda r: (r["system"], r["variant"])):
        p, m = r["predicate"], r["measured"]
        got = "-" if m is None else f"{m['value']:.4f} [{m['low']:.4f}, {m['high']:.4f}]"
        rows.append([r["system"], r["variant"], r["claim"], f"{p['metric']} {p['relation']} {p['value']:g}", got, r["verdict"]])
    head = ["system", "data", "claim", "test", "measured", "verdict"]
    return table(head, rows) if rows else nothing("make -C benchmarks cpu")


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


RENDERERS: dict[str, Callable[[Path], str]] = {f.__name__: f for f in (pareto, demo, efficiency, claims, systems)}


def main() -> int:
    wanted: dict[Path, str] = {}
    for page in PAGES:
        text = page.read_text()
        wanted[page] = BLOCK.sub(lambda m, page=page: f"{m.group(1)}{RENDERERS[m.group(2)](page)}\n{m.group(3)}", text)
    if picked := chosen():
        wanted[FIGURE] = svg(curves(picked), title_of(picked))
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
