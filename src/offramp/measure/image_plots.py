"""Pictures about generated images, as inline SVG in the style of `offramp.measure.plots`: samples, depths, decisions, and what they cost.

Every function takes arrays, not models. Pixels are embedded as PNG, so a picture needs nothing outside itself; shades mix with the
page's background, so that one picture serves light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.measure.image_quality import explained_by_step, psnr, relative_l2, variance_within_step
from offramp.measure.page import png_uri
from offramp.measure.plots import _MARKERS, _SERIES, _STYLES, BLUE, INK, MUTED, Picture, _figure, _percent_axis, _short, _svg, percent

_SHADE = (0x2F, 0x78, 0xC4)
"""Of pixels in maps; pixels cannot follow the page's variables, so this one is legible on light and on dark paper."""
_KINDS = ((*_SHADE, 255), (*_SHADE, 40), (0xC9, 0x6A, 0x1E, 230), (0x3B, 0x8F, 0x5C, 230), (0x8A, 0x57, 0xB8, 230), (0xB0, 0x3A, 0x55, 230))
_MOST_ROWS = 256
"""Samples drawn in a map; of more, evenly spaced ones after sorting."""


# ------------------------------------------------------------------------------------------------ samples


def sample_grid(
    full: Tensor,
    systems: Mapping[str, Tensor],
    *,
    key: str,
    title: str = "Full, fast and difference at equal noise",
    low: float = -1.0,
    high: float = 1.0,
    gain: float | None = None,
    columns: Sequence[str] = (),
) -> Picture:
    """Images of the full model, and below them, from the same noise, each system's images and how they differ.

    Args:
        full: ``[N, C, H, W]`` with C of 1 or 3.
        systems: images of each system by name, the same shape; at least one.
        key: prefix of ids, unique in the page.
        title: short.
        low: value that is black.
        high: value that is white, > ``low``.
        gain: factor on differences, which are shown about mid-grey; by default such that all but the largest half per cent of all
            differences fit, at least 1. The same for all systems, so that their rows can be compared.
        columns: a label for each image, e.g. its class.
    """
    if full.ndim != 4 or full.shape[0] < 1 or full.shape[1] not in (1, 3) or not systems:
        raise InvalidInput(f"full must be [N, C, H, W] with C of 1 or 3 and systems not empty, got {tuple(full.shape)}, {list(systems)}.")
    if not (math.isfinite(low) and math.isfinite(high) and high > low) or (gain is not None and not gain > 0):
        raise InvalidInput(f"low < high and gain > 0 are needed, got {low}, {high} and {gain}.")
    if columns and len(columns) != len(full):
        raise InvalidInput(f"columns must name the {len(full)} images, got {len(columns)} names.")
    base = full.detach().cpu().double()
    made = {name: x.detach().cpu().double() for name, x in systems.items()}
    for name, x in made.items():
        if x.shape != base.shape or not bool(x.isfinite().all()):
            raise InvalidInput(f"The images of {name!r} must be finite and {tuple(base.shape)} as the full model's, got {tuple(x.shape)}.")
    span = high - low
    gaps = {name: (x - base) / span for name, x in made.items()}
    if gain is None:
        sizes = torch.cat([g.abs().flatten() for g in gaps.values()]).sort().values
        usual = float(sizes[min(len(sizes) - 1, int(0.995 * len(sizes)))])
        gain = max(1.0, 0.5 / usual) if usual > 0 else 1.0
        gain = float(f"{gain:.2g}")
    shown: list[tuple[str, str, Tensor]] = [("full model", "", (base - low) / span)]
    for name, x in made.items():
        shown.append((name, "", (x - low) / span))
        shown.append(("difference", f"{gain:g} times", 0.5 + gain * gaps[name]))

    left, width, gap, head = 92.0, 460.0, 3.0, 12.0 if columns else 0.0
    cell = min(64.0, (width - left) / len(base) - gap)
    tall = cell * base.shape[2] / base.shape[3]
    parts = []
    for c, text in enumerate(columns):
        parts.append(_text(left + c * (cell + gap) + cell / 2, 8, _short(text, max(3, int(cell / 4.2))), 7.4, "middle", "muted"))
    y = head
    for r, (name, note, pixels) in enumerate(shown):
        if r and not note:
            y += 5  # systems lie apart
        middle = y + tall / 2
        parts.append(_text(left - 7, middle + (0 if note else 3), _short(name, 17), 8.5, "end", "muted" if note else "ink"))
        if note:
            parts.append(_text(left - 7, middle + 9, note, 7.4, "end", "muted"))
        for c, image in enumerate(pixels):
            raw = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
            place = f'x="{left + c * (cell + gap):.2f}" y="{y:.2f}" width="{cell:.2f}" height="{tall:.2f}"'
            parts.append(f'<image {place} preserveAspectRatio="none" style="image-rendering: pixelated" href="{png_uri(raw)}"/>')
        y += tall + gap
    svg = _drawn(key, left + len(base) * (cell + gap), y, parts)
    rows, words = [], []
    for name, x in made.items():
        ratio, distance = psnr(x, base, span), relative_l2(x, base)
        words.append(f"{name} {float(ratio.mean()):.1f} dB" if bool(ratio.isfinite().all()) else f"{name} (some images equal)")
        for c in range(len(base)):
            label = columns[c] if columns else str(c + 1)
            rows.append((name, label, f"{float(ratio[c]):.2f}" if math.isfinite(ratio[c]) else "equal", f"{float(distance[c]):.4f}"))
    alt = f"{len(base)} images of the full model and of {len(made)} faster ways from the same noise; mean PSNR: {', '.join(words)}."
    return Picture(svg, alt, title, ("system", "image", "PSNR, dB", "relative L2"), tuple(rows))


def _text(x: float, y: float, text: str, size: float, anchor: str, colour: str) -> str:
    fallback = {"ink": "#1d2126", "muted": "#5c6570"}[colour]
    style = f"font: {size}px system-ui, sans-serif; text-anchor: {anchor}; fill: var(--{colour}, {fallback})"
    return f'<text x="{x:.2f}" y="{y:.2f}" style="{style}">{escape(text)}</text>'


def _drawn(key: str, width: float, height: float, parts: Sequence[str]) -> str:
    """An ``<svg>`` of our own drawing, shaped as `plots` makes them: sized by its view box (points), hidden from readers."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise InvalidInput(f"A picture's key must be lower-case letters, digits and dashes, got {key!r}.")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.2f} {height:.2f}" version="1.1"'
    return f'{head} aria-hidden="true" focusable="false"><g id="{key}-0">{"".join(parts)}</g></svg>'


# ------------------------------------------------------------------------------------------------ depths and decisions


def depth_map(
    depth: Tensor,
    *,
    key: str,
    title: str = "Depth",
    noise: Sequence[float] = (),
    unit: str = "share of the full depth",
    steps: str = "sampler step",
) -> Picture:
    """Depth of every sample at every step, darker is deeper; above it each step's mean and spread over samples.

    The title says which share of the variance of depth the step explains (`explained_by_step`): near 100 %, a schedule would do.

    Args:
        depth: ``[S, T]`` >= 0.
        key: prefix of ids, unique in the page.
        title: short, without the share.
        noise: T noise levels for the table, in the sampler's own unit; the number of the step if empty.
        unit: of depth.
        steps: name of the horizontal axis.
    """
    share = explained_by_step(depth)  # checks the shape
    x = depth.detach().cpu().double()
    samples, count = x.shape
    if float(x.min()) < 0:
        raise InvalidInput(f"Depths are >= 0, the smallest is {float(x.min()):.4g}.")
    if noise and len(noise) != count:
        raise InvalidInput(f"noise must hold one level for each of {count} steps, got {len(noise)}.")
    mean, spread = x.mean(0), variance_within_step(x).sqrt()
    top = float(x.max()) or 1.0
    image = _rows(x, x.mean(1)) / top
    shades = torch.zeros(*image.shape, 4, dtype=torch.uint8)
    shades[..., :3] = torch.tensor(_SHADE, dtype=torch.uint8)
    shades[..., 3] = (image * 255).round().to(torch.uint8)
    with _figure(6.4, 3.6, 2) as (figure, (above, below)):
        above.get_gridspec().set_height_ratios([1, 2])
        places = list(range(1, count + 1))
        above.fill_between(
            places, (mean - spread).tolist(), (mean + spread).tolist(), color=BLUE, alpha=0.22, linewidth=0, step="mid", label="one SD"
        )
        above.step(places, mean.tolist(), where="mid", color=BLUE, label="mean over samples")
        above.set_ylim(0, 1.08 * top)
        above.set_ylabel("depth")
        _map(below, shades, samples, "sample, by mean depth")
        below.set_xlabel(steps)
        _swatches(
            figure, [(f"{v:.3g} {unit if i == 4 else ''}".strip(), (*_SHADE, round(255 * v / top))) for i, v in _quarters(top)], above
        )
        svg = _svg(figure, key)
    rows = tuple(
        (
            str(t + 1),
            *([f"{noise[t]:.4g}"] if noise else []),
            f"{float(mean[t]):.4g}",
            f"{float(spread[t]):.4g}",
            f"{float(x[:, t].min()):.4g}",
            f"{float(x[:, t].max()):.4g}",
        )
        for t in range(count)
    )
    alone = float(variance_within_step(x).mean().sqrt())
    alt = (
        f"Depth of {samples} samples over {count} steps, {float(x.mean()):.3g} {unit} on average. The step explains {percent(share)} "
        f"of its variance; within a step samples differ by {alone:.3g} (standard deviation)."
    )
    header = (steps, *(["noise level"] if noise else []), "mean depth", "SD over samples", "least", "most")
    return Picture(svg, alt, f"{title}: the step explains {percent(share)} of its variance", header, rows)


def decision_map(
    decisions: Tensor,
    names: Sequence[str] = ("compute", "reuse"),
    *,
    key: str,
    title: str = "Computed and reused",
    rows: str = "sample",
    steps: str = "sampler step",
) -> Picture:
    """What was decided for every row (sample, block or region) at every step; the first kind is drawn strongest.

    Args:
        decisions: ``[R, T]`` int64, indices into ``names``, or bool (true is the first kind).
        names: 2 to 6 kinds.
        key: prefix of ids, unique in the page.
        title: short.
        rows: what a row is; rows keep their order.
        steps: name of the horizontal axis.
    """
    if decisions.ndim != 2 or decisions.numel() == 0 or decisions.is_floating_point() or decisions.is_complex():
        raise InvalidInput(f"decisions must be a non-empty integer [rows, steps], got {decisions.dtype} {tuple(decisions.shape)}.")
    if not 2 <= len(names) <= len(_KINDS):
        raise InvalidInput(f"names must hold 2 to {len(_KINDS)} kinds, got {len(names)}.")
    x = decisions.detach().cpu()
    x = (~x).long() if x.dtype == torch.bool else x.long()
    if int(x.min()) < 0 or int(x.max()) >= len(names):
        raise InvalidInput(f"decisions must be within 0..{len(names) - 1} ({', '.join(names)}), got {int(x.min())}..{int(x.max())}.")
    count = x.shape[1]
    colours = torch.tensor(_KINDS, dtype=torch.uint8)
    with _figure(6.4, 2.6) as (figure, ax):
        _map(ax, colours[_rows(x, None)], len(x), rows)
        ax.set_xlabel(steps)
        _swatches(figure, [(n, _KINDS[i]) for i, n in enumerate(names)], None)
        svg = _svg(figure, key)
    shares = torch.stack([(x == i).double().mean(0) for i in range(len(names))])
    table = tuple((str(t + 1), *(percent(float(s)) for s in shares[:, t])) for t in range(count))
    whole = ", ".join(f"{n} {percent(float(s))}" for n, s in zip(names, shares.mean(1), strict=True))
    alt = f"Decisions for {len(x)} rows ({rows}) over {count} steps: {whole}."
    return Picture(svg, alt, f"{title}: {names[0]} {percent(float(shares[0].mean()))}", (steps, *names), table)


def _rows(x: Tensor, order: Tensor | None) -> Tensor:
    """Rows in the order of ``order``, thinned to `_MOST_ROWS`."""
    kept = x if order is None else x[order.argsort(stable=True)]
    if len(kept) <= _MOST_ROWS:
        return kept
    return kept[torch.linspace(0, len(kept) - 1, _MOST_ROWS).round().long()]


def _map(ax: Any, shades: Tensor, rows: int, name: str) -> None:
    """Pixels ``[R, T, 4]`` as they are, one a cell."""
    from matplotlib.ticker import MaxNLocator

    steps = shades.shape[1]
    ax.imshow(shades.numpy(), interpolation="none", aspect="auto", extent=(0.5, steps + 0.5, rows + 0.5, 0.5), zorder=2)
    ax.grid(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.set_xlim(0.5, steps + 0.5)
    ax.set_ylabel(name)


def _quarters(top: float) -> list[tuple[int, float]]:
    return [(i, top * i / 4) for i in range(5)]


def _swatches(figure: Any, kinds: Sequence[tuple[str, tuple[int, ...]]], lines: Any) -> None:
    """A legend of shades, after that of the lines of an axes if one is given."""
    from matplotlib.patches import Patch

    handles, labels = lines.get_legend_handles_labels() if lines is not None else ([], [])
    for name, colour in kinds:
        r, g, b, a = (c / 255 for c in colour)
        handles.append(Patch(facecolor=(r, g, b, a), edgecolor=MUTED, linewidth=0.4))
        labels.append(name)
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), columnspacing=1.0)


# ------------------------------------------------------------------------------------------------ cost and quality


@dataclass(frozen=True)
class CostPoint:
    """One setting of one system.

    Attributes:
        name: of the system; points of one name are joined.
        setting: what tells it from the system's other points, written beside it; may be empty.
        cost: in the unit of the figure, >= 0.
        values: the distance (lower is better) of each seed, at least one.
        control: whether it is what a method must beat: drawn open and dashed.
    """

    name: str
    setting: str
    cost: float
    values: tuple[float, ...]
    control: bool = False

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(v) for v in (self.cost, *self.values)) or self.cost < 0:
            raise InvalidInput(f"A point needs a finite cost >= 0 and finite values, got {self.cost} and {self.values} ({self.name!r}).")

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def cost_quality(
    points: Sequence[CostPoint],
    *,
    key: str,
    title: str,
    quality: str = "FID",
    cost: str = "executed FLOPs (share of the full model)",
    unit: str = "share",
    full: CostPoint | None = None,
    floor: float | None = None,
    size: tuple[float, float] = (6.4, 4.0),
) -> Picture:
    """Distance against cost, every control on it: lower and further left is better.

    Bars reach from the lowest to the highest seed. The vertical axis is logarithmic where distances differ more than eightfold.

    Args:
        points: settings of systems and controls, at least one.
        key: prefix of ids, unique in the page.
        title: short.
        quality: name of the distance.
        cost: name of the horizontal axis, its unit in brackets.
        unit: ``"share"`` prints costs as percentages, anything else as numbers in that unit.
        full: the full model: its distance is drawn across.
        floor: what real images get (`fid_floor`), drawn across; only in the legend where it lies far below everything else.
        size: width and height in inches, without the legend's lines.
    """
    if not points:
        raise InvalidInput("A cost-quality figure needs at least one point.")
    share = unit == "share"
    families: dict[str, list[CostPoint]] = {}
    for point in points:
        families.setdefault(point.name, []).append(point)
    every = [*points, *([full] if full is not None else [])]
    low, high = min(min(p.values) for p in every), max(max(p.values) for p in every)
    with _figure(*size) as (figure, ax):
        for i, (name, group) in enumerate(families.items()):
            line = sorted(group, key=lambda p: p.cost)
            control = line[0].control
            means = [p.mean for p in line]
            bars = [[m - min(p.values) for m, p in zip(means, line)], [max(p.values) - m for m, p in zip(means, line)]]
            ax.errorbar(
                [p.cost for p in line],
                means,
                yerr=bars if any(map(any, bars)) else None,
                color=_SERIES[i % 6],
                linestyle=_STYLES[1 + i % 5] if control else "-",
                linewidth=1.1 if control else 1.7,
                marker=_MARKERS[(i + i // 6) % 6],
                markerfacecolor="none" if control else None,
                capsize=2,
                elinewidth=0.9,
                label=f"{_short(name, 30)} (control)" if control else _short(name, 34),
                zorder=3 if control else 4,
            )
        if full is not None:
            ax.axhline(full.mean, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="full model")
            ax.plot([full.cost], [full.mean], marker="*", markersize=8, color=INK, linestyle="none", zorder=5)
        if floor is not None:
            far = low - floor > high - low  # drawn there it would squeeze everything else; the legend has it
            words = f"real images against real images: {floor:.3g}{' (below the axis)' if far else ''}"
            if far:
                ax.plot([], [], color="none", label=words)
            else:
                ax.axhline(floor, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1, label=words)
        steep = low > 0 and high > 8 * low
        if steep:
            from matplotlib.ticker import FuncFormatter, LogLocator

            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_locator(LogLocator(subs=()))
        if share:
            _percent_axis(ax.xaxis)
        else:
            ax.set_xlim(0, 1.08 * max(p.cost for p in every))  # distances on paper are ratios of time
        ax.grid(True, axis="both")
        ax.margins(0.07, 0.1)
        if low >= 0 and not steep and ax.get_ylim()[0] < 0:
            ax.set_ylim(bottom=0)
        ax.set_xlabel(cost)
        ax.set_ylabel(f"{quality}, lower is better{' (log scale)' if steep else ''}")
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2, columnspacing=1.2)
        figure.set_figheight(size[1] + 0.17 * math.ceil(len(labels) / 2))
        _label_points(figure, ax, every if full is None else [*points, full])
        svg = _svg(figure, key)

    def shown(value: float) -> str:
        return percent(value) if share else f"{value:.4g} {unit}"

    listed = [*every] if full is None else [full, *points]
    rows = tuple(
        (p.name, p.setting, "control" if p.control else "", shown(p.cost), f"{p.mean:.4g}", ", ".join(f"{v:.4g}" for v in p.values))
        for p in listed
    )
    best = min(points, key=lambda p: p.mean)
    alt = (
        f"{quality} against {cost} for {', '.join(families)}. Lowest {best.mean:.4g} at {shown(best.cost)} ({best.name} {best.setting})."
        + (f" The full model has {full.mean:.4g} at {shown(full.cost)}." if full is not None else "")
        + (f" Real images against real images: {floor:.4g}." if floor is not None else "")
    )
    return Picture(svg, alt, title, ("system", "setting", "", "cost", quality, "of seeds"), rows)


def _label_points(figure: Any, ax: Any, points: Sequence[CostPoint]) -> None:
    """Write each point's setting where it covers least: of twelve places around it, the one with the least overlap so far."""
    figure.draw_without_rendering()  # settles the layout, and with it where points are
    scale = figure.dpi / 72
    box = ax.get_window_extent()
    spots = [tuple(map(float, ax.transData.transform((p.cost, p.mean)))) for p in points]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in spots]

    def overlap(a: Sequence[float], b: Sequence[float]) -> float:
        return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    for point, (x, y) in zip(points, spots, strict=True):
        if not point.setting:
            continue
        text = _short(point.setting, 22)
        wide, tall = 3.7 * scale * len(text), 7 * scale
        best: tuple[float, float, float] | None = None
        for reach in (6, 13):
            for dx, dy in ((1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6), (0, 1.2), (0, -1.2)):
                cx, cy = x + scale * reach * dx + dx * wide / 2, y + scale * reach * dy
                spot = (cx - wide / 2, cy - tall / 2, cx + wide / 2, cy + tall / 2)
                inside = overlap(spot, (box.x0, box.y0, box.x1, box.y1))
                cost = sum(overlap(spot, t) for t in taken) + 3 * (wide * tall - inside) + 0.02 * reach * tall
                if best is None or cost < best[0] - 1e-9:
                    best = (cost, cx, cy)
        if best is None:  # there are always twelve places
            continue
        _, cx, cy = best
        taken.append((cx - wide / 2, cy - tall / 2, cx + wide / 2, cy + tall / 2))
        words = ax.annotate(
            text,
            (point.cost, point.mean),
            xytext=((cx - x) / scale, (cy - y) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=6.8,
            color=INK,
            zorder=6,
        )
        words.set_in_layout(False)
