"""System and Card: a published method as a frozen composition of parts. Systems make it, engines use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from offramp.core.errors import InvalidInput
from offramp.core.protocols import HeadSpec, Rule


@dataclass(frozen=True)
class Predicate:
    """A claim as a test on measured numbers, for `offramp reproduce`.

    Only budgets below the full model's cost count: at the full cost every method may run every block on every input, which says nothing
    about leaving early. Where the paper names the cost at which it makes its claim, so does the predicate.

    Attributes:
        metric: what is compared, by its name in a result: ``accuracy``, ``drop`` (accuracy of the full model minus ours),
            ``gain_over_fixed``, ``gain_over_random``, ``gain_over_static`` (ours minus the baseline at equal cost) or ``excess``
            (realised minus requested mean cost).
        relation: how.
        value: with what.
        over: how several budgets become one number: their mean, the least favourable or the most favourable.
        budget: the one budget that counts, as a share of the full model's FLOPs, in (0, 1); ``None`` = all below 1 that were measured.

    Raises:
        InvalidInput: ``budget`` is not inside (0, 1).
    """

    metric: str
    relation: Literal["<=", ">="]
    value: float
    over: Literal["mean", "worst", "best"] = "mean"
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget < 1:
            raise InvalidInput(f"The budget of a predicate must lie inside (0, 1), a share of the full model's cost, got {self.budget}.")

    def counts(self, budget: float) -> bool:
        """Whether what was measured at a budget (a share of the full model's FLOPs) is part of the test."""
        return budget < 1 if self.budget is None else math.isclose(budget, self.budget)

    def holds(self, measured: float) -> bool:
        """Whether a measured number satisfies it."""
        return measured <= self.value if self.relation == "<=" else measured >= self.value

    def __str__(self) -> str:
        where = f"at cost {self.budget:g}" if self.budget is not None else f"{self.over} over budgets below 1"
        return f"{self.metric} {self.relation} {self.value:g}, {where}"


@dataclass(frozen=True)
class Card:
    """What a method is and claims. No speed-up figure is ever written here.

    Attributes:
        name: the method's published short name; the file is named after it.
        title: of the paper.
        year: of publication.
        engine: ``classify``, ``generate``, ``denoise``, ``stream`` or ``split``.
        delta_from: the method it changes, or ``""``.
        delta: what it changes, by named axis (``head``, ``score``, ``rule``, ``train``, ``calibrate``, ``axis``).
        lossless: outputs equal the base model's.
        guaranteed: comes with a statistical guarantee.
        trained: needs training beyond the base model's.
        status: ``reference`` (parity with the authors' code recorded), ``faithful`` (claim reproduced), ``sketch``.
        claim: the paper's claim as a sentence that `offramp reproduce` measures.
        bibtex: for `offramp cite`.
        arxiv: identifier or ``""``.
        predicate: the claim as a test on numbers.
    """

    name: str
    title: str
    authors: str
    year: int
    venue: str
    engine: Literal["classify", "generate", "denoise", "stream", "split"]
    claim: str
    bibtex: str
    delta_from: str = ""
    delta: Mapping[str, str] | None = None
    lossless: bool = False
    guaranteed: bool = False
    trained: bool = True
    status: Literal["reference", "faithful", "sketch"] = "sketch"
    arxiv: str = ""
    predicate: Predicate | None = None


@dataclass(frozen=True)
class System:
    """A composition. Every field is a part; ``None`` means the method does not have one.

    Attributes:
        card: what it is.
        rule: score of each exit.
        head: head at each early exit; ``None`` keeps the network's own.
        placement: where the exits go (a part of ``exits``), or ``None`` for the default.
        recipe: how it is trained; ``None`` for post-hoc methods.
        calibrator: how thresholds are chosen.
        target: the budget the paper uses by default.
    """

    card: Card
    rule: Rule
    head: HeadSpec | None = None
    placement: Any = None
    recipe: Any = None
    calibrator: Any = None
    target: Any = None
    reduction: Any = None
    draft: Any = None
    fill: Any = None
