"""Where exits go, as data. A placement chooses among blocks, each with the share of the model's cost spent when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from offramp.core.errors import InvalidInput


class BlockLike(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def spent(self) -> float: ...


class Placement(Protocol):
    """Chooses module paths among the blocks of a model, in execution order."""

    def choose(self, blocks: Sequence[BlockLike]) -> list[str]: ...


@dataclass(frozen=True)
class Fractions:
    """Exits at the blocks that end nearest to these shares of the model's cost, each inside (0, 1)."""

    shares: tuple[float, ...]

    def choose(self, blocks: Sequence[BlockLike]) -> list[str]:
        if not self.shares or any(not 0 < s < 1 for s in self.shares):
            raise InvalidInput(f"Shares of the cost must lie inside (0, 1), got {self.shares}.")
        early = [b for b in blocks if b.spent < 1] or list(blocks)
        paths = [min(early, key=lambda b: abs(b.spent - share)).path for share in sorted(self.shares)]
        return list(dict.fromkeys(paths))


@dataclass(frozen=True)
class Evenly:
    """``count`` exits, evenly spaced by cost."""

    count: int = 3

    def choose(self, blocks: Sequence[BlockLike]) -> list[str]:
        if self.count < 1:
            raise InvalidInput(f"At least one exit is needed, got count={self.count}.")
        return Fractions(tuple((i + 1) / (self.count + 1) for i in range(self.count))).choose(blocks)


@dataclass(frozen=True)
class EveryBlock:
    """An exit after every block but the last, as BERT-style multi-exit models have."""

    def choose(self, blocks: Sequence[BlockLike]) -> list[str]:
        if len(blocks) < 2:
            raise InvalidInput(f"The model has {len(blocks)} block(s); an exit after every block but the last needs two.")
        return [b.path for b in blocks[:-1]]


@dataclass(frozen=True)
class AfterBlocks:
    """Exits after these shares of the blocks, each inside (0, 1), whatever the blocks cost: language models, whose blocks are alike.

    A share of a block is rounded, and no exit comes before the first block or after the last. ``(1 / 16,)`` is after 2 of 32 blocks and
    after the first of 8.
    """

    shares: tuple[float, ...]

    def choose(self, blocks: Sequence[BlockLike]) -> list[str]:
        if not self.shares or any(not 0 < s < 1 for s in self.shares):
            raise InvalidInput(f"Shares of the blocks must lie inside (0, 1), got {self.shares}.")
        if len(blocks) < 2:
            raise InvalidInput(f"The model has {len(blocks)} block(s); an exit before the last needs two.")
        return [blocks[after - 1].path for after in self.depths(len(blocks))]

    def depths(self, blocks: int) -> tuple[int, ...]:
        """After how many of ``blocks`` blocks the exits are, ascending."""
        return tuple(sorted({min(max(1, math.floor(s * blocks + 0.5)), blocks - 1) for s in self.shares}))
