"""Reproductions of diffusion systems: train a small flow transformer on real images, sample at several costs, and compare FID.

All trainings begin with the same weights and take the same number of steps, the full model's own continuation included. Beside the system
stand, at every cost: fewer steps of the sampler, the best schedule of depths by noise level, reuse at random, and a constant depth. FID is
in features of a classifier that is trained here on the same images, with as many samples as the variant says: it is for comparison between
rows of one table only. Costs are executed FLOPs of whole images over those of the full model with all steps. Every method but those whose
weights are trained for one cost is calibrated by `offramp.calibrate` on other noise. Nothing is tuned after the fact: the verdict is the
card's predicate on the measured numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp import systems
from offramp.budget import MeanCost, threshold_for_cost
from offramp.cli import data as reading
from offramp.cli.image_nets import EulerFlow, Features, SmallDiT
from offramp.cli.progress import Say
from offramp.cli.reproduce_common import Reproduction, VariantSettings, averaged
from offramp.core.errors import BudgetInfeasible, InvalidInput, NoEffectWarning
from offramp.core.noise import FlowMatching
from offramp.core.system import System
from offramp.diffusion import DenoisingNet
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import DiffusionModel, attach_diffusion
from offramp.engines.diffusion.pipeline import sample
from offramp.measure.image_quality import FeatureStatistics, explained_by_step, fid, relative_l2
from offramp.measure.pareto import Point, curve, interpolate, upper_hull
from offramp.policies.skips import ConstantDepth, DepthSchedule, LayerGroups
from offramp.train import fit, noisy_loader
from offramp.train.denoising import ExitsView, PlanView, add_heads
from offramp.train.noising import Noising, RectifiedFlow
from offramp.train.recipe import FinalOnly, Joint
from offramp.verbs import calibrate

CONTROLS = {"steps": "few-steps", "schedule": "static-schedule", "random": "random-skip", "shallow": "shallow"}
"""What stands beside every system: a metric ``gain_over_X`` for each."""


@dataclass(frozen=True)
class ImageSettings(VariantSettings):
    """One variant of a reproduction of a diffusion system.

    Attributes:
        data: ``digits`` (of scikit-learn), or ``{data}`` for the path given on the command line, with a split ``train``.
        depth: blocks of the transformer.
        width: of its state.
        heads: of attention.
        patch: side of a token.
        steps: of the first training.
        tune_steps: of every training that begins with its weights.
        batch_size: of trainings.
        learning_rate: of the first training; others take ``tune_rate``.
        tune_rate: see there.
        sampler_steps: of the full model.
        samples: images for an FID.
        sample_batch: of them at a time.
        calibration: samples to calibrate with; half of them are held out.
        feature_steps: of the classifier that judges.
        feature_width: of its first layers.
        budgets: costs, as shares of the full model's with all steps.
        below: further costs at which controls are measured, so that they can be compared at any cost in between.
        mixed_precision: of training on CUDA.
    """

    data: str
    depth: int
    width: int
    heads: int
    steps: int
    tune_steps: int
    patch: int = 2
    batch_size: int = 64
    learning_rate: float = 2e-3
    tune_rate: float = 5e-4
    sampler_steps: int = 20
    samples: int = 512
    sample_batch: int = 256
    calibration: int = 32
    feature_steps: int = 300
    feature_width: int = 16
    budgets: tuple[float, ...] = (0.75, 0.6, 0.5)
    below: tuple[float, ...] = (0.4,)
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.steps, self.tune_steps, self.samples, self.sample_batch, self.feature_steps, self.batch_size)
        if min(counts) < 1 or self.sampler_steps < 2 or self.calibration < 2:
            raise InvalidInput("Numbers of steps, samples and rows must be at least 1, sampler_steps and calibration 2.")
        if not self.budgets or not all(0 < b < 1 for b in (*self.budgets, *self.below)):
            raise InvalidInput("budgets must not be empty, and costs lie inside (0, 1).")


# ---- images and models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Images ``[N, C, H, W]`` in [-1, 1] and their classes ``[N]``."""

    images: Tensor
    classes: Tensor

    @property
    def count(self) -> int:
        """Classes."""
        return int(self.classes.max()) + 1


def read_pictures(settings: ImageSettings, data: str | None, device: str) -> Pictures:
    """Read the images of a variant.

    Raises:
        InvalidInput: it asks for a path and none was given, or what is there has no labels.
    """
    if settings.data == "digits":
        digits = reading.optional("sklearn.datasets", "demo", "The digits data set").load_digits()
        images, classes = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(digits.target).long()
        return Pictures(images.to(device), classes.to(device))
    if "{data}" in settings.data and data is None:
        raise InvalidInput("This variant reads images from a path: give it with --data.")
    records = reading.read(settings.data.replace("{data}", data or ""), split="train", images=reading.Images())
    if records.labels is None:
        raise InvalidInput(f"{records.source} has no labels.")
    held = torch.stack([records[i][0] for i in range(len(records))])
    return Pictures((held * 2 - 1).to(device), records.labels.to(device))


class Bench:
    """One repetition: the images, the network that judges, and models by name, each trained once.

    Args:
        settings: of the variant.
        pictures: real images.
        seed: of everything random.
        device: to train and sample on.
        say: told what is being done.
    """

    def __init__(self, settings: ImageSettings, pictures: Pictures, seed: int, device: str, say: Say) -> None:
        self.settings, self.pictures, self.seed, self.device, self.say = settings, pictures, seed, device, say
        channels, size = int(pictures.images.shape[1]), int(pictures.images.shape[2])
        torch.manual_seed(seed)
        self.features = Features(channels, pictures.count, size, settings.feature_width).to(device)
        say(f"seed {seed}: the network that judges")
        self.accuracy = self.features.fit(pictures.images, pictures.classes, settings.feature_steps, settings.batch_size, seed)
        self.real = self._statistics(pictures.images)
        self.make = partial(SmallDiT, channels, pictures.count, size, settings.depth, settings.width, settings.heads, settings.patch)
        self._models: dict[str, DiffusionModel] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._start: dict[str, Tensor] | None = None
        generator = torch.Generator().manual_seed(seed + 1000)
        count = settings.samples + settings.calibration
        noise = torch.randn(count, channels, size, size, generator=generator).to(device)
        labels = (torch.arange(count) % pictures.count).to(device)
        self.noise, self.labels = noise[: settings.samples], labels[: settings.samples]
        self.other: dict[str, Any] = {"noise": noise[settings.samples :], "inputs": {"class_labels": labels[settings.samples :]}}
        self.full = self.sampled(self.model(systems.build("few-steps", share=1.0), "full", Joint(FinalOnly())), ())

    def _statistics(self, images: Tensor) -> FeatureStatistics:
        with torch.no_grad():
            return FeatureStatistics.of(torch.cat([self.features(x) for x in images.split(512)]), "classifier trained here")

    def start(self) -> dict[str, Tensor]:
        """Weights that all trainings begin with."""
        if self._start is None:
            self.say(f"seed {self.seed}: training")
            torch.manual_seed(self.seed)
            model = self.make().to(self.device)
            net = self.attached(model, systems.build("few-steps")).net
            self._trained(ExitsView(net, []), Joint(FinalOnly()), self.settings.steps, self.settings.learning_rate)
            self._start = {k: v.clone() for k, v in model.state_dict().items()}
        return self._start

    def attached(self, model: nn.Module, system: System) -> DiffusionModel:
        """A system on a model."""
        example = {
            "sample": self.pictures.images[:2].clone(),
            "timestep": torch.tensor([500.0, 100.0], device=self.device),
            "class_labels": self.pictures.classes[:2].clone(),
        }
        return attach_diffusion(model.eval(), system=system, scheduler=EulerFlow(), noise=FlowMatching(), example=example)

    def model(self, system: System, key: str, recipe: Any) -> DiffusionModel:
        """A system on a model that was trained for it, from the weights that all begin with.

        Args:
            system: the method.
            key: what was trained is kept under this name.
            recipe: how; the method's own where it trains what its plan leaves.
        """
        if key in self._models:
            made = self._models[key]
            return self.attached(made.net.model, system) if made.system != system else made
        model = self.make().to(self.device)
        model.load_state_dict(self.start())
        made = self.attached(model, system)
        self.say(f"seed {self.seed}: training {key}")
        as_run = made.skips is not None and made.skips.as_run and getattr(made.skips, "depths", True)
        view: Any = PlanView(made.net, made.points) if as_run else ExitsView(made.net, None if key == "uniform" else [])
        self._trained(view, recipe, self.settings.tune_steps, self.settings.tune_rate)
        self._models[key] = made
        return made

    def with_heads(self, system: System, full: DiffusionModel) -> DiffusionModel:
        """Exits trained on the full model as it is."""
        if system.card.name in self._models:
            return self._models[system.card.name]
        made = self._models[system.card.name] = self.attached(copy.deepcopy(full.net.model), system)
        add_heads(made.net, system.head, made.layout.blocks[:-1])
        self.say(f"seed {self.seed}: training exits")
        self._trained(ExitsView(made.net, made.layout.blocks[:-1]), system.recipe, self.settings.tune_steps, 2 * self.settings.tune_rate)
        return made

    def _trained(self, view: Any, recipe: Any, steps: int, rate: float) -> None:
        images, classes = self.pictures.images.cpu(), self.pictures.classes.cpu()
        noising = Noising(RectifiedFlow(), label="class_labels")
        loader = noisy_loader(images, noising, min(self.settings.batch_size, len(images)), classes=classes)
        fit(
            view,
            loader,
            recipe,
            epochs=-(-steps // len(loader)),
            max_steps=steps,
            seed=self.seed,
            progress=False,
            max_grad_norm=1.0,
            mixed_precision=self.settings.mixed_precision if self.device != "cpu" else "no",
            optimizer=lambda groups: torch.optim.AdamW(groups, rate, weight_decay=0.0),
            scheduler=lambda optimizer, count: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda k: min(1.0, (k + 1) / (0.05 * count + 1), (count - k) / (0.3 * count + 1))
            ),
        )
        view.model.eval()

    def sampled(self, made: DiffusionModel, points: Sequence[Any] | None, share: float = 1.0) -> dict[str, Any]:
        """Images, their FID and what they cost, of a system's points or its published settings."""
        asked = self.settings.sampler_steps
        steps = max(1, int(share * asked + 1e-9))
        images, flops, depths = [], [], []
        for noise, labels in zip(self.noise.split(self.settings.sample_batch), self.labels.split(self.settings.sample_batch), strict=True):
            denoiser = made.run(points)
            images.append(sample(denoiser, EulerFlow(), noise, steps=steps, inputs={"class_labels": labels}))
            flops.append(denoiser.report.row_cost * steps / asked)
            depths.append(denoiser.report.depth)
        pictures, depth = torch.cat(images), torch.cat(depths)
        row = {
            "cost": float(torch.cat(flops).mean()),
            "fid": fid(self._statistics(pictures), self.real),
            "explained": explained_by_step(depth) if len(depth.unique()) > 1 else None,
        }
        if hasattr(self, "full"):
            row["drift"] = float(relative_l2(pictures, self.full["images"]).mean())
        return {**row, "images": pictures}

    def row(self, name: str, arguments: Mapping[str, Any], cost: float) -> dict[str, Any]:
        """`at_cost` without its images, or why it cannot be; the same whatever was asked for before, and found once."""
        key = json.dumps([name, dict(arguments), cost], sort_keys=True, default=str)
        if key not in self._rows:
            self.say(f"seed {self.seed}: {name} at {cost:g}")
            torch.manual_seed(self.seed)
            try:
                found = {"budget": cost} | {k: v for k, v in at_cost(self, name, arguments, cost).items() if k != "images"}
                self._rows[key] = found | {"fid_ratio": found["fid"] / self.full["fid"], "excess": found["cost"] - cost}
            except BudgetInfeasible as error:
                self._rows[key] = {"budget": cost, "infeasible": str(error)}
        return dict(self._rows[key])


# ---- one system at one cost ----------------------------------------------------------------------------------------------


def at_cost(bench: Bench, name: str, arguments: Mapping[str, Any], cost: float) -> dict[str, Any]:
    """A system brought to a cost: calibrated, or trained for it.

    Raises:
        BudgetInfeasible: it cannot be.
    """
    system = systems.build(name, **arguments)
    full = bench.model(systems.build("few-steps", share=1.0), "full", Joint(FinalOnly()))
    skips = system.skips
    if system.reduction is not None:
        return with_tokens(bench, system, full, cost)
    if system.head is not None:
        made = bench.with_heads(system, full)
    elif isinstance(skips, DepthSchedule) and not skips.depths:
        made = bench.model(system, "uniform", system.recipe)
    elif isinstance(skips, DepthSchedule | ConstantDepth | LayerGroups):
        return trained_for(bench, system, cost)
    else:
        made = bench.attached(full.net.model, system)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        plan = calibrate(made, MeanCost(cost), **bench.other, steps=bench.settings.sampler_steps)
    return bench.sampled(made, plan.points, plan.share) | {"how": plan.certificate.method, "held_out": plan.cost.value}


def with_tokens(bench: Bench, system: System, full: DiffusionModel, cost: float) -> dict[str, Any]:
    """A method that computes some of the tokens, at the largest share of them whose cost on calibration noise is within a cost.

    Raises:
        BudgetInfeasible: no share is.
    """

    def at(ratio: float) -> DiffusionModel:
        return bench.attached(full.net.model, dataclasses.replace(system, reduction=dataclasses.replace(system.reduction, ratio=ratio)))

    def run(ratio: float) -> Tensor:
        denoiser = at(ratio).run()
        sample(denoiser, EulerFlow(), bench.other["noise"], steps=bench.settings.sampler_steps, inputs=bench.other["inputs"])
        return denoiser.report.row_cost

    found = threshold_for_cost(run, cost, 0.01, 1.0)
    return bench.sampled(at(found.threshold), None) | {"how": f"ratio {found.threshold:.4g}"}


def candidates(system: System, blocks: int) -> Iterator[System]:
    """A system whose weights are trained for one cost, at ever lower costs."""
    skips = system.skips
    if isinstance(skips, DepthSchedule):  # the published list, lowered at once for all levels
        for lower in range(skips.of):
            yield dataclasses.replace(system, skips=DepthSchedule(tuple(max(1, d - lower) for d in skips.depths), skips.of))
    elif isinstance(skips, LayerGroups):
        for groups in range(2, blocks + 1):
            if blocks % groups == 0:
                yield dataclasses.replace(system, skips=LayerGroups(groups))
    else:
        for depth in range(blocks - 1, 0, -1):
            yield dataclasses.replace(system, skips=ConstantDepth(depth / blocks))


def trained_for(bench: Bench, system: System, cost: float) -> dict[str, Any]:
    """The dearest of a system's settings within a cost, trained for it."""
    start = bench.make().to(bench.device)
    start.load_state_dict(bench.start())
    best = 1.0
    for found in candidates(system, bench.settings.depth):
        probe = bench.attached(start, found)  # each goes on at places of its own; the published one need not fit this model
        spent = _scheduled_cost(bench, probe.net, found.skips.points(probe.layout))
        best = min(best, spent)
        if spent <= cost * (1 + 1e-9):
            key = f"{system.card.name} {found.skips}"
            return bench.sampled(bench.model(found, key, system.recipe), None) | {"how": str(found.skips)}
    raise BudgetInfeasible(
        f"The cheapest setting of {system.card.name} costs {best:.4g}, more than {cost:g}.",
        requested=cost,
        best=best,
        unit="share of the full model's cost",
    )


def _scheduled_cost(bench: Bench, net: DenoisingNet, points: Sequence[Any]) -> float:
    """Cost of points that the noise level decides, by one row."""
    denoiser = Denoiser(net, points)
    first = {"class_labels": bench.labels[:1]}
    sample(denoiser, EulerFlow(), bench.noise[:1], steps=bench.settings.sampler_steps, inputs=first)
    return denoiser.report.cost


# ---- the result ----------------------------------------------------------------------------------------------------------


def measure_seed(name: str, settings: ImageSettings, pictures: Pictures, seed: int, device: str, say: Say) -> dict[str, Any]:
    """What one repetition gave: raw numbers as JSON data."""
    return measure_on(Bench(settings, pictures, seed, device, say), name, settings)


def measure_on(bench: Bench, name: str, settings: ImageSettings) -> dict[str, Any]:
    """The same on a bench that other systems of the same settings may have used: what they share is there already."""
    full, images = bench.full, bench.pictures.images
    floor = fid(bench._statistics(images[::2]), bench._statistics(images[1::2]))
    rows = {"ours": [bench.row(name, settings.system, cost) for cost in settings.budgets]}
    for label, control in CONTROLS.items():
        rows[label] = [bench.row(control, {}, cost) for cost in (*settings.budgets, *settings.below)]
    for row in rows["ours"]:
        if "infeasible" not in row:
            row |= {f"gain_over_{k}": _gain(row, rows[k], full["fid"]) for k in CONTROLS}
    return {
        "seed": bench.seed,
        "images": len(images),
        "samples": settings.samples,
        "classifier_accuracy": bench.accuracy,
        "fid_of_halves": floor,
        "full": {"cost": full["cost"], "fid": full["fid"]},
        "budgets": rows.pop("ours"),
        "controls": rows,
    }


def _gain(row: Mapping[str, Any], control: Sequence[Mapping[str, Any]], full: float) -> float | None:
    """FID of a control at the cost of a row, minus the row's, over the full model's; ``None`` below the control's cheapest."""
    points = [Point(f"{r['budget']:g}", r["cost"], -r["fid"]) for r in control if "infeasible" not in r]
    if not points or row["cost"] < min(p.cost for p in points):
        return None
    reference = curve("control", upper_hull([*points, Point("full", 1.0, -full)]))
    return (-interpolate(reference, row["cost"]) - row["fid"]) / full


SHOWN = ("cost", "fid", "fid_ratio", "drift", "explained", *(f"gain_over_{k}" for k in CONTROLS))
"""The numbers of a row that are averaged over seeds, in the order they are shown."""


def summarise(settings: ImageSettings, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds: the full model, and the system and every control at every cost."""

    def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"budget": rows[0].get("budget"), **averaged(rows, SHOWN)}

    costs = len(settings.budgets) + len(settings.below)
    return {
        "full": mean([s["full"] for s in seeds]),
        "rows": [mean([s["budgets"][k] for s in seeds]) for k in range(len(settings.budgets))],
        "controls": {name: [mean([s["controls"][name][k] for s in seeds]) for k in range(costs)] for name in CONTROLS},
    }


COLUMNS = {"cost": "cost", "fid": "FID", "fid_ratio": "over full", "drift": "drift", "explained": "R2 of depth on step"}
"""Numbers of the table and their heads; gains over the controls at equal cost are in the saved result."""


def table_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary as a table: columns, then the full model, the system and every control at every cost."""
    summary = result["summary"]
    every = [("full", summary["full"]), *((result["system"], r) for r in summary["rows"])]
    every += [(CONTROLS[k], r) for k, rows in summary["controls"].items() for r in rows]
    rows = [
        (name, "-" if r["budget"] is None else f"{r['budget']:g}", *(f"{r[k][0]:.2f}" if k in r else "-" for k in COLUMNS))
        for name, r in every
    ]
    return ("", "asked", *COLUMNS.values()), rows


DENOISERS = Reproduction(
    "denoise",
    ImageSettings,
    "tiny",
    read=lambda settings, data, device, say: read_pictures(settings, data, device),
    repeat=measure_seed,
    summarise=summarise,
    table=table_rows,
)
"""Methods that skip a part of a denoiser."""

__all__ = ["CONTROLS", "DENOISERS", "Bench", "ImageSettings", "Pictures", "measure_on", "measure_seed", "read_pictures", "table_rows"]
