"""skip: fewer blocks the further a text has come, the same for every row (SkipDecode).

What runs at a token is a part of what ran at every one before it, so every key and value that is read was written; a schedule that breaks
this is refused when it does. Prompts run the blocks of the first new token, which their pass decides.

Shapes: ``B`` rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.text.rows import Rows
from offramp.policies.decoding import Scheduled


class Skipping:
    """A schedule at work on the rows of a batch, all of which stand at the same new token.

    Args:
        rows: nothing has run yet.
        mode: the schedule.
    """

    def __init__(self, rows: Rows, mode: Scheduled) -> None:
        if mode.schedule.blocks != len(rows.model):
            raise InvalidInput(f"The schedule is for {mode.schedule.blocks} blocks and the model has {len(rows.model)}.")
        self.rows, self.schedule = rows, mode.schedule
        self.length = int((rows.limit - rows.start)[0])
        self.before = set(range(len(rows.model)))

    def blocks(self, place: int) -> tuple[int, ...]:
        """Numbers of the blocks that run for new token ``place``, ascending; called for one place after the other.

        Raises:
            InvalidInput: none runs, or one that did not run before and so lacks keys and values.
        """
        found = self.schedule.executed(place, self.length)
        if not found or list(found) != sorted(set(found)) or not set(found) <= self.before:
            raise InvalidInput(
                f"At new token {place} of {self.length} a schedule must run one block at least, in ascending order, and only such as ran "
                f"for every token before; {self.schedule!r} gave {list(found)} after {sorted(self.before)}."
            )
        self.before = set(found)
        return found

    def first(self) -> Tensor:
        """Run the prompts. Returns the logits ``[B, V]`` of their last tokens."""
        return self.rows.prefill(ranges(self.blocks(0)))

    def write(self) -> None:
        """The second token and all after it, until every row is finished."""
        rows = self.rows
        place = 0
        while bool(rows.alive.any()):
            place += 1
            found, one = self.blocks(place), rows.alive.long()
            hidden = rows.run_ranges(ranges(found), rows.length - 1, one, 1)
            rows.append(rows.choose(rows.model.logits(hidden[:, 0]))[:, None], one, torch.full_like(one[:, None], len(found)))
            rows.result.deep_passes += 1


def ranges(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs ``(start, stop)``, the stop not in it."""
    out = []
    for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in run]
        out.append((numbers[0], numbers[-1] + 1))
    return out
