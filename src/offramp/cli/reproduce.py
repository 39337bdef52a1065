"""Reproductions: train a method small on real data, measure its claim, and set the result beside what it must beat.

The baselines are always the same: the full model trained alone; one fixed exit, or the best blind mix of two, at equal cost; random exits
with the method's own shares; and a smaller static model trained alone, or the best mix of two, at equal cost. Nothing is tuned after the
fact: the verdict is the card's predicate on the measured numbers.

Trainings (`train_static`, `train_exits`) and what is computed from them (`measure_seed`) are apart, so that trainings may run side by side
and those that several methods have in common run once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp import systems
from offramp.budget import MeanCost, calibrate
from offramp.cli import data as reading
from offramp.cli.config import unknown_key
from offramp.cli.nets import NETS
from offramp.cli.progress import Say
from offramp.cli.reproduce_common import Reproduction, VariantSettings, averaged
from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.core.flops import count_flops
from offramp.core.protocols import Rule
from offramp.core.system import System
from offramp.core.trace import Trace
from offramp.engines.classify.record import record
from offramp.measure.pareto import Curve, Point, curve, fixed_exit_curve, interpolate, plan_point, random_exit, upper_hull
from offramp.measure.quality import exit_accuracy, outcome
from offramp.network import MultiExit, as_example, attach
from offramp.train.loop import fit
from offramp.train.recipe import FinalOnly, Joint


@dataclass(frozen=True)
class Settings(VariantSettings):
    """One variant of a reproduction of a classifier.

    Attributes:
        data: ``digits`` (of scikit-learn), ``images`` or ``text``.
        net: ``conv``, ``vit`` or ``text``, see `offramp.cli.nets`.
        depth: blocks of the full model.
        epochs: of each training.
        net_args: other arguments of the network.
        smaller: the smaller static models, each by the arguments in which it differs from the full one (``depth``, ``width``).
        train: data spec of the training items; ``{data}`` stands for the path given on the command line.
        test: data spec of the test items.
        train_split: split inside ``train``.
        test_split: split inside ``test``.
        calibration: share of the training items that is held out to choose thresholds, in (0, 1).
        sentences: texts that are phrases of one another: hold out this many whole sentences instead of ``calibration``, and leave their
            phrases out of training; 0 = off.
        test_share: share of the items held out for testing where there is no ``test`` spec, in (0, 1).
        batch_size: in training.
        learning_rate: highest, of AdamW, for all weights; it rises over the first fifth of the steps and falls by a cosine.
        weight_decay: of AdamW.
        augment: shift images by up to 4 pixels and mirror them, in training.
        mixed_precision: of training on a CUDA device: ``no``, ``bf16`` or ``fp16``. A CPU trains, and every device measures, in float32.
        mean: subtracted from images per channel.
        std: divided by.
        vocabulary: words of the tokenizer that is made from the training texts.
        length: longest text, in tokens.
        budgets: mean costs to calibrate for, as shares of the full model's FLOPs.
    """

    data: str
    net: str
    depth: int
    epochs: int
    net_args: Mapping[str, Any] = field(default_factory=dict)
    smaller: tuple[Mapping[str, Any], ...] = ()
    train: str = ""
    test: str = ""
    train_split: str | None = None
    test_split: str | None = None
    calibration: float = 0.2
    sentences: int = 0
    test_share: float = 0.3
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    augment: bool = False
    mixed_precision: str = "bf16"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocabulary: int = 8000
    length: int = 64
    budgets: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.net not in NETS:
            raise unknown_key(self.net, list(NETS), "net")
        if self.data not in ("digits", "images", "text"):
            raise unknown_key(self.data, ["digits", "images", "text"], "data")
        if any(not isinstance(s, Mapping) or not s for s in self.smaller):
            raise InvalidInput(f"smaller must list tables such as {{ depth = 2 }}, got {list(self.smaller)}.")
        if not self.budgets:
            raise InvalidInput("budgets must not be empty.")


class Items:
    """Items in memory as whole tensors, on one device: batches are cut from them without workers or copies.

    Attributes:
        inputs: ``[N, C, H, W]``, or for texts a mapping of ``[N, T]`` with 0 in ``attention_mask`` where there is padding.
        labels: ``[N]`` int64.
        texts: the texts themselves, or empty.
    """

    def __init__(self, inputs: Tensor | Mapping[str, Tensor], labels: Tensor, texts: Sequence[str] = ()) -> None:
        self.inputs, self.labels, self.texts = inputs, labels, tuple(texts)
        # On the host, so that cutting a batch to its longest text does not wait for the device.
        self.lengths = None if isinstance(inputs, Tensor) else inputs["attention_mask"].sum(1).cpu()

    def __len__(self) -> int:
        return int(self.labels.numel())

    def take(self, rows: Tensor) -> Items:
        """Those of some rows."""
        texts = [self.texts[i] for i in rows.tolist()] if self.texts else ()
        return Items(self.at(rows.to(self.labels.device), None), self.labels[rows.to(self.labels.device)], texts)

    def to(self, device: str) -> Items:
        """The same on a device."""
        inputs = self.inputs.to(device) if isinstance(self.inputs, Tensor) else {k: v.to(device) for k, v in self.inputs.items()}
        return Items(inputs, self.labels.to(device), self.texts)

    def at(self, rows: Tensor, length: int | None) -> Any:
        """Inputs of some rows, texts cut to a length."""
        return self.inputs[rows] if isinstance(self.inputs, Tensor) else {k: v[rows, :length] for k, v in self.inputs.items()}

    def example(self) -> Any:
        """Two inputs; texts have the median length, so that costs are those of a typical text."""
        return self.at(torch.arange(2, device=self.labels.device), None if self.lengths is None else max(2, int(self.lengths.median())))


class Batches:
    """Batches ``(inputs, labels)`` of items, as often as it is iterated.

    Args:
        items: where they are cut from.
        size: items in a batch.
        train: shuffle, by the global random state, and leave out a last batch that is not full.
        augment: mirror images and shift them by up to 4 pixels.
    """

    def __init__(self, items: Items, size: int, *, train: bool = False, augment: bool = False) -> None:
        self.items, self.size, self.train, self.augment = items, size, train, augment

    def __len__(self) -> int:
        whole = len(self.items) // self.size
        return max(1, whole) if self.train else math.ceil(len(self.items) / self.size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = torch.randperm(len(self.items)) if self.train else torch.arange(len(self.items))
        there = order.to(self.items.labels.device)
        for start in range(0, len(self) * self.size, self.size):
            rows, lengths = there[start : start + self.size], self.items.lengths
            longest = None if lengths is None else int(lengths[order[start : start + self.size]].max())
            inputs = self.items.at(rows, longest)
            yield (shifted(inputs) if self.augment else inputs), self.items.labels[rows]


def shifted(images: Tensor, by: int = 4) -> Tensor:
    """Images ``[B, C, H, W]`` mirrored with probability 1/2 and shifted by up to ``by`` pixels each way, zeros coming in; all at once."""
    b, c, h, w = images.shape
    device = images.device
    images = torch.where(torch.rand(b, 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    padded = nn.functional.pad(images, (by, by, by, by))
    top, left = torch.randint(0, 2 * by + 1, (2, b, 1), device=device)
    rows, columns = top + torch.arange(h, device=device), left + torch.arange(w, device=device)
    item, channel = torch.arange(b, device=device)[:, None, None, None], torch.arange(c, device=device)[:, None, None]
    return padded[item, channel, rows[:, None, :, None], columns[:, None, None, :]]


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

    def to(self, device: str) -> Pool:
        """The same on a device."""
        return Pool(self.train.to(device), None if self.test is None else self.test.to(device), self.classes, self.vocabulary)


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
        return Pool(Items(images, torch.from_numpy(loaded.target).long()), None, 10)
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
    held = [_items(r, settings.data == "text") for r in read]
    return Pool(held[0], held[1] if len(held) > 1 else None, max(len(r.classes) for r in read), settings.vocabulary)


def _items(records: reading.Records, text: bool) -> Items:
    inputs = [records[i][0] for i in range(len(records))]
    if text:
        return Items(reading.pad_batch(inputs, records.pad), _labels(records), [str(records.raw(i)) for i in range(len(records))])
    return Items(torch.stack(inputs), _labels(records))


def _labels(records: reading.Records) -> Tensor:
    if records.labels is None:
        raise InvalidInput(f"{records.source} has no labels.")
    return records.labels


def make_net(settings: Settings, pool: Pool, device: str = "cpu", **change: Any) -> nn.Module:
    """A network of the variant, changed in some arguments, on a device."""
    args: dict[str, Any] = {"classes": pool.classes, "depth": settings.depth, **settings.net_args}
    if settings.net == "text":
        args |= {"vocabulary": pool.vocabulary, "length": settings.length}
    elif isinstance(pool.train.inputs, Tensor):
        args["channels"] = int(pool.train.inputs.shape[1])
        if settings.net == "vit":
            args["size"] = int(pool.train.inputs.shape[2])
    try:
        net = NETS[settings.net](**(args | change))
    except TypeError as error:
        raise InvalidInput(f"net_args or smaller do not fit the net {settings.net!r}: {error}.") from error
    # Convolutions in reduced precision are several times faster with the channels last.
    if device.startswith("cuda"):
        return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # missing in torch's stubs
    return net.to(device)


@dataclass(frozen=True)
class Static:
    """A network without exits, trained like the others.

    Attributes:
        name: what it is.
        flops: per item.
        accuracy: on the test items.
    """

    name: str
    flops: int
    accuracy: float


@dataclass(frozen=True)
class Recorded:
    """A network with exits, trained and run on every item once.

    Attributes:
        calibration: trace of the held-out items.
        test: trace of the test items.
        head_flops: of each early exit, per item.
        items: how many there were in training.
    """

    calibration: Trace
    test: Trace
    head_flops: tuple[int, ...]
    items: int


def train_static(settings: Settings, pool: Pool, change: Mapping[str, Any], seed: int, device: str) -> tuple[Static, nn.Module]:
    """Train and test a network without exits; ``change`` is what differs from the full model, nothing for that one itself."""
    train, _, test = divide(settings, pool, seed)
    example = train.example()
    torch.manual_seed(seed)
    model = make_net(settings, pool, device, **change)
    net = attach(model, at=["blocks.0"], example=example)  # the loop trains networks with exits; FinalOnly leaves this one out
    _fit(settings, net, train, Joint(FinalOnly()), seed, device)
    placed = as_example(example).to(net.device, net.dtype)
    flops = count_flops(model, *placed.args, **placed.kwargs) // 2
    right = 0
    with torch.inference_mode():
        for inputs, labels in Batches(test.to(device), 500):
            logits = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            right += int((logits.argmax(-1) == labels).sum())
    name = ", ".join(f"{key} {value}" for key, value in change.items()) or "full model"
    return Static(name, flops, right / len(test)), model


def train_exits(
    settings: Settings, pool: Pool, system: System, seed: int, device: str, *, full: nn.Module | None = None, rules: Sequence[Any] = ()
) -> Recorded:
    """Train a method's network and record every exit on the held-out and the test items.

    Args:
        settings: of the variant.
        pool: its items.
        system: the method.
        seed: of the division of the items, the weights and the training.
        device: to train on.
        full: the full model, trained; needed by a method that trains nothing.
        rules: recorded besides the method's own.
    """
    train, held_out, test = divide(settings, pool, seed)
    example = train.example()
    rule = _rule(system)
    if system.recipe is None:
        if full is None:
            raise InvalidInput(f"{system.card.name} trains nothing, so it needs the full model.")
        net = attach(full, example=example, system=system)
    else:
        torch.manual_seed(seed)
        net = attach(make_net(settings, pool, device), example=example, system=system)
        _fit(settings, net, train, system.recipe, seed, device)
    calibration, tested = (record(net, Batches(items, 500), rules=[rule, *rules], progress=False) for items in (held_out, test))
    return Recorded(calibration, tested, tuple(e.head_flops for e in net.exits), len(train))


def _rule(system: System) -> Rule:
    if system.rule is None:
        raise InvalidInput(f"{system.card.name} has no rule: nothing leaves at its exits, so there is nothing to record.")
    return system.rule


def measure_seed(system: System, budgets: Sequence[float], seed: int, statics: Sequence[Static], recorded: Recorded) -> dict[str, Any]:
    """What one repetition gave: raw numbers as JSON data.

    Args:
        system: the method.
        budgets: as in `Settings`.
        seed: for the record.
        statics: the full model, then the smaller ones.
        recorded: the method's network.
    """
    full, trace = statics[0], recorded.test
    static = [Point(s.name, s.flops / full.flops, s.accuracy) for s in statics]
    return {
        "seed": seed,
        "items": {"train": recorded.items, "calibration": recorded.calibration.items, "test": trace.items},
        "exits": list(trace.exits),
        "exit_accuracy": exit_accuracy(trace).tolist(),
        "exit_cost": (trace.cost / trace.base_cost).tolist(),
        "exit_cost_alone": (_alone(recorded) / trace.base_cost).tolist(),
        "full": {"accuracy": full.accuracy, "flops": full.flops},
        "static": [{"name": p.name, "cost": p.cost, "accuracy": p.quality} for p in static],
        "budgets": _budgets(system, budgets, recorded, static, full.accuracy),
    }


def divide(settings: Settings, pool: Pool, seed: int) -> tuple[Items, Items, Items]:
    """Training, calibration and test items, drawn by seed."""
    order = torch.randperm(len(pool.train), generator=torch.Generator().manual_seed(seed))
    tested = 0 if pool.test is not None else round(settings.test_share * len(order))
    test = pool.test if pool.test is not None else pool.train.take(order[:tested])
    if settings.sentences:
        held_rows, rows = sentences_apart(pool.train.texts, settings.sentences, seed)
    else:
        held = round(settings.calibration * (len(order) - tested))
        held_rows, rows = order[tested : tested + held], order[tested + held :]
    if not len(held_rows) or not len(rows) or not len(test):
        raise InvalidInput(
            f"calibration={settings.calibration} and test_share={settings.test_share} leave a part of {len(order)} items empty."
        )
    return pool.train.take(rows), pool.train.take(held_rows), test


def sentences_apart(texts: Sequence[str], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out whole sentences of a set that holds sentences and their phrases (SST-2 does).

    Calibration needs items like those that are served, whole sentences, and must not see phrases that training saw.

    Args:
        texts: words separated by spaces.
        count: sentences to hold out.
        seed: of the draw.

    Returns:
        Rows of the sentences held out, and rows of the texts of which no two words in a row or more are a phrase of them.

    Raises:
        InvalidInput: there are fewer sentences.
    """
    words = [t.split() for t in texts]
    ending = [i for i, w in enumerate(words) if len(w) >= 5 and w[-1] in (".", "!", "?")]
    tails = {" ".join(words[i][k:]) for i in ending for k in range(1, len(words[i]))}
    whole = [i for i in ending if " ".join(words[i]) not in tails]
    if len(whole) <= count:
        raise InvalidInput(f"sentences={count} must be held out, but there are {len(whole)} whole sentences among {len(texts)} texts.")
    held = random.Random(seed).sample(whole, count)
    parts = {" ".join(words[i][a:b]) for i in held for a in range(len(words[i])) for b in range(a + 2, len(words[i]) + 1)}
    rest = [i for i, w in enumerate(words) if " ".join(w) not in parts]
    return torch.tensor(held), torch.tensor(rest)


def _fit(settings: Settings, net: MultiExit, train: Items, recipe: Any, seed: int, device: str) -> None:
    fit(
        net,
        Batches(train, settings.batch_size, train=True, augment=settings.augment),
        recipe,
        epochs=settings.epochs,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay),
        scheduler=warmup_cosine,
        max_grad_norm=1.0,
        mixed_precision=settings.mixed_precision if device.startswith("cuda") else None,
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


def _alone(recorded: Recorded) -> Tensor:
    """``[K]`` FLOPs of the network up to each exit with that head alone: all that a fixed exit needs."""
    heads = torch.tensor([*recorded.head_flops, 0], dtype=torch.float64)
    return recorded.test.cost - heads.cumsum(0) + heads


def _budgets(
    system: System, wanted: Sequence[float], recorded: Recorded, static: Sequence[Point], full_accuracy: float
) -> list[dict[str, Any]]:
    calibration, trace = recorded.calibration, recorded.test
    fixed = Curve("fixed exit", upper_hull(fixed_exit_curve(trace, _alone(recorded)).points))
    smaller = curve("static models", upper_hull(static))
    budgets = sorted({*wanted, *([system.card.predicate.budget] if system.card.predicate and system.card.predicate.budget else [])})
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        try:
            plan = calibrate(calibration, _rule(system), MeanCost(budget), method=system.calibrator)
        except BudgetInfeasible as error:
            rows.append({"budget": budget, "infeasible": True, "best": error.best})
            continue
        point = plan_point(trace, plan)
        result = outcome(trace, plan)
        shares = torch.bincount(result.exits, minlength=len(trace.exits)) / trace.items
        random = random_exit(trace, shares.double())
        row: dict[str, Any] = {
            "budget": budget,
            "cost": point.cost,
            "cost_se": float(result.cost.std() / trace.items**0.5),
            "accuracy_se": (point.quality * (1 - point.quality) / trace.items) ** 0.5,
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


def repeat(name: str, settings: Settings, pool: Pool, seed: int, device: str, say: Say) -> dict[str, Any]:
    """Train everything of one repetition, and `measure_seed`."""
    system = systems.build(name, **settings.system)
    say(f"seed {seed}: full model")
    full, model = train_static(settings, pool, {}, seed, device)
    statics = [full]
    for change in settings.smaller:
        say(f"seed {seed}: static model, {change}")
        statics.append(train_static(settings, pool, change, seed, device)[0])
    say(f"seed {seed}: {name}")
    recorded = train_exits(settings, pool, system, seed, device, full=model)
    return measure_seed(system, settings.budgets, seed, statics, recorded)


def summarise(settings: Settings, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds: the full model, and per budget ours and the baselines with an interval on each."""
    rows: list[dict[str, Any]] = []
    for index, budget in enumerate(r["budget"] for r in seeds[0]["budgets"]):
        feasible = [s["budgets"][index] for s in seeds if not s["budgets"][index].get("infeasible")]
        shown = averaged(feasible, ("cost", "accuracy", "fixed", "random", "static"))
        rows.append({"budget": budget, "seeds": len(feasible), **shown})
    return {"full_accuracy": averaged([s["full"] for s in seeds], ["accuracy"])["accuracy"], "budgets": rows}


def table_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary as a table: columns, then the full model and what every budget gave."""

    def cell(value: Sequence[float] | None) -> str:
        return "-" if value is None else f"{100 * value[0]:.2f} ± {100 * (value[0] - value[1]):.2f}"

    rows: list[tuple[str, ...]] = [("full", "1.000", cell(result["summary"]["full_accuracy"]), "", "", "")]
    for row in result["summary"]["budgets"]:
        cost = f"{row['cost'][0]:.3f}" if "cost" in row else "infeasible"
        rows.append((f"{row['budget']:g}", cost, *(cell(row.get(k)) for k in ("accuracy", "fixed", "random", "static"))))
    return ("budget", "cost", "this method", "fixed exit or mix", "random exit", "smaller model"), rows


CLASSIFIERS = Reproduction(
    "classify",
    Settings,
    "digits",
    read=lambda settings, data, device, say: load_pool(settings, data).to(device),
    repeat=repeat,
    summarise=summarise,
    table=table_rows,
    averages="accuracy in %, mean ± half of the 95 % interval",
)
"""Methods that leave a feed-forward network early."""
