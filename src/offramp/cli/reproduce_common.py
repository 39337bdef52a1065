"""What every reproduction is made of: settings from a TOML file, repetitions by seed, and how their numbers become a claim's verdict.

What is trained and measured differs by engine; that is a `Reproduction`, made in ``reproduce.py`` for classifiers, ``reproduce_text.py``,
``reproduce_unmask.py`` and ``reproduce_images.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

from offramp import systems
from offramp.cli.config import read_toml, unknown_key
from offramp.cli.progress import Say
from offramp.core.bundle import write_json
from offramp.core.certificate import Estimate
from offramp.core.errors import InvalidInput
from offramp.core.system import Predicate, System
from offramp.measure.clock import environment

# ---- settings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VariantSettings:
    """One variant of a reproduction: a table ``[variant]`` of its TOML file. What an engine needs besides is in a class of its own.

    Attributes:
        seeds: one whole repetition each.
        system: arguments of the system's builder.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    system: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InvalidInput("seeds must not be empty.")

    @classmethod
    def variants(cls, path: Path) -> list[str]:
        """Names of the variants in a configuration: its tables, but for those that are named like a setting and so shared."""
        return [name for name, table in read_toml(path).items() if isinstance(table, Mapping) and name not in cls.__dataclass_fields__]

    @classmethod
    def load(cls, path: Path, variant: str) -> Self:
        """Read one variant. What stands outside its table is shared by all variants; where both have a table, they are joined.

        Raises:
            InvalidInput: the file or the variant is missing, a key is unknown, a required one is absent, or a value is out of range.
        """
        config, known = read_toml(path), cls.variants(path)
        if variant not in known:
            raise InvalidInput(f"{path} has no variant {variant!r}; it has: {', '.join(known)}.")
        where, own = f"{path}, variant {variant}", config[variant]
        merged = {key: value for key, value in config.items() if key not in known}
        for key, value in own.items():
            merged[key] = {**merged[key], **value} if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) else value
        for key in merged:
            if key not in cls.__dataclass_fields__:
                raise unknown_key(key, list(cls.__dataclass_fields__), where)
        for each in fields(cls):
            if each.default is MISSING and each.default_factory is MISSING and each.name not in merged:
                raise InvalidInput(f"{where}: the key {each.name!r} is missing.")
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}
        try:
            return cls(**values)
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error}") from error


def to_try(sweep: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Changes of a builder's arguments, one row of the result each: every value of every argument in turn, or none at all."""
    return [{name: value} for name, values in sweep.items() for value in values] or [{}]


def in_words(change: Mapping[str, float]) -> str:
    """Name of a row."""
    return ", ".join(f"{name} {value:g}" for name, value in change.items()) or "default"


# ---- numbers over seeds --------------------------------------------------------------------------------------------------

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def across_seeds(values: Sequence[float]) -> Estimate:
    """Mean with a 95 % t interval over seeds; of a single value that value, at level 0."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, mean, mean, 0.0)
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96 + 2.4 / (len(values) - 1)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def averaged(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> dict[str, list[float]]:
    """The numbers that are shown, each as mean and interval over the rows that have it; one that no row has is left out."""
    found = {key: [float(row[key]) for row in rows if row.get(key) is not None] for key in shown}
    means = {key: across_seeds(values) for key, values in found.items() if values}
    return {key: [e.value, e.low, e.high] for key, e in means.items()}


def rows_by_name(seeds: Sequence[Mapping[str, Any]], part: str, label: str, shown: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a part of every seed, `averaged` over those of the same name."""
    for name in dict.fromkeys(row[label] for seed in seeds for row in seed[part]):
        same = [row for seed in seeds for row in seed[part] if row[label] == name]
        yield {"name": name, **averaged(same, shown)}


# ---- the claim -----------------------------------------------------------------------------------------------------------


def measured(predicate: Predicate, rows: Sequence[Mapping[str, Any]], counts: Callable[[float], bool] | None = None) -> float | None:
    """The number that a predicate compares, from the rows of one seed that count; ``None`` if none of them gives it.

    Args:
        predicate: of a card.
        rows: each with its ``budget``; one that is ``infeasible`` has nothing to compare.
        counts: whether a budget counts; by default what the predicate says.
    """
    wanted = counts or predicate.counts
    chosen = [row for row in rows if not row.get("infeasible") and wanted(row["budget"])]
    return predicate.combined([float(row[predicate.metric]) for row in chosen if row.get(predicate.metric) is not None])


def verdict(predicate: Predicate, estimate: Estimate | None, nothing: str = "no budget was feasible") -> str:
    """``holds`` or ``does not hold`` by the mean over seeds; ``(not clear)`` where the interval reaches over the limit.

    Args:
        predicate: of a card.
        estimate: of the number that it compares; ``None`` = there is none.
        nothing: why there may be none.
    """
    if estimate is None:
        return f"not measured: {nothing}"
    word = "holds" if predicate.holds(estimate.value) else "does not hold"
    clear = estimate.level > 0 and predicate.holds(estimate.low) == predicate.holds(estimate.high)
    return word if clear else f"{word} (not clear: {'the interval reaches over the limit' if estimate.level > 0 else 'one seed'})"


def claim_of(system: System) -> Predicate:
    """The claim on a system's card as a test on numbers.

    Raises:
        InvalidInput: it has none.
    """
    if system.card.predicate is None:
        raise InvalidInput(f"The card of {system.card.name} has no predicate to measure.")
    return system.card.predicate


@dataclass(frozen=True)
class Reproduction:
    """How the methods of one engine are reproduced: what a repetition is, and how repetitions are shown. The rest is the same for all.

    Attributes:
        engine: on the cards of the methods.
        settings: class of a variant.
        default: variant that is run if none is named.
        read: ``(settings, path of the data, device, say)`` to what all repetitions use.
        repeat: ``(system's name, settings, what read gave, seed, device, say)`` to the raw numbers of a repetition as JSON data; its
            ``budgets`` are the rows that the claim is about.
        summarise: ``(settings, repetitions)`` to means over seeds as JSON data.
        table: a result's summary as columns and rows of text.
        averages: what the numbers of that table are.
        counts: ``(system, budget of a row)`` to whether the row is part of the test; by default what the card's predicate says.
        nothing: why no row may be.
    """

    engine: str
    settings: type[VariantSettings]
    default: str
    read: Callable[[Any, str | None, str, Say], Any]
    repeat: Callable[[str, Any, Any, int, str, Say], dict[str, Any]]
    summarise: Callable[[Any, Sequence[Mapping[str, Any]]], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], tuple[tuple[str, ...], list[tuple[str, ...]]]]
    averages: str = "mean"
    counts: Callable[[System, float], bool] = lambda system, cost: claim_of(system).counts(cost)
    nothing: str = "no budget was feasible"

    def run(
        self,
        name: str,
        settings: VariantSettings,
        *,
        variant: str,
        data: str | None = None,
        device: str = "cpu",
        say: Say = lambda text: None,
    ) -> dict[str, Any]:
        """Train and measure, seed by seed.

        Args:
            name: of the system.
            settings: of the variant, of the class `settings`.
            variant: its name, for the record.
            data: path of the data, if the variant needs one.
            device: to train and measure on.
            say: told what is being done.

        Returns:
            JSON data: claim, verdict, means over seeds, and the raw numbers of every seed.

        Raises:
            InvalidInput: the system is of another engine or has no claim, or the data are missing or do not fit.
        """
        card = systems.load_card(name)
        if card.engine != self.engine:
            raise InvalidInput(f"{name} is a method of the {card.engine} engine; here those of the {self.engine} engine are reproduced.")
        system = systems.build(name, **settings.system)
        claim_of(system)
        given = self.read(settings, data, device, say)
        seeds = [self.repeat(name, settings, given, seed, device, say) for seed in settings.seeds]
        return self.conclude(system, settings, variant, seeds, environment(device))

    def conclude(
        self, system: System, settings: VariantSettings, variant: str, seeds: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Claim, verdict and summary of repetitions: the result as JSON data.

        Args:
            system: the method, built with the variant's arguments; its card has a predicate.
            settings: of the variant.
            variant: its name.
            seeds: what `repeat` gave.
            machine: `offramp.measure.clock.environment` of the machine that they ran on.
        """
        predicate = claim_of(system)
        each = [measured(predicate, seed["budgets"], partial(self.counts, system)) for seed in seeds]
        values = [value for value in each if value is not None]
        estimate = across_seeds(values) if values else None
        got = None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high, "level": estimate.level}
        return {
            "schema": "offramp.reproduce/1",
            "system": system.card.name,
            "variant": variant,
            "claim": system.card.claim,
            "predicate": asdict(predicate),
            "measured": None if got is None else {**got, "values": values},
            "verdict": verdict(predicate, estimate, self.nothing),
            "summary": self.summarise(settings, seeds),
            "environment": dict(machine),
            "settings": asdict(settings),
            "composition": {axis: systems.describe(getattr(system, axis)) for axis in systems.AXES if getattr(system, axis) is not None},
            "seeds": list(seeds),
        }


def save(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result as ``<system>--<variant>--<device>.json``, atomically. Returns its path."""
    device = str(result["environment"].get("device", "cpu")).partition(":")[0]
    path = folder / f"{result['system']}--{result['variant']}--{device}.json"
    write_json(path, result)
    return path


__all__ = [
    "Reproduction",
    "VariantSettings",
    "across_seeds",
    "averaged",
    "claim_of",
    "in_words",
    "measured",
    "rows_by_name",
    "save",
    "to_try",
    "verdict",
]
