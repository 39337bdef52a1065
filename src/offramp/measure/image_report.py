"""One self-contained HTML file that compares ways of generating images: no network, no script. Needs the extra ``report``.

The question it answers is whether a method beats what needs no method: every system is set beside the best control *at its own cost*, once
by executed FLOPs and once by measured time, and is called better only where the difference is more than the spread over seeds.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.core.bundle import write_text
from offramp.core.certificate import Estimate
from offramp.core.errors import InvalidInput
from offramp.measure.clock import environment as this_environment
from offramp.measure.image_plots import CostPoint, cost_quality, decision_map, depth_map, sample_grid
from offramp.measure.image_quality import DensityCoverage, FidFloor, PrecisionRecall, explained_by_step, outside_spread, seed_difference
from offramp.measure.page import figure, page, paragraph, table, tiles
from offramp.measure.plots import percent
from offramp.measure.report import _flat


@dataclass(frozen=True)
class ImageResult:
    """What one setting of one system gave. What was not measured is ``None`` or empty, and is shown as such.

    Attributes:
        name: of the system; settings of one system share it.
        setting: what tells it from the others, e.g. ``"cost 0.5"``.
        fid: Fréchet distance of each seed to real images, at least one; the same seeds in the same order for every result.
        flops: executed FLOPs over those of the full model, probes, heads and decisions included, >= 0.
        time_ms: measured milliseconds per batch, by batch size.
        control: whether it is a control, which needs no method: fewer steps, a fixed schedule, random skips, a shallower model.
        kid: kernel distance, mean over seeds.
        precision_recall: in the same features.
        density_coverage: in the same features.
        psnr_db: mean over images, to the full model's images from the same noise.
        relative_l2: the same way.
        accuracy: share of images that a classifier gives the class that was asked for.
        explained: R squared of depth on the step.
        exit_efficiency: ideal over measured time, by batch size.
        cache_bytes: kept between steps, per image.
    """

    name: str
    setting: str
    fid: tuple[float, ...]
    flops: float
    time_ms: Mapping[int, float] = field(default_factory=dict)
    control: bool = False
    kid: float | None = None
    precision_recall: PrecisionRecall | None = None
    density_coverage: DensityCoverage | None = None
    psnr_db: float | None = None
    relative_l2: float | None = None
    accuracy: float | None = None
    explained: float | None = None
    exit_efficiency: Mapping[int, float] = field(default_factory=dict)
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        self.point(self.flops)  # checks flops and fid
        if not all(b >= 1 and t > 0 for b, t in self.time_ms.items()):
            raise InvalidInput(f"time_ms maps batch sizes >= 1 to times > 0, got {dict(self.time_ms)} ({self.name!r}).")

    @property
    def title(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name

    @property
    def mean_fid(self) -> float:
        return statistics.fmean(self.fid)

    def point(self, cost: float) -> CostPoint:
        """This result in a figure whose horizontal axis gives it ``cost``."""
        return CostPoint(self.name, self.setting, cost, self.fid, self.control)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, for a committed result; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageResult:
        """What `to_dict` gave, also after JSON has made strings of batch sizes and lists of tuples.

        Raises:
            InvalidInput: a needed entry is missing, or one is unknown.
        """
        values = dict(data)
        try:
            values["fid"] = tuple(float(v) for v in values["fid"])
            for name in ("time_ms", "exit_efficiency"):
                values[name] = {int(b): float(v) for b, v in values.get(name, {}).items()}
            for name, kind in (("precision_recall", PrecisionRecall), ("density_coverage", DensityCoverage)):
                values[name] = kind(**values[name]) if values.get(name) is not None else None
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"These are not the entries of an image result: {sorted(data)} ({error}).") from error


@dataclass(frozen=True)
class Versus:
    """A system beside the best control at its cost.

    Attributes:
        result: of the system.
        cost: of it.
        control: name of the control with the lowest mean distance at that cost, or ``""`` if none can be that cheap.
        control_fid: its mean distance there, on the straight line between its settings.
        difference: the system's distance minus the control's, with an interval over seeds; negative is better. ``None`` without a
            control; with one seed an interval of level 0.
    """

    result: ImageResult
    cost: float
    control: str
    control_fid: float | None
    difference: Estimate | None

    @property
    def verdict(self) -> str:
        """In words; a difference within the spread over seeds is no difference."""
        if self.difference is None:
            return "no control is as cheap"
        if self.difference.level == 0:
            return "one seed: not clear"
        if not outside_spread(self.difference):
            return "within the spread"
        return "better" if self.difference.value < 0 else "worse"


def against_controls(
    results: Sequence[ImageResult], cost: Callable[[ImageResult], float | None], level: float = 0.95
) -> tuple[Versus, ...]:
    """Every system that is no control, beside the best control at equal cost.

    A control's distance between two of its settings is read off the straight line between them, seed by seed; beyond its dearest setting
    that setting counts, since a larger budget need not be spent.

    Args:
        results: systems and controls, all of the same seeds.
        cost: of a result; ``None`` leaves it out.
        level: of the intervals, in (0, 1).
    """
    _same_seeds(results)
    families: dict[str, list[tuple[float, ImageResult]]] = {}
    for result in results:
        if result.control and (at := cost(result)) is not None:
            families.setdefault(result.name, []).append((at, result))
    found = []
    for result in results:
        at = cost(result)
        if result.control or at is None:
            continue
        rivals = {name: values for name, group in families.items() if (values := _at_cost(group, at)) is not None}
        if not rivals:
            found.append(Versus(result, at, "", None, None))
            continue
        name = min(rivals, key=lambda n: statistics.fmean(rivals[n]))
        mean = statistics.fmean(rivals[name])
        gap = result.mean_fid - mean
        difference = seed_difference(result.fid, rivals[name], level) if len(result.fid) > 1 else Estimate(gap, gap, gap, 0.0)
        found.append(Versus(result, at, name, mean, difference))
    return tuple(found)


def _same_seeds(results: Sequence[ImageResult]) -> None:
    counts = {len(r.fid) for r in results}
    if len(counts) > 1:
        raise InvalidInput(f"All results need distances of the same seeds, got {sorted(counts)} of them: {[r.title for r in results]}.")


def _at_cost(group: Sequence[tuple[float, ImageResult]], cost: float) -> list[float] | None:
    """Distance of each seed of a control at a cost, or ``None`` below its cheapest setting."""
    settings = sorted(group, key=lambda g: (g[0], g[1].mean_fid))
    slack = 1e-9 * max(1.0, cost)  # the same cost, counted in another order
    below = [g for g in settings if g[0] <= cost + slack]
    above = [g for g in settings if g[0] > cost + slack]
    if not below:
        return None
    # Of settings at one cost the best counts.
    nearest = max(g[0] for g in below)
    left = min((g for g in below if g[0] == nearest), key=lambda g: g[1].mean_fid)
    if not above or nearest >= cost - slack:
        return list(left[1].fid)
    right = above[0]
    share = (cost - left[0]) / (right[0] - left[0])
    return [a + share * (b - a) for a, b in zip(left[1].fid, right[1].fid, strict=True)]


# ------------------------------------------------------------------------------------------------ the page


def image_report(
    path: str | os.PathLike[str],
    *,
    full: ImageResult,
    results: Sequence[ImageResult],
    features: str,
    floor: FidFloor | None = None,
    images: tuple[Tensor, Mapping[str, Tensor]] | None = None,
    columns: Sequence[str] = (),
    depths: Mapping[str, Tensor] | None = None,
    decisions: Mapping[str, tuple[Tensor, Sequence[str]]] | None = None,
    noise: Sequence[float] = (),
    title: str = "Diffusion: cost and quality",
    notes: Sequence[str] = (),
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page.

    Args:
        path: the HTML file; written atomically, its folder is made if missing.
        full: the plain pipeline; its ``flops`` is 1.
        results: systems and controls, of the same seeds as ``full``.
        features: which network gave the features, and of how many images, in words: every distance is in these features.
        floor: what real images get.
        images: the full model's images ``[N, C, H, W]`` in [-1, 1] and each system's from the same noise.
        columns: N labels of those images.
        depths: ``[S, T]`` depth of every sample at every step, by system, as a share of the full depth.
        decisions: ``[R, T]`` and the names of the kinds, by system (see `decision_map`).
        noise: T noise levels of the steps, if all maps have the same T.
        title: of the page.
        notes: paragraphs that a reader needs (sampler, guidance, data), plain text.
        environment: machine and versions of the measurement, as `offramp.measure.environment` gives it; this machine's by default.

    Returns:
        The path.

    Raises:
        InvalidInput: no results, results of other seeds, or arrays that do not match.
        MissingExtra: matplotlib is not installed.
    """
    if not results:
        raise InvalidInput("There is nothing to compare: results is empty.")
    _same_seeds([full, *results])
    depths, decisions = depths or {}, decisions or {}
    sections = [
        ("summary", "Summary", _summary(full, results, features, floor, notes)),
        ("cost", "Quality against cost", _cost(full, results, floor)),
        ("controls", "Against the best control at equal cost", _controls(results)),
        ("table", "Every setting", _table(full, results)),
        ("samples", "Samples at equal noise", "" if images is None else figure(sample_grid(*images, key="samples", columns=columns))),
        ("depth", "Where depth goes", _depths(depths, noise)),
        ("decisions", "What is computed and what is reused", _decisions(decisions)),
        ("machine", "Machine and versions", _machine(environment)),
    ]
    seeds = len(full.fid)
    about = f"{len(results)} settings of {len({r.name for r in results})} systems and controls; {seeds} seed{'' if seeds == 1 else 's'}"
    write_text(path, page(title, about, [s for s in sections if s[2]]))
    return Path(path)


def _batches(results: Sequence[ImageResult]) -> list[int]:
    return sorted({b for r in results for b in r.time_ms})


def _summary(full: ImageResult, results: Sequence[ImageResult], features: str, floor: FidFloor | None, notes: Sequence[str]) -> str:
    spread = f"over seeds {min(full.fid):.3g} to {max(full.fid):.3g}" if len(full.fid) > 1 else "one seed"
    heads = [("FID, full model", f"{full.mean_fid:.3g}", spread)]
    if floor is not None:
        heads.append(
            ("FID, real against real", f"{floor.mean:.3g}", f"SD {floor.spread:.2g}; {floor.count:,} against {floor.reference:,} images")
        )
    compared = against_controls(results, lambda r: r.flops)
    if compared:
        verdicts = [v.verdict for v in compared]
        heads.append(("better than every control", f"{verdicts.count('better')} of {len(verdicts)}", "settings, at equal executed FLOPs"))
        for b in _batches(results)[-1:]:
            timed = [v.verdict for v in against_controls(results, lambda r, b=b: r.time_ms.get(b))]  # type: ignore[misc]
            heads.append(("better than every control", f"{timed.count('better')} of {len(timed)}", f"settings, at equal time, batch {b}"))
    out = tiles(heads) + paragraph(f"Distances are in the features of {features}; lower is better, and only differences matter.")
    return out + "".join(paragraph(n) for n in notes)


def _cost(full: ImageResult, results: Sequence[ImageResult], floor: FidFloor | None) -> str:
    real = None if floor is None else floor.mean
    star = full.point(full.flops)
    pictures = [cost_quality([r.point(r.flops) for r in results], key="flops", title="FID against executed FLOPs", full=star, floor=real)]
    for b in _batches(results):
        timed = [r.point(r.time_ms[b]) for r in results if b in r.time_ms]
        pictures.append(
            cost_quality(
                timed,
                key=f"time-{b}",
                title=f"FID against measured time, batch {b}",
                cost=f"measured time (ms per batch of {b})",
                unit="ms",
                full=full.point(full.time_ms[b]) if b in full.time_ms else None,
                floor=real,
            )
        )
    bars = "Bars reach from the lowest to the highest seed. " if len(full.fid) > 1 else ""
    shown = "".join(map(figure, pictures))
    return f'<div class="pair">{shown}</div>' + paragraph(f"{bars}Open markers and dashed lines are controls.", "fine")


def _controls(results: Sequence[ImageResult]) -> str:
    axes: list[tuple[str, Callable[[ImageResult], float | None], Callable[[float], str]]] = [
        ("executed FLOPs", lambda r: r.flops, percent),
        *(
            (f"time, batch {b}", lambda r, b=b: r.time_ms.get(b), lambda v: f"{v:.4g} ms")  # type: ignore[misc]
            for b in _batches(results)
        ),
    ]
    rows = []
    for name, cost, shown in axes:
        for v in against_controls(results, cost):
            gap = v.difference
            between = "-" if gap is None else f"{gap.value:+.3g}" + (f" ({gap.low:+.3g} to {gap.high:+.3g})" if gap.level else "")
            best = "-" if v.control_fid is None else f"{v.control_fid:.4g}"
            rows.append((v.result.title, name, v.control or "-", v.verdict, shown(v.cost), f"{v.result.mean_fid:.4g}", best, between))
    if not rows:
        return ""
    header = ("system", "equal", "best control", "verdict", "cost", "FID", "control's FID", "difference (95 % over seeds)")
    return table(header, rows, "Each system beside the control with the lowest FID at its cost", text_columns=4) + paragraph(
        "A control's FID at a cost is read off the straight line between its settings. A difference whose interval holds 0 is called "
        "within the spread.",
        "fine",
    )


def _table(full: ImageResult, results: Sequence[ImageResult]) -> str:
    every = [full, *results]
    batches = _batches(every)
    efficient = sorted({b for r in every for b in r.exit_efficiency})
    columns: list[tuple[str, Callable[[ImageResult], str]]] = [
        ("FLOPs", lambda r: percent(r.flops)),
        ("FID", lambda r: f"{r.mean_fid:.4g}"),
        ("of seeds", lambda r: f"{min(r.fid):.4g} to {max(r.fid):.4g}" if len(r.fid) > 1 else ""),
        *((f"time / full, batch {b}", lambda r, b=b: _over(r.time_ms.get(b), full.time_ms.get(b))) for b in batches),  # type: ignore[misc]
        *((f"ms, batch {b}", lambda r, b=b: _shown(r.time_ms.get(b), ".4g")) for b in batches),  # type: ignore[misc]
        *((f"exit efficiency, batch {b}", lambda r, b=b: _shown(r.exit_efficiency.get(b), ".3f")) for b in efficient),  # type: ignore[misc]
        ("KID", lambda r: _shown(r.kid, ".3g")),
        ("precision", lambda r: _shown(None if r.precision_recall is None else r.precision_recall.precision, ".3f")),
        ("recall", lambda r: _shown(None if r.precision_recall is None else r.precision_recall.recall, ".3f")),
        ("density", lambda r: _shown(None if r.density_coverage is None else r.density_coverage.density, ".3f")),
        ("coverage", lambda r: _shown(None if r.density_coverage is None else r.density_coverage.coverage, ".3f")),
        ("right class", lambda r: "" if r.accuracy is None else percent(r.accuracy)),
        ("PSNR to full, dB", lambda r: _shown(r.psnr_db, ".2f")),
        ("relative L2", lambda r: _shown(r.relative_l2, ".3f")),
        ("depth explained by the step", lambda r: "" if r.explained is None else percent(r.explained)),
        ("cache bytes per image", lambda r: _shown(r.cache_bytes, ",")),
    ]
    cells = [[show(r) for r in every] for _, show in columns]
    kept = [i for i, column in enumerate(cells) if any(column)]  # what nobody measured has no column
    rows = [
        (r.title, "full model" if r is full else "control" if r.control else "system", *(cells[i][j] or "-" for i in kept))
        for j, r in enumerate(every)
    ]
    return table(("name", "kind", *(columns[i][0] for i in kept)), rows, "All that was measured", text_columns=2)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _over(value: float | None, full: float | None) -> str:
    return "" if value is None or full is None else f"{value / full:.3f}"


def _depths(depths: Mapping[str, Tensor], noise: Sequence[float]) -> str:
    if not depths:
        return ""
    pictures = [depth_map(d, key=f"depth-{i}", title=name, noise=noise) for i, (name, d) in enumerate(depths.items())]
    most = max(explained_by_step(d) for d in depths.values())
    words = "A sample's depth is worth deciding only as far as the step does not decide it: what the step explains, a schedule could do."
    if most > 0.9:
        words += " Where more than nine tenths are explained, the rule is a schedule in all but name."
    return paragraph(words) + f'<div class="pair">{"".join(figure(p) for p in pictures)}</div>'


def _decisions(decisions: Mapping[str, tuple[Tensor, Sequence[str]]]) -> str:
    pictures = [decision_map(d, names, key=f"decisions-{i}", title=name) for i, (name, (d, names)) in enumerate(decisions.items())]
    return f'<div class="pair">{"".join(figure(p) for p in pictures)}</div>' if pictures else ""


def _machine(environment: Mapping[str, Any] | None) -> str:
    rows = _flat(environment if environment is not None else this_environment())
    return table(("what", "value"), rows, "Measured on", text_columns=2)
