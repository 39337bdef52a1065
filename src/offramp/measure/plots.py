"""Pictures for the report, as inline SVG that follows the page's light or dark colours, or as files. Needs the extra ``report``.

Every picture carries a text alternative and the numbers it shows, so that nothing is said by colour or shape alone.
Colours are CSS variables with a printable fallback: ``--ink``, ``--muted``, ``--grid`` and ``--c1`` .. ``--c6``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput, MissingExtra
from offramp.measure.pareto import Curve, Point
from offramp.measure.quality import Overthinking, Reliability

# Drawn with these stand-ins, which the finished SVG replaces by CSS variables; (variable, light value for print and fallback).
_COLOURS = {
    "#010101": ("ink", "#1d2126"),
    "#020202": ("muted", "#5c6570"),
    "#030303": ("grid", "#dfe3e8"),
    "#040404": ("c1", "#1f5fa8"),
    "#050505": ("c2", "#c2570c"),
    "#060606": ("c3", "#2f7d4f"),
    "#070707": ("c4", "#7b4aa6"),
    "#080808": ("c5", "#a8324a"),
    "#090909": ("c6", "#6d6a5f"),
}
INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE, RED, STONE = _COLOURS
_SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, STONE)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_POINT_MARKERS = ("D", "X", "^", "s", "v", "P", "*", "o")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (1, 3)))


@dataclass(frozen=True)
class Picture:
    """A figure with its words and numbers.

    Attributes:
        svg: one ``<svg>`` element, no script, no reference to anything outside itself.
        alt: what it shows, in a sentence or two.
        title: short.
        header: column names of the table of its numbers.
        rows: the numbers, as text.
    """

    svg: str
    alt: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "Drawing figures") from error
    return matplotlib


@contextmanager
def _figure(width: float = 4.2, height: float = 2.8, panels: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure (inches) and its axes in the house style; matplotlib's settings are put back afterwards.

    Several ``panels`` lie under each other, share the horizontal axis and come as a list.
    """
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    style = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.labelsize": 8.5,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.width": 0.7,
        "ytick.major.size": 0,
        "xtick.major.size": 3,
        "text.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 7.4,
        "legend.handlelength": 1.8,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "offramp",
        "text.parse_math": False,  # a user's "$" is a dollar
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context():
        # Start from matplotlib's own defaults, whatever the user's style file says.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_subplot() if panels == 1 else list(figure.subplots(panels, sharex=True))


def _svg(figure: Any, key: str) -> str:
    """The figure as an ``<svg>`` element whose ids start with ``key`` and whose colours are CSS variables."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise InvalidInput(f"A picture's key must be lower-case letters, digits and dashes, got {key!r}.")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib's ids are hashes of unrounded coordinates, whose last bits differ between machines: they are numbered instead, and
    # coordinates (inside tags; a label keeps its digits) rounded.
    names = {name: f"{key}-{i}" for i, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', text)))}
    text = re.sub(r'\b(id="|href="#)([^"]+)"', lambda m: f'{m[1]}{names[m[2]]}"', text)
    text = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names[m[1]]})", text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{3,}", lambda m: f"{round(float(m[0]), 2) + 0.0:.2f}", tag[0]), text)
    for stand_in, (name, fallback) in _COLOURS.items():
        text = text.replace(stand_in, f"var(--{name}, {fallback})")
    # The page sets the font; matplotlib's family list would fall back to a serif where DejaVu is missing.
    text = re.sub(r"(font: [^;\"]*?px )[^;\"]+", r"\1system-ui, sans-serif", text)
    # Size comes from the view box and the page.
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} aria-hidden="true" focusable="false">{rest}'


def standalone(picture: Picture) -> str:
    """The picture as the text of an SVG file: light colours on white, at its own size, with its title and its alternative inside.

    The same picture gives the same bytes: no date, no random id.
    """
    head, body = re.sub(r"var\(--\w+, (#\w+)\)", r"\1", picture.svg).split(">", 1)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    if found is None:
        raise InvalidInput(f"The picture {picture.title!r} has no view box, so it is none of this module's.")
    width, height = (round(float(points) * 4 / 3) for points in found.groups())  # points to pixels
    head = head.replace(' aria-hidden="true" focusable="false"', f' width="{width}" height="{height}" role="img"')
    words = f"<title>{escape(picture.title)}</title>\n <desc>{escape(picture.alt)}</desc>"
    return f'{head}>\n {words}\n <rect width="100%" height="100%" fill="#fff"/>{body}\n'


def percent(value: float, digits: int = 1) -> str:
    """A share as text, ``0.1234 -> "12.3 %"``."""
    return f"{100 * value:.{digits}f} %"


def _percent_axis(axis: Any, digits: int = 0) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.6g} %"))


def _short(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else "\N{HORIZONTAL ELLIPSIS}" + name[-(limit - 1) :]


def _exit_ticks(ax: Any, names: Sequence[str]) -> None:
    """Exit names under a bar chart; tilted where they would touch."""
    shown = [_short(n) for n in names]
    ax.set_xticks(range(len(names)))
    crowded = sum(len(n) for n in shown) > 42
    size = 8 if len(names) <= 12 else 6.5
    ax.set_xticklabels(shown, rotation=45 if crowded else 0, ha="right" if crowded else "center", fontsize=size)
    ax.tick_params(axis="x", length=0)


def pareto_chart(
    curves: Sequence[Curve],
    points: Sequence[Point] = (),
    *,
    dots: Sequence[Curve] = (),
    key: str,
    title: str,
    quality: str = "accuracy",
    cost: str = "mean cost (FLOPs, share of the full model)",
    unit: str = "share",
    size: tuple[float, float] = (4.2, 2.6),
) -> Picture:
    """Quality against cost.

    Args:
        curves: lines, the first drawn strongest.
        points: single settings (plans, smaller models), labelled in the legend.
        dots: families of settings between which nothing lies (fixed exits): open markers without a line.
        key: prefix of ids, unique in the page.
        title: short.
        quality: name of the vertical axis, a share.
        cost: name of the horizontal axis, its unit in brackets.
        unit: ``"share"`` prints costs as percentages, anything else as numbers in that unit.
        size: width and height in inches, without the legend's lines.
    """
    if not curves and not points and not dots:
        raise InvalidInput("A Pareto figure needs at least one curve or point.")
    share = unit == "share"
    with _figure(*size) as (figure, ax):
        for i, line in enumerate(curves):
            colour, style = _SERIES[i % 6], _STYLES[i % 6]
            marker = "" if len(line.points) > 14 else _MARKERS[i % 6]
            # Open markers: lines are families of settings, filled markers are single ones.
            ax.plot(
                line.cost, line.quality, color=colour, linestyle=style, marker=marker, markerfacecolor="none", label=line.name, zorder=3
            )
        for line in dots:
            ax.plot(
                line.cost,
                line.quality,
                linestyle="none",
                marker="o",
                markersize=6,
                markerfacecolor="none",
                color=INK,
                label=line.name,
                zorder=4,
            )
        for j, point in enumerate(points):
            ax.plot(
                [point.cost],
                [point.quality],
                linestyle="none",
                marker=_POINT_MARKERS[j % 8],
                markersize=6.5,
                color=_SERIES[(len(curves) + j) % 6],
                label=_short(point.name, 34),
                zorder=5,
            )
        if share:
            _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.grid(True, axis="both")
        ax.margins(0.06, 0.08)
        low, high = ax.get_ylim()
        if high - low < 0.02:  # nearly equal qualities are drawn as nearly equal, not stretched over the whole height
            middle = (low + high) / 2
            ax.set_ylim(middle - 0.01, middle + 0.01)
        if ax.get_ylim()[1] > 1.005:  # no share is above 1; a little room for the markers
            ax.set_ylim(top=1.005)
        if not share:
            # Times start at zero, so that distances on paper are ratios of time.
            ax.set_xlim(0, 1.06 * max(p.cost for p in [*points, *(q for c in [*curves, *dots] for q in c.points)]))
        ax.set_xlabel(cost)
        ax.set_ylabel(quality)
        entries = len(curves) + len(points) + len(dots)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=1 if entries <= 2 else 2, columnspacing=1.2)
        figure.set_figheight(size[1] + 0.17 * math.ceil(entries / (1 if entries <= 2 else 2)))
        svg = _svg(figure, key)

    def shown(value: float) -> str:
        return percent(value) if share else f"{value:.4g} {unit}"

    every = [(line.name, p) for line in [*curves, *dots] for p in line.points] + [(p.name, p) for p in points]
    rows = tuple((name, p.name if name != p.name else "", shown(p.cost), percent(p.quality, 2)) for name, p in every)
    best = max(every, key=lambda e: e[1].quality)
    cheapest = min(every, key=lambda e: e[1].cost)
    names = [line.name for line in [*curves, *dots]] + [p.name for p in points]
    alt = (
        f"{quality} against {cost}: {', '.join(names)}. "
        f"Best {percent(best[1].quality, 2)} at {shown(best[1].cost)} ({best[0]}); "
        f"cheapest {shown(cheapest[1].cost)} with {percent(cheapest[1].quality, 2)} ({cheapest[0]})."
    )
    return Picture(svg, alt, title, ("series", "setting", "cost", quality), rows)


def exit_histogram(
    shares: Tensor,
    exits: Sequence[str],
    *,
    key: str,
    title: str = "Where items leave",
    expected: Sequence[float] = (),
    words: tuple[str, str] = ("items", "exit"),
) -> Picture:
    """Share of items leaving at each exit.

    Args:
        shares: ``[K]`` observed.
        exits: K names.
        key: prefix of ids, unique in the page.
        title: short.
        expected: K shares that the plan foresaw, drawn as ticks; none if empty.
        words: what is counted, and where.
    """
    values = [float(s) for s in shares]
    with _figure(4.2, 2.6) as (figure, ax):
        bars = ax.bar(range(len(values)), values, width=0.66, color=BLUE, zorder=2, label=f"these {words[0]}")
        if expected:
            ax.hlines(
                list(expected),
                [k - 0.42 for k in range(len(values))],
                [k + 0.42 for k in range(len(values))],
                colors=ORANGE,
                linewidth=2,
                zorder=3,
                label="foreseen by the plan",
            )
            figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        if len(values) <= 9:
            for bar, value in zip(bars, values, strict=True):
                top = max(value, 0.0)
                ax.annotate(
                    f"{100 * value:.1f}",
                    (bar.get_x() + bar.get_width() / 2, max(top, expected[bars.index(bar)] if expected else 0.0)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=INK,
                )
        _percent_axis(ax.yaxis)
        ax.set_ylim(0, 1.16 * max([*values, *expected, 1e-9]))
        _exit_ticks(ax, exits)
        ax.set_ylabel(f"share of {words[0]}")
        ax.set_xlabel(words[1])
        svg = _svg(figure, key)
    rows = tuple(
        (n, percent(v, 2), *([percent(expected[k], 2)] if expected else [])) for k, (n, v) in enumerate(zip(exits, values, strict=True))
    )
    alt = (
        f"Share of {words[0]} leaving at each {words[1]}: "
        + ", ".join(f"{n} {percent(v)}" for n, v in zip(exits, values, strict=True))
        + "."
    )
    return Picture(svg, alt, title, (words[1], f"these {words[0]}", *(["foreseen"] if expected else [])), rows)


def reliability_diagram(diagram: Reliability, name: str, *, key: str) -> Picture:
    """Accuracy against confidence of one exit; bar width of the count below. On the diagonal, confidence can be trusted."""
    filled = diagram.count > 0
    confidence, accuracy = diagram.confidence[filled].tolist(), diagram.accuracy[filled].tolist()
    share = (diagram.count[filled].double() / diagram.count.sum()).tolist()
    with _figure(2.5, 2.5) as (figure, ax):
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        # Items per bin along the floor, so that a wild point with three items is seen for what it is.
        edges = diagram.edges.tolist()
        kept = [i for i, f in enumerate(filled.tolist()) if f]
        ax.bar(
            [edges[i] for i in kept],
            [0.25 * s / max(share) for s in share],
            width=[max(edges[i + 1] - edges[i], 0.004) for i in kept],
            align="edge",
            color=GRID,
            edgecolor=MUTED,
            linewidth=0.3,
            zorder=1,
        )
        ax.plot(confidence, accuracy, color=BLUE, marker="o", markersize=3.6, linewidth=1.4, zorder=3)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1.02)
        ax.set_aspect("equal", adjustable="box")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_xlabel("confidence")
        ax.set_ylabel("accuracy")
        svg = _svg(figure, key)
    edges = diagram.edges.tolist()
    rows = tuple(
        (
            f"{edges[i]:.3f} to {edges[i + 1]:.3f}",
            str(int(diagram.count[i])),
            f"{float(diagram.confidence[i]):.3f}",
            f"{float(diagram.accuracy[i]):.3f}",
        )
        for i in range(len(edges) - 1)
        if int(diagram.count[i])
    )
    gap = sum(s * (c - a) for s, c, a in zip(share, confidence, accuracy, strict=True))
    lean = "overconfident" if gap > 0.005 else "underconfident" if gap < -0.005 else "neither over- nor underconfident"
    alt = f"Reliability of exit {name}: expected calibration error {diagram.ece:.3f}, on the whole {lean} by {abs(gap):.3f}."
    return Picture(svg, alt, f"{name}: ECE {diagram.ece:.3f}", ("confidence bin", "items", "mean confidence", "accuracy"), rows)


def overthinking_bars(facts: Overthinking, exits: Sequence[str], *, key: str, title: str = "What going on gains and loses") -> Picture:
    """For each early exit: items the rest of the network sets right, and items it spoils."""
    early = list(exits[:-1])
    gained, lost = facts.gained_after.tolist(), facts.lost_after.tolist()
    with _figure(4.2, 2.6) as (figure, ax):
        places = range(len(early))
        ax.bar(places, gained, width=0.62, color=GREEN, label="wrong here, right at the end", zorder=2)
        ax.bar(
            places,
            [-x for x in lost],
            width=0.62,
            color=RED,
            hatch="////",
            edgecolor="white",
            linewidth=0,
            label="right here, wrong at the end",
            zorder=2,
        )
        ax.axhline(0, color=MUTED, linewidth=0.8, zorder=3)
        if len(early) <= 8:
            for k in places:
                ax.annotate(f"{100 * gained[k]:.1f}", (k, gained[k]), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7.5)
                ax.annotate(
                    f"{100 * lost[k]:.1f}", (k, -lost[k]), xytext=(0, -2), textcoords="offset points", ha="center", va="top", fontsize=7.5
                )
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{abs(100 * v):.6g} %"))
        ax.margins(0.06, 0.16)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -0.01 if max(lost, default=0) else -0.004), max(high, 0.01))  # bars of nothing have no scale of their own
        _exit_ticks(ax, early)
        ax.set_ylabel("share of items")
        ax.set_xlabel("exit")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2, columnspacing=1.2)
        svg = _svg(figure, key)
    rows = tuple((n, percent(g, 2), percent(x, 2)) for n, g, x in zip(early, gained, lost, strict=True))
    alt = (
        "Per exit, the share of items that the rest of the network corrects and the share it spoils. "
        f"Over all exits {percent(facts.destructive)} of items are right at some exit and wrong at the end; "
        f"{percent(facts.wasteful)} are right both early and at the end."
    )
    return Picture(svg, alt, title, ("exit", "wrong here, right at the end", "right here, wrong at the end"), rows)


def requested_realised(
    names: Sequence[str],
    requested: Sequence[float],
    realised: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    key: str,
    title: str = "Requested and realised cost",
) -> Picture:
    """Mean cost asked for against mean cost on these items, with its interval, both over the full model's FLOPs."""
    if not names:
        raise InvalidInput("At least one requested cost is needed.")
    with _figure() as (figure, ax):
        span = [*requested, *low, *high]
        bottom, top = min(span), max(span)
        pad = max(0.05 * (top - bottom), 0.03)
        line = [bottom - pad, top + pad]
        ax.plot(line, line, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2, label="as requested")
        errors = [[r - a for r, a in zip(realised, low, strict=True)], [b - r for r, b in zip(realised, high, strict=True)]]
        bars = ax.errorbar(
            requested,
            realised,
            yerr=errors,
            fmt="o",
            color=BLUE,
            markersize=5.5,
            capsize=3,
            elinewidth=1.2,
            zorder=3,
            label="realised, 95 %",
        )
        figure.legend(handles=[ax.get_lines()[0], bars], loc="outside lower left", ncols=2)
        ax.set_xlim(*line)
        ax.set_ylim(*line)
        _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.grid(True, axis="both")
        ax.set_xlabel("requested mean cost (share of the full model)")
        ax.set_ylabel("realised mean cost")
        svg = _svg(figure, key)
    rows = tuple(
        (n, percent(a), percent(b, 2), f"{percent(x, 2)} to {percent(y, 2)}")
        for n, a, b, x, y in zip(names, requested, realised, low, high, strict=True)
    )
    alt = "Requested against realised mean cost: " + "; ".join(f"{r[0]} asked {r[1]}, got {r[2]}" for r in rows) + "."
    return Picture(svg, alt, title, ("plan", "requested", "realised", "interval"), rows)


def score_distribution(scores: Tensor, right: Tensor | None, threshold: float, name: str, *, key: str, bins: int = 30) -> Picture:
    """Scores of one exit over all items, right and wrong answers apart, with the plan's threshold.

    Args:
        scores: ``[N]``.
        right: ``[N]`` bool, or ``None`` without labels.
        threshold: items at or above it leave here (if they have not left before); infinite: not drawn.
        name: of the exit.
        key: prefix of ids, unique in the page.
        bins: of the histogram, >= 1.
    """
    values = scores.detach().cpu().double()
    finite = values[values.isfinite()]
    if finite.numel() == 0:
        raise InvalidInput(f"No finite scores at exit {name}.")
    low, high = float(finite.min()), float(finite.max())
    if math.isfinite(threshold):
        low, high = min(low, threshold), max(high, threshold)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)

    def counts(mask: Tensor) -> list[float]:
        chosen = values[mask & values.isfinite()]
        return (torch.bincount(torch.bucketize(chosen, edges[1:-1], right=True), minlength=bins).double() / values.numel()).tolist()

    everything = torch.ones_like(values, dtype=torch.bool)
    parts = [("items", BLUE, everything)] if right is None else [("wrong", RED, ~right), ("right", BLUE, right)]
    leaves = float((values >= threshold).double().mean())
    with _figure(2.7, 2.2) as (figure, ax):
        base = [0.0] * bins
        for label, colour, mask in parts:
            part = counts(mask)
            top = [a + b for a, b in zip(base, part, strict=True)]
            ax.stairs(top, edges.tolist(), baseline=base, fill=True, color=colour, linewidth=0, label=label, zorder=2)
            base = top
        if math.isfinite(threshold):
            ax.axvline(threshold, color=INK, linewidth=1.2, zorder=4)
            left = threshold > (low + high) / 2
            ax.annotate(
                f"leave at {threshold:.3g}",
                (threshold, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if left else 4, -2),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                fontsize=7.5,
            )
        ax.set_ylim(0, 1.12 * max([*base, 1e-9]))
        _percent_axis(ax.yaxis)
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.set_xlabel("score")
        ax.set_ylabel("share of items")
        if right is not None:
            figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        svg = _svg(figure, key)
    marks = [0.05, 0.25, 0.5, 0.75, 0.95]
    rows = []
    for label, _, mask in parts:
        chosen = values[mask & values.isfinite()]
        cells = (
            torch.quantile(chosen[:: max(1, chosen.numel() // 1_000_000)], torch.tensor(marks, dtype=torch.float64)).tolist()
            if chosen.numel()
            else []
        )
        rows.append((label, str(int(mask.sum())), *(f"{c:.4g}" for c in cells), *(["-"] * (len(marks) - len(cells)))))
    off = (
        "this exit is switched off"
        if threshold == float("inf")
        else f"{percent(leaves)} of all items score at or above the threshold {threshold:.4g}"
    )
    alt = f"Scores at exit {name}, from {float(finite.min()):.3g} to {float(finite.max()):.3g}; {off}."
    return Picture(
        svg,
        alt,
        f"{name}{': switched off' if threshold == float('inf') else ''}",
        ("answers", "items", *(f"{int(100 * m)} % quantile" for m in marks)),
        tuple(rows),
    )


def promise_histograms(
    drops: Mapping[str, Mapping[str, Sequence[float]]],
    limit: float,
    *,
    key: str,
    title: str,
    loss: str = "accuracy given up",
    bins: int = 48,
    size: tuple[float, float] = (6.4, 1.1),
) -> Picture:
    """What was really lost when the same loss was promised many times: one panel a data set, one histogram a method.

    Args:
        drops: by data set, then by method: the loss of each repetition, a share. All data sets have the same methods.
        limit: what was promised.
        key: prefix of ids, unique in the page.
        title: short.
        loss: name of the horizontal axis.
        bins: of the histograms, about this many, >= 1.
        size: width of the picture and height of a panel in inches.
    """
    methods = list(next(iter(drops.values()), {}))
    if not methods or any(list(panel) != methods or not all(panel.values()) for panel in drops.values()):
        raise InvalidInput("Every data set needs the same methods in the same order, at least one, and each at least one loss.")
    every = [d for panel in drops.values() for losses in panel.values() for d in losses]
    low, high = min(0.0, *every), max(limit, *every)
    step = (high - low) / bins or 1.0
    if limit > low:
        step = (limit - low) / max(1, round((limit - low) / step))  # the limit is an edge
    bins = max(1, math.ceil((high - low) / step - 1e-9))
    edges = [low + i * step for i in range(bins + 1)]

    def beyond(losses: Sequence[float]) -> float:
        return sum(d > limit for d in losses) / len(losses)

    with _figure(size[0], 0.75 + size[1] * len(drops), len(drops)) as (figure, axes):
        panels = axes if isinstance(axes, list) else [axes]
        for ax, (name, panel) in zip(panels, drops.items(), strict=True):
            for i, (method, losses) in enumerate(panel.items()):
                counts = [0] * bins
                for d in losses:
                    counts[max(0, math.ceil((d - low) / step - 1e-9) - 1)] += 1  # a loss on an edge belongs below it, as at the limit
                heights = [c / len(losses) for c in counts]
                ax.stairs(heights, edges, fill=True, color=_SERIES[i % 6], alpha=0.35, linewidth=0, zorder=2 + i)
                ax.stairs(heights, edges, color=_SERIES[i % 6], linestyle=_STYLES[i % 6], linewidth=1.2, label=method, zorder=8 + i)
                ax.annotate(
                    f"{method}: {percent(beyond(losses))} beyond",
                    (1, 1),
                    xycoords="axes fraction",
                    xytext=(0, -3 - 11 * i),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=7.5,
                )
            ax.axvline(limit, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=20, label=f"promised: at most {percent(limit)}")
            ax.set_title(name, loc="left", fontsize=8)
            _percent_axis(ax.yaxis)
        _percent_axis(panels[-1].xaxis)
        panels[-1].set_xlabel(loss)
        panels[len(panels) // 2].set_ylabel("share of repetitions")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(methods) + 1)
        svg = _svg(figure, key)
    rows = tuple(
        (name, method, str(len(losses)), percent(sum(losses) / len(losses), 2), percent(beyond(losses)))
        for name, panel in drops.items()
        for method, losses in panel.items()
    )
    alt = f"{loss} where at most {percent(limit)} was promised; beyond it: " + "; ".join(f"{r[0]}, {r[1]} {r[4]}" for r in rows) + "."
    return Picture(svg, alt, title, ("data", "method", "repetitions", f"mean {loss}", "beyond the limit"), rows)
