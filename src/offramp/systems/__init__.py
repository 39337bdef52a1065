"""Published methods: one file each, a composition of parts with a card. Files are found by name; nothing is registered.

A file ``systems/x_y.py`` is the system ``x-y``: it holds a `Card` named ``CARD`` and one builder function named like the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from offramp.core.errors import InvalidInput
from offramp.core.parts import part_to_dict
from offramp.core.system import Card, System
from offramp.policies.decoding import Accept, Adapting, CatchUp, Copy, Decaying, Recompute, Scheduled, Verify, Way

AXES: dict[str, str] = {
    "rule": "when an input leaves",
    "head": "what reads each exit",
    "placement": "where the exits go",
    "recipe": "how it is trained",
    "calibrator": "how thresholds are chosen",
    "target": "the budget it is given by default",
    "reduction": "what is left out inside a layer",
    "draft": "what proposes tokens",
    "fill": "what stands in for a skipped segment",
    "threshold": "the score to leave with",
    "skips": "what part of a denoiser is skipped, when, and what stands for it",
}
"""The axes along which systems differ, in the order they are shown."""


@dataclass(frozen=True)
class Difference:
    """One axis on which two systems differ.

    Attributes:
        axis: a field of `System`, with a dot before a field of a part of the same type.
        left: its value in the first system, as text.
        right: in the second.
    """

    axis: str
    left: str
    right: str


def list_systems() -> list[str]:
    """Names of all systems, sorted, from the names of the files; none of them is imported."""
    return sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def load_card(name: str) -> Card:
    """The card of a system.

    Raises:
        InvalidInput: there is no such system.
    """
    card: Card = _module(name).CARD
    return card


def build(name: str, **kwargs: Any) -> System:
    """The composition of a system.

    Args:
        name: as listed.
        **kwargs: arguments of its builder function, for instance ``patience=4`` of pabee.

    Raises:
        InvalidInput: there is no such system, or its builder does not take an argument.
    """
    module = _module(name)
    builder = getattr(module, module.__name__.rpartition(".")[2])
    takes = inspect.signature(builder).parameters
    for key in kwargs:
        if key not in takes:
            near = difflib.get_close_matches(key, takes, n=1, cutoff=0.3)
            raise InvalidInput(
                f"{name} takes {', '.join(takes) or 'no arguments'}; got {key!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
    system: System = builder(**kwargs)
    return system


def way(system: System, threshold: float | tuple[float, ...] | None = None) -> Way:
    """How a language-model system writes text, as the one thing that engines carry out.

    Args:
        system: with a draft, a fill or a schedule.
        threshold: that calibration chose, one for all exits or one each, ``inf`` = none leaves; takes the place of the system's number, or
            of what its threshold decays from. Not for systems that draft or run a schedule.

    Raises:
        InvalidInput: the system is not of a language model, its threshold has to be calibrated and none was given, or one was given that
            it has no use for.
    """
    name, fill = system.card.name, system.fill
    if isinstance(system.draft, Verify) or isinstance(fill, Scheduled):
        if threshold is not None:
            raise InvalidInput(f"{name} leaves at no threshold: its drafts are verified, or a schedule decides. Leave threshold out.")
        return system.draft if isinstance(system.draft, Verify) else fill
    if not isinstance(fill, CatchUp | Recompute | Copy) or system.rule is None:
        raise InvalidInput(f"{name} is a {system.card.engine} system and does not say how text is written; `compile` takes its plan.")
    least = system.threshold if threshold is None else threshold
    if isinstance(system.threshold, Decaying) and threshold is not None:
        if isinstance(threshold, tuple):
            raise InvalidInput(f"The threshold of {name} decays from one number for all exits, got {threshold}.")
        least = threshold if math.isinf(threshold) else replace(system.threshold, tau=threshold)
    elif isinstance(system.threshold, Adapting) and threshold is not None:
        raise InvalidInput(f"The threshold of {name} follows the text it writes; leave threshold out.")
    if least is None:
        raise InvalidInput(f"{name} chooses its thresholds on calibration texts: way(system, threshold=...) takes what was chosen.")
    return Accept(least, system.rule, fill)


def source(name: str) -> Path:
    """The file of a system."""
    return Path(str(_module(name).__file__))


def show(name: str) -> str:
    """Card, composition and notes of a system as text."""
    module, system = _module(name), build(name)
    card = system.card
    claims = [word for word, holds in (("lossless", card.lossless), ("guaranteed", card.guaranteed), ("trained", card.trained)) if holds]
    lines = [
        f"{card.name}: {card.title}",
        f"  {card.authors}. {card.venue}, {card.year}." + (f" arXiv:{card.arxiv}" if card.arxiv else ""),
        f"  engine {card.engine}; status {card.status}; {', '.join(claims) or 'no claims'}",
        f"  claim: {card.claim}",
    ]
    if card.delta_from:
        lines += [f"  delta from {card.delta_from}:", *(f"    {axis:<11} {what}" for axis, what in (card.delta or {}).items())]
    lines += ["", "composition:"]
    lines += [f"  {axis:<11} {text}" for axis in AXES if (text := describe(getattr(system, axis))) != "-"]
    takes = inspect.signature(getattr(module, module.__name__.rpartition(".")[2])).parameters.values()
    lines += ["", "arguments:" if takes else "arguments: none", *(f"  {p.name} = {p.default!r}" for p in takes)]
    lines += ["", inspect.cleandoc(module.__doc__ or "")]
    return "\n".join(lines)


def diff(left: str, right: str) -> list[Difference]:
    """Where two systems differ, computed from their compositions.

    Returns:
        One entry per axis; parts of the same type are compared field by field.
    """
    one, two = build(left), build(right)
    found = [Difference("engine", one.card.engine, two.card.engine)] if one.card.engine != two.card.engine else []
    for axis in AXES:
        found += _compare(axis, getattr(one, axis), getattr(two, axis))
    return found


def cite(*names: str) -> str:
    """BibTeX of the named systems, each entry once.

    Raises:
        InvalidInput: a name is unknown, or none was given.
    """
    if not names:
        raise InvalidInput(f"Name at least one system to cite: {', '.join(list_systems())}.")
    return "\n\n".join(dict.fromkeys(inspect.cleandoc(load_card(name).bibtex) for name in names))


def describe(part: Any) -> str:
    """A part as one line of text: ``Name(field=value)`` with the fields that are not at their default; ``-`` for none."""
    if part is None:
        return "-"
    return _render(part_to_dict(part), _defaults(part))


def _defaults(part: Any) -> Mapping[str, Any]:
    if not dataclasses.is_dataclass(part):
        return {}
    out = {}
    for field in dataclasses.fields(part):
        if field.default is not dataclasses.MISSING:
            out[field.name] = part_to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            out[field.name] = part_to_dict(field.default_factory())
    return out


def _render(data: Any, defaults: Mapping[str, Any] | None = None) -> str:
    if isinstance(data, Mapping) and set(data) == {"type", "args"}:
        shown = {k: v for k, v in data["args"].items() if k not in (defaults or {}) or (defaults or {})[k] != v}
        return f"{data['type']}({', '.join(f'{k}={_render(v)}' for k, v in shown.items())})"
    if isinstance(data, list):
        return f"({', '.join(map(_render, data))})"
    return str(data)


def _compare(axis: str, left: Any, right: Any) -> list[Difference]:
    one, two = part_to_dict(left), part_to_dict(right)
    if one == two:
        return []
    same_type = isinstance(one, Mapping) and isinstance(two, Mapping) and "type" in one and one["type"] == two.get("type")
    if not same_type:
        return [Difference(axis, describe(left), describe(right))]
    names = dict.fromkeys([*one["args"], *two["args"]])
    return [
        Difference(f"{axis}.{n}", _render(one["args"].get(n)), _render(two["args"].get(n)))
        for n in names
        if one["args"].get(n) != two["args"].get(n)
    ]


def _module(name: str) -> ModuleType:
    known = list_systems()
    canonical = name.strip().lower().replace("_", "-")
    if canonical not in known:
        near = difflib.get_close_matches(canonical, known, n=3, cutoff=0.4)
        raise InvalidInput(f"There is no system {name!r}." + (f" Nearest: {', '.join(near)}." if near else f" Known: {', '.join(known)}."))
    return importlib.import_module(f"{__name__}.{canonical.replace('-', '_')}")


__all__ = ["AXES", "Difference", "build", "cite", "describe", "diff", "list_systems", "load_card", "show", "source", "way"]
