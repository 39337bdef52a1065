"""System and Card: a published method as a frozen composition of parts. Systems make it, engines use it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule


@dataclass(frozen=True)
class Predicate:
    """A claim as a test on measured numbers, for `offramp reproduce`.

    Only budgets below the full model's cost count: at the full cost every method may run every block on every input, which says nothing
    about leaving early. Where the paper names the cost at which it makes its claim, so does the predicate. A way of writing text whose
    text cannot change (a lossless system) counts at any cost: there the cost is what is claimed.

    What classifiers are measured by: ``accuracy``, ``drop`` (accuracy of the full model minus ours), ``gain_over_fixed``,
    ``gain_over_random``, ``gain_over_static`` (accuracy: ours minus the baseline's at equal cost), ``excess`` (realised minus requested
    mean cost).

    What ways of writing text are measured by, each at one setting or at several (tolerances, limits, thresholds):

    - ``agreement``: share of the written tokens that the full model would choose after the same text;
    - ``perplexity_ratio``: perplexity of held-out text as the method reads it, over that of the full model trained as long without exits;
    - ``acceptance``, ``tokens_per_round``: share of the drafts that are kept; tokens for each pass over all blocks;
    - ``blocks_share``: blocks run in turn for a token, a pass over several tokens counted once, over those of plain decoding;
    - ``cost``: the same in weights read, heads and output layers with them: the time where memory bounds it. This is the budget;
    - ``speedup``: time of plain decoding by the same engine on the same device over ours, of the same model with its exits;
    - ``gain_over_fixed``: of lossless systems, by how much of its cost the cheapest fixed draft length is dearer than ours; of others,
      agreement minus that of the best fixed depth, or mix of two, at equal cost;
    - ``gain_over_static``: agreement minus that of a smaller model trained alone, or mix of two, at equal cost;
    - ``excess``: disagreement that was measured minus what was asked for.

    What ways of filling in masks are measured by: ``cost`` (FLOPs of whole texts over those of no cache; the budget), ``agreement`` (share
    of the tokens that no cache writes there too), ``gain_over_fixed`` (agreement minus that of a refresh at fixed intervals, or mix of two,
    at equal cost).

    What denoisers are measured by, at each cost asked for: ``cost`` (executed FLOPs of whole images over those of the full model with all
    steps; the budget), ``fid_ratio`` (FID over the full model's), ``gain_over_steps``, ``gain_over_schedule``, ``gain_over_random``,
    ``gain_over_shallow`` (FID of fewer steps, of the best schedule by noise level, of random skips, of a constant depth, minus ours, over
    the full model's FID, at equal cost), ``explained`` (R squared of the exit depth on the step alone), ``excess`` (realised minus
    requested cost).

    Attributes:
        metric: what is compared, by its name above.
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

    def combined(self, values: Sequence[float]) -> float | None:
        """One number of those of several budgets, as ``over`` says; ``None`` of none."""
        if not values:
            return None
        upper = (self.relation == "<=") == (self.over == "worst")
        return statistics.fmean(values) if self.over == "mean" else max(values) if upper else min(values)

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
        engine: ``classify``, ``generate``, ``unmask``, ``denoise``, ``stream`` or ``split``.
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
    engine: Literal["classify", "generate", "unmask", "denoise", "stream", "split"]
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


class Draft(Protocol):
    """What proposes tokens that the whole model then verifies: `offramp.policies.decoding.Verify`."""

    @property
    def draft_length(self) -> int:
        """Most drafts in a round."""
        ...

    @property
    def exit_index(self) -> int:
        """Which exit drafts."""
        ...


@dataclass(frozen=True)
class System:
    """A composition. Every field is a part; ``None`` means the method does not have one.

    A language-model system drafts (``draft``), or lets tokens leave (``rule``, ``threshold``, ``fill``), or runs a schedule (``fill``);
    `offramp.systems.way` makes of it the one way of decoding that engines carry out. A diffusion system skips (``skips``): from there come
    the decision points of its plan, once it is known where a denoiser has places and how its noise is scaled.

    Attributes:
        card: what it is.
        rule: score of each exit; ``None`` where nothing is scored, because drafts are verified or a schedule decides.
        head: head at each early exit, a `HeadSpec` or for language models an `offramp.exits.lm.LMHeadSpec`; ``None`` keeps the network's
            own.
        placement: where the exits go (a part of ``exits``), or ``None`` for the default; a language model then has none.
        recipe: how it is trained; ``None`` for post-hoc methods.
        calibrator: how thresholds are chosen from data. Of a language model, a `offramp.budget.risk_control.Procedure` for the target, or
            ``(scores [N, K], agreed [N, K]) -> K thresholds``.
        target: the budget the paper uses by default.
        reduction: what is left out inside a layer.
        draft: what proposes tokens.
        fill: what stands in for skipped blocks: of a language model a `offramp.policies.decoding.Fill`, or `Scheduled` where none are
            missing.
        threshold: least score to leave with where it is set and not chosen from data: a number, one for each exit, or one that moves
            (`Decaying`, `Adapting` of ``policies.decoding``). What a calibrator chooses takes the place of a number and of what decays.
        skips: of a diffusion system, what part of a denoiser is skipped, when, and what stands for it: a part of ``policies.skips``.
    """

    card: Card
    rule: Rule | None = None
    head: Any = None
    placement: Any = None
    recipe: Any = None
    calibrator: Any = None
    target: Any = None
    reduction: Any = None
    draft: Draft | None = None
    fill: Any = None
    threshold: Any = None
    skips: Any = None
