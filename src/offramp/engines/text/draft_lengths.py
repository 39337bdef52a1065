"""Which draft length the next round has, where rounds of several lengths are at hand: host arithmetic, while the device works.

With acceptance ``c`` a round of ``k`` drafts writes ``1 + c + ... + c^k`` tokens in a time that was measured; the length with the most
tokens in a time is chosen (the planner's arithmetic, `offramp.engines.text.planner`, with what the texts at hand show in place of texts
seen before). Length 0 is plain decoding, so that texts on which the exit errs are not written more slowly for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from offramp.core.errors import InvalidInput


@dataclass(frozen=True)
class LengthChoice:
    """What is known before the first round.

    Attributes:
        lengths: draft lengths to choose from, ascending, each at least 0.
        times: what a round of each takes, > 0, any unit.
        acceptance: chance of a draft to be kept, to start from, in [0, 1].
        weight: drafts that the start counts for, > 0.
        memory: judged drafts over which what was seen fades, > 0; ``inf`` = never.
        patience: rounds without a draft until one is tried again, at least 1: with none nothing would be learned.
    """

    lengths: tuple[int, ...]
    times: tuple[float, ...]
    acceptance: float = 0.7
    weight: float = 10.0
    memory: float = 256.0
    patience: int = 32

    def __post_init__(self) -> None:
        ordered = bool(self.lengths) and list(self.lengths) == sorted(set(self.lengths)) and self.lengths[0] >= 0
        if not ordered or len(self.times) != len(self.lengths) or not all(t > 0 for t in self.times):
            raise InvalidInput(f"lengths must be ascending from 0 on, with a time > 0 each; got {self.lengths} and {self.times}.")
        if not (0 <= self.acceptance <= 1 and self.weight > 0 and self.memory > 0 and self.patience >= 1):
            raise InvalidInput(
                "acceptance must be in [0, 1], weight and memory > 0 and patience >= 1; got "
                f"{self.acceptance}, {self.weight}, {self.memory} and {self.patience}."
            )

    @classmethod
    def of(cls, times: Mapping[int, float], acceptance: float) -> LengthChoice:
        """From measured times of rounds by draft length."""
        ordered = sorted(times)
        return cls(tuple(ordered), tuple(times[k] for k in ordered), acceptance)

    def best(self, acceptance: float) -> int:
        """The length with the most tokens in a time; of equals, the shortest."""

        def rate(place: int) -> float:
            return sum(acceptance**j for j in range(self.lengths[place] + 1)) / self.times[place]

        return self.lengths[max(range(len(self.lengths)), key=rate)]

    def start(self) -> Chooser:
        """For the texts of one call."""
        return Chooser(self)


class Chooser:
    """Follows what rounds keep.

    Attributes:
        length: of the next round.
    """

    def __init__(self, known: LengthChoice) -> None:
        self.known, self.lengths = known, known.lengths
        self._judged, self._kept = known.weight, known.weight * known.acceptance
        self._before = (0, 0)
        self._idle = 0
        self.length = known.best(known.acceptance)

    @property
    def acceptance(self) -> float:
        """As it looks now."""
        return self._kept / self._judged

    def saw(self, judged: int, kept: int) -> int:
        """After a round. Returns the length of the next.

        Args:
            judged: drafts since the start that the full model has looked at: those up to and with the first rejected of each row.
            kept: those of them that it kept.
        """
        new, good = max(0, judged - self._before[0]), max(0, kept - self._before[1])
        self._before = (max(judged, self._before[0]), max(kept, self._before[1]))
        fading = math.exp(-new / self.known.memory)
        self._judged, self._kept = self._judged * fading + new, self._kept * fading + good
        self.length = self.known.best(self.acceptance)
        self._idle = 0 if self.length else self._idle + 1
        if self._idle > self.known.patience and len(self.lengths) > 1:
            self._idle, self.length = 0, self.lengths[1]
        return self.length


__all__ = ["Chooser", "LengthChoice"]
