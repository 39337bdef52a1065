"""When to stop drafting and let the full model verify.

A rule keeps named tensors for every row, is asked after each draft whether the row makes another, and is told after verification how many
drafts were kept. All of it is tensor code without a host synchronisation, so that a whole round may be captured as one graph.

**What a rule may look at.** The text follows the model's own law whatever the rule decides, if the decision to draft a position was made
without knowing what would be drafted there (once a draft exists it must be verified, or drafts would be selected) and without knowing the
random numbers that judge it. Within a round that is plain: before draft ``k + 1`` a rule sees drafts up to ``k``. Across rounds it is
not, since random numbers belong to positions. Drafts behind the first rejected one are thrown away, but their positions come again and use
the same numbers. A rule that remembered how confident a discarded draft was, or only how many were discarded, would know something of
what is about to be drafted, and the text would no longer follow the law. Hence the contract of `DraftStop.learn`: the state afterwards is a
function of drafts up to and with the first rejected one and of whether one was rejected. Then, by induction over positions, text and state
up to a position depend only on numbers of earlier positions, and on the rule's own, which come from another stream: given those, the
numbers of the position are untouched, and acceptance is exact there (`offramp.engines.text.sampling.accept`). Every rule here is tested
for it.

Shapes: ``B`` rows, ``K`` most drafts of a round, ``N`` bins.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.types import RuleState
from offramp.policies.acceptance import AcceptanceBins


class DraftStop(ABC):
    """Decides, row by row, whether another draft is worth making. Subclasses are frozen data.

    The first draft of a round is always made, and never more than the engine's draft length.
    """

    @property
    def random(self) -> bool:
        """Whether `go` reads ``noise``."""
        return False

    def begin(self, rows: int, most: int, device: torch.device) -> RuleState:
        """State before the first round.

        Args:
            rows: ``B``.
            most: drafts that a round can have, ``K``.
            device: where decisions are made.
        """
        return {}

    @abstractmethod
    def go(self, state: RuleState, made: int, probability: Tensor, noise: Tensor) -> tuple[Tensor, RuleState]:
        """Whether each row makes another draft.

        Called after every draft, the last possible one included, whose answer is not used.

        Args:
            state: of the rows.
            made: drafts of this round so far, from 1 to ``K``; a constant of the graph.
            probability: ``[B]`` of the newest draft, by the exit's softmax. Rows that have stopped give any number.
            noise: ``[B]`` uniform numbers in [0, 1), a fresh one for every decision.

        Returns:
            Bool ``[B]``, and the state.
        """

    def learn(self, state: RuleState, drafts: Tensor, kept: Tensor) -> RuleState:
        """State after verification.

        It may depend on the drafts up to and with the first rejected one, on ``kept`` and on ``kept < drafts``, but not on drafts
        behind it nor on how many there were; see the top of this file.

        Args:
            state: of the rows.
            drafts: int64 ``[B]`` made in this round; 0 for rows that took no part.
            kept: int64 ``[B]``, at most ``drafts``.
        """
        return state


@dataclass(frozen=True)
class FixedLength(DraftStop):
    """As many drafts as the engine's draft length, always."""

    def go(self, state: RuleState, made: int, probability: Tensor, noise: Tensor) -> tuple[Tensor, RuleState]:
        return torch.ones_like(probability, dtype=torch.bool), state


@dataclass(frozen=True)
class BelowProbability(DraftStop):
    """Stop after a draft that is less likely than ``eta`` (Kangaroo, Liu et al. 2024; there with at most 6 drafts).

    Attributes:
        eta: in [0, 1].
    """

    eta: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InvalidInput(f"eta must be in [0, 1], got {self.eta}.")

    def go(self, state: RuleState, made: int, probability: Tensor, noise: Tensor) -> tuple[Tensor, RuleState]:
        return probability >= self.eta, state


@dataclass(frozen=True)
class BetaThompson(DraftStop):
    """Thompson sampling of "one more draft pays" (EESD, Liu et al. 2024, Beta-TS).

    Before each further draft ``theta ~ Beta(a, b)``, go with probability ``theta``; after a round with ``r`` of ``m`` kept, ``a += r`` and
    ``b += 1`` if ``r < m``. As ``theta`` is drawn anew for every decision and used once, going has probability ``a / (a + b)`` exactly: one
    uniform number decides, and no Beta variate is made.

    Attributes:
        a: of the prior, > 0.
        b: of the prior, > 0.
    """

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.a) and math.isfinite(self.b) and self.a > 0 and self.b > 0):
            raise InvalidInput(f"a and b must be positive and finite, got {self.a} and {self.b}.")

    @property
    def random(self) -> bool:
        return True

    def begin(self, rows: int, most: int, device: torch.device) -> RuleState:
        return {"a": torch.full((rows,), self.a, device=device), "b": torch.full((rows,), self.b, device=device)}

    def go(self, state: RuleState, made: int, probability: Tensor, noise: Tensor) -> tuple[Tensor, RuleState]:
        return noise * (state["a"] + state["b"]) < state["a"], state

    def learn(self, state: RuleState, drafts: Tensor, kept: Tensor) -> RuleState:
        return {"a": state["a"] + kept, "b": state["b"] + (kept < drafts)}


class _Calibrating(DraftStop):
    """Remembers the confidence of a round's drafts until it is known which were kept, then moves the bins."""

    bins: AcceptanceBins

    def begin(self, rows: int, most: int, device: torch.device) -> RuleState:
        return {**self.bins.begin(rows, device), "confidence": torch.zeros(rows, most, device=device)}

    def _saw(self, state: RuleState, made: int, probability: Tensor) -> RuleState:
        place = torch.arange(state["confidence"].shape[1], device=probability.device) == made - 1
        return {**state, "confidence": torch.where(place, probability[:, None].to(state["confidence"].dtype), state["confidence"])}

    def learn(self, state: RuleState, drafts: Tensor, kept: Tensor) -> RuleState:
        place = torch.arange(state["confidence"].shape[1], device=drafts.device)
        looked = place < torch.minimum(drafts, kept + 1)[:, None]  # up to and with the first rejected
        after = self.bins.update(state, state["confidence"], looked, place < kept[:, None])
        return {**after, "confidence": torch.zeros_like(state["confidence"])}


@dataclass(frozen=True)
class CalibratedThompson(_Calibrating):
    """Thompson sampling with a distribution for each level of confidence (after EESD's Calibration-TS).

    The paper takes the prior's mean from the calibrated confidence of the draft, so that each token is decided by itself; how prior and
    evidence are joined there is not known to us. Here: every bin of confidence has its own Beta distribution, whose prior is the
    calibrated acceptance of that bin and which learns from the drafts in it. As in `BetaThompson` one uniform number decides.

    Attributes:
        bins: confidence to acceptance.
    """

    bins: AcceptanceBins = field(default_factory=AcceptanceBins.trusting)

    @property
    def random(self) -> bool:
        return True

    def go(self, state: RuleState, made: int, probability: Tensor, noise: Tensor) -> tuple[Tensor, RuleState]:
        return noise < self.bins.estimate(state, probability), self._saw(state, made, probability)


@dataclass(frozen=True)
class MarginalValue(_Calibrating):
    """Draft on while what the next draft is expected to bring is worth more than it costs.

    It brings a token if all drafts so far and itself are kept: the product of their calibrated acceptances times the row's mean acceptance,
    as the next one's confidence is not known yet. A token is worth the time it takes now: that of the best fixed draft length at the row's
    mean acceptance ``c``, ``min over k of (k draft + verify) / (1 + c + ... + c^k)``, at most ``plain`` if that is given. The mean is
    over drafts that were judged; the time that rounds really took would depend on discarded drafts (see the top of this file). Costs are a
    row's own: in a batch, the others may draft on anyway.

    Attributes:
        draft: time of one draft step, blocks before the exit and head, > 0. Any unit; only ratios count.
        verify: time of the rest of a round: the last step through the blocks before the exit, those behind it, the head, > 0.
        plain: time of a token of plain decoding, or ``None``.
        acceptance: mean acceptance to start from, in (0, 1); it counts for ten drafts.
        bins: confidence to acceptance.
    """

    draft: float
    verify: float
    plain: float | None = None
    acceptance: float = 0.7
    bins: AcceptanceBins = field(default_factory=AcceptanceBins.trusting)

    def __post_init__(self) -> None:
        given = [self.draft, self.verify, *([] if self.plain is None else [self.plain])]
        if not all(math.isfinite(v) and v > 0 for v in given):
            raise InvalidInput(f"draft, verify and plain must be positive finite times, got {given}.")
        if not 0 < self.acceptance < 1:
            raise InvalidInput(f"acceptance must be inside (0, 1), got {self.acceptance}.")

    def begin(self, rows: int, most: int, device: torch.device) -> RuleState:
        one = torch.ones(rows, device=device)
        return {**super().begin(rows, most, device), "reach": one, "kept": 10 * self.acceptance * one, "judged": 10 * one}

    def go(self, state: RuleState, made: int, probability: Tensor, noise: Tensor) -> tuple[Tensor, RuleState]:
        state = self._saw(state, made, probability)
        sure = self.bins.estimate(state, probability)
        reach = sure if made == 1 else state["reach"] * sure
        mean = state["kept"] / state["judged"]
        length = torch.arange(1, state["confidence"].shape[1] + 1, device=mean.device)
        tokens = 1 + (mean[:, None] ** length).cumsum(1)
        worth = ((length * self.draft + self.verify) / tokens).amin(1)
        if self.plain is not None:
            worth = worth.clamp(max=self.plain)
        return reach * mean * worth > self.draft, {**state, "reach": reach}

    def learn(self, state: RuleState, drafts: Tensor, kept: Tensor) -> RuleState:
        return {
            **super().learn(state, drafts, kept),
            "reach": torch.ones_like(state["reach"]),
            "kept": state["kept"] + kept,
            "judged": state["judged"] + torch.minimum(drafts, kept + 1),
        }


STOPS: dict[str, type] = {
    c.__name__: c for c in (FixedLength, BelowProbability, BetaThompson, CalibratedThompson, MarginalValue, AcceptanceBins)
}
"""Every rule (and what it is made of) by name: what a saved plan may name."""

__all__ = [*STOPS, "DraftStop", "STOPS"]
