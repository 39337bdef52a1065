"""Captured rounds that are kept, by what they were made for, so that texts which need the same share them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from offramp.engines.capture import Tuning
from offramp.engines.text.rounds import Captured, Rounds
from offramp.engines.text.sampling import Sampling
from offramp.language import LanguageModel


@dataclass(frozen=True)
class Need:
    """What captured rounds are made for: texts that need the same, or are shorter, share them.

    Attributes:
        rows: texts at a time, a power of two.
        slots: most tokens of a text, at most a quarter more than is needed from 1,024 on, or what the model's positions allow.
        lengths: of rounds, see `Rounds`.
        way: whose exit, rule and draws are used.
        sampling: what is chosen.
        ends: token ids that end a text.
    """

    rows: int
    slots: int
    lengths: tuple[int, ...]
    way: Captured
    sampling: Sampling
    ends: tuple[int, ...]


@dataclass
class Kept:
    """Rounds, what they were made for, and what each of their lengths takes here, if that was measured."""

    need: Need
    rounds: Rounds
    times: Mapping[int, float] | None = None


class KeptRounds:
    """Rounds of one model, the one unused for longest first; that one goes where there would be too many.

    Args:
        lm: from `offramp.attach`.
        compiled: see `Rounds`.
        most: to keep, at least 1. Each holds a cache for its rows and slots.

    Attributes:
        all: what is kept.
        made: how many have been made, those included that were made anew since weights had moved.
    """

    def __init__(self, lm: LanguageModel, compiled: bool | Tuning | None, most: int) -> None:
        self.lm, self.compiled, self.most = lm, compiled, most
        self.all: list[Kept] = []
        self.made = 0

    def serving(self, need: Need) -> Kept:
        """Rounds that serve a need, those made for longer texts included: attention reads no further than a text goes.

        Where lengths are wanted that those rounds lack, up to the same longest, they get them: the others are captured already.
        """
        fitting = [
            k
            for k in self.all
            if k.need.slots >= need.slots
            and replace(k.need, slots=need.slots, lengths=need.lengths) == need
            and k.need.lengths[-1] == need.lengths[-1]
        ]
        if fitting:
            found = min(fitting, key=lambda k: k.need.slots)
            self.all.remove(found)
            if found.rounds.renew():
                found.times = None
                self.made += 1
            if not set(need.lengths) <= set(found.need.lengths):
                found.rounds.allow(need.lengths)
                found.need, found.times = replace(found.need, lengths=found.rounds.lengths), None
        else:
            del self.all[: max(0, len(self.all) - self.most + 1)]
            found = Kept(need, self._make(need))
            self.made += 1
        self.all.append(found)
        return found

    def keep(self, ways: Collection[Captured]) -> None:
        """Let go of rounds that write in other ways."""
        self.all = [k for k in self.all if k.need.way in ways]

    def _make(self, need: Need) -> Rounds:
        return Rounds(
            self.lm,
            need.rows,
            need.slots,
            need.lengths,
            sampling=need.sampling,
            eos_token_id=need.ends,
            compiled=self.compiled,
            way=need.way,
        )


__all__ = ["Kept", "KeptRounds", "Need"]
