"""Reproductions: train a method small on real data, measure its claim, and set the result beside what it must beat.

The baselines are always the same: the full model trained alone; one fixed exit, or the best blind mix of two, at equal cost; random exits
with the method's own shares; and a smaller static model trained alone, or the best mix of two, at equal cost. Nothing is tuned after the
fact: the verdict is the card's predicate on the measured numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from offramp import systems
from offramp.budget import MeanCost, calibrate
from offramp.cli import data as reading
from offramp.cli.config import read_toml, unknown_key
from offramp.cli.nets import NETS
from offramp.core.bundle import write_json
from offramp.core.certificate import Estimate
from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.core.flops import count_flops
from offramp.core.system import Predicate, System
from offramp.core.trace import Trace
from offramp.engines.record import record
from offramp.measure.clock import environment
from offramp.measure.pareto import Curve, Point, curve, fixed_exit_curve, interpolate, plan_point, random_exit, upper_hull
from offramp.measure.quality import exit_accuracy, outcome
from offramp.network import MultiExit, as_example, attach
from offramp.train.loop import fit
from offramp.train.recipe import FinalOnly, Joint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """One variant of a reproduction: a table ``[variant]`` of its TOML file.

    Attributes:
        data: ``digits`` (of scikit-learn), ``images`` or ``text``.
        net: ``conv`` or ``text``, see `offramp.cli.nets`.
        depth: blocks of the full model.
        epochs: of each training.
        net_args: other arguments of the network.
        static_depths: blocks of the smaller static models.
        train: data spec of the training items; ``{data}`` stands for the path given on the command line.
        test: data spec of the test items.
        train_split: split inside ``train``.
        test_split: split inside ``test``.
        calibration: share of the training items that is held out to choose thresholds, in (0, 1).
        test_share: share of the items held out for testing where there is no ``test`` spec, in (0, 1).
        batch_size: in training.
        learning_rate: highest, of AdamW, for all weights; it rises over the first fifth of the steps and falls by a cosine.
        weight_decay: of AdamW.
        augment: shift images by up to 4 pixels and mirror them, in training.
        mean: subtracted from images per channel.
        std: divided by.
        vocabulary: words of the tokenizer that is made from the training texts.
        length: longest text, in tokens.
        seeds: one whole repetition each.
        budgets: mean costs to calibrate for, as shares of the full model's FLOPs.
        system: arguments of the system's builder.
    """

    data: str
    net: str
    depth: int
    epochs: int
    net_args: Mapping[str, Any] = field(default_factory=dict)
    static_depths: tuple[int, ...] = ()
    train: str = ""
    test: str = ""
    train_split: str | None = None
    test_split: str | None = None
    calibration: float = 0.2
    test_share: float = 0.3
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    augment: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocabulary: int = 8000
    length: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    system: Mapping[str, Any] = field(default_factory=dict)


def variants(path: Path) -> list[str]:
    """Names of the variants in a configuration."""
    return [name for name, table in read_toml(path).items() if isinstance(table, Mapping) and name != "system"]


def load_settings(path: Path, variant: str) -> Settings:
    """Read one variant; keys outside tables are shared by all variants.

    Raises:
        InvalidInput: the file or the variant is missing, a key is unknown or a required one is absent.
    """
    config = read_toml(path)
    if variant not in variants(path):
        raise InvalidInput(f"{path} has no variant {variant!r}; it has: {', '.join(variants(path))}.")
    merged: dict[str, Any] = {k: v for k, v in config.items() if not isinstance(v, Mapping) or k == "system"} | dict(config[variant])
    for key in merged:
        if key not in Settings.__dataclass_fields__:
            raise unknown_key(key, list(Settings.__dataclass_fields__), f"{path}, variant {variant}")
    for key in ("data", "net", "depth", "epochs"):
        if key not in merged:
            raise InvalidInput(f"{path}, variant {variant}: the key {key!r} is missing.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
    settings = Settings(**values)
    if settings.net not in NETS:
        raise unknown_key(settings.net, list(NETS), f"{path}, variant {variant}: net")
    if settings.data not in ("digits", "images", "text"):
        raise unknown_key(settings.data, ["digits", "images", "text"], f"{path}, variant {variant}: data")
    if any(not 1 <= d < settings.depth for d in settings.static_depths):
        raise InvalidInput(
            f"{path}, variant {variant}: static_depths must lie between 1 and {settings.depth - 1}, got {settings.static_depths}."
        )
    if not settings.seeds or not settings.budgets:
        raise InvalidInput(f"{path}, variant {variant}: seeds and budgets must not be empty.")
    return settings


class Items(Dataset[tuple[Any, Tensor]]):
    """Items in memory, with the augmentation of training where it is asked for."""

    def __init__(self, inputs: Sequence[Any], labels: Tensor, pad: Mapping[str, int] | None = None, augment: bool = False) -> None:
        self.inputs, self.labels, self.pad, self.augment = inputs, labels, pad, augment

    def __len__(self) -> int:
        return int(self.labels.numel())

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        item = self.inputs[index]
        if self.augment:
            if torch.rand(()) < 0.5:
                item = item.flip(-1)
            top, left = torch.randint(0, 9, (2,)).tolist()
            item = nn.functional.pad(item, (4, 4, 4, 4))[:, top : top + item.shape[1], left : left + item.shape[2]]
        return item, self.labels[index]

    def take(self, rows: Tensor, augment: bool = False) -> Items:
        return Items([self.inputs[int(i)] for i in rows], self.labels[rows], self.pad, augment)

    def collate(self, batch: Sequence[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        inputs = [item for item, _ in batch]
        labels = torch.stack([label for _, label in batch])
        return (torch.stack(inputs) if self.pad is None else reading.pad_batch(inputs, self.pad)), labels

    def loader(self, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=self.collate)


@dataclass(frozen=True)
class Pool:
    """The items of a reproduction.

    Attributes:
        train: to be divided into training and calibration items, by seed.
        test: fixed, or ``None`` where it is also divided off ``train``, by seed.
        classes: number of classes.
        vocabulary: number of token ids, for text.
    """

    train: Items
    test: Items | None
    classes: int
    vocabulary: int = 0


def load_pool(settings: Settings, data: str | None) -> Pool:
    """Read the items of a variant.

    Args:
        settings: says what they are.
        data: path that ``{data}`` stands for.

    Raises:
        InvalidInput: the path is needed and missing, or cannot be read.
        MissingExtra: scikit-learn is not installed.
    """
    if settings.data == "digits":
        loaded = reading.optional("sklearn.datasets", "demo", "The digits data set").load_digits()
        images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
        return Pool(Items(list(images), torch.from_numpy(loaded.target).long()), None, 10)
    if not settings.train or ("{data}" in settings.train + settings.test and data is None):
        raise InvalidInput("This variant reads data from a path: give it with --data.")
    specs = [
        (s.format(data=data), split) for s, split in ((settings.train, settings.train_split), (settings.test, settings.test_split)) if s
    ]
    texts = images_as = None
    if settings.data == "text":
        plain = reading.read(specs[0][0], split=specs[0][1], texts=reading.words([], 4))
        texts = reading.words(["\n".join([plain.raw(i)]) for i in range(len(plain))], settings.vocabulary, settings.length)
    else:
        images_as = reading.Images(mean=settings.mean, std=settings.std)
    read = [reading.read(spec, split=split, images=images_as, texts=texts) for spec, split in specs]
    classes = max(len(r.classes) for r in read)
    held = [Items([r[i][0] for i in range(len(r))], _labels(r), r.pad if settings.data == "text" else None) for r in read]
    return Pool(held[0], held[1] if len(held) > 1 else None, classes, settings.vocabulary)


def _labels(records: reading.Records) -> Tensor:
    if records.labels is None:
        raise InvalidInput(f"{records.source} has no labels.")
    return records.labels


def make_net(settings: Settings, pool: Pool, depth: int) -> nn.Module:
    """A network of the variant with the given depth."""
    first = pool.train.inputs[0]
    args: dict[str, Any] = {"classes": pool.classes, "depth": depth, **settings.net_args}
    if settings.net == "text":
        args |= {"vocabulary": pool.vocabulary, "length": settings.length}
    else:
        args |= {"channels": int(first.shape[0]), "full_depth": settings.depth}
    try:
        return NETS[settings.net](**args)
    except TypeError as error:
        raise InvalidInput(f"net_args do not fit the net {settings.net!r}: {error}.") from error


def run_seed(settings: Settings, pool: Pool, system: System, seed: int, device: str, say: Say) -> dict[str, Any]:
    """Train, calibrate and measure once. Returns raw numbers as JSON data."""
    train, held_out, test = _divide(settings, pool, seed)
    example = train.collate([train[i] for i in range(2)])[0]
    say(f"seed {seed}: full model")
    full, full_flops, full_accuracy = _train_static(settings, pool, settings.depth, train, test, example, seed, device)
    static = [Point("full model", 1.0, full_accuracy)]
    for depth in settings.static_depths:
        say(f"seed {seed}: static model of {depth} blocks")
        _, flops, accuracy = _train_static(settings, pool, depth, train, test, example, seed, device)
        static.append(Point(f"{depth} blocks", flops / full_flops, accuracy))
    say(f"seed {seed}: {system.card.name}")
    if system.recipe is None:
        net = attach(full, example=example, system=system)
    else:
        torch.manual_seed(seed)
        net = attach(make_net(settings, pool, settings.depth).to(device), example=example, system=system)
        _fit(settings, net, train, system.recipe, seed, device)
    say(f"seed {seed}: recording")
    calibration = record(net, held_out.loader(256), rules=[system.rule], progress=False)
    trace = record(net, test.loader(256), rules=[system.rule], progress=False)
    return {
        "seed": seed,
        "items": {"train": len(train), "calibration": len(held_out), "test": len(test)},
        "exits": list(trace.exits),
        "exit_accuracy": exit_accuracy(trace).tolist(),
        "exit_cost": (trace.cost / trace.base_cost).tolist(),
        "full": {"accuracy": full_accuracy, "flops": full_flops},
        "static": [{"name": p.name, "cost": p.cost, "accuracy": p.quality} for p in static],
        "budgets": _budgets(settings, system, net, calibration, trace, static, full_accuracy),
    }


def _divide(settings: Settings, pool: Pool, seed: int) -> tuple[Items, Items, Items]:
    """Training, calibration and test items, drawn by seed."""
    order = torch.randperm(len(pool.train), generator=torch.Generator().manual_seed(seed))
    tested = 0 if pool.test is not None else round(settings.test_share * len(order))
    test = pool.test if pool.test is not None else pool.train.take(order[:tested])
    held = round(settings.calibration * (len(order) - tested))
    if not 0 < held < len(order) - tested or not len(test):
        raise InvalidInput(
            f"calibration={settings.calibration} and test_share={settings.test_share} leave a part of {len(order)} items empty."
        )
    return pool.train.take(order[tested + held :], settings.augment), pool.train.take(order[tested : tested + held]), test


def _train_static(
    settings: Settings, pool: Pool, depth: int, train: Items, test: Items, example: Any, seed: int, device: str
) -> tuple[nn.Module, int, float]:
    """A network without exits, trained like the others: itself, its FLOPs per item and its accuracy."""
    torch.manual_seed(seed)
    model = make_net(settings, pool, depth).to(device)
    net = attach(model, at=["blocks.0"], example=example)  # the loop trains networks with exits; FinalOnly leaves this one out
    _fit(settings, net, train, Joint(FinalOnly()), seed, device)
    model.eval()
    placed = as_example(example).to(net.device, net.dtype)
    flops = count_flops(model, *placed.args, **placed.kwargs) // 2
    right = 0
    with torch.inference_mode():
        for inputs, labels in test.loader(256):
            moved = as_device(inputs, device)
            logits = model(**moved) if isinstance(moved, dict) else model(moved)
            right += int((logits.argmax(-1).cpu() == labels).sum())
    return model, flops, right / len(test)


def as_device(inputs: Any, device: str) -> Any:
    """A tensor or a mapping of tensors on a device."""
    return {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)


def _fit(settings: Settings, net: MultiExit, train: Items, recipe: Any, seed: int, device: str) -> None:
    fit(
        net,
        train.loader(settings.batch_size, shuffle=True),
        recipe,
        epochs=settings.epochs,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay),
        scheduler=warmup_cosine,
        max_grad_norm=1.0,
        seed=seed,
        progress=False,
    )
    net.to(device).eval()


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear rise over the first fifth of the steps, then a cosine to 0."""
    rise = max(1, steps // 5)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _budgets(
    settings: Settings, system: System, net: MultiExit, calibration: Trace, trace: Trace, static: Sequence[Point], full_accuracy: float
) -> list[dict[str, Any]]:
    heads = torch.tensor([*(e.head_flops for e in net.exits), 0], dtype=torch.float64)
    alone = trace.cost - heads.cumsum(0) + heads  # a fixed exit needs only its own head
    fixed = Curve("fixed exit", upper_hull(fixed_exit_curve(trace, alone).points))
    smaller = curve("static models", upper_hull(static))
    budgets = sorted(
        {*settings.budgets, *([system.card.predicate.budget] if system.card.predicate and system.card.predicate.budget else [])}
    )
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        try:
            plan = calibrate(calibration, system.rule, MeanCost(budget), method=system.calibrator)
        except BudgetInfeasible as error:
            rows.append({"budget": budget, "infeasible": True, "best": error.best})
            continue
        point = plan_point(trace, plan)
        shares = torch.bincount(outcome(trace, plan).exits, minlength=len(trace.exits)) / trace.items
        random = random_exit(trace, shares.double())
        row: dict[str, Any] = {
            "budget": budget,
            "cost": point.cost,
            "calibration_cost": plan.mean_cost,
            "accuracy": point.quality,
            "drop": full_accuracy - point.quality,
            "excess": point.cost - budget,
            "thresholds": [str(t) for t in plan.thresholds],
            "shares": shares.tolist(),
            "random": random.quality,
            "fixed": _at(fixed, point.cost),
            "static": _at(smaller, point.cost),
        }
        for name in ("fixed", "random", "static"):
            row[f"gain_over_{name}"] = None if row[name] is None else point.quality - row[name]
        rows.append(row)
    return rows


def _at(reference: Curve, cost: float) -> float | None:
    """Quality of a curve at a cost, ``None`` where the curve says nothing."""
    return interpolate(reference, cost) if cost >= reference.points[0].cost else None


def measured(predicate: Predicate, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The number that a predicate compares, from the budgets of one seed; ``None`` if no budget gives it."""
    chosen = [r for r in rows if not r.get("infeasible") and (predicate.budget is None or math.isclose(r["budget"], predicate.budget))]
    values = [float(r[predicate.metric]) for r in chosen if r.get(predicate.metric) is not None]
    if not values:
        return None
    upper = (predicate.relation == "<=") == (predicate.over == "worst")
    return statistics.fmean(values) if predicate.over == "mean" else max(values) if upper else min(values)


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def across_seeds(values: Sequence[float]) -> Estimate:
    """Mean with a 95 % t interval over seeds; of a single value that value, at level 0."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, mean, mean, 0.0)
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96 + 2.4 / (len(values) - 1)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def reproduce(
    name: str, settings: Settings, *, variant: str, data: str | None = None, device: str = "cpu", say: Say = lambda text: None
) -> dict[str, Any]:
    """Run a reproduction.

    Args:
        name: of the system.
        settings: of the variant.
        variant: its name, for the record.
        data: path of the data, if the variant needs one.
        device: to train on.
        say: told what is being done.

    Returns:
        JSON data: claim, verdict, one row per budget averaged over seeds, and the raw numbers of every seed.
    """
    system = systems.build(name, **settings.system)
    predicate = system.card.predicate
    if predicate is None:
        raise InvalidInput(f"The card of {name} has no predicate to measure.")
    pool = load_pool(settings, data)
    seeds = [run_seed(settings, pool, system, seed, device, say) for seed in settings.seeds]
    values = [v for s in seeds if (v := measured(predicate, s["budgets"])) is not None]
    estimate = across_seeds(values) if values else None
    return {
        "schema": "offramp.reproduce/1",
        "system": system.card.name,
        "variant": variant,
        "claim": system.card.claim,
        "predicate": asdict(predicate),
        "measured": None
        if estimate is None
        else {"value": estimate.value, "low": estimate.low, "high": estimate.high, "level": estimate.level, "values": values},
        "verdict": verdict(predicate, estimate),
        "summary": summarise(seeds),
        "environment": environment(device),
        "settings": asdict(settings),
        "composition": {axis: systems.describe(getattr(system, axis)) for axis in systems.AXES if getattr(system, axis) is not None},
        "seeds": seeds,
    }


def verdict(predicate: Predicate, estimate: Estimate | None) -> str:
    """``holds`` or ``does not hold`` by the mean over seeds; ``(not clear)`` where the interval reaches over the limit."""
    if estimate is None:
        return "not measured: no budget was feasible"
    word = "holds" if predicate.holds(estimate.value) else "does not hold"
    clear = estimate.level > 0 and predicate.holds(estimate.low) == predicate.holds(estimate.high)
    return word if clear else f"{word} (not clear: {'the interval reaches over the limit' if estimate.level > 0 else 'one seed'})"


def summarise(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds: the full model, and per budget ours and the baselines with an interval on each."""
    budgets = [r["budget"] for r in seeds[0]["budgets"]]
    rows = []
    for index, budget in enumerate(budgets):
        feasible = [s["budgets"][index] for s in seeds if not s["budgets"][index].get("infeasible")]
        row: dict[str, Any] = {"budget": budget, "seeds": len(feasible)}
        for key in ("cost", "accuracy", "fixed", "random", "static"):
            values = [r[key] for r in feasible if r[key] is not None]
            if values:
                e = across_seeds(values)
                row[key] = [e.value, e.low, e.high]
        rows.append(row)
    full = across_seeds([s["full"]["accuracy"] for s in seeds])
    return {"full_accuracy": [full.value, full.low, full.high], "budgets": rows}


def save(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result as ``<system>--<variant>--<device>.json``, atomically. Returns its path."""
    device = str(result["environment"].get("device", "cpu")).partition(":")[0]
    path = folder / f"{result['system']}--{result['variant']}--{device}.json"
    write_json(path, result)
    return path
