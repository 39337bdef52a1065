"""Depth by position: fewer blocks the further a text has come, the same for every row (SkipDecode)."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from offramp.core.errors import BudgetInfeasible, InvalidInput


@dataclass(frozen=True)
class LinearDepth:
    """SkipDecode's schedule (Del Corro et al. 2023): blocks used fall linearly from ``most`` to ``least`` over the new tokens.

    The first ``warmup`` blocks always run and then the last ones; the gap between them is jumped. What runs at a position is a part of what
    ran at every earlier one, so no key or value is ever missing. Prompts use ``most`` blocks.

    Attributes:
        blocks: of the model.
        most: blocks at the first new token, from ``least`` to ``blocks``.
        least: blocks at the last, above ``warmup``.
        warmup: first blocks that always run, at least 0.
    """

    blocks: int
    most: int
    least: int
    warmup: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.least <= self.most <= self.blocks:
            raise InvalidInput(
                f"A schedule needs 0 <= warmup < least <= most <= blocks, got {self.warmup}, {self.least}, {self.most}, {self.blocks}."
            )

    def depth(self, place: int, length: int) -> int:
        """Blocks used for new token ``place`` (from 0) of ``length``.

        Raises:
            InvalidInput: the place is not one of them.
        """
        if not 0 <= place < length:
            raise InvalidInput(f"place must be from 0 to {length - 1}, got {place}.")
        share = place / (length - 1) if length > 1 else 0.0
        return math.floor(self.most - (self.most - self.least) * share + 0.5)

    def executed(self, place: int, length: int) -> tuple[int, ...]:
        """Numbers of the blocks that run for it, ascending."""
        upper = self.depth(place, length) - self.warmup
        return (*range(self.warmup), *range(self.blocks - upper, self.blocks))

    def mean_cost(self, length: int) -> float:
        """Blocks used over all blocks, on average over ``length`` new tokens."""
        return sum(self.depth(t, length) for t in range(length)) / (length * self.blocks)

    @classmethod
    def for_speedup(cls, blocks: int, speedup: float, length: int, *, warmup: int = 1, most: int | None = None) -> LinearDepth:
        """The schedule whose mean cost is at most ``1 / speedup`` and as near to it as can be.

        Of equals the steepest is taken: early tokens bear on all others. Heads and embeddings are not counted, so time falls by less.

        Args:
            blocks: of the model.
            speedup: blocks of the model over blocks used, >= 1.
            length: new tokens.
            warmup: see the class.
            most: blocks at the first token, if that is settled.

        Raises:
            InvalidInput: an argument is out of range.
            BudgetInfeasible: even the shallowest schedule costs more; carries the largest speed-up.
        """
        if blocks < 1 or not (math.isfinite(speedup) and speedup >= 1) or length < 1 or not 0 <= warmup < blocks:
            raise InvalidInput(
                f"blocks and length must be at least 1, speedup at least 1 and warmup from 0 to {blocks - 1}; got {blocks}, {length}, "
                f"{speedup} and {warmup}."
            )
        if most is not None and not warmup < most <= blocks:
            raise InvalidInput(f"most must be from {warmup + 1} to {blocks}, got {most}.")
        best: tuple[float, int, LinearDepth] | None = None
        lowest = math.inf
        for top in range(warmup + 1, blocks + 1) if most is None else [most]:
            made = [cls(blocks, top, least, warmup) for least in range(warmup + 1, top + 1)]
            within = bisect_right(made, 1 / speedup + 1e-12, key=lambda d: d.mean_cost(length))  # cost rises with the last depth
            lowest = min(lowest, made[0].mean_cost(length))
            if within:
                cost = made[within - 1].mean_cost(length)
                if best is None or (cost, top) > best[:2]:
                    best = (cost, top, made[within - 1])
        if best is None:
            raise BudgetInfeasible(
                f"With {warmup} warm-up blocks of {blocks}{'' if most is None else f' and {most} at the first token'}, no schedule over "
                f"{length} tokens is {speedup:g} times shallower than the model; the most is {1 / lowest:.3g}.",
                requested=speedup,
                best=1 / lowest,
                unit="blocks of the model over blocks used",
            )
        return best[2]
