"""Every diffusion system against every control, on models that `train_diffusion.py` made: cost, quality, and who wins at equal time.

    python feature_net.py     --data IMAGES --out runs/features
    python train_diffusion.py flow     --data IMAGES --out runs/diffusion          (and noise, unet, variants)
    python diffusion.py --models runs/diffusion --data IMAGES --features runs/features --work runs/table --out results/diffusion_h100.json
    python diffusion.py --models runs/tiny --tiny --out runs/tiny.json        everything in about a minute on a CPU

In parts, each within the minutes of the call and written to disk as it is done; what a call has no time for is left out, named, and done
by the next call with the same arguments. In the order in which they matter:

- ``plans``: settings of every system and control for each cost, and compositions of ours, chosen on calibration noise and held-out images.
- ``quality``: for each setting images from the same noise; FID in the features of a trained and of a random network, KID, precision and
  recall, right classes; distance from the full model's images; executed FLOPs, remembered bytes, how far the step alone explains depth.
  One seed of all settings before the next seed of any.
- ``time``: whole sampling runs at each batch size in turn with the full model, compiled and captured; exit efficiency of the denoiser.
- ``text``: speed of every training-free system on denoisers with cross attention and two guidance branches, of random weights.
- ``page``: an HTML page and, in the result, who wins at equal time.

Side by side, each on a GPU of its own (``CUDA_VISIBLE_DEVICES``): one call chooses the plans, others take them in and measure, each with a
result of its own, and the last one puts everything together, which needs no GPU and takes the settings from what is there:

    python diffusion.py ... --families flow --parts plans --out runs/plans.json
    python diffusion.py ... --families flow --parts quality --out runs/quality.json --take runs/plans.json --beside 1
    python diffusion.py ... --families flow --parts time --out runs/time.json --take runs/plans.json --beside 1
    python diffusion.py ... --parts page --out results/diffusion_h100.json --take runs/plans.json runs/quality.json runs/time.json

``--share 1/2`` and ``--share 2/2`` divide the settings, ``--first-seed`` the seeds, ``--batches`` and ``--families`` the rest. ``--work``
may be one folder for all of them, or the last call names all of theirs. Times are over the full model's in the same process.

A model's variants belong to the model that they began with. Distances are in the features of `feature_net.py`, from its training images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusion_plans import Calibration, Plans, check_costs
from diffusion_sheet import SETTINGS, Files, Result, models_in, settled, take, without_stale
from diffusion_text import TEXT, TEXT_SYSTEMS, TextModel
from diffusion_ways import (
    ByBlock,
    Called,
    Model,
    Segments,
    Way,
    Whole,
    ideal_ms,
    load_families,
    model_of,
)
from feature_net import FeatureNet, Features, frozen, load_features, random_net
from lm_common import Budget, asked_parts, numbers, run_parts
from torch import Tensor
from train_diffusion import images_of

from offramp.backbones.shared_code import SharedCode
from offramp.engines.diffusion.denoise import Denoiser
from offramp.measure.clock import compare, environment
from offramp.measure.image_quality import (
    FeatureStatistics,
    PrecisionRecall,
    explained_by_step,
    fid,
    fid_difference,
    fid_floor,
    kid,
    precision_recall,
    psnr,
    relative_l2,
    variance_within_step,
)
from offramp.measure.image_report import ImageResult, against_controls, image_report

PARTS = ("plans", "quality", "time", "text", "page")
CALIBRATION_SEED, TIMING_SEED, EVALUATION_SEED = 1, 2, 10
"""Noise is of different seeds; those of evaluation count on from the last."""

RIVALS = ("few-steps", "dpm++", "heun", "trained on", "static-schedule", "deepcache")
"""What the best of ours is to beat at equal time: fewer steps (of any sampler, or of the model trained on), a schedule, DeepCache."""

# ---- what is compared ----------------------------------------------------------------------------------------------------


def combined(family: str, rows: Sequence[Mapping[str, Any]], ways: Mapping[str, Way]) -> dict[str, ImageResult]:
    """One result for each setting from its rows, with the seeds that all have; times are those over the full model's of the same rounds,
    times the full model's median.

    Args:
        family: whose rows.
        rows: of the result.
        ways: by title.
    """
    mine = [r for r in rows if r.get("system") == family and r["way"] in ways]
    quality: dict[str, dict[int, Mapping[str, Any]]] = {}
    for r in mine:
        if r["group"] == "quality":
            quality.setdefault(r["way"], {})[r["rows"]] = r
    seeds = sorted(set.intersection(*(set(found) for found in quality.values()))) if quality else []
    timed = [r for r in mine if r["group"] == "time"]
    full = {b: statistics.median(r["full_ms"] for r in timed if r["rows"] == b) for b in {r["rows"] for r in timed}}
    out = {}
    for title, found in quality.items():
        if not seeds:
            continue
        every, way = [found[s] for s in seeds], ways[title]

        def mean(key: str, every: Sequence[Mapping[str, Any]] = every) -> float | None:
            values = [e[key] for e in every]
            return None if any(v is None for v in values) else statistics.fmean(values)

        shares = (mean("precision"), mean("recall"))
        times = {r["rows"]: r["over_full"] * full[r["rows"]] for r in timed if r["way"] == title}
        if title == "full model":
            times = dict(full)
        out[title] = ImageResult(
            way.name, way.setting, tuple(e["fid"] for e in every), float(mean("flops") or 0), times, way.control, mean("kid"),
            None if None in shares else PrecisionRecall(*shares),  # type: ignore[arg-type]
            psnr_db=mean("psnr_db"), relative_l2=mean("relative_l2"), accuracy=mean("accuracy"), explained=mean("explained"),
            exit_efficiency={r["rows"]: r["exit_efficiency"] for r in timed if r["way"] == title and r.get("exit_efficiency") is not None},
            cache_bytes=None if every[0]["cache_bytes"] is None else int(every[0]["cache_bytes"]),
        )  # fmt: skip
    return out


def verdicts(results: Mapping[str, ImageResult], batch: int | None) -> list[dict[str, Any]]:
    """Every system beside every control at the same cost.

    Args:
        results: by title, the full model among them.
        batch: cost is the measured time at this batch size; ``None``: executed FLOPs.

    Returns:
        For every system and control: both distances, their difference and what it is called.
    """

    def cost(result: ImageResult) -> float | None:
        return result.flops if batch is None else result.time_ms.get(batch)

    full = results.get("full model")
    whole = None if full is None else cost(full)
    out = []
    families = sorted({r.name for r in results.values() if r.control})
    for title, result in results.items():
        if result.control or title == "full model":
            continue
        for name in families:
            rivals = [r for r in results.values() if r.control and r.name == name]
            for found in against_controls([result, *rivals], cost):
                gap = found.difference
                out.append(
                    {
                        "way": title, "control": name, "cost": found.cost if whole is None else found.cost / whole, "fid": result.mean_fid,
                        "control_fid": found.control_fid, "difference": None if gap is None else [gap.value, gap.low, gap.high],
                        "verdict": found.verdict,
                    }
                )  # fmt: skip
    return out


def winner(
    results: Mapping[str, ImageResult], chosen: Sequence[str], batch: int, rivals: Sequence[str], share: float = 0.5
) -> dict[str, Any] | None:
    """The composition chosen beforehand that is nearest to a share of the full model's time, and the controls at its own time.

    Args:
        results: by title, the full model among them.
        chosen: titles of what was chosen on calibration noise.
        batch: whose time counts.
        rivals: names of controls.
        share: of the full model's measured time.

    Returns:
        Its title, share of time and distance; each control's distance there, on the line between two of its settings, and of its next
        dearer setting, which is at least as good where distances fall ever more slowly with cost; whether it beats all. ``None``
        without measured times.
    """
    full = results.get("full model")
    timed = {t: results[t].time_ms[batch] for t in chosen if t in results and batch in results[t].time_ms}
    if full is None or batch not in full.time_ms or not timed:
        return None
    title = min(timed, key=lambda t: abs(timed[t] / full.time_ms[batch] - share))
    rows = [
        v for v in verdicts({t: r for t, r in results.items() if t in (title, "full model") or r.control}, batch) if v["control"] in rivals
    ]
    reached = [v for v in rows if v["control_fid"] is not None]
    best = min(reached, key=lambda v: v["control_fid"], default=None)
    dearer = {v["control"]: next_dearer(results, v["control"], batch, timed[title]) for v in rows}

    def seen(v: Mapping[str, Any]) -> dict[str, Any]:
        above = dearer[v["control"]]
        return {"fid": v["control_fid"], "verdict": v["verdict"], "next_dearer": above,
                "next_dearer_fid": None if above is None else results[above].mean_fid}  # fmt: skip

    return {
        "way": title, "batch": batch, "time_over_full": timed[title] / full.time_ms[batch], "fid": results[title].mean_fid,
        "controls": {v["control"]: seen(v) for v in rows},
        "lower_than_all": bool(reached) and all(results[title].mean_fid < v["control_fid"] for v in reached),
        "lower_than_next_dearer": bool(rows)
        and all(results[title].mean_fid < results[above].mean_fid for above in dearer.values() if above is not None),
        "beyond_the_spread": bool(reached) and all(v["verdict"] == "better" for v in reached),
        "best_control": None if best is None else best["control"],
    }  # fmt: skip


def next_dearer(results: Mapping[str, ImageResult], control: str, batch: int, time_ms: float) -> str | None:
    """Title of a control's cheapest setting that takes at least so long; of its dearest one if none does, ``None`` if none was timed."""
    timed = {t: r.time_ms[batch] for t, r in results.items() if r.control and r.name == control and batch in r.time_ms}
    above = {t: ms for t, ms in timed.items() if ms >= time_ms}
    if above:
        return min(above, key=lambda t: above[t])
    return max(timed, key=lambda t: timed[t]) if timed else None


def in_turn(ways: Sequence[Way]) -> list[Way]:
    """Ways in the order in which they matter: what the bar names first, then a setting of each system in turn, near half the cost first."""
    first = ("full model", "few-steps", "ours", "deepcache", "static-schedule")

    def place(way: Way) -> tuple[int, int]:
        group = "ours" if way.about.get("chosen") else way.name
        rank = first.index(group) if group in first else len(first)
        alike = sorted((w for w in ways if w.name == way.name), key=lambda w: abs(w.about.get("cost", 0.5) - 0.5))
        nth = [w.title for w in alike].index(way.title)
        return rank if rank < len(first) else len(first) + nth, nth

    return sorted(ways, key=place)


def share_of(given: str) -> tuple[int, int]:
    """``2/3``: the second of three shares.

    Raises:
        SystemExit: there is no such share.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    which, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= which <= of:
        raise SystemExit(f"--share is like 1/2 or 2/2, of as many calls as there are; got {given!r}.")
    return which, of


def slug(title: str) -> str:
    """A title as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# ---- the benchmark -------------------------------------------------------------------------------------------------------


class Benchmark:
    """Parts over all families of models; results of each are on disk as they are made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.budget = args, Budget(args.minutes)
        self.device = torch.device(args.device)
        self.dtype = getattr(torch, args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.costs, self.half = (() if not c else check_costs([float(x) for x in c.split(",")]) for c in (args.costs, args.half))
        self.share = share_of(args.share)
        self.families: dict[str, dict[str, Model]] = {}
        self.code = SharedCode(dynamic=False) if self.device.type == "cuda" and args.compile else None
        self.any_rows = SharedCode()  # of segments for any number of rows, where only images are wanted
        self._features: dict[str, Features] = {}
        self._real: dict[str, Tensor] = {}
        self._full: dict[tuple[str, int], Tensor] = {}
        self._noise: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._gaps: dict[tuple[str, str, str], dict[str, Any]] = {}
        call = {
            "environment": environment(self.device), "parts": args.parts, "families": args.families, "beside": args.beside,
        }  # fmt: skip
        self.sheet = Result(
            args.out,
            {
                "benchmark": "diffusion", "dtype": str(self.dtype).removeprefix("torch."), "steps": args.steps, "samples": args.samples,
                "guidance": args.guidance, "costs": list(self.costs), "half": list(self.half), "calibration": args.calibration,
                "environment": call["environment"], "rows": [],
                "models": {n: d for n, d in models_in(args.models).items() if n in args.families.split(",")} if args.models else {},
            },
            self.budget,
            call,
        )  # fmt: skip
        for path in args.take:
            found = take(self.sheet.content, json.loads(path.read_text()), str(path))
            print(f"taken from {path}: " + ", ".join(f"{n} {what}" for what, n in found.items()), flush=True)
        self._asked()
        self.files = Files(args.work or [Path(args.out).with_suffix("")], self.sheet.content)

    def _asked(self) -> None:
        """What a whole result would hold, and no rows of plans that are gone."""
        content, args = self.sheet.content, self.args
        parts = args.parts.split(",")
        content["seeds"] = max(args.seeds if "quality" in parts else 0, content.get("seeds", 0))
        content["batches"] = sorted({*(numbers(args.batches) if "time" in parts else ()), *content.get("batches", [])})
        if gone := without_stale(content):
            print(f"{gone} rows are of settings that are no longer planned and were dropped.", flush=True)
        settled(content)
        self.sheet.write()

    @cached_property
    def images(self) -> dict[str, tuple[Tensor, Tensor]]:
        return images_of(self.args)

    # ---- what all parts use ------------------------------------------------------------------------------------------------------

    def family(self, name: str) -> dict[str, Model]:
        """A family of models, cut; segments are compiled where that pays."""
        if name not in self.families:
            with self.budget.part(f"load: {name}"):
                found = load_families(self.args.models, self.device, self.dtype, self.args.guidance, self.args.steps, [name])[name]
                if self.args.compile and self.device.type == "cuda":
                    for model in found.values():
                        model.compile(self.any_rows)
            self.families[name] = found
        return self.families[name]

    def names(self) -> list[str]:
        return [n for n in self.args.families.split(",") if n in self.sheet.content["models"]]

    def ways(self, name: str) -> list[Way]:
        """Settings that the part ``plans`` left in the result."""
        found = self.sheet.content.get("plans", {}).get(name)
        if not found:
            return []
        return in_turn([Way.from_dict(w) for w in found])

    def mine(self, name: str) -> list[Way]:
        """Those of this call's share: every so many of the first ones, whatever was measured before."""
        which, of = self.share
        return [w for place, w in enumerate(self.ways(name)[: self.args.most]) if place % of == which - 1]

    def has(self, **key: Any) -> bool:
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.sheet.content["rows"])

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails is written down with its error and does not cost the rest; the call then fails at its end."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.sheet.content.setdefault("errors", {})[what] = f"{type(error).__name__}: {error}"
            self.sheet.write()
        else:
            self.sheet.content.get("errors", {}).pop(what, None)

    def features(self) -> dict[str, Features]:
        """Feature networks, and features of the real images."""
        if not self._features:
            if self.args.features is not None:
                self._features = {n: load_features(self.args.features, n, self.device) for n in ("trained", "random")}
            elif self.args.tiny:
                real = self.images["train"][0].to(self.device)
                torch.manual_seed(0)
                self._features = {
                    "trained": frozen(FeatureNet(8, 16, 10, 1).eval(), self.device),
                    "random": frozen(random_net(real, width=8, dimensions=16), self.device),
                }
            else:
                raise SystemExit("--features is needed: the folder that feature_net.py wrote.")
            self._real = {n: self._features_of_real(n, f) for n, f in self._features.items()}
            size = len(self._real["trained"])
            count = min(self.args.samples, size // 2)
            floor = fid_floor(self._real["trained"], count)
            self.sheet.content["features"] = {
                "networks": {n: f.network for n, f in self._features.items()}, "real": size,
                "floor": list(floor.values), "floor_count": floor.count, "floor_mean": floor.mean,
                "floor_carried_over": floor.at(self.args.samples, size),
            }  # fmt: skip
            self.sheet.write()
        return self._features

    def kept_real(self, kind: str) -> Tensor | None:
        """Features of the training images, if an earlier call that this result knows of left them in a folder."""
        about = self.sheet.content.get("features")
        found: Tensor | None = None
        if about is not None:
            found = self.files.load(f"real-{about['networks'][kind][:12]}-{about['real']}.features.pt", self.device)
        return found

    def _features_of_real(self, kind: str, network: Features) -> Tensor:
        about = self.sheet.content.get("features", {}).get("networks", {})
        if about and about[kind] != network.network:
            raise SystemExit("The result is in the features of other networks: give the folder that it was measured with to --features.")
        found = self.kept_real(kind)
        if found is None:
            found = network(self.images["train"][0].to(self.device))
            self.files.save(f"real-{network.network[:12]}-{len(found)}.features.pt", found)
        return found

    # ---- plans -------------------------------------------------------------------------------------------------------------------

    def plans(self) -> None:
        for name in self.names():
            kept, whole = (self.sheet.content.setdefault(k, {}) for k in ("plans", "compositions"))
            if whole.get(name) is not None and not self.args.again:
                continue
            if not self.budget.fits(f"plans: {name}", self.args.guess_plans):
                continue
            family = self.family(name)
            base = family[name]
            calibration = Calibration.of(base, self.args.calibration, self.args.few, CALIBRATION_SEED)
            plans = Plans(family, self.images["test"], calibration, self.costs, batch=self.args.sample_batch, half=self.half)
            if name not in kept or self.args.again:
                with self.budget.part(f"plans: {name}"), self.trying(f"plans: {name}"):
                    kept[name] = [w.to_dict() for w in (plans.full, *plans.controls(), *plans.systems())]
                    self.sheet.content.setdefault("planned_in", {})[name] = self.sheet.measured()
                    self._asked()
            if name in kept and self.budget.fits(f"compositions: {name}", self.args.guess_plans / 2):
                with self.budget.part(f"compositions: {name}"), self.trying(f"compositions: {name}"):
                    until = max(20.0, self.args.reserve * 60)
                    ours = plans.compositions(lambda: self.budget.left > until)
                    kept[name] = [w for w in kept[name] if not w["ours"]] + [w.to_dict() for w in ours]
                    whole[name] = "all were tried" if self.budget.left > until else "some were not tried for want of time"
                    self._asked()
            print(f"{name}: {len(kept.get(name, []))} settings; compositions: {whole.get(name, 'not yet')}", flush=True)

    # ---- quality -----------------------------------------------------------------------------------------------------------------

    def quality(self) -> None:
        self.features()
        waiting = [
            (name, seed, way)
            for seed in range(self.args.first_seed, self.args.seeds)
            for name in self.names()
            for way in self.mine(name)
            if not self.has(group="quality", system=name, way=way.title, rows=seed, key=way.key)
        ]
        about = f"{len(waiting)} samplings of {self.args.samples:,} images to do, {self.args.guess_quality * len(waiting) / 60:.0f} minutes"
        print(f"{about} at {self.args.guess_quality:g} s each; {self.budget.left:.0f} s left", flush=True)
        for name, seed, way in waiting:
            title = f"{way.title}, seed {seed}"
            with self.trying(f"load: {name}"):
                self.family(name)
            if name not in self.families:
                continue
            if (name, seed) not in self._full and self.budget.fits(f"full model: {name}, seed {seed}", 3 * self.args.guess_quality):
                with self.budget.part(f"full model: {name}, seed {seed}"), self.trying(f"quality {name}: full model, seed {seed}"):
                    self._reference(name, seed)
            if way.title == "full model" or (name, seed) not in self._full:
                continue
            if self.budget.fits(f"quality {name}: {title}", self.args.guess_quality):
                with self.budget.part(f"quality {name}: {title}"), self.trying(f"quality {name}: {title}"):
                    self._quality(name, way, seed)

    def _reference(self, name: str, seed: int) -> None:
        """The full model's images of a seed, which all others are held against, and its row."""
        way = next(w for w in self.ways(name) if w.title == "full model")
        file = self.files.name(name, way, "images", seed, slug)
        made = self.files.load(file, self.device)
        if made is None or not self.has(group="quality", system=name, way=way.title, rows=seed, key=way.key):
            made = self._quality(name, way, seed).half()
            self.files.save(file, made)
        self._full[name, seed] = made

    def _images(self, name: str, way: Way, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """All images of a seed, and what ran."""
        family = self.family(name)
        model, base = model_of(family, way), family[name]
        denoiser = model.denoiser(way)
        if (name, seed) not in self._noise:
            self._noise = {(name, seed): base.noise(self.args.samples, EVALUATION_SEED + seed)}
        noise, labels = self._noise[name, seed]
        images, shares, kept = [], [], {}
        for part, (n, c) in enumerate(zip(noise.split(self.args.sample_batch), labels.split(self.args.sample_batch), strict=True)):
            drawn = model.draw(denoiser, way, n, c)
            images.append(drawn.images)
            shares.append(model.share(drawn, base) * len(n))
            if part == 0 and drawn.report is not None:
                depth = drawn.report.depth[: len(n)].double() / drawn.report.segments
                kept = {
                    "depth": depth, "log_snr": drawn.report.log_snr[0].tolist(), "cache_bytes": drawn.report.cache_bytes / len(n),
                    "explained": explained_by_step(depth), "within": float(variance_within_step(depth).mean()),
                }  # fmt: skip
        return torch.cat(images), {**kept, "flops": sum(shares) / len(noise), "evaluations": drawn.calls}

    def _quality(self, name: str, way: Way, seed: int) -> Tensor:
        """Measure a setting's images of a seed; returns them."""
        begun = time.monotonic()
        made, ran = self._images(name, way, seed)
        seconds = time.monotonic() - begun
        found: dict[str, Any] = {}
        for kind, network in self.features().items():
            values, real = network(made), self._real[kind]
            stats = [FeatureStatistics.of(x, network.network) for x in (real, values)]
            found["fid" if kind == "trained" else f"fid_{kind}"] = fid(*stats)
            if kind == "trained":
                distance = kid(real, values, subsets=self.args.subsets)
                shares = precision_recall(real[: len(values)], values)
                found |= {"kid": distance.mean, "kid_spread": distance.spread, "precision": shares.precision, "recall": shares.recall}
                labels = torch.arange(len(made), device=self.device) % self.family(name)[name].classes
                with torch.no_grad():
                    found["accuracy"] = float((network.net.head(values).argmax(1) == labels).double().mean())
                self.files.save(self.files.name(name, way, "features", seed, slug), values.half().cpu())
        if way.title == "full model":
            found |= {"psnr_db": None, "relative_l2": 0.0}
        else:
            full = self._full[name, seed].float()
            ratio = psnr(made, full, 2.0)
            found["psnr_db"] = None if bool(ratio.isinf().all()) else float(ratio[ratio.isfinite()].mean())
            found["relative_l2"] = float(relative_l2(made, full).mean())
        if seed == 0:
            shown = {"images": made[:8].half().cpu(), "depth": ran["depth"][:64] if "depth" in ran else None, "log_snr": ran.get("log_snr")}
            self.files.save(self.files.name(name, way, "shown", 0, slug), shown)
        took = time.monotonic() - begun - seconds
        self.sheet.row(
            way=way.title, system=name, group="quality", rows=seed, control=way.control, ours=way.ours, model=way.model,
            flops=ran["flops"], evaluations=ran["evaluations"], **found, explained=ran.get("explained") if way.by_sample else None,
            within=ran.get("within"), cache_bytes=ran.get("cache_bytes"), made_in_s=seconds, judged_in_s=took, key=way.key,
        )  # fmt: skip
        return made

    # ---- time --------------------------------------------------------------------------------------------------------------------

    def time(self) -> None:
        for batch in numbers(self.args.batches):
            for name in self.names():
                ways = [
                    w
                    for w in self.mine(name)
                    if w.title != "full model" and not self.has(group="time", system=name, way=w.title, rows=batch, key=w.key)
                ]
                ready: dict[str, Any] = {}
                if not ways or not self.budget.fits(f"captured: {name}, batch {batch}", 4 * self.args.guess_time):
                    continue
                minutes = self.args.guess_time * len(ways) / 60
                print(f"{name}, batch {batch}: {len(ways)} settings to time, about {minutes:.0f} minutes", flush=True)
                with self.budget.part(f"captured: {name}, batch {batch}"), self.trying(f"captured: {name}, batch {batch}"):
                    self._captured(name, batch, ready)
                if f"captured: {name}, batch {batch}" in self.sheet.content.get("errors", {}):
                    continue
                for way in ways:
                    if self.budget.fits(f"time {name} {batch}: {way.title}", self.args.guess_time):
                        with self.budget.part(f"time {name} {batch}: {way.title}"), self.trying(f"time {name} {batch}: {way.title}"):
                            self._time(name, way, batch, ready)

    def uncompiled(self, name: str) -> dict[str, Model]:
        """A family whose segments are as they were exported: what is captured compiles them itself."""
        if f"{name}, to time" not in self.families:
            found = load_families(self.args.models, self.device, self.dtype, self.args.guidance, self.args.steps, [name])[name]
            self.families[f"{name}, to time"] = found
        return self.families[f"{name}, to time"]

    def _captured(self, name: str, batch: int, ready: dict[str, Any]) -> None:
        """What all settings of a family and batch size share: the full model as one graph, and the parts that plans are made of."""
        family = self.uncompiled(name)
        noise, labels = family[name].noise(batch, TIMING_SEED)
        for model in family.values():
            model.wear(model.name)
            noted: list[dict[str, Any]] = []
            called = Called(model.module, model.net, noted)
            model.sample(called, Way("", "", model.name, self.args.steps), noise, labels)
            runner = ByBlock(self.device, self.code is not None, code=self.code)
            segments = Segments(model.net, runner, noted[0])
            # The full model is whichever of two is faster: one compiled function, or the parts that plans are made of without a plan.
            forms: dict[str, torch.nn.Module] = {"compiled whole": Whole(model.net, noted[0]), "in parts": Denoiser(model.net, run=runner)}
            ran = {n: partial(_each, m, noted, called.times) for n, m in forms.items()}
            done = compare(ran, reference="compiled whole", warmup=1, repeats=self.args.repeats, device=self.device)
            ms = {n: t.median_ms / len(noted) for n, t in done.timings.items()}
            fastest = min(ms, key=ms.__getitem__)
            self.sheet.call.setdefault("full_ms", {})[f"{name}, batch {batch}: {model.name}"] = {**ms, "taken": fastest}
            ready[model.name] = (forms[fastest], noted, called.times, runner, segments)

    def _time(self, name: str, way: Way, batch: int, ready: dict[str, Any]) -> None:
        """Whole runs and the denoiser's calls alone, each in turn with the full model's."""
        family = self.uncompiled(name)
        base, full_way = family[name], Way("full model", "", name, self.args.steps)
        noise, labels = base.noise(batch, TIMING_SEED)
        model = model_of(family, way)
        whole, full_calls, full_times, _, _ = ready[name]
        own, _, _, runner, segments = ready[model.name]
        rows = len(next(iter(full_calls[0].values())))
        functions: dict[str, Callable[[], object]] = {"full": partial(base.sample, Called(whole, base.net), full_way, noise, labels)}
        ran: list[int] = []
        if way.plain:
            functions["ours"] = partial(model.sample, Called(own, model.net), way, noise, labels)
        else:
            denoiser = model.denoiser(way, runner)
            noted: list[dict[str, Any]] = []
            functions["ours"] = partial(model.sample, Called(denoiser, model.net), way, noise, labels)
            called = Called(denoiser, model.net, noted)
            model.sample(called, way, noise, labels)
            if way.regions is None:
                functions["full calls"] = partial(_each, whole, full_calls, full_times)
                functions["calls"] = partial(_each, denoiser, noted, called.times)
                functions["calls"]()
                ran = [denoiser.report.ran.get(k, 0) for k in range(len(model.net.cut().segments))]
                functions["segments"] = segments
        done = compare(functions, reference="full", warmup=1, repeats=self.args.repeats, device=self.device)
        ms = {n: t.median_ms for n, t in done.timings.items()}
        found: dict[str, Any] = {}
        if ran:
            each = segments.median_ms()
            segments.clear()
            ideal = ideal_ms(ran, rows, each)
            found = {
                "calls_ms": ms["calls"], "full_calls_ms": ms["full calls"], "ideal_ms": ideal, "exit_efficiency": ideal / ms["calls"],
                # Against the whole model's own time, scaled by the share of the work: the stricter yardstick.
                "exit_efficiency_whole": ms["full calls"] / len(full_calls) * ideal / sum(each) / ms["calls"],
                "segment_ms": each, "reach": [r / rows / len(full_calls) for r in ran],
            }  # fmt: skip
        ratio = done.ratios["ours"]
        self.sheet.row(
            way=way.title, system=name, group="time", rows=batch, over_full=ratio.value, over_full_95=[ratio.low, ratio.high],
            median_ms=ms["ours"], full_ms=ms["full"], key=way.key, **found,
            samples_ms={n: list(t.samples_ms) for n, t in done.timings.items()},
        )  # fmt: skip

    # ---- text --------------------------------------------------------------------------------------------------------------------

    def text(self) -> None:
        for kind in TEXT:
            model: TextModel | None = None
            for batch in numbers(self.args.text_batches):
                done = {r["name"] for r in self.sheet.content["rows"] if (r["group"], r["system"], r["rows"]) == ("text", kind, batch)}
                waiting = [n for n in TEXT_SYSTEMS if n not in done]
                if not waiting or not self.budget.fits(f"text: {kind}, batch {batch}", self.args.guess_text):
                    continue
                with self.budget.part(f"text: {kind}, batch {batch}"), self.trying(f"text: {kind}, batch {batch}"):
                    model = model or TextModel(kind, self.args.tiny, self.device, self.dtype, self.args.steps, self.args.guidance)
                    for row in model.times(batch, waiting, self.args.repeats, self.args.compile):
                        self.sheet.row(system=kind, group="text", rows=batch, **row)

    # ---- page --------------------------------------------------------------------------------------------------------------------

    def page(self) -> None:
        for name in self.names():
            ways = {w.title: w for w in self.ways(name)}
            results = combined(name, self.sheet.content["rows"], ways)
            if "full model" not in results or len(results) < 2:
                print(f"{name}: nothing to compare yet", flush=True)
                continue
            batches = sorted({b for r in results.values() for b in r.time_ms})
            chosen = [t for t, w in ways.items() if w.about.get("chosen")]
            self.sheet.content.setdefault("verdicts", {})[name] = {
                "seeds": len(results["full model"].fid),
                "by_flops": verdicts(results, None),
                "by_time": {str(b): verdicts(results, b) for b in batches},
                "half_time": [found for b in batches if (found := winner(results, chosen, b, RIVALS)) is not None],
                "half_time_any_control": [
                    found for b in batches if (found := winner(results, chosen, b, sorted({r.name for r in results.values() if r.control})))
                ],
                "over_cost": [
                    {"way": t, "asked": ways[t].about["cost"], "executed": r.flops} for t, r in results.items() if "cost" in ways[t].about
                ],
            }  # fmt: skip
            for found in self.sheet.content["verdicts"][name]["half_time"]:
                found["by_images"] = self._by_images(name, ways, found)
                there = {t for t, r in results.items() if found["batch"] in r.time_ms}
                found["not_measured"] = [t for t, w in ways.items() if w.control and w.name in RIVALS and t not in there]
            self.sheet.write()
            self._page(name, ways, results)

    def _by_images(self, name: str, ways: Mapping[str, Way], found: Mapping[str, Any]) -> dict[str, Any]:
        """The distance of a composition less that of each control's next dearer setting, with an interval over images of the first seed."""
        out: dict[str, Any] = {}
        for control, about in found["controls"].items():
            pair = (found["way"], about["next_dearer"])
            if None in pair:
                continue
            if (name, *pair) not in self._gaps:
                made = [self.files.load(self.files.name(name, ways[t], "features", 0, slug)) for t in pair]
                if any(m is None for m in made):
                    print(f"{name}: features of {' or '.join(pair)} are in none of the folders; no interval over images", flush=True)
                    continue
                real = self.kept_real("trained")
                if real is None:
                    print(f"{name}: features of the training images are in none of the folders; no interval over images", flush=True)
                    break
                gap = fid_difference(made[0].float(), made[1].float(), FeatureStatistics.of(real))
                self._gaps[(name, *pair)] = {"setting": pair[1], "difference": [gap.value, gap.low, gap.high], "level": gap.level}
            out[control] = self._gaps[(name, *pair)]
        return out

    def _page(self, name: str, ways: Mapping[str, Way], results: Mapping[str, ImageResult]) -> None:
        def kept(title: str) -> dict[str, Any] | None:
            found: dict[str, Any] | None = self.files.load(self.files.name(name, ways[title], "shown", 0, slug))
            return found

        full = kept("full model")
        shown = [
            t for t in results if t != "full model" and (ways[t].about.get("chosen") or ways[t].setting.endswith(f"{self.costs[-1]:g}"))
        ]
        images = {t: found["images"].float() for t in shown[:8] if (found := kept(t)) is not None}
        depths, levels = {}, []
        for title in [t for t in results if ways[t].by_sample or ways[t].about.get("chosen")][:8]:
            found = kept(title)
            if found is not None and found["depth"] is not None and found["depth"].shape[1] > 1 and bool((found["depth"] >= 0).all()):
                depths[title] = found["depth"]
                levels = found["log_snr"]
        same = {d.shape[1] for d in depths.values()} == {len(levels)}
        about = self.sheet.content["features"]
        target = Path(self.args.page or self.files.folders[0]) / f"diffusion-{name}.html"
        image_report(
            target, full=results["full model"], results=[r for t, r in results.items() if t != "full model"],
            features=f"a classifier of the training images; reference: {about['real']:,} of these",
            images=(full["images"].float(), images) if full is not None and images else None,
            columns=[f"class {k}" for k in range(8)] if images else (), depths=depths, noise=levels if same else (),
            title=f"Diffusion: {name}, cost and quality",
            notes=[
                f"{self.args.samples:,} images a seed, {self.args.steps} steps, guidance {self.args.guidance:g}, {self.dtype}.",
                "Settings were chosen on other noise and on held-out images.",
                *self.sheet.content["missing"][name],
            ],
            environment=self.sheet.content["environment"],
        )  # fmt: skip
        print(f"wrote {target}", flush=True)


def _each(denoiser: torch.nn.Module, calls: Sequence[Mapping[str, Any]], times: Tensor | None) -> None:
    """A trajectory's calls again, without the sampler."""
    if isinstance(denoiser, Denoiser):
        denoiser.reset(times)
    for inputs in calls:
        denoiser(**inputs)
    if isinstance(denoiser, Denoiser):
        denoiser.release()


def _as_measured(args: argparse.Namespace) -> None:
    """Settings of a call that measures nothing are those of the first result that is there."""
    path = next((p for p in (args.out, *args.take) if p.is_file()), None)
    if path is None:
        raise SystemExit(f"There is no result at {args.out} to make a page of, and none to --take.")
    found = json.loads(path.read_text())
    for name in SETTINGS[1:]:
        setattr(args, name, ",".join(map(str, found[name])) if isinstance(found[name], list) else found[name])


def estimate(args: argparse.Namespace) -> str:
    """What a whole run would take on one H100, from the guesses, in words."""
    return (
        f"{args.minutes:g} minutes; expected on one H100: plans about {args.guess_plans:g} s a model, quality {args.guess_quality:g} s a "
        f"setting and seed, time {args.guess_time:g} s a setting and batch size, text {args.guess_text:g} s a model and batch size"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=None, help="folder that train_diffusion.py wrote; text and page need none")
    parser.add_argument("--out", type=Path, required=True, help="the result; what is there is gone on with")
    parser.add_argument("--data", type=Path, default=None, help="images with splits train and test; scikit-learn's digits by default")
    parser.add_argument("--features", type=Path, default=None, help="folder that feature_net.py wrote")
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="results of other calls with the same settings, to take in")
    parser.add_argument("--beside", type=int, default=0, help="how many other processes measure on this host meanwhile; noted")
    parser.add_argument("--work", type=Path, nargs="+", default=None,
                        help="folder for images and features, beside the result by default; more are read")  # fmt: skip
    parser.add_argument("--page", type=Path, default=None, help="folder for the HTML pages; the first of WORK by default")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of these, with commas between")
    parser.add_argument("--families", default="flow,noise,unet", help="some of these, with commas between")
    parser.add_argument("--again", action="store_true", help="choose plans anew; rows of changed settings are dropped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 on CUDA by default, float32 on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--reserve", type=float, default=0.5, help="minutes that the choice of compositions leaves")
    parser.add_argument("--costs", default="0.75,0.6,0.5")
    parser.add_argument("--half", default="0.45,0.4", help="further costs of compositions alone, so that one takes half of the time")
    parser.add_argument(
        "--share", default="1/1", help="of the settings that quality and time measure, e.g. 1/2 here and 2/2 in another call"
    )
    parser.add_argument("--most", type=int, default=None, help="settings of a family that quality and time measure, the first that matter")
    parser.add_argument("--first-seed", type=int, default=0, help="that this call samples with; those before are another call's")
    parser.add_argument("--batches", default="64,8,1")
    parser.add_argument("--text-batches", default="1,8")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    for name, value in {"items": None, "steps": 50, "samples": 10_000, "sample-batch": 1000, "seeds": 3, "calibration": 256, "few": 64,
                        "repeats": 7, "subsets": 100}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, guess in {"plans": 300.0, "quality": 30.0, "time": 15.0, "text": 300.0}.items():
        parser.add_argument(f"--guess-{name}", type=float, default=guess, help="seconds, until one was seen")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--tiny", action="store_true", help="a trial of everything")
    args = parser.parse_args(arguments)
    if args.tiny:
        trial: dict[str, Any] = {
            "steps": 8,
            "samples": 24,
            "sample_batch": 12,
            "seeds": 1,
            "calibration": 4,
            "few": 2,
            "repeats": 1,
            "subsets": 2,
        }
        trial |= {"costs": "0.6", "half": "0.5", "batches": "2", "text_batches": "1", "items": 200}
        trial |= {f"guess_{part}": 1.0 for part in ("plans", "quality", "time", "text")}
        parser.set_defaults(**trial)  # what was given stays
        args = parser.parse_args(arguments)
    asked = asked_parts(args.parts, PARTS)
    if asked == ["page"]:
        _as_measured(args)
    if not {"plans", "quality", "time"} & set(asked):
        args.models = None
    elif args.models is None:
        parser.error("--models is needed: the folder that train_diffusion.py wrote.")
    torch.set_float32_matmul_precision("high")
    print(estimate(args), flush=True)
    bench = Benchmark(args)
    run_parts({name: getattr(bench, name) for name in PARTS}, asked, bench.sheet)


if __name__ == "__main__":
    main()
