"""Ways of decoding as data: who decides that an exit's token stands, and what becomes of the blocks behind the exit.

*Plain* runs every block. *Verify* takes what the exit says as a draft that the whole model confirms. *Accept* lets a token leave where a
score reaches a threshold; a `Fill` says how the keys and values that it then misses behind the exit come to be. *Scheduled* runs fewer
blocks by position, so that none are ever missed. Engines carry them out; systems name them.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.policies.draft_stop import DraftStop, FixedLength
from offramp.policies.threshold import Confidence

# ---- what stands in for skipped blocks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatchUp:
    """Tokens that left wait with their states at the exit; one pass takes all of them through the blocks behind (FREE, Bae et al. 2023).

    Keys and values are then those of the full model for the text as written, and what it would have said is known for each: an audit
    for free.

    Attributes:
        cap: most tokens of a row that may wait before the pass is made, at least 1.
    """

    cap: int = 8

    def __post_init__(self) -> None:
        _check_cap(self.cap)


@dataclass(frozen=True)
class Recompute:
    """Every later pass runs the waiting tokens again from the first block on, as far as it goes (EE-LLM, Chen et al. 2023, section 4.1).

    Attributes:
        cap: most tokens of a row that may wait before a pass goes all the way, at least 1.
    """

    cap: int = 8

    def __post_init__(self) -> None:
        _check_cap(self.cap)


@dataclass(frozen=True)
class Copy:
    """Each block behind the exit makes its keys and values from the state at the exit (CALM, Schuster et al. 2022, section 3.3).

    Nothing waits. Cheap, and not what the full model would have: later tokens see states that never went through those blocks.
    """


Fill = CatchUp | Recompute | Copy


def _whole(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def _check_cap(cap: int) -> None:
    if not _whole(cap) or cap < 1:
        raise InvalidInput(f"cap must be a whole number, at least 1, got {cap!r}.")


# ---- thresholds that move ------------------------------------------------------------------------------------------------


@runtime_checkable
class Adapting(Protocol):
    """A threshold that follows what catching up shows, such as `offramp.budget.agreement.BetaMixture`. Immutable."""

    def threshold(self) -> float:
        """The threshold now; ``inf`` = no token leaves."""
        ...

    def seen(self, confidence: Tensor, agreed: Tensor) -> Adapting:
        """After tokens with these scores ``[N]`` have been looked at: whether the exit had said what the full model says (bool ``[N]``)."""
        ...


@dataclass(frozen=True)
class Decaying:
    """``0.9 tau + 0.1 tau exp(-temperature * t / T)`` at new token ``t`` of ``T``: stricter first (CALM, Schuster et al. 2022, equation 5).

    Early mistakes are carried through the whole text.

    Attributes:
        tau: the threshold at the first new token, at least 0.
        temperature: how fast it falls, at least 0; 0 = it stays.
    """

    tau: float
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau >= 0 and math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidInput(f"tau and temperature must be finite and at least 0, got {self.tau} and {self.temperature}.")

    def at(self, place: Tensor, length: Tensor) -> Tensor:
        """Thresholds (float32) of new tokens ``place`` (from 0) of texts of ``length`` new tokens, both int64 of one shape."""
        return self.tau * (0.9 + 0.1 * (-self.temperature * place.float() / length.float()).exp())


# ---- ways ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """Every block for every token."""


@dataclass(frozen=True)
class Verify:
    """Drafts from an exit, kept as far as the whole model agrees (Leviathan et al. 2023; Kangaroo, LayerSkip).

    Attributes:
        draft_length: most drafts in a round, at least 1.
        stop: whether a row makes another draft.
        sample_drafts: when sampling, draw the drafts too; else the most likely token is drafted and verified as a certain choice.
        exit_index: which exit.
    """

    draft_length: int = 4
    stop: DraftStop = field(default_factory=FixedLength)
    sample_drafts: bool = True
    exit_index: int = 0

    def __post_init__(self) -> None:
        if not _whole(self.draft_length) or self.draft_length < 1:
            raise InvalidInput(f"draft_length must be a whole number, at least 1, got {self.draft_length!r}.")
        if not _whole(self.exit_index):
            raise InvalidInput(f"exit_index must be a whole number, the first exit 0, got {self.exit_index!r}.")
        if not isinstance(self.stop, DraftStop):
            raise InvalidInput(f"stop must be a rule of offramp.policies.draft_stop such as BelowProbability(0.6), got {self.stop!r}.")


@dataclass(frozen=True)
class Accept:
    """A token leaves at the first exit whose score reaches its threshold; the text may differ from the full model's.

    Which tokens leave depends on the row alone: when others make the blocks behind an exit run, a row catches up with them and its choices
    stay.

    Attributes:
        threshold: least score: one for all exits that are used, or one for each; or `Decaying`, or `Adapting`. ``inf`` = none leaves.
            One that adapts is each row's own while a text is written; what it learned in all is given back.
        rule: scores an exit's answer, higher = surer. Rules that remember earlier exits start anew at every token.
            They read the exit's own logits, before a temperature or a repetition penalty.
        fill: how keys and values behind the exit come to be.
        exits: which exits are used, by number, ascending; ``None`` = all.
    """

    threshold: float | tuple[float, ...] | Decaying | Adapting = 0.9
    rule: Rule = field(default_factory=Confidence)
    fill: Fill = field(default_factory=CatchUp)
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = self.threshold
        numbers = given if isinstance(given, tuple) else (given,) if isinstance(given, int | float) else ()
        if any(math.isnan(t) for t in numbers) or (isinstance(given, tuple) and not given):
            raise InvalidInput(f"threshold must be a number, or one for each exit, got {given!r}.")
        if not isinstance(given, int | float | tuple | Decaying | Adapting):
            raise InvalidInput(f"threshold must be a number, a tuple of them, Decaying(...) or BetaMixture(...), got {given!r}.")
        if not isinstance(self.rule, Rule):
            raise InvalidInput(f"rule must be a rule of offramp.policies such as Confidence(), got {self.rule!r}.")
        if not isinstance(self.fill, CatchUp | Recompute | Copy):
            raise InvalidInput(f"fill must be CatchUp(...), Recompute(...) or Copy(), got {self.fill!r}.")
        if isinstance(self.fill, Copy) and isinstance(given, Adapting):
            raise InvalidInput("A threshold that adapts learns from passes over tokens that left: give fill=CatchUp() or Recompute().")
        used = self.exits
        if used is not None and (not used or list(used) != sorted(set(used)) or used[0] < 0):
            raise InvalidInput(f"exits must be ascending numbers of exits from 0 on, at least one, got {used}.")


@runtime_checkable
class DepthSchedule(Protocol):
    """Which blocks run at a new token, such as `offramp.budget.depth_schedule.LinearDepth`.

    What runs at a token must be a part of what ran at every earlier one, so that no key or value is missing.
    """

    @property
    def blocks(self) -> int:
        """Of the model."""
        ...

    def executed(self, place: int, length: int) -> tuple[int, ...]:
        """Numbers of the blocks that run for new token ``place`` (from 0) of ``length``, ascending."""
        ...


@dataclass(frozen=True)
class Scheduled:
    """Fewer blocks the further a text has come, the same for every row (SkipDecode, Del Corro et al. 2023).

    Attributes:
        schedule: which blocks run; prompts run those of the first new token.
    """

    schedule: DepthSchedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, DepthSchedule):
            raise InvalidInput(f"schedule must say which blocks run, such as LinearDepth(...), got {self.schedule!r}.")


Way = Plain | Verify | Accept | Scheduled

__all__ = [
    "Accept",
    "Adapting",
    "CatchUp",
    "Copy",
    "Decaying",
    "DepthSchedule",
    "Fill",
    "Plain",
    "Recompute",
    "Scheduled",
    "Verify",
    "Way",
]
